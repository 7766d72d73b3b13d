"""The spool: durable custody of objects on one side of a lane. One worker process owns it, one loop uses it.

    begin ──▶ part ──▶ write… ──▶ commit ──▶ objects/<id>.<sha256><suffix> ──▶ feed ──▶ done
               ▲                    │                                              └──▶ park
    spares/<n>─┘                    └──▶ quarantine/<id>.<reason><suffix>, or abandon

A file is a header that the caller gives, then the data set; `sha256` is over the data set. The name carries
id and hash and the header everything else, so custody does not depend on `index.db`: a row may follow its
file by some milliseconds, and an index that is lost is rebuilt from the files when the spool is opened. For
a moment a small object of side A is in the journal and in memory only (`spool_journal`).

Never here: what is in a header or a data set.
"""

from __future__ import annotations

import asyncio
import os
import re
import sqlite3
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Self

from relay.errors import SpoolError
from relay.records import ManifestEntry
from relay.spool_bridge import Bridge
from relay.spool_committer import Recorded
from relay.spool_feed import FEED_PAGE, Feed
from relay.spool_files import Directory, is_reason, spool_error
from relay.spool_index import Buried, Index, Mark, Refused, index_error, make_entry
from relay.spool_ledger import Ledger
from relay.spool_part import Part, PartFile
from relay.spool_parts import Parts
from relay.spool_recovery import Judged, Recovery, open_or_rebuild
from relay.spool_release import MAX_DETAIL_CHARS, Releases
from relay.spool_room import Room
from relay.spool_schema import connect
from relay.spool_spares import Spares
from relay.spool_syncer import Intake
from relay.spool_types import (
    MAX_HEADER_BYTES,
    DeliveryState,
    Describe,
    Entry,
    Facts,
    Recovered,
    SpoolLimits,
    SpoolStats,
    Status,
)

__all__ = [
    "MAX_HEADER_BYTES",
    "DeliveryState",
    "Describe",
    "Entry",
    "Facts",
    "Feed",
    "Part",
    "Recovered",
    "Spool",
    "SpoolLimits",
    "SpoolStats",
    "Status",
]


_HAS = "SELECT 1 FROM objects WHERE id = ?1 UNION ALL SELECT 1 FROM tombstones WHERE id = ?1 LIMIT 1"
_KNOWN = "SELECT 1 FROM objects WHERE sop_instance = ? AND sha256 = ? LIMIT 1"
_LAYOUT = re.compile(r"[\x00-\x1f\x7f]+")


