"""The journal: custody of small objects within one write, until their own files are on the disk.

    commit ──▶ journal │ record │ record │ free … │   fdatasync, then the sender hears "success"
                            │
       in memory too ──▶ a file, made with many others a moment later ──▶ the record's place is free

To make one file durable the file system writes its data, its inode and its directory through a journal of its
own, which takes three times as long as writing the same bytes over a place that is there already, and waits
for everybody else's files. So what was just committed is here, durable, and in memory, for the link to take;
its file follows. After a crash the file is made from here.

    ┌ "MFJ1" │ crc32 u32 │ seq u64 │ id 16 │ sha256 32 │ data offset u32 │ size u64 ┐ file ┐ 0 … to 4096
    └──────────── crc32 is of what follows it up to the data set ───────────────────┘

A ring: a record that does not fit before the end goes to the beginning. The index remembers the `floor`: no
record up to that seq is needed any more, so what an earlier lap left means nothing. It is forgotten once
nothing new comes, so that no object is longer here than its retention allows.

Never here: who waits, the index, what is in a file.
"""

from __future__ import annotations

import hashlib
import os
import threading
import zlib
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from struct import Struct

from relay.spool_files import FILE_MODE, Directory, is_full, write_all
from relay.spool_types import MAX_HEADER_BYTES, Entry

NAME = "journal"

MAGIC = b"MFJ1"
_HEAD = Struct(">4sL")
_FIELDS = Struct(">Q16s32sLQ")
HEADER_BYTES = _HEAD.size + _FIELDS.size

BLOCK = 4096
"""Records begin at multiples of it: a page that is durable is not written again for the next record."""

GROW_BYTES = 8 << 20
"""Disk taken at a time while the ring is filled for the first time."""

MAX_RECORD_FILE_BYTES = 1 << 20
"""A longer file is written as it comes: there the disk's own speed counts, and memory."""


@dataclass(frozen=True, slots=True)
class Record:
    """A whole record as `Journal.replay` finds it. `data_offset` and `size` as in `Entry`; `at` is its file's
    first byte in the journal."""

    seq: int
    id: str
    sha256: str
    data_offset: int
    size: int
    at: int


@dataclass(slots=True)
class _Place:
    seq: int
    start: int
    end: int
    needed: bool = True


