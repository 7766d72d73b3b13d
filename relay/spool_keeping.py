"""Custody within one write: the loop appends to the journal, a thread syncs it, whoever waits hears of it.

    keep ──▶ append ──▶ wait ──▶ ┌ fdatasync, for all that was appended before it began ┐ ──▶ told
             (loop)              └ thread; what comes meanwhile is the next group ──────┘

The thread does nothing else. The committer's has an index and files to look after, and for each turn of its
own it takes the interpreter from the loop: a sender that waits for one answer waited for that, too.

Never here: files, the index.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable, Sequence
from functools import partial

from relay.spool_journal import Journal
from relay.spool_syncer import Intake


class Keeping:
    """The journal of one spool at work. Used by its loop."""

    def __init__(
        self,
        journal: Journal,
        *,
        post: Callable[[Callable[[], None]], None],
        told: Callable[[Sequence[Intake], OSError | None], None],
    ) -> None:
        """
        Args:
            post: Calls what it is given in the loop; called from the thread.
            told: Hears, in the loop, which objects are durable now, or why they are not: then the journal
                has failed and takes nothing any more.
        """
        self._journal = journal
        self._post = post
        self._told = told
        self._appended: list[Intake] = []
        self._syncing: list[Intake] = []
        self.idle = asyncio.Event()
        """Set while nobody waits."""
        self.idle.set()
        self._turns: queue.SimpleQueue[bool] = queue.SimpleQueue()
        """For the thread: one for each sync, False for its end."""
        self._thread = threading.Thread(target=self._run, name="spool-journal", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        return f"<Keeping {self._journal!r} waiting={len(self._appended) + len(self._syncing)}>"

    def keep(self, intake: Intake) -> bool:
        """Take what is in memory of `intake` into the journal; False where it has no place for it."""
        assert intake.data is not None
        try:
            if not self._journal.append(intake.entry, intake.data):
                return False
        except OSError as error:
            self._told([], error)
            return False
        self._appended.append(intake)
        self.idle.clear()
        if not self._syncing:
            self._sync()
        return True

    def _sync(self) -> None:
        self._syncing, self._appended = self._appended, []
        self._turns.put(True)

    def _run(self) -> None:
        while self._turns.get():
            error = None
            try:
                self._journal.sync()
            except OSError as failed:
                error = failed
            self._post(partial(self._synced, error))

    def _synced(self, error: OSError | None) -> None:
        group, self._syncing = self._syncing, []
        if error is not None:
            group, self._appended = group + self._appended, []
        if self._appended:
            self._sync()
        else:
            self.idle.set()
        self._told(group, error)

    def close(self) -> None:
        """End the thread, once it is `idle`, and close the journal."""
        self._turns.put(False)
        self._thread.join()
        self._journal.close()