class Spool:
    """Objects in custody, in one directory, used from one event loop. Other processes: `spool_admin`."""

    recovered: Recovered
    """What opening found."""

    @classmethod
    async def open(
        cls,
        directory: str,
        limits: SpoolLimits,
        *,
        destinations: Sequence[str],
        suffix: str,
        describe: Describe,
        resumable: bool = False,
    ) -> Self:
        """Open the spool in `directory` (made if absent; never resolved), after recovering what a crash left.

        Args:
            destinations: Whom each new object is to be delivered to, at least one. A destination new to the
                spool gets nothing old; deliveries waiting for one that is not named are parked.
            suffix: Ends the names of whole files, as in ``.dcm``.
            describe: Reads a header; see `Describe`.
            resumable: Keep the parts of an earlier process for `resume` (side B) instead of removing them
                (side A, where an unfinished object was never acknowledged).

        Raises:
            SpoolError: The directory or its index cannot be used, or another process has it open.
        """
        opened = await asyncio.to_thread(Directory, directory, suffix)
        spool = cls(opened, limits, destinations, describe, resumable=resumable)
        try:
            await spool._start(resumable)
        except (SpoolError, asyncio.CancelledError):
            await spool.close()
            raise
        return spool

    def __init__(
        self,
        directory: Directory,
        limits: SpoolLimits,
        destinations: Sequence[str],
        describe: Describe,
        *,
        resumable: bool,
    ) -> None:
        """Not for use: see `open`."""
        if not destinations or len(set(destinations)) != len(destinations):
            directory.close()
            raise ValueError("a spool needs destinations, each once")
        self.recovered = Recovered()
        self._directory = directory
        self._limits = limits
        self._describe = describe
        self._room = Room(limits, directory.free_bytes, time.monotonic)
        self._ledger = Ledger(limits, self._room, tuple(destinations))
        self._spares = Spares(directory)
        self._parts = Parts(
            directory,
            self._room,
            self._spares,
            describe,
            resumable=resumable,
            in_memory=limits.journal_bytes > 0,
        )
        self._fresh: dict[int, bytearray] = {}
        """Files in custody that are not in ``objects/`` yet, by seq."""
        self._feeds = {name: Feed(name, read=self._read_page, tried=self.tried) for name in destinations}
        self._bridge = Bridge(directory, limits, self._spares, self)
        self._releases = Releases(directory, describe, self._bridge, self)
        self._release_task: asyncio.Task[None] | None = None
        self._reader: sqlite3.Connection | None = None
        self._seq = 0

    def __repr__(self) -> str:
        feeds = ", ".join(map(repr, self._feeds.values()))
        error = self._bridge.error
        return f"<Spool {self._room!r} {feeds}{f' failed: {error}' if error else ''}>"

    async def _start(self, resumable: bool) -> None:
        figures: Recorded | None = None

        def open_index() -> Index:
            nonlocal figures
            with ExitStack() as undo:
                index, rebuilt = open_or_rebuild(self._directory.index_path)
                undo.callback(index.close)
                unconfigured = index.serve(tuple(self._feeds))
                recovery = Recovery(self._directory, index, self._describe, self._spares, resumable=resumable)
                self.recovered = recovery.run(rebuilt=rebuilt, unconfigured=unconfigured)
                self._parts.resumable = recovery.parts
                self._seq = index.last_seq()
                figures = Recorded([], index.totals(), 0)
                undo.pop_all()
            return index

        await self._bridge.start(open_index)
        assert figures is not None
        self.recorded(figures)
        for name, feed in self._feeds.items():
            if not figures.totals.counts.get((name, DeliveryState.WAITING)):
                feed.caught_up()
        try:
            self._reader = connect(self._directory.index_path, create=False)
        except sqlite3.Error as error:
            raise self._index_error(error) from error
        self._releases.look.set()
        self._release_task = asyncio.create_task(self._releases.run(), name="spool-releases")

    def _index_error(self, error: sqlite3.Error) -> SpoolError:
        return index_error(error, self._directory.index_path, self._directory.free_bytes())

    # ---- taking objects in -------------------------------------------------------------------------------

    def admit(self, size: int = 0) -> None:
        """Check that an object of `size` bytes (0: unknown) could be taken in now. Costs microseconds.

        Raises:
            SpoolFull: `bound` is ``bytes``, ``objects``, ``disk`` or ``object`` (`size` is over the limit of
                one object).
        """
        self._bridge.check()
        self._room.check_new(size)

    def begin(self, header: bytes, *, id: str | None = None, size: int = 0, at_once: bool = False) -> Part:
        """Begin an object with `header`; a part of the same id that is there starts anew.

        Args:
            header: First bytes of the file, at most `MAX_HEADER_BYTES`.
            id: 32 lower hex digits; a random one if None.
            size: Bytes of the data set if known, for `admit`.
            at_once: All of it is here already. A part that does not come to its end need not be there for
                `resume`, which saves a rename.

        Raises:
            SpoolFull: As `admit`.
            SpoolError: An object of this id is being written through another Part.
        """
        self._bridge.check()
        return self._parts.begin(header, id, size, at_once=at_once)

    def resume(self) -> Sequence[tuple[str, int]]:
        """Parts of an earlier process: id and bytes of data set present. Empty unless `resumable`."""
        return tuple(self._parts.resumable.items())

    def reopen(self, id: str) -> Part:
        """Continue a part that `resume` named; `Part.size` is where the next byte goes.

        Hashes what is there, which takes 1 s per GB or so, in the loop's thread.

        Raises:
            SpoolError: No such part, or its header cannot be described.
        """
        self._bridge.check()
        return self._parts.reopen(id)

    async def commit(self, part: Part, facts: Facts) -> Entry:
        """Put a whole object into custody; durable when this returns (side A).

        Where the journal has a place for it, that is one write and one fdatasync, and its file follows; else
        the order is write, fsync of the file, rename into ``objects/``, fsync of the directory. Commits that
        wait at the same time share one pass. Then the object is in every feed.

        Cancelling does not undo the commit.

        Raises:
            SpoolFull: The disk is full. The part is gone.
            SpoolError: The disk failed. The part is gone and the object is not in custody.
        """
        intake = self._take_over(part, facts)
        intake.committing = True
        entry = intake.entry
        if intake.data is not None:
            self._fresh[entry.seq] = intake.data
        await self._bridge.commit(intake)
        return entry

    def _take_over(self, part: Part, facts: Facts) -> Intake:
        """Make an entry of a whole part, and the work of making it durable."""
        self._bridge.check()
        if facts.data_offset != part.data_offset:
            raise ValueError(f"the header has {part.data_offset} bytes, not {facts.data_offset}")
        if not part.size:
            raise SpoolError(f"object {part.id} has no data set")
        if part.given_id and self.has(part.id):
            raise SpoolError(f"object {part.id} is in custody already")
        part.stamp(time.time_ns())
        entry = self._make_entry(part.id, part.sha256, part.size, facts)
        taken = self._parts.take(part)
        file, data = (taken, None) if isinstance(taken, PartFile) else (None, taken)
        return Intake(entry, self._directory.object_name(part.id, entry.sha256), file, data)

    def _make_entry(self, id: str, sha256: str, size: int, facts: Facts) -> Entry:
        self._seq += 1
        self._room.pending_objects += 1
        self._room.pending_bytes += size + facts.data_offset
        return make_entry(self._seq, id, sha256, size, facts, time.time())

    def seal(self, part: Part, facts: Facts, sha256: str | None = None) -> Entry:
        """Put a whole object into custody so that the end of this process loses nothing (side B).

        Renames at once, in the loop's thread, and hands the object to every feed; fsync and index row follow
        in the next pass. The end of the machine before that may lose it: see `durable`.

        Raises:
            SpoolError: The data set's hash is not `sha256` (the part is still there: quarantine or abandon
                it), or the disk failed.
        """
        part.file()
        if sha256 is not None and part.sha256 != sha256:
            raise SpoolError(f"object {part.id}: the data set is not the one its hash tells of")
        intake = self._take_over(part, facts)
        self._seal(intake)
        return intake.entry

    def _seal(self, intake: Intake) -> None:
        """Move a whole file into ``objects/`` and let the rest follow."""
        entry = intake.entry
        assert intake.file is not None
        try:
            intake.rename(self._directory)
        except OSError as error:
            os.close(intake.file.fd)
            self.lost(entry)
            raise spool_error(error, f"sealing object {entry.id}") from error
        self._bridge.sync(intake)
        self.committed(entry)

    def let_in(self, id: str, name: str, folder: int, fd: int, judged: Judged) -> None:
        """For `Releases`: seal a file that is no part."""
        entry = self._make_entry(id, judged.sha256, judged.size, judged.facts)
        file = PartFile(name, folder, fd)
        self._seal(Intake(entry, self._directory.object_name(id, judged.sha256), file))

    async def durable(self, entry: Entry) -> None:
        """Wait until a sealed object would survive a power failure.

        Raises:
            SpoolError: It would not: fsync failed. The file is left for the next opening to judge.
        """
        await self._bridge.durable(entry)

    def quarantine(self, part: Part, reason: str, detail: str = "") -> None:
        """Keep a refused object for a person, instead of `commit`.

        Args:
            reason: A fixed word of 1 to 32 of a-z, 0-9 and inner hyphens; it becomes part of the name.
            detail: One line that a person understands, at most 500 characters, without patient data.

        Raises:
            SpoolFull: The quarantine is full (``quarantine``); the part is still there.
        """
        if not is_reason(reason):
            raise ValueError(f"{reason!r} is not 1 to 32 of a-z, 0-9 and inner hyphens")
        self._bridge.check()
        size = part.data_offset + part.size
        file = part.file()
        self._ledger.check_quarantine(size)
        name = self._directory.quarantine_name(part.id, reason)
        try:
            os.rename(file.name, name, src_dir_fd=file.folder, dst_dir_fd=self._directory.quarantine)
        except OSError as error:
            raise spool_error(error, f"putting object {part.id} into quarantine") from error
        self._parts.close(part)
        detail = _LAYOUT.sub(" ", detail)[:MAX_DETAIL_CHARS]
        row = Refused(part.id, name, reason, detail, size, time.time())
        self._ledger.put(row)
        self._bridge.put(row)

    # ---- duplicates --------------------------------------------------------------------------------------

    def has(self, id: str) -> bool:
        """Whether an object of this id is in custody, or was (see `SpoolLimits.max_tombstones`)."""
        return self._ledger.has(id) or self._lookup(_HAS, id)

    def _lookup(self, query: str, *values: object) -> bool:
        self._bridge.check()
        assert self._reader is not None
        try:
            return self._reader.execute(query, values).fetchone() is not None
        except sqlite3.Error as error:
            raise self._index_error(error) from error

    def known(self, sop_instance: str, sha256: str) -> bool:
        """Whether this instance with exactly this data set is in custody, delivered or not.

        What retention has removed is not: whoever sends it again wants it delivered again.
        """
        return self._ledger.known(sop_instance, sha256) or self._lookup(
            _KNOWN, sop_instance, bytes.fromhex(sha256)
        )

    def bury(self, part: Part, sop_instance: str) -> None:
        """Remove a whole part that is `known`, and remember that its id needs no coming again (see `has`)."""
        self._seq += 1
        row = Buried(self._seq, part.id, sop_instance, part.sha256)
        part.abandon()
        self._ledger.put(row)
        self._bridge.put(row)

    # ---- handing objects out -----------------------------------------------------------------------------

    def feed(self, destination: str) -> Feed:
        """The feed of one configured destination; always the same one.

        Raises:
            SpoolError: Not a destination of this spool.
        """
        try:
            return self._feeds[destination]
        except KeyError:
            raise SpoolError(f"{destination!r} is no destination of this spool") from None

    def open_data(self, entry: Entry) -> int:
        """A descriptor for reading the file, positioned at the data set. The caller closes it.

        Raises:
            SpoolError: The object is not in custody any more.
        """
        if (data := self._fresh.get(entry.seq)) is not None:
            fd = os.memfd_create("object", os.MFD_CLOEXEC)
            os.write(fd, data)
            os.lseek(fd, entry.data_offset, os.SEEK_SET)
            return fd
        try:
            name = self._directory.object_name(entry.id, entry.sha256)
            fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._directory.objects)
        except OSError as error:
            raise spool_error(error, f"reading object {entry.id}") from error
        os.lseek(fd, entry.data_offset, os.SEEK_SET)
        return fd

    def fresh(self, entry: Entry) -> memoryview | None:
        """The data set, where it is in memory still: an object that has just come. Else see `open_data`."""
        data = self._fresh.get(entry.seq)
        return None if data is None else memoryview(data)[entry.data_offset :].toreadonly()

    def done(self, entry: Entry, destination: str, status: Status = 0) -> None:
        """Record a delivery; written with the next group, some milliseconds later."""
        self._settle(entry, Mark(entry.seq, destination, DeliveryState.DONE, status, time.time()))

    def park(self, entry: Entry, destination: str, status: Status) -> None:
        """Record that delivery is refused for good; an operator may send it again."""
        self._settle(entry, Mark(entry.seq, destination, DeliveryState.PARKED, status, time.time()))

    def _settle(self, entry: Entry, mark: Mark) -> None:
        self.feed(mark.destination).settle(entry.seq)
        self._ledger.put(mark)
        self._bridge.put(mark)

    def tried(self, entry: Entry, destination: str, status: Status) -> Entry:
        """Record a failed attempt on an object that stays held; the entry with one attempt more."""
        self._bridge.put(Mark(entry.seq, destination, DeliveryState.WAITING, status, time.time()))
        return replace(entry, attempts=entry.attempts + 1)

    def _read_page(self, feed: Feed, after: int, generation: int) -> None:
        destination = feed.destination
        self._bridge.post_job(
            lambda index: index.waiting(destination, after, FEED_PAGE),
            lambda page: feed.loaded(generation, page),
        )

    async def doubt(self, destination: str, byte_count: int) -> int:
        """Set the newest done deliveries that cover `byte_count` bytes of data set back to waiting.

        For a link whose buffers were lost: what had entered it last may not have left it. Returns how many.
        """
        feed = self.feed(destination)
        count: int = await self._bridge.job(lambda index: index.doubt(destination, byte_count))
        feed.rewind()
        return count

    async def unpark(self, sop_instance: str, sha256: str) -> int:
        """Set parked deliveries of an object that is sent again back to waiting. Returns how many."""
        count: int = await self._bridge.job(lambda index: index.unpark(sop_instance, bytes.fromhex(sha256)))
        if count:
            for feed in self._feeds.values():
                feed.rewind()
        return count

    async def recent(self, destination: str, limit: int) -> tuple[ManifestEntry, ...]:
        """What was delivered last, newest first, as far as it is still in custody."""
        self.feed(destination)
        entries: tuple[ManifestEntry, ...] = await self._bridge.job(
            lambda index: index.recent(destination, limit)
        )
        return entries

    # ---- housekeeping ------------------------------------------------------------------------------------

    def stats(self) -> SpoolStats:
        """The fill, at no cost."""
        return self._ledger.stats()

    @property
    def full(self) -> str | None:
        """The bound that leaves no place for a new object now, as in `SpoolFull`; None if there is room."""
        return self._room.full

    async def sweep(self) -> int:
        """Remove delivered objects whose retention is over, oldest first; returns how many. Call each minute.

        What presses on the bounds is removed without being asked for.
        """
        before = time.time() - self._limits.retention_seconds
        removed = 0
        while count := await self._bridge.job(lambda index: self._bridge.committer.remove(index, before)):
            removed += count
        return removed

    async def failed(self) -> None:
        """Wait until the spool cannot go on, as a task beside the worker's others.

        Raises:
            SpoolError: Always: why the committer thread ended.
        """
        await self._bridge.failed.wait()
        self._bridge.check()

    async def close(self) -> None:
        """Finish what waits, write all rows, close. Parts that are open stay as they are."""
        if self._release_task is not None:
            self._release_task.cancel()
            await asyncio.gather(self._release_task, return_exceptions=True)
        await self._bridge.stop()
        if self._reader is not None:
            self._reader.close()
            self._reader = None
        self._parts.close_all()
        self._spares.close()
        self._directory.close()

    # ---- for the bridge ----------------------------------------------------------------------------------

    def committed(self, entry: Entry) -> None:
        """An object is in custody."""
        self._ledger.add(entry)
        for feed in self._feeds.values():
            feed.offer(entry)

    def settled(self, entry: Entry) -> None:
        """An object's file is durable."""
        self._fresh.pop(entry.seq, None)

    def lost(self, entry: Entry) -> None:
        """An object did not come into custody."""
        self._fresh.pop(entry.seq, None)
        self._room.pending_objects -= 1
        self._room.pending_bytes -= entry.size + entry.data_offset

    def recorded(self, news: Recorded) -> None:
        """Rows are written."""
        self._ledger.recorded(news)

    def changed(self) -> None:
        """An operator sent something again, released something, or gave it up."""
        for feed in self._feeds.values():
            feed.rewind()
        self._releases.look.set()

    def broken(self, error: SpoolError) -> None:
        """Nothing works any more."""
        for feed in self._feeds.values():
            feed.fail(error)
