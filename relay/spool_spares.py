"""Spare files: what an object is written to was made beforehand, so nobody waits while a file is made.

    made or emptied by the committer ──▶ spares/<n>, open ──take──▶ a part ──▶ objects/, quarantine/
                  ▲                                                                │
                  └──────────── removed after its retention, or abandoned ◀────────┘

Making a file waits for a journal that is being written, and ext4 looks at every inode freed in the last
minutes before it gives one out (0.8 ms of CPU after a few thousand removals, 0.02 ms without). A spool
removes as many files as it takes, so it would pay that for each object. It uses them again instead.

A spare that is taken stays under its own name until the object is whole; what an earlier process left in one
is an object that nobody was told was kept, and is emptied.

Never here: what is written to a file.
"""

from __future__ import annotations

import os
from collections import deque
from dataclasses import dataclass

from relay.spool_files import FILE_MODE, Directory, discard

MAX_SPARES = 128
"""Files kept open for use: a group of the committer (`spool_committer.MAX_GROUP`) and those that fill it."""

ENOUGH = 96
"""Made up to here, whenever nobody waits for the disk."""


@dataclass(frozen=True, slots=True)
class Spare:
    """An empty file in ``spares/``, open for reading and writing."""

    name: str
    fd: int


class Spares:
    """The spares of one spool. Any thread may `take` and `give`; the rest is the committer's thread's."""

    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        # A deque's own operations are atomic.
        self._ready: deque[Spare] = deque()
        self._number = 0

    def __repr__(self) -> str:
        return f"<Spares {len(self._ready)}>"

    def __len__(self) -> int:
        return len(self._ready)

    def take(self) -> Spare | None:
        """An empty file, the taker's from here on; None when there is none just now."""
        try:
            return self._ready.popleft()
        except IndexError:
            return None

    def give(self, spare: Spare) -> None:
        """Take back a file whose object was given up, whatever is in it.

        Raises:
            OSError: It cannot be emptied; the file is gone, or is emptied at the next opening.
        """
        if len(self._ready) >= MAX_SPARES:
            os.close(spare.fd)
            discard(spare.name, self._directory.spares)
            return
        try:
            os.ftruncate(spare.fd, 0)
        except OSError:
            os.close(spare.fd)
            raise
        self._ready.append(spare)

    def adopt(self) -> int:
        """Take what an earlier process left; returns how many of them held part of an object."""
        begun = 0
        with os.scandir(self._directory.spares) as files:
            found = [(file.name, file.stat(follow_symlinks=False).st_size) for file in files]
        for name, size in found:
            begun += size > 0
            if name.isascii() and name.isdecimal() and len(self._ready) < MAX_SPARES:
                self._number = max(self._number, int(name))
                self._open(name, os.O_TRUNC)
            else:
                discard(name, self._directory.spares)
        return begun

    def fill(self) -> None:
        """Make as many as there should be.

        Raises:
            OSError: The disk is full or failed. The loop makes a file for each object then, and says so.
        """
        while len(self._ready) < ENOUGH:
            self._open(self._next_name(), os.O_CREAT | os.O_EXCL)

    def recycle(self, name: str, folder: int) -> None:
        """Remove the file `name` from `folder`: make a spare of it, or unlink it when there are many.

        Raises:
            OSError: It can be neither. A file that is gone already is no error.
        """
        if len(self._ready) >= MAX_SPARES:
            discard(name, folder)
            return
        try:
            links = os.stat(name, dir_fd=folder, follow_symlinks=False).st_nlink
            if links > 1:
                # Somebody keeps a copy by link: it stays what it is.
                discard(name, folder)
                return
            spare = self._next_name()
            os.rename(name, spare, src_dir_fd=folder, dst_dir_fd=self._directory.spares)
        except FileNotFoundError:
            return
        self._open(spare, os.O_TRUNC)

    def close(self) -> None:
        """Close them all; the files stay for the next opening."""
        while self._ready:
            os.close(self._ready.pop().fd)

    def _next_name(self) -> str:
        self._number += 1
        return str(self._number)

    def _open(self, name: str, flags: int) -> None:
        flags |= os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
        self._ready.append(Spare(name, os.open(name, flags, FILE_MODE, dir_fd=self._directory.spares)))
