"""The committer: the thread that keeps files and index, so that the loop never waits for them.

    loop ──put──▶ inbox ──▶ commits that the journal did not take: synced · renamed ─────────────post──▶ loop
                        ├─▶ what was journaled or sealed: synced in groups by the syncer ────────post──▶ loop
                        ├─▶ rows of many groups in one transaction, some milliseconds later ─────post──▶ loop
                        └─▶ spare files, while nobody waits

Files come before rows: a row says nothing that its file does not prove, so it may wait until nobody waits for
an fsync. Everything else that needs the index (a page, a sweep) is a job, run after the rows before it.

Never here: what the loop knows; the two sides meet only in the inbox, in the spares and in `post`.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from relay.errors import SpoolError, SpoolFull
from relay.spool_files import Directory, discard, spool_error
from relay.spool_inbox import Inbox
from relay.spool_index import Index, Mark, Row, Totals, index_error
from relay.spool_journal import Journal
from relay.spool_spares import Spares
from relay.spool_syncer import Intake, Syncer, make_durable
from relay.spool_types import SpoolLimits

MAX_GROUP = 128
"""Objects committed in one pass."""

MAX_SEAL_DELAY_SECONDS = 0.5
"""How long a file that nobody waits for waits for others to be synced with it. The journal has it meanwhile,
or side A sends it again."""

MAX_DEFERRED = 256
"""Files that wait to be synced, or…"""

MAX_DEFERRED_BYTES = 16 << 20
"""…their bytes, many of which are in memory: here the wait is over."""

MAX_ROW_DELAY_SECONDS = 0.05
"""How long a row waits for others. After a kill what is younger is found by recovery or delivered twice."""

MAX_UNRECORDED = 65_536
"""Rows that may wait while the index cannot be written (disk full); beyond, the spool ends."""

RETRY_SECONDS = 0.25
"""Between two attempts to write rows, or files that the journal has, to a full disk."""

LOCK_SECONDS = 0.05
"""How long rows wait for another process's transaction at once, while objects may wait for an fsync."""

POLL_SECONDS = 1.0
"""Between two looks at what other processes changed, and at the free disk."""

FORGET_SECONDS = 10.0
"""Without a commit for so long, the journal's old records are given up."""

EVICT_BATCH = 64
"""Delivered objects removed at once, some milliseconds, for those that wait for an fsync meanwhile."""

MAX_DROPPED_TOLD = 1000
"""Deliveries to each destination, given up by operators, logged at one look; the rest at the next."""

IDS_PER_LINE = 100
"""Of objects named in one line of the log: 3 KiB."""

DISK_MARGIN = 256 * 2**20
"""Bytes above `min_free_disk_bytes` at which delivered objects are removed, before anything is refused."""

log = logging.getLogger(__name__)

_TRY_AGAIN = frozenset({sqlite3.SQLITE_FULL, sqlite3.SQLITE_BUSY})


@dataclass(slots=True)
class Job:
    """Work on the index; `done` is called in the loop with its result."""

    work: Callable[[Index], Any]
    done: Callable[[Any], None]


@dataclass(frozen=True, slots=True)
class Stop:
    """The end of what is put."""


@dataclass(frozen=True, slots=True)
class Committed:
    """News for the loop: these commits are durable, or have their `error`."""

    intakes: list[Intake]


@dataclass(frozen=True, slots=True)
class Synced:
    """News from the syncer, for the loop too: files that were handed on are durable, or have an `error`."""

    intakes: list[Intake]


@dataclass(frozen=True, slots=True)
class Recorded:
    """News for the loop: these rows are written; the figures after it, and what was removed for room."""

    rows: list[Row]
    totals: Totals
    evicted: int


@dataclass(frozen=True, slots=True)
class Changed:
    """News for the loop: another process changed the index."""


@dataclass(frozen=True, slots=True)
class Ended:
    """News for the loop: the committer ended, in order if `error` is None."""

    error: SpoolError | None


