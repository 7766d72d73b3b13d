"""What makes files durable: at once for those that somebody waits for, on a thread of its own for the rest.

    committer ──▶ make_durable(objects)                      a file each, and their directory once
              ──▶ Syncer.put(objects) ──▶ thread: make_durable ──▶ done(objects)

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
from relay.spool_files import FILE_MODE, Directory, discard, let_go, spool_error, write_all, write_out
from relay.spool_part import PartFile
from relay.spool_spares import Spares
from relay.spool_types import Entry


@dataclass(slots=True, eq=False)
class Intake:
    """A whole object to make durable: a file, or bytes that have no file yet."""

    entry: Entry
    name: str
    """Of its file in ``objects/``."""
    file: PartFile | None
    """Its file; in ``objects/`` already if it was handed on."""
    data: bytearray | None = None
    """All of the file's bytes, until the file is durable; None where it was written as it came."""
    committing: bool = False
    """Whether somebody waits to hear that it is in custody."""
    error: SpoolError | None = None

    def write_file(self, directory: Directory, spares: Spares) -> None:
        """Give what is only in memory a file.

        Raises:
            OSError: The disk failed.
        """
        assert self.data is not None
        if (spare := spares.take()) is not None:
            self.file = PartFile(spare.name, directory.spares, spare.fd)
        else:
            flags = os.O_CREAT | os.O_TRUNC | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
            fd = os.open(self.entry.id, flags, FILE_MODE, dir_fd=directory.parts)
            self.file = PartFile(self.entry.id, directory.parts, fd)
        write_all(self.file.fd, [memoryview(self.data)], 0)
        # For the order of objects that a recovery finds.
        stored_ns = int(self.entry.stored_at * 1e9)
        os.utime(self.file.fd, ns=(stored_ns, stored_ns))

    def rename(self, directory: Directory) -> None:
        """Move the file into ``objects/``, if it is not there.

        Raises:
            OSError: It is where it was.
        """
        file = self.file
        assert file is not None
        if file.folder != directory.objects:
            os.rename(file.name, self.name, src_dir_fd=file.folder, dst_dir_fd=directory.objects)
            self.file = PartFile(self.name, directory.objects, file.fd)

    def give_up(self, error: OSError, directory: Directory) -> None:
        """A commit that failed leaves nothing; a file that was handed on stays, for recovery to judge, unless
        its bytes are in the journal still."""
        if self.error is None:
            self.error = spool_error(error, f"making object {self.entry.id} durable")
            if self.file is not None and (self.committing or self.data is not None):
                discard(self.file.name, self.file.folder)


def make_durable(intakes: Sequence[Intake], directory: Directory, spares: Spares) -> None:
    """Write what has no file, sync the files, move each to its place, sync their directory; close them.

    Of several that nobody waits for, one after the other is on its way to the disk: an answer that waits for
    the journal would wait for all that is before it there. One that fails gets its `error`; the others go on.
    """
    for intake in intakes:
        try:
            if intake.data is not None:
                intake.write_file(directory, spares)
            if intake.file is not None and len(intakes) > 1:
                if intake.committing:
                    let_go(intake.file.fd, 0, 0)
                else:
                    write_out(intake.file.fd)
        except OSError as error:
            intake.give_up(error, directory)
    for intake in intakes:
        try:
            if intake.file is not None and intake.error is None:
                os.fsync(intake.file.fd)
                intake.rename(directory)
        except OSError as error:
            intake.give_up(error, directory)
    try:
        os.fsync(directory.objects)
    except OSError as error:
        for intake in intakes:
            intake.give_up(error, directory)
    for intake in intakes:
        if intake.file is not None:
            os.close(intake.file.fd)
        if intake.error is None:
            intake.data = None


class Syncer:
    """The thread. One group at a time: what comes meanwhile is the next one."""

    def __init__(self, directory: Directory, spares: Spares, done: Callable[[list[Intake]], None]) -> None:
        """`done` is called on the thread when a group is over."""
        self.busy = False
        """Whether a group was put and is not over. The putting thread's own word."""
        self._directory = directory
        self._spares = spares
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
            make_durable(group, self._directory, self._spares)
            self._done(group)

    def close(self) -> None:
        """End the thread; returns when it has ended."""
        self._groups.put(None)
        self._thread.join()
