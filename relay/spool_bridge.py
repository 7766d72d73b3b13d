"""The bridge: the loop's end of the committer. Turns what is put into awaitables, and news into calls.

    loop   commit ──▶ journal, where there is a place ──▶ committer's queue, in no hurry
           commit, sync, put, job ─────────────────────▶ committer's queue
           Keeper's methods       ◀── news

Never here: what a file, a row or a feed is.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from relay.errors import SpoolError
from relay.spool_committer import Changed, Committed, Committer, Ended, Job, News, Recorded, Synced
from relay.spool_files import Directory, spool_error
from relay.spool_index import Index, Row
from relay.spool_journal import Journal
from relay.spool_keeping import Keeping
from relay.spool_spares import Spares
from relay.spool_syncer import Intake
from relay.spool_types import Entry, SpoolLimits

MAX_OPEN = 1024
"""Objects whose files are not synced yet, those being committed included. Beyond, a commit waits for its own
file."""

log = logging.getLogger(__name__)


class Keeper(Protocol):
    """Who hears the news, in the loop."""

    def committed(self, entry: Entry) -> None:
        """A committed object is durable."""

    def settled(self, entry: Entry) -> None:
        """An object's file is where it belongs, durable."""

    def lost(self, entry: Entry) -> None:
        """A commit failed; the object is not in custody."""

    def recorded(self, news: Recorded) -> None:
        """Rows are written."""

    def changed(self) -> None:
        """Another process changed the index."""

    def broken(self, error: SpoolError) -> None:
        """Nothing works any more."""


