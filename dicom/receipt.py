"""Side B's receipt: from records back to an object in B's own custody.

    ObjectStart ─▶ part ◀─ ObjectPart…     ObjectEnd ─▶ hash ─▶ examine ─▶ seal ─▶ every destination's feed

Nothing is believed for having come over the link: sizes, order and hash are checked here, and the data set is
walked again by this side's own process. A record is forgotten by the link only after `deliver` is done with
it, and by then its bytes are in a file, so a sink that dies goes on where it was. While B's spool is full,
`deliver` waits, and with it the link.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from dicom import part10
from dicom.faults import Refused
from dicom.spooling import Examiner, describe
from dicom.walk import Outline
from relay.errors import SpoolError, SpoolFull
from relay.link import Arrival
from relay.metrics import Metrics
from relay.process import within
from relay.records import MAX_MANIFEST_ENTRIES, MAX_PART_BYTES, Manifest, ObjectEnd, ObjectPart, ObjectStart
from relay.spool import MAX_HEADER_BYTES, Entry, Facts, Part, Spool

MAX_UNSYNCED_BYTES = 64 << 20
"""Bytes sealed but not yet on the disk: what a power failure takes, A sends again (`forward.DOUBT_BYTES`)."""

FULL_RETRY_SECONDS = 1.0
"""While the spool is full: how often to look again, beside at each delivery."""

MAX_UNSYNCED_OBJECTS = 1024
"""The same bound for small objects, which cost a sync each."""

MAX_NAMED_MISSING = 100
"""Objects named one by one as never seen; the rest are only counted."""

MAX_REFUSED_IDS = 4 * MAX_MANIFEST_ENTRIES
"""Refused objects remembered, so that a manifest does not call them missing. It names what was sent last."""

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Open:
    """The object that is arriving. `start` is None when it began before this process did."""

    part: Part
    start: ObjectStart | None


class Receipt:
    """Takes the object records of a lane. Only one object is on the link at a time."""

    def __init__(self, spool: Spool, examiner: Examiner, metrics: Metrics) -> None:
        self._spool = spool
        self._examiner = examiner
        self._metrics = metrics
        self._resumable = dict(spool.resume())
        self._open: _Open | None = None
        self._unsynced: deque[Entry] = deque()
        self._unsynced_bytes = 0
        self.room = asyncio.Event()
        """To be set when a delivery may have made room."""
        self.received = 0
        self.duplicates = 0
        self.refused: dict[str, int] = {}
        self._refused_ids: dict[str, None] = {}
        self.missing: set[str] = set()
        self.full = False

    def __repr__(self) -> str:
        return f"<Receipt {self._open} received={self.received} missing={len(self.missing)}>"

    def deliver(self, arrival: Arrival) -> Awaitable[None] | None:
        """Take one record; `link.Deliver`."""
        record = arrival.record
        if isinstance(record, ObjectPart):
            return self._part(record)
        if isinstance(record, ObjectStart):
            return self._start(record, arrival)
        if isinstance(record, ObjectEnd):
            return self._end(record)
        if isinstance(record, Manifest):
            self._compare(record)
        return None

    def _start(self, start: ObjectStart, arrival: Arrival) -> Awaitable[None] | None:
        if self._open is not None:
            # A was restarted in the middle of an object and begins it, or another, anew.
            self._give_up("A began anew")
        self._resumable.pop(start.id, None)
        self.missing.discard(start.id)
        if self._spool.has(start.id):
            self._count_duplicate()
            return None
        if start.parsed_ns:
            self._metrics.latency("link").record_ns(arrival.left_ns - arrival.entered_ns)
        at_once = arrival.held and start.size <= MAX_PART_BYTES
        return self._retrying(lambda: self._begin(start, at_once))

    def _begin(self, start: ObjectStart, at_once: bool) -> None:
        head = part10.header(start.sop_class, start.sop_instance, start.transfer_syntax)
        self._open = _Open(self._spool.begin(head, id=start.id, size=start.size, at_once=at_once), start)

    def _part(self, record: ObjectPart) -> Awaitable[None] | None:
        if record.id in self._resumable:
            return self._resuming(record.id, lambda: self._part(record))
        current = self._open
        if current is None or current.part.id != record.id:
            # Of an object that is known already, or was given up.
            return None
        part = current.part
        if record.offset + len(record.data) <= part.size:
            return None
        if record.offset > part.size:
            self._give_up(f"a part begins at byte {record.offset}, {part.size} are here")
            return None
        # A sink that is killed within a long write leaves some of its pages; the link has the whole again.
        missing = memoryview(record.data)[part.size - record.offset :]
        return self._retrying(lambda: part.write([missing]))

    def _end(self, end: ObjectEnd) -> Awaitable[None] | None:
        if end.id in self._resumable:
            return self._resuming(end.id, lambda: self._end(end))
        current = self._open
        if current is None or current.part.id != end.id:
            return None
        self._open = None
        return self._accept(current, end)

    async def _resuming(self, id: str, then: Callable[[], Awaitable[None] | None]) -> None:
        """Go on with the object that an earlier process had begun."""

        def reopen() -> None:
            self._open = _Open(self._spool.reopen(id), None)
            del self._resumable[id]

        actions: tuple[Callable[[], Awaitable[None] | None], ...] = (lambda: self._retrying(reopen), then)
        for action in actions:
            waiting = action()
            if waiting is not None:
                await waiting

    def _accept(self, current: _Open, end: ObjectEnd) -> Awaitable[None] | None:
        part, start = current.part, current.start
        size = part.size if start is None else start.size
        if part.size != size or part.sha256 != end.sha256:
            self._refuse(part, "integrity", "its size or SHA-256 is not what side A announced")
            return None
        facts = self._facts(part, start)
        try:
            outline = self._examiner.examined(part, facts.transfer_syntax)
        except Refused as refusal:
            self._refuse(part, refusal.reason, str(refusal))
            return None
        return self._examine_long(part, facts) if outline is None else self._judge(part, facts, outline)

    async def _examine_long(self, part: Part, facts: Facts) -> None:
        try:
            outline = await self._examiner.examine(part, facts.transfer_syntax)
        except Refused as refusal:
            self._refuse(part, refusal.reason, str(refusal))
            return
        waiting = self._judge(part, facts, outline)
        if waiting is not None:
            await waiting

    def _judge(self, part: Part, facts: Facts, outline: Outline) -> Awaitable[None] | None:
        """Take a sound object into custody, unless it is known; wait where too much is not synced."""
        if (outline.sop_class, outline.sop_instance) != (
            facts.sop_class,
            facts.sop_instance,
        ) or outline.edits:
            self._refuse(part, "mismatch", "the data set is not the object that side A announced")
            return None
        if self._spool.known(facts.sop_instance, part.sha256):
            log.info("object %s is in custody already, under another id", part.id)
            self._spool.bury(part, facts.sop_instance)
            self._count_duplicate()
            return self._unpark(facts.sop_instance, part.sha256) if self._any_parked() else None
        entry = self._spool.seal(part, facts)
        self.received += 1
        self._metrics.count("objects_received", "Objects that crossed the link")
        self._unsynced.append(entry)
        self._unsynced_bytes += entry.size
        return self._bound_unsynced() if self._over_bound() else None

    def _any_parked(self) -> bool:
        return any(self._spool.stats().parked.values())

    async def _unpark(self, sop_instance: str, sha256: str) -> None:
        """A sender that sends a parked object again hopes that its destination was mended."""
        count = await self._spool.unpark(sop_instance, sha256)
        if count:
            log.info("it was parked, and %d deliveries of it wait again", count)

    def _facts(self, part: Part, start: ObjectStart | None) -> Facts:
        if start is None:
            # It began before this process did: what is known of it is in the head that was written then.
            return describe(os.pread(part.fileno(), MAX_HEADER_BYTES, 0))
        return Facts(
            data_offset=part.data_offset,
            sop_class=start.sop_class,
            sop_instance=start.sop_instance,
            transfer_syntax=start.transfer_syntax,
            grade=start.grade,
            received_ns=start.received_ns,
            parsed_ns=start.parsed_ns,
        )

    def _over_bound(self) -> bool:
        return self._unsynced_bytes > MAX_UNSYNCED_BYTES or len(self._unsynced) > MAX_UNSYNCED_OBJECTS

    async def _bound_unsynced(self) -> None:
        """Let at most `MAX_UNSYNCED_BYTES` be where a power failure takes them."""
        while self._over_bound():
            oldest = self._unsynced.popleft()
            await self._spool.durable(oldest)
            self._unsynced_bytes -= oldest.size

    def _compare(self, manifest: Manifest) -> None:
        """Name what A sent and B never saw. The manifest travels behind the objects it lists."""
        now_missing = [
            entry.id
            for entry in manifest.entries
            if entry.id not in self._refused_ids and not self._spool.has(entry.id)
        ]
        for id in now_missing:
            if id not in self.missing and len(self.missing) < MAX_NAMED_MISSING:
                self.missing.add(id)
                log.error("object %s was sent by side A and never arrived; send it again there", id)
        self._metrics.gauge("objects_missing", "Objects that side A sent and B never saw", len(now_missing))

    def _retrying(self, action: Callable[[], None]) -> Awaitable[None] | None:
        """Do `action`, at once where there is room for it; else the link waits until there is."""
        return None if self._done(action) else self._until_done(action)

    async def _until_done(self, action: Callable[[], None]) -> None:
        while True:
            self.room.clear()
            await within(FULL_RETRY_SECONDS, self.room.wait())
            if self._done(action):
                return

    def _done(self, action: Callable[[], None]) -> bool:
        """Whether `action` is over: done, or of an object that never fits; False while there is no room."""
        try:
            action()
            self.full = False
        except SpoolFull as full:
            if full.bound == "object":
                self._count_refusal("too-large")
                self._give_up(str(full))
                return True
            if not self.full:
                log.warning("the link waits: %s", full)
            self.full = True
            return False
        return True

    def _give_up(self, why: str) -> None:
        if self._open is not None:
            log.warning("object %s is given up unfinished: %s", self._open.part.id, why)
            self._open.part.abandon()
            self._open = None

    def _refuse(self, part: Part, reason: str, detail: str) -> None:
        """Side A let pass what must not: keep it here for a person."""
        self._count_refusal(reason)
        self._refused_ids[part.id] = None
        if len(self._refused_ids) > MAX_REFUSED_IDS:
            del self._refused_ids[next(iter(self._refused_ids))]
        log.error("object %s from the link is in quarantine: %s", part.id, detail)
        try:
            self._spool.quarantine(part, reason, detail)
        except SpoolError as error:
            log.error("object %s is not kept: %s", part.id, error)
            part.abandon()

    def _count_duplicate(self) -> None:
        self.duplicates += 1
        self._metrics.count("duplicates", "Objects that were in custody already")

    def _count_refusal(self, reason: str) -> None:
        self.refused[reason] = self.refused.get(reason, 0) + 1
        self._metrics.count("refused", "Objects refused", reason=reason)
