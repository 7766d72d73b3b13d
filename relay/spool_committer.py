"""The committer: the one thread that waits for the disk, so that the loop never does.

    loop ──put──▶ inbox ──▶ fsync files · rename · fsync directory (one for the group) ──post──▶ loop
                        ├─▶ rows of many groups in one transaction, some milliseconds later ──post──▶ loop
                        └─▶ spare files, while nobody waits

Files come before rows: a row says nothing that its file does not prove, so it may wait until nobody waits for
an fsync. Everything else that needs the index (a page, a sweep) is a job, run after the rows before it.

Never here: what the loop knows; the two sides meet only in the inbox, in the spares and in `post`.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from relay.errors import SpoolError
from relay.spool_files import Directory, discard, spool_error, start_writeback
from relay.spool_inbox import Inbox
from relay.spool_index import Admitted, Index, Mark, Row, Totals
from relay.spool_part import PartFile
from relay.spool_spares import Spares
from relay.spool_types import Entry, SpoolLimits

MAX_GROUP = 128
"""Objects in one pass: their fsyncs take about 50 ms, which the first of them waits."""

MAX_SEAL_DELAY_SECONDS = 0.05
"""How long a sealed file waits for others to be synced with it. It has been handed on already; until then a
power failure takes it, and side A sends it again."""

MAX_ROW_DELAY_SECONDS = 0.05
"""How long a row waits for others. After a kill what is younger is found by recovery or delivered twice."""

MAX_UNRECORDED = 65_536
"""Rows that may wait while the index cannot be written (disk full); beyond, the spool ends."""

RETRY_SECONDS = 0.25
"""Between two attempts to write rows to a full disk."""

LOCK_SECONDS = 0.05
"""How long rows wait for another process's transaction at once, while objects may wait for an fsync."""

POLL_SECONDS = 1.0
"""Between two looks at what other processes changed, and at the free disk."""

EVICT_BATCH = 64
"""Delivered objects removed at once, some milliseconds, for those that wait for an fsync meanwhile."""

DISK_MARGIN = 256 * 2**20
"""Bytes above `min_free_disk_bytes` at which delivered objects are removed, before anything is refused."""

log = logging.getLogger(__name__)

_TRY_AGAIN = frozenset({sqlite3.SQLITE_FULL, sqlite3.SQLITE_BUSY})


@dataclass(slots=True)
class Intake:
    """A file to make durable. `part` is where it is if it is still to be renamed (commit)."""

    entry: Entry
    fd: int
    name: str
    part: PartFile | None
    error: SpoolError | None = None


@dataclass(slots=True)
class Job:
    """Work on the index; `done` is called in the loop with its result."""

    work: Callable[[Index], Any]
    done: Callable[[Any], None]


@dataclass(frozen=True, slots=True)
class Stop:
    """The end of what is put."""


@dataclass(frozen=True, slots=True)
class Synced:
    """News for the loop: these files are durable, or have their `error`."""

    intakes: list[Intake]


@dataclass(frozen=True, slots=True)
class Recorded:
    """News for the loop: these rows are written; the figures after it, and what was removed for room."""

    rows: list[Row]
    totals: Totals
    evicted: int
    quarantine_dropped: int


@dataclass(frozen=True, slots=True)
class Changed:
    """News for the loop: another process changed the index."""


@dataclass(frozen=True, slots=True)
class Ended:
    """News for the loop: the committer ended, in order if `error` is None."""

    error: SpoolError | None


News = Synced | Recorded | Changed | Ended


def _due(item: Intake | Row | Job) -> float:
    """When the committer has to look at `item`. Somebody waits for a commit and for a job, nobody else."""
    if type(item) is Job or (type(item) is Intake and item.part is not None):
        return 0.0
    return time.monotonic() + min(MAX_SEAL_DELAY_SECONDS, MAX_ROW_DELAY_SECONDS)


