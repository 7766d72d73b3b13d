"""A part: an object that is being received, in a file or still in memory, and its data set's running hash.

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
from relay.spool_files import let_go, spool_error, write_all
from relay.spool_journal import MAX_RECORD_FILE_BYTES
from relay.spool_room import Room

WRITEBACK_BYTES = 8 << 20
"""Bytes after which the disk is set to work, so that the fsync of a long object finds little left to do."""

COPIED_BYTES = 128 << 10
"""Up to this size reading a data set costs less than mapping it."""

REHASH_BYTES = 1 << 20
"""Read at once while the bytes of an earlier process are hashed anew."""


@dataclass(frozen=True, slots=True)
class PartFile:
    """Where a part's file is: its name in a folder, both by descriptor."""

    name: str
    folder: int
    fd: int


class Part:
    """What becomes an object. `size` is bytes of data set so far. `Spool.begin` makes it."""

    __slots__ = (
        "_closed",
        "_file",
        "_hash",
        "_leave",
        "_memory",
        "_open_file",
        "_reserved",
        "_room",
        "_written_back",
        "data_offset",
        "given_id",
        "id",
        "size",
    )

    def __init__(
        self,
        *,
        id: str,
        given_id: bool,
        open_file: Callable[[], PartFile],
        memory: bytearray | None,
        data_offset: int,
        declared: int,
        room: Room,
        leave: Callable[[Part], None],
    ) -> None:
        """`memory` holds the header, or `open_file` is called at once and the header is in the file."""
        self.id = id
        self.given_id = given_id
        """Whether the id came from elsewhere, so that it may have come before."""
        self.size = 0
        self.data_offset = data_offset
        self._closed = False
        self._open_file = open_file
        self._memory = memory
        self._file = open_file() if memory is None else None
        self._hash = hashlib.sha256()
        self._room = room
        self._reserved = data_offset + declared
        self._leave = leave
        self._written_back = 0

    def __repr__(self) -> str:
        return f"<Part {self.id} {self.size} bytes{' closed' if self._closed else ''}>"

    def write(self, buffers: Sequence[Buffer]) -> None:
        """Append `buffers`, gathered in as few system calls as there can be, and hash them.

        Raises:
            SpoolFull: ``bytes``, ``disk``, or ``object`` when it would become longer than one object may be.
                What was there before is still there; abandon or quarantine it.
            SpoolError: The disk failed, or the part is not open any more.
        """
        self._check_open()
        views = [memoryview(buffer).cast("B") for buffer in buffers if len(buffer)]
        length = sum(map(len, views))
        self._room.check_object(self.size + length)
        end = self.data_offset + self.size
        excess = max(0, end + length - self._reserved)
        if excess:
            self._room.take(excess)
            self._reserved += excess
        if self._memory is not None and end + length <= MAX_RECORD_FILE_BYTES:
            for view in views:
                self._memory += view
        else:
            self._append(views, end, length)
        for view in views:
            self._hash.update(view)
        self.size += length

    def _append(self, views: list[memoryview], end: int, length: int) -> None:
        """Write at the end of the file, which is made for it if the part was in memory."""
        fd = self.file().fd
        try:
            write_all(fd, views, end)
        except OSError as error:
            os.ftruncate(fd, end)
            raise spool_error(error, f"writing object {self.id}") from error
        if end + length - self._written_back >= WRITEBACK_BYTES:
            let_go(fd, self._written_back, end + length - self._written_back)
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
        self._check_open()
        if self._memory is not None:
            with memoryview(self._memory) as whole, whole[self.data_offset :].toreadonly() as data:
                yield data
            return
        fd = self.file().fd
        if self.size <= COPIED_BYTES:
            try:
                copy = os.pread(fd, self.size, self.data_offset)
            except OSError as error:
                raise spool_error(error, f"reading object {self.id}") from error
            with memoryview(copy) as data:
                yield data
            return
        length = self.data_offset + self.size
        with (
            mmap.mmap(fd, length, prot=mmap.PROT_READ) as pages,
            memoryview(pages) as whole,
            whole[self.data_offset :] as data,
        ):
            yield data

    def abandon(self) -> None:
        """Forget it. Nothing to do once the object is in custody, quarantined or abandoned."""
        if not self._closed:
            self._leave(self)

    def _check_open(self) -> None:
        if self._closed:
            raise SpoolError(f"object {self.id} is not being written any more")

    def file(self) -> PartFile:
        """The part's file, which stays its own; what is in memory is written to it.

        Raises:
            SpoolError: The object was committed, sealed, quarantined or abandoned, or the disk failed.
        """
        self._check_open()
        if self._file is None:
            assert self._memory is not None
            try:
                self._file = self._open_file()
                write_all(self._file.fd, [memoryview(self._memory)], 0)
            except OSError as error:
                raise spool_error(error, f"writing object {self.id}") from error
            self._memory = None
        return self._file

    def fileno(self) -> int:
        """The descriptor of `file`."""
        return self.file().fd

    def stamp(self, wall_ns: int) -> None:
        """Note when the object was whole, finer than the file system does, for its order in a recovery."""
        self._check_open()
        if self._file is not None:
            try:
                os.utime(self._file.fd, ns=(wall_ns, wall_ns))
            except OSError as error:
                raise spool_error(error, f"finishing object {self.id}") from error

    def release(self) -> PartFile | bytearray | None:
        """Give what there is of it away, its file or its bytes, and the room back; it is closed from here on.

        None where its file could not be written: nothing of it is left.
        """
        self._check_open()
        self._closed = True
        self._room.give(self._reserved)
        return self._file or self._memory

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