News = Committed | Synced | Recorded | Changed | Ended


def _due(item: Intake | Row | Job) -> float:
    """When the committer has to look at `item`. Somebody waits for a commit and for a job, nobody else."""
    if type(item) is Job or (type(item) is Intake and item.committing):
        return 0.0
    return time.monotonic() + min(MAX_SEAL_DELAY_SECONDS, MAX_ROW_DELAY_SECONDS)


def _tell_dropped(index: Index) -> None:
    """Log every object that an operator gave up: nothing leaves custody undelivered without a trace."""
    for destination, dropped in index.dropped(MAX_DROPPED_TOLD).items():
        for first in range(0, len(dropped), IDS_PER_LINE):
            ids = [id for _, id in dropped[first : first + IDS_PER_LINE]]
            log.warning(
                "an operator dropped %d objects, not delivered to %s: %s",
                len(ids),
                destination,
                " ".join(ids),
            )
        index.told(destination, [seq for seq, _ in dropped])


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
        self._inbox: Inbox[Intake | Synced | Row | Job | Stop] = Inbox()
        self.journal: Journal | None = None
        """Where the loop puts what is deferred first; to be set before it does."""
        self._commits: list[Intake] = []
        self._deferred: list[Intake] = []
        self._deferred_bytes = 0
        self._deferred_since = 0.0
        self._defer_again_at = 0.0
        self._journaled_at = 0.0
        self._unsynced: set[int] = set()
        """Seqs of files that are deferred or being synced."""
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
            error = spool_error(failed, f"the spool's directory {self._directory.path}")
        except sqlite3.Error as failed:
            error = index_error(failed, self._directory.index_path, self._directory.free_bytes())
        finally:
            self._news(Ended(error))

    def _serve(self, index: Index) -> None:
        index.wait_for_others(LOCK_SECONDS)
        self._free_disk = self._directory.free_bytes()
        self._make_spares()
        syncer = Syncer(self._directory, self._spares, lambda group: self._inbox.put(Synced(group), 0.0))
        with closing(syncer):
            while not self._stopping or self._commits or self._unsynced or self._rows or self._jobs:
                self._turn(index, syncer)

    def _turn(self, index: Index, syncer: Syncer) -> None:
        self._inbox.wait_until(self._due(syncer))
        self._collect(syncer)
        if self._commits:
            self._commit()
        else:
            self._make_spares()
        if not syncer.busy and self._deferred and time.monotonic() >= self._defer_until():
            group, self._deferred, self._deferred_bytes = self._deferred, [], 0
            syncer.put(group)
        if time.monotonic() < self._retry_at:
            return
        try:
            self._write_rows(index)
            self._run_jobs(index)
            self._look_around(index)
        except sqlite3.OperationalError as error:
            if self._stopping or error.sqlite_errorcode not in _TRY_AGAIN:
                raise
            self._retry_at = time.monotonic() + RETRY_SECONDS

    # ---- the inbox ---------------------------------------------------------------------------------------

    def _collect(self, syncer: Syncer) -> None:
        """Take everything that is there, at most `MAX_GROUP` commits."""
        while len(self._commits) < MAX_GROUP and (item := self._inbox.take()) is not None:
            match item:
                case Intake(committing=True):
                    self._commits.append(item)
                case Intake():
                    self._defer(item)
                case Synced():
                    syncer.busy = False
                    self._synced(item)
                case Job():
                    self._jobs.append(item)
                case Stop():
                    self._stopping = True
                case _:
                    self._add_row(item)

    def _due(self, syncer: Syncer) -> float:
        """When something is to be done though nothing new comes."""
        if self._retry_at > time.monotonic():
            return self._retry_at
        due = self._rows_since + MAX_ROW_DELAY_SECONDS if self._rows else self._poll_at
        if self._deferred and not syncer.busy:
            due = min(due, self._defer_until())
        if (self._stopping or self._jobs) and not self._unsynced:
            return 0.0
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

    def _commit(self) -> None:
        """Make a group of commits durable."""
        commits, self._commits = self._commits, []
        make_durable(commits, self._directory, self._spares)
        self._news(Committed(commits))
        for intake in commits:
            # One that a failing journal did not keep has its place there.
            self._release(intake.entry.seq)
        self._add_synced(commits)

    def _defer(self, intake: Intake) -> None:
        """Let a file that nobody waits for be synced with others."""
        if not self._deferred:
            self._deferred_since = time.monotonic()
        self._deferred.append(intake)
        self._deferred_bytes += intake.entry.size
        if intake.data is not None:
            self._journaled_at = time.monotonic()
        self._unsynced.add(intake.entry.seq)

    def _defer_until(self) -> float:
        """When what is deferred is to be synced."""
        full = len(self._deferred) >= MAX_DEFERRED or self._deferred_bytes >= MAX_DEFERRED_BYTES
        hurry = full or self._jobs or self._stopping
        due = 0.0 if hurry else self._deferred_since + MAX_SEAL_DELAY_SECONDS
        return max(due, self._defer_again_at)

    def _synced(self, group: Synced) -> None:
        """The syncer is done with a group. What found the disk full is in the journal and is tried again."""
        full = [each for each in group.intakes if each.data is not None and isinstance(each.error, SpoolFull)]
        over = [each for each in group.intakes if each not in full] if full else group.intakes
        for intake in over:
            self._unsynced.discard(intake.entry.seq)
            if intake.error is None:
                self._release(intake.entry.seq)
        self._add_synced(over)
        self._news(Synced(over))
        for intake in full:
            self._unsynced.discard(intake.entry.seq)
            if not self._stopping:
                self._defer(Intake(intake.entry, intake.name, None, intake.data))
                self._defer_again_at = time.monotonic() + RETRY_SECONDS

    def _add_synced(self, intakes: list[Intake]) -> None:
        for intake in intakes:
            if intake.error is None:
                self._add_row(intake.entry)

    def _release(self, seq: int) -> None:
        if self.journal is not None:
            self.journal.release(seq)

    # ---- rows and jobs -----------------------------------------------------------------------------------

    def _write_rows(self, index: Index) -> None:
        """Write the rows that wait, once it is time."""
        overdue = time.monotonic() - self._rows_since >= MAX_ROW_DELAY_SECONDS
        if self._rows and (overdue or self._jobs or self._stopping):
            # A delivery may be over before its object's file is synced: the object's row has to come first.
            early: list[Row] = []
            rows: list[Row] = []
            for row in self._rows:
                (early if type(row) is Mark and row.seq in self._unsynced else rows).append(row)
            if not rows:
                self._rows_since = time.monotonic()
                return
            replaced = index.record(rows, self.journal.floor if self.journal is not None else 0)
            self._rows, self._rows_since = early, time.monotonic()
            for name in replaced:
                discard(name, self._directory.quarantine)
            self._report(index, rows)

    def _run_jobs(self, index: Index) -> None:
        """Run the jobs, each after all files and rows that were put before it; figures go before results."""
        while self._jobs and not self._rows and not self._unsynced:
            job = self._jobs[0]
            result = job.work(index)
            del self._jobs[0]
            self._report(index, [])
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
        if self.journal is not None and now >= self._journaled_at + FORGET_SECONDS:
            self.journal.forget()
        changes = index.foreign_changes()
        if changes != index.seen:
            index.park_unserved()
            index.seen = changes
            self._news(Changed())
        _tell_dropped(index)
        self._report(index, [])

    def _report(self, index: Index, rows: list[Row]) -> None:
        """Remove what presses on a bound, one batch of it, and tell the loop how things stand."""
        totals = index.totals()
        evicted = 0
        if totals.retained[0] and self._presses(totals):
            evicted = self.remove(index, float("inf"))
        if evicted:
            totals = index.totals()
            self._poll_at = 0.0
        self._news(Recorded(rows, totals, evicted))

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
