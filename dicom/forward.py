"""Side A's forwarder: from custody onto the link, in the order objects came.

An object crosses as start, parts, end. It is recorded as sent when the link has taken its last fragment;
nothing ever says that B has it, so what may have been lost with a link's buffers is sent again (B knows it by
its id), and a manifest repeats what was sent lately so that B can name what it never saw.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time

from relay.errors import SpoolError
from relay.link import Outlet
from relay.metrics import Metrics
from relay.records import (
    MAX_MANIFEST_ENTRIES,
    MAX_PART_BYTES,
    Manifest,
    ObjectEnd,
    ObjectPart,
    ObjectStart,
    Record,
)
from relay.spool import Entry, Spool
from relay.spool_reading import Reading

LINK = "link"
"""The one destination of side A's spool."""

DOUBT_BYTES = 256 << 20
"""What may be between A's mark "sent" and B's disk when a link's buffers or the machine's memory are lost:
the sockets' buffers (8 MiB), and what B has not yet synced (`receipt.MAX_UNSYNCED_BYTES`), with room to
spare."""

MANIFEST_SECONDS = 10.0
"""Between two manifests."""

log = logging.getLogger(__name__)


class Forwarder:
    """Sends what waits in the spool. `run` and `manifests` are tasks of the source."""

    def __init__(self, spool: Spool, outlet: Outlet, metrics: Metrics) -> None:
        self._spool = spool
        self._outlet = outlet
        self._metrics = metrics
        self._buffer = memoryview(bytearray(MAX_PART_BYTES))
        self._progress = asyncio.Event()
        self.sent = 0

    async def run(self) -> None:
        """Send objects until cancelled."""
        feed = self._spool.feed(LINK)
        while True:
            entry = await feed.next()
            try:
                await self._send(entry)
            except SpoolError as error:
                # The file is gone or unreadable: the next opening of the spool will say what became of it.
                log.error("object %s cannot be sent: %s", entry.id, error)
                self._spool.park(entry, LINK, "unreadable")
            self._progress.set()

    async def idle(self) -> None:
        """Wait until everything in custody has crossed."""
        while self._spool.stats().waiting[LINK]:
            self._progress.clear()
            await self._progress.wait()

    async def _send(self, entry: Entry) -> None:
        start = ObjectStart(
            id=entry.id,
            sop_class=entry.sop_class,
            sop_instance=entry.sop_instance,
            transfer_syntax=entry.transfer_syntax,
            size=entry.size,
            received_ns=entry.received_ns,
            parsed_ns=entry.parsed_ns,
            grade=entry.grade,
        )
        end = ObjectEnd(id=entry.id, sha256=entry.sha256)
        fresh = self._spool.fresh(entry)
        fd = self._spool.open_data(entry) if fresh is None else -1
        reading = Reading(fd, entry.data_offset, last=True)
        try:
            offset = 0
            while offset < entry.size:
                # Senders who wait for an answer go first, before each part.
                await asyncio.sleep(0)
                if fresh is None:
                    data = self._read(reading, entry, offset)
                else:
                    data = fresh[offset : offset + MAX_PART_BYTES]
                records: list[Record] = [ObjectPart(id=entry.id, offset=offset, data=data)]
                if offset == 0:
                    records.insert(0, start)
                offset += len(data)
                if offset == entry.size:
                    records.append(end)
                # Together, so that a small object is one fragment.
                await self._outlet.send(*records)
        finally:
            if fd >= 0:
                os.close(fd)
        self._spool.done(entry, LINK)
        self.sent += 1
        if entry.parsed_ns:
            self._metrics.latency("forward").record_ns(time.monotonic_ns() - entry.parsed_ns)

    def _read(self, reading: Reading, entry: Entry, offset: int) -> memoryview:
        """The next part of a data set, valid until the next call. A disk's fault is one object's, not the
        link's."""
        try:
            count = reading.read_into([self._buffer])
        except OSError as error:
            raise SpoolError(f"reading its file failed: {error.strerror}") from error
        if count == 0:
            raise SpoolError(f"the file of object {entry.id} is shorter than it was")
        return self._buffer[: min(count, entry.size - offset)]

    async def manifests(self) -> None:
        """Repeat what was sent lately, until cancelled."""
        while True:
            await asyncio.sleep(MANIFEST_SECONDS)
            entries = await self._spool.recent(LINK, MAX_MANIFEST_ENTRIES)
            if entries:
                await self._outlet.send(Manifest(entries=entries))