class Journal:
    """The journal of one spool. One thread appends, one syncs, one releases and forgets."""

    def __init__(self, directory: Directory, max_bytes: int) -> None:
        """Open it, or make an empty one.

        Raises:
            OSError: The disk failed.
        """
        self._max_bytes = max_bytes // BLOCK * BLOCK
        flags = os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
        self._fd = os.open(NAME, flags, FILE_MODE, dir_fd=directory.root)
        self._allocated = os.fstat(self._fd).st_size
        self._head = 0
        self._live: deque[_Place] = deque()
        self._places: dict[int, _Place] = {}
        self._last = 0
        self._failed = False
        self._lock = threading.Lock()
        """Around what says where there is room. Held for microseconds, but while the file grows or is cut."""

    def __repr__(self) -> str:
        return f"<Journal {len(self._live)} records head={self._head}/{self._max_bytes}>"

    @property
    def floor(self) -> int:
        """No record of a seq up to this is needed."""
        with self._lock:
            return self._live[0].seq - 1 if self._live else self._last

    def append(self, entry: Entry, data: bytearray) -> bool:
        """Write the whole file `data` of `entry`; durable after `sync`. False if there is no place for it, as
        there never is once the journal has failed.

        Raises:
            OSError: The disk failed.
        """
        length = len(data)
        if length > MAX_RECORD_FILE_BYTES or self._failed:
            return False
        with self._failing():
            start = self._reserve(entry.seq, -(-(HEADER_BYTES + length) // BLOCK) * BLOCK)
            if start is None:
                return False
            self._write(entry, data, start)
        return True

    def _reserve(self, seq: int, size: int) -> int | None:
        """A place of `size` bytes for the record of `seq`, if there is one."""
        with self._lock:
            start = self._place_for(size)
            if start is not None and self._allocate(start + size):
                place = self._places[seq] = _Place(seq, start, start + size)
                self._live.append(place)
                self._head = place.end
                self._last = max(self._last, seq)
                return start
        return None

    def _write(self, entry: Entry, data: bytearray, start: int) -> None:
        fields = _FIELDS.pack(
            entry.seq, bytes.fromhex(entry.id), bytes.fromhex(entry.sha256), entry.data_offset, entry.size
        )
        with memoryview(data) as view, view[: entry.data_offset] as head:
            checksum = zlib.crc32(head, zlib.crc32(fields))
            write_all(self._fd, [memoryview(_HEAD.pack(MAGIC, checksum) + fields), view], start)

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """Nothing is written any more after an error: what a disk then holds nobody can tell."""
        try:
            yield
        except OSError:
            self._failed = True
            raise

    def _place_for(self, size: int) -> int | None:
        """Where `size` bytes are free; None if nowhere."""
        if not self._live:
            self._head = 0
            return 0 if size <= self._max_bytes else None
        tail = self._live[0].start
        if self._head <= tail:
            return self._head if self._head + size <= tail else None
        if self._head + size <= self._max_bytes:
            return self._head
        return 0 if size <= tail else None

    def _allocate(self, end: int) -> bool:
        """See to it that the file reaches to `end`; False while the disk is full."""
        if end > self._allocated:
            grown = min(max(end, self._allocated + GROW_BYTES), self._max_bytes)
            try:
                os.posix_fallocate(self._fd, self._allocated, grown - self._allocated)
            except OSError as error:
                if is_full(error):
                    return False
                raise
            self._allocated = grown
        return True

    def sync(self) -> None:
        """Make what was appended durable.

        Raises:
            OSError: It is not.
        """
        with self._failing():
            os.fdatasync(self._fd)

    def forget(self) -> None:
        """Give up what the file holds, where nothing of it is needed: copies of objects that may be removed.

        Raises:
            OSError: The disk failed.
        """
        with self._lock:
            if not self._live and self._allocated and not self._failed:
                os.ftruncate(self._fd, 0)
                self._allocated = 0

    def release(self, seq: int) -> None:
        """The file of this object is durable itself, or the object is not kept."""
        with self._lock:
            place = self._places.pop(seq, None)
            if place is None:
                return
            place.needed = False
            while self._live and not self._live[0].needed:
                self._live.popleft()

    def replay(self, floor: int) -> Iterator[Record]:
        """The whole records above `floor`, in order of their seq. Before anything is appended.

        Raises:
            OSError: The disk failed.
        """
        found = []
        at = 0
        while at < self._allocated:
            record = self._read(at)
            if record is None:
                at += BLOCK
                continue
            at += -(-(HEADER_BYTES + record.data_offset + record.size) // BLOCK) * BLOCK
            self._last = max(self._last, record.seq)
            if record.seq > floor:
                found.append(record)
        yield from sorted(found, key=lambda record: record.seq)

    def _read(self, at: int) -> Record | None:
        """The record that begins at `at`, if one does and all of it is there."""
        head = os.pread(self._fd, HEADER_BYTES + MAX_HEADER_BYTES, at)
        if len(head) < HEADER_BYTES or not head.startswith(MAGIC):
            return None
        _, checksum = _HEAD.unpack_from(head)
        fields = head[_HEAD.size : HEADER_BYTES]
        seq, id, sha256, data_offset, size = _FIELDS.unpack(fields)
        if not 0 < data_offset <= MAX_HEADER_BYTES or not 0 < size <= MAX_RECORD_FILE_BYTES:
            return None
        if zlib.crc32(head[HEADER_BYTES : HEADER_BYTES + data_offset], zlib.crc32(fields)) != checksum:
            return None
        data = os.pread(self._fd, size, at + HEADER_BYTES + data_offset)
        if len(data) != size or hashlib.sha256(data).digest() != sha256:
            return None
        return Record(seq, id.hex(), sha256.hex(), data_offset, size, at + HEADER_BYTES)

    def copy_to(self, record: Record, fd: int) -> None:
        """Write the file of `record` to the empty file `fd`.

        Raises:
            OSError: The disk failed.
        """
        whole = os.pread(self._fd, record.data_offset + record.size, record.at)
        write_all(fd, [memoryview(whole)], 0)

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)
