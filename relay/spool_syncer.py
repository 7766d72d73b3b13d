"""What makes files durable: at once for those that somebody waits for, on a thread of its own for the rest.

    committer ──▶ make_durable(files)                                    a file each, and their directory once
              ──▶ Syncer.put(files) ──▶ thread: make_durable ──▶ done(files)

Nobody waits for what a journal holds, nor for what side A would send again, so many of these share one pass
of the file system's journal, and the committer goes on meanwhile.

Never here: who waits, and what is recorded of a file.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from relay.errors import SpoolError
from relay.spool_files import Directory, discard, spool_error, start_writeback
from relay.spool_part import PartFile
from relay.spool_types import Entry


@dataclass(slots=True)
class Intake:
    """A file to make durable. `part` is where it is if it is still to be renamed (commit)."""

    entry: Entry
    fd: int
    name: str
    part: PartFile | None
    error: SpoolError | None = None

    def rename(self, directory: Directory) -> None:
        """Move the file from its `part` into ``objects/``.

        Raises:
            OSError: It is where it was.
        """
        assert self.part is not None
        os.rename(self.part.name, self.name, src_dir_fd=self.part.folder, dst_dir_fd=directory.objects)

    def give_up(self, error: OSError, directory: Directory) -> None:
        """A commit that failed leaves nothing; a file that was handed on stays, for recovery to judge."""
        if self.error is None:
            self.error = spool_error(error, f"making object {self.entry.id} durable")
            if self.part is not None:
                discard(self.part.name, self.part.folder)
                discard(self.name, directory.objects)


def make_durable(intakes: Sequence[Intake], directory: Directory) -> None:
    """Sync a group of files, rename those that are parts, sync their directory; close the files.

    A file that fails gets its `error`; the others go on.
    """
    if len(intakes) > 1:
        for intake in intakes:
            start_writeback(intake.fd, 0, 0)
    for intake in intakes:
        try:
            os.fsync(intake.fd)
            if intake.part is not None:
                intake.rename(directory)
        except OSError as error:
            intake.give_up(error, directory)
        os.close(intake.fd)
    try:
        os.fsync(directory.objects)
    except OSError as error:
        for intake in intakes:
            intake.give_up(error, directory)


class Syncer:
    """The thread. One group at a time: what comes meanwhile is the next one."""

    def __init__(self, directory: Directory, done: Callable[[list[Intake]], None]) -> None:
        """`done` is called on the thread when a group is over."""
        self.busy = False
        """Whether a group was put and is not over. The putting thread's own word."""
        self._directory = directory
        self._done = done
        self._groups: queue.SimpleQueue[list[Intake] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="spool-syncer", daemon=True)
        self._thread.start()

    def put(self, intakes: list[Intake]) -> None:
        """Begin a group; not while one is `busy`."""
        self.busy = True
        self._groups.put(intakes)

    def _run(self) -> None:
        while (group := self._groups.get()) is not None:
            make_durable(group, self._directory)
            self._done(group)

    def close(self) -> None:
        """End the thread; returns when it has ended."""
        self._groups.put(None)
        self._thread.join()