class Committer:
    """The thread and its inbox. `post` is called from it and hands a callable to the loop."""

    def __init__(
        self,
        directory: Directory,
        limits: SpoolLimits,
        spares: Spares,
        *,
        tell: Callable[[News], None],
        post: Callable[[Callable[[], None]], None],
    ) -> None:
        self._directory = directory
        self._limits = limits
        self._spares = spares
        self._tell = tell
        self._post = post
        self._inbox: Inbox[Intake | Row | Job | Stop] = Inbox()
        self._intakes: list[Intake] = []
        self._sync_at = 0.0
        self._rows: list[Row] = []
        self._jobs: list[Job] = []
        self._rows_since = 0.0
        self._retry_at = 0.0
        self._poll_at = 0.0
        self._free_disk = 0
        self._stopping = False

    def start(self, open_index: Callable[[], Index]) -> None:
        """Run the thread; `open_index` runs in it first."""
        threading.Thread(target=self._run, args=(open_index,), name="spool-committer", daemon=True).start()

    def put(self, item: Intake | Row | Job) -> None:
        """Hand over work; never blocks."""
        self._inbox.put(item, _due(item))

    def stop(self) -> None:
        """Finish all that was put, then end with `Ended`."""
        self._inbox.put(Stop(), 0.0)

    def _news(self, news: News) -> None:
        self._post(lambda: self._tell(news))

    def _run(self, open_index: Callable[[], Index]) -> None:
        error: SpoolError | None = SpoolError("the spool's committer broke")
        try:
            index = open_index()
            try:
                self._serve(index)
                error = None
            finally:
                index.close()
        except SpoolError as known:
            error = known
        except OSError as failed:
            error = spool_error(failed, "the spool's directory")
        except sqlite3.Error as failed:
            error = SpoolError(f"the spool's index failed: {failed}")
        finally:
            self._news(Ended(error))

    def _serve(self, index: Index) -> None:
        index.wait_for_others(LOCK_SECONDS)
        self._free_disk = self._directory.free_bytes()
        self._make_spares()
        while not self._stopping or self._intakes or self._rows or self._jobs:
            self._inbox.wait_until(self._due())
            self._collect()
            if self._intakes and (self._stopping or self._jobs or time.monotonic() >= self._sync_at):
                intakes, self._intakes = self._intakes, []
                self._sync(intakes)
                self._news(Synced(intakes))
            elif not self._intakes:
                self._make_spares()
            if time.monotonic() < self._retry_at:
                continue
            try:
                self._write_rows(index)
                self._run_jobs(index)
                self._look_around(index)
            except sqlite3.OperationalError as error:
                if self._stopping or error.sqlite_errorcode not in _TRY_AGAIN:
                    raise
                self._retry_at = time.monotonic() + RETRY_SECONDS

    # ---- the inbox ---------------------------------------------------------------------------------------

    def _collect(self) -> None:
        """Take everything that is there, at most `MAX_GROUP` files."""
        while len(self._intakes) < MAX_GROUP and (item := self._inbox.take()) is not None:
            match item:
                case Intake():
                    self._add_intake(item)
                case Job():
                    self._jobs.append(item)
                case Stop():
                    self._stopping = True
                case _:
                    self._add_row(item)
        if len(self._intakes) >= MAX_GROUP:
            self._sync_at = 0.0

    def _add_intake(self, intake: Intake) -> None:
        """Nobody waits for a sealed file: a little later, many share the journal's one commit."""
        now = time.monotonic()
        if not self._intakes:
            self._sync_at = now + MAX_SEAL_DELAY_SECONDS
        if intake.part is not None:
            self._sync_at = now
        self._intakes.append(intake)

    def _due(self) -> float:
        """When something is to be done though nothing new comes."""
        if self._retry_at > time.monotonic():
            return self._retry_at
        if self._stopping or self._jobs:
            return 0.0
        due = self._poll_at
        if self._rows:
            due = min(due, self._rows_since + MAX_ROW_DELAY_SECONDS)
        if self._intakes:
            due = min(due, self._sync_at)
        return due

    def _make_spares(self) -> None:
        """Nobody waits for the disk just now. A disk that is full says so where it matters: to the loop."""
        if not self._stopping:
            try:
                self._spares.fill()
            except OSError as error:
                log.debug("no spare files: %s", error.strerror)

    def _add_row(self, row: Row) -> None:
        if not self._rows:
            self._rows_since = time.monotonic()
        self._rows.append(row)
        if len(self._rows) > MAX_UNRECORDED:
            raise SpoolError(f"{MAX_UNRECORDED} rows could not be written to the index: the disk is full")

    # ---- files -------------------------------------------------------------------------------------------

    def _sync(self, intakes: list[Intake]) -> None:
        """Make a group of files durable. A file that fails gets its error; the others go on."""
        if len(intakes) > 1:
            for intake in intakes:
                start_writeback(intake.fd, 0, 0)
        for intake in intakes:
            try:
                os.fsync(intake.fd)
                if intake.part is not None:
                    self._rename(intake.part, intake.name)
            except OSError as error:
                self._give_up(intake, error)
            os.close(intake.fd)
        try:
            os.fsync(self._directory.objects)
        except OSError as error:
            for intake in intakes:
                self._give_up(intake, error)
        for intake in intakes:
            if intake.error is None:
                self._add_row(intake.entry)

    def _rename(self, part: PartFile, name: str) -> None:
        os.rename(part.name, name, src_dir_fd=part.folder, dst_dir_fd=self._directory.objects)

    def _give_up(self, intake: Intake, error: OSError) -> None:
        """A commit that failed leaves nothing; a sealed file stays, for recovery to judge."""
        if intake.error is None:
            intake.error = spool_error(error, f"making object {intake.entry.id} durable")
            if intake.part is not None:
                discard(intake.part.name, intake.part.folder)
                discard(intake.name, self._directory.objects)

    # ---- rows and jobs -----------------------------------------------------------------------------------

    def _write_rows(self, index: Index) -> None:
        """Write the rows that wait, once it is time."""
        overdue = time.monotonic() - self._rows_since >= MAX_ROW_DELAY_SECONDS
        if self._rows and (overdue or self._jobs or self._stopping):
            # A delivery may be over before its object's file is synced: the object's row has to come first.
            unsynced = {intake.entry.seq for intake in self._intakes}
            early: list[Row] = []
            rows: list[Row] = []
            for row in self._rows:
                (early if type(row) is Mark and row.seq in unsynced else rows).append(row)
            if not rows:
                return
            replaced = index.record(rows)
            self._rows, self._rows_since = early, time.monotonic()
            for name in replaced:
                discard(name, self._directory.quarantine)
            self._report(index, rows)

    def _run_jobs(self, index: Index) -> None:
        """Run the jobs, each after all rows that were put before it."""
        while self._jobs and not self._rows:
            job = self._jobs[0]
            result = job.work(index)
            del self._jobs[0]
            self._finish(job, result)

    def _finish(self, job: Job, result: Any) -> None:
        self._post(lambda: job.done(result))

    def _look_around(self, index: Index) -> None:
        """Each second: what did others change, how full is the disk."""
        now = time.monotonic()
        if now < self._poll_at or self._rows:
            return
        self._poll_at = now + POLL_SECONDS
        self._free_disk = self._directory.free_bytes()
        changes = index.foreign_changes()
        if changes != index.seen:
            index.park_unserved()
            index.seen = changes
            self._news(Changed())
        self._report(index, [])

    def _report(self, index: Index, rows: list[Row]) -> None:
        """Remove what presses on a bound, one batch of it, and tell the loop how things stand."""
        totals = index.totals()
        evicted = dropped = 0
        if totals.retained[0] and self._presses(totals):
            evicted = self.remove(index, float("inf"))
        if self._limits.quarantine_drops_oldest:
            dropped = self._drop_oldest_quarantined(index, totals)
        if evicted or dropped:
            totals = index.totals()
            self._poll_at = 0.0
        self._news(Recorded(rows, totals, evicted, dropped))

    # ---- removing ----------------------------------------------------------------------------------------

    def _presses(self, totals: Totals) -> bool:
        """Whether delivered objects take the place of new ones."""
        limits = self._limits
        return (
            totals.undelivered[0] + totals.retained[0] > limits.max_objects
            or totals.undelivered[1] + totals.retained[1] > limits.max_bytes
            or self._free_disk < limits.min_free_disk_bytes + DISK_MARGIN
        )

    def remove(self, index: Index, settled_before: float) -> int:
        """Remove one batch of objects delivered before a time (UTC, seconds): rows first, then files."""
        gone = index.forget(settled_before, EVICT_BATCH, self._limits.max_tombstones)
        for id, sha256 in gone:
            self._spares.recycle(self._directory.object_name(id, sha256), self._directory.objects)
        self._free_disk = self._directory.free_bytes()
        return len(gone)

    def _drop_oldest_quarantined(self, index: Index, totals: Totals) -> int:
        """Remove what is in quarantine longest until the rest is within its bounds."""
        objects, size = totals.quarantined
        dropped = 0
        while objects > self._limits.max_quarantine_objects or size > self._limits.max_quarantine_bytes:
            oldest = index.oldest_quarantined()
            if oldest is None:
                break
            index.record([Admitted(oldest[0])])
            discard(oldest[1], self._directory.quarantine)
            objects, size, dropped = objects - 1, size - oldest[2], dropped + 1
        return dropped