class Bridge:
    """Runs the committer for one loop."""

    def __init__(self, directory: Directory, limits: SpoolLimits, spares: Spares, keeper: Keeper) -> None:
        self.error: SpoolError | None = None
        self.failed = asyncio.Event()
        self.committer = Committer(directory, limits, spares, tell=self._hear, post=self.post)
        self._keeper = keeper
        self._directory = directory
        self._journal_bytes = limits.journal_bytes
        self._keeping: Keeping | None = None
        self._loop = asyncio.get_running_loop()
        self._commits: dict[int, asyncio.Future[None]] = {}
        self._unsynced: set[int] = set()
        self._synced: asyncio.Future[None] = self._loop.create_future()
        self._jobs: set[asyncio.Future[Any]] = set()
        self._ended = asyncio.Event()

    async def start(self, open_index: Callable[[], Index]) -> None:
        """Start the thread and wait until `open_index` has run in it.

        Raises:
            SpoolError: It failed.
        """

        def first() -> Index:
            index = open_index()
            self.post(lambda: resolve(opened, None))
            return index

        opened: asyncio.Future[None] = self._loop.create_future()
        self._jobs.add(opened)
        self.committer.start(first)
        try:
            await opened
        finally:
            self._jobs.discard(opened)
        if self._journal_bytes:
            try:
                journal = Journal(self._directory, self._journal_bytes)
            except OSError as error:
                raise spool_error(error, f"opening the journal in {self._directory.path}") from error
            self.committer.journal = journal
            self._keeping = Keeping(journal, post=self.post, told=self._kept)

    async def stop(self) -> None:
        """Finish what was put, end the threads."""
        if self._keeping is not None:
            await self._keeping.idle.wait()
        self.committer.stop()
        await self._ended.wait()
        if self._keeping is not None:
            self._keeping.close()
            self._keeping = None

    def check(self) -> None:
        """Raise why the spool cannot go on, if it cannot."""
        if self.error is not None:
            raise self.error

    def fail(self, error: SpoolError) -> None:
        """The spool cannot go on; everyone who waits hears why. Only the first error counts."""
        if self.error is not None:
            return
        self.error = error
        self.failed.set()
        for future in [*self._commits.values(), *self._jobs]:
            if not future.done():
                future.set_exception(error)
        resolve(self._synced, None)
        self._keeper.broken(error)

    # ---- to the committer --------------------------------------------------------------------------------

    async def commit(self, intake: Intake) -> None:
        """Wait until a file is durable; raises why it is not."""
        future: asyncio.Future[None] = self._loop.create_future()
        self._commits[intake.entry.seq] = future
        if not self._keep(intake):
            self.committer.put(intake)
        await future

    def _keep(self, intake: Intake) -> bool:
        """Whether the journal takes an object, which is then told of by `_kept`."""
        return (
            self._keeping is not None
            and intake.data is not None
            and len(self._unsynced) + len(self._commits) <= MAX_OPEN
            and self._keeping.keep(intake)
        )

    def _kept(self, intakes: Sequence[Intake], error: OSError | None) -> None:
        """These objects are durable in the journal and their files follow; or each waits for its own file."""
        if error is not None:
            log.error("the spool's journal failed, every object is synced by itself: %s", error)
            for intake in intakes:
                self.committer.put(intake)
            return
        for intake in intakes:
            # What becomes of its file is no answer to the commit any more.
            self.sync(Intake(intake.entry, intake.name, None, intake.data))
            self._hear_committed(intake)

    def sync(self, intake: Intake) -> None:
        """Let a file become durable; see `durable`."""
        self._unsynced.add(intake.entry.seq)
        self.committer.put(intake)

    async def durable(self, entry: Entry) -> None:
        """Wait until a file given to `sync` is durable; raises why it is not."""
        while entry.seq in self._unsynced:
            self.check()
            await asyncio.shield(self._synced)

    def put(self, row: Row) -> None:
        """Let a row be written."""
        self.committer.put(row)

    async def job(self, work: Callable[[Index], Any]) -> Any:
        """Run `work` in the committer's thread after the rows put before it; its result."""
        self.check()
        future: asyncio.Future[Any] = self._loop.create_future()
        self._jobs.add(future)
        self.post_job(work, lambda result: resolve(future, result))
        try:
            return await future
        finally:
            self._jobs.discard(future)

    def post_job(self, work: Callable[[Index], Any], done: Callable[[Any], None]) -> None:
        """As `job`; calls `done` with the result instead of being awaited."""
        self.committer.put(Job(work, done))

    # ---- from the committer ------------------------------------------------------------------------------

    def post(self, callback: Callable[[], None]) -> None:
        """Call `callback` in the loop. The one method that the committer's thread may call."""
        try:
            self._loop.call_soon_threadsafe(callback)
        except RuntimeError:
            if not self._loop.is_closed():
                raise

    def _hear(self, news: News) -> None:
        match news:
            case Committed(intakes):
                for intake in intakes:
                    self._hear_committed(intake)
            case Synced(intakes):
                for intake in intakes:
                    self._hear_synced(intake)
                resolve(self._synced, None)
                self._synced = self._loop.create_future()
            case Recorded():
                self._keeper.recorded(news)
            case Changed():
                self._keeper.changed()
            case Ended(error):
                self.fail(error or SpoolError("the spool is closed"))
                self._ended.set()

    def _hear_synced(self, intake: Intake) -> None:
        """A file that was handed on before; without it nothing may go on."""
        if intake.error is None:
            self._unsynced.discard(intake.entry.seq)
            self._keeper.settled(intake.entry)
        else:
            self.fail(intake.error)

    def _hear_committed(self, intake: Intake) -> None:
        entry = intake.entry
        future = self._commits.pop(entry.seq)
        if intake.error is None:
            if intake.data is None:
                self._keeper.settled(entry)
            # First whoever waits for the answer, then whoever goes on with the object.
            resolve(future, None)
            self._keeper.committed(entry)
        else:
            self._keeper.lost(entry)
            if not future.done():
                future.set_exception(intake.error)


def resolve(future: asyncio.Future[Any], result: Any) -> None:
    """Set a result, unless whoever waited has gone."""
    if not future.done():
        future.set_result(result)
