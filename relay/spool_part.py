"""A part: the file of an object that is being received, and the running hash of its data set.

Never here: fsync, the index.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from relay.errors import SpoolError
from relay.records import Buffer
from relay.spool_files import spool_error, start_writeback
from relay.spool_room import Room

MAX_GATHER = 1024
"""Buffers that one pwritev takes: Linux's IOV_MAX."""

WRITEBACK_BYTES = 8 << 20
"""Bytes after which the disk is set to work, so that the fsync of a long object finds little left to do."""

COPIED_BYTES = 128 << 10
"""Up to this size reading a data set costs less than mapping it."""

REHASH_BYTES = 1 << 20
"""Read at once while the bytes of an earlier process are hashed anew."""


@dataclass(frozen=True, slots=True)
class PartFile:
    """Where a part's file is: its name in a folder (a descriptor)."""

    name: str
    folder: int


class Part:
    """A file that becomes an object. `size` is bytes of data set so far. `Spool.begin` makes it."""

    __slots__ = (
        "_fd",
        "_hash",
        "_leave",
        "_reserved",
        "_room",
        "_written_back",
        "data_offset",
        "file",
        "given_id",
        "id",
        "size",
    )

    def __init__(
        self,
        *,
        id: str,
        given_id: bool,
        file: PartFile,
        fd: int,
        data_offset: int,
        declared: int,
        room: Room,
        leave: Callable[[Part], None],
    ) -> None:
        self.id = id
        self.given_id = given_id
        """Whether the id came from elsewhere, so that it may have come before."""
        self.file = file
        self.size = 0
        self.data_offset = data_offset
        self._fd = fd
        self._hash = hashlib.sha256()
        self._room = room
        self._reserved = data_offset + declared
        self._leave = leave
        self._written_back = 0

    def __repr__(self) -> str:
        return f"<Part {self.id} {self.size} bytes{'' if self._fd >= 0 else ' closed'}>"

    def write(self, buffers: Sequence[Buffer]) -> None:
        """Append `buffers`, gathered in as few system calls as there can be, and hash them.

        Raises:
            SpoolFull: ``bytes``, ``disk``, or ``object`` when it would become longer than one object may be.
                What was there before is still there; abandon or quarantine it.
            SpoolError: The disk failed, or the part is not open any more.
        """
        fd = self.fileno()
        views = [memoryview(buffer).cast("B") for buffer in buffers if len(buffer)]
        length = sum(map(len, views))
        self._room.check_object(self.size + length)
        end = self.data_offset + self.size
        excess = max(0, end + length - self._reserved)
        if excess:
            self._room.take(excess)
            self._reserved += excess
        try:
            _write_all(fd, views, end)
        except OSError as error:
            os.ftruncate(fd, end)
            raise spool_error(error, f"writing object {self.id}") from error
        for view in views:
            self._hash.update(view)
        self.size += length
        if end + length - self._written_back >= WRITEBACK_BYTES:
            start_writeback(fd, self._written_back, end + length - self._written_back)
            self._written_back = end + length

    @property
    def sha256(self) -> str:
        """Lower hex SHA-256 of the data set so far."""
        return self._hash.hexdigest()

    @contextmanager
    def view(self) -> Iterator[memoryview]:
        """The data set as a read-only memoryview, valid inside the ``with`` only: a copy of a small one, the
        file's pages of any other.

        Raises:
            BufferError: On leaving, when a slice of it is still in use.
            SpoolError: The disk failed.
        """
        if self.size <= COPIED_BYTES:
            try:
                copy = os.pread(self.fileno(), self.size, self.data_offset)
            except OSError as error:
                raise spool_error(error, f"reading object {self.id}") from error
            with memoryview(copy) as data:
                yield data
            return
        length = self.data_offset + self.size
        with (
            mmap.mmap(self.fileno(), length, prot=mmap.PROT_READ) as pages,
            memoryview(pages) as whole,
            whole[self.data_offset :] as data,
        ):
            yield data

    def abandon(self) -> None:
        """Remove the file. Nothing to do once the object is in custody, quarantined or abandoned."""
        if self._fd >= 0:
            self._leave(self)

    def fileno(self) -> int:
        """The open file's descriptor, which stays the part's own.

        Raises:
            SpoolError: The object was committed, sealed, quarantined or abandoned.
        """
        if self._fd < 0:
            raise SpoolError(f"object {self.id} is not being written any more")
        return self._fd

    def stamp(self, wall_ns: int) -> None:
        """Note when the object was whole, finer than the file system does, for its order in a recovery."""
        try:
            os.utime(self.fileno(), ns=(wall_ns, wall_ns))
        except OSError as error:
            raise spool_error(error, f"finishing object {self.id}") from error

    def release(self) -> int:
        """Give the descriptor to the spool, and the room back; the part is closed from here on."""
        fd = self.fileno()
        self._fd = -1
        self._room.give(self._reserved)
        return fd

    def rehash(self, size: int) -> None:
        """Take the first `size` bytes of data set that are in the file as written."""
        fd = self.fileno()
        buffer = memoryview(bytearray(REHASH_BYTES))
        while self.size < size:
            wanted = buffer[: min(REHASH_BYTES, size - self.size)]
            count = os.preadv(fd, [wanted], self.data_offset + self.size)
            if not count:
                raise SpoolError(f"part {self.id} is shorter than it was")
            self._hash.update(wanted[:count])
            self.size += count


def _write_all(fd: int, views: list[memoryview], offset: int) -> None:
    """Write `views` at `offset` however little the kernel takes at once."""
    first = 0
    while first < len(views):
        written = os.pwritev(fd, views[first : first + MAX_GATHER], offset)
        offset += written
        while first < len(views) and written >= len(views[first]):
            written -= len(views[first])
            first += 1
        if written:
            views = [views[first][written:], *views[first + 1 :]]
            first = 0
