"""The spool's directory: its four folders by descriptor, its names, and what an OSError means to it.

    spares/<n>   parts/<id>   objects/<id>.<sha256><suffix>   quarantine/<id>.<reason><suffix>
    journal      index.db

Paths are never resolved: a worker may reach the directory only through ``.`` or an inherited descriptor.

Never here: the index, what is in a file.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re

from relay.errors import SpoolError, SpoolFull

DIRECTORY_MODE = 0o700
FILE_MODE = 0o600

MAX_GATHER = 1024
"""Buffers that one pwritev takes: Linux's IOV_MAX."""

SYNC_FILE_RANGE_WRITE_AND_WAIT = 1 | 2 | 4
"""linux/fs.h: wait for what is being written, write what is dirty, wait for that."""

_NO_SUCH_CALL = frozenset({errno.ENOSYS, errno.EPERM, errno.ESPIPE})
"""What kernels, sandboxes and files that have no sync_file_range say; a disk never does."""

_libc = ctypes.CDLL(None, use_errno=True)

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""What the kernel says when a file can grow no more: disk, quota, RLIMIT_FSIZE."""

_OBJECT_NAME = re.compile(r"([0-9a-f]{32})\.([0-9a-f]{64})(.*)")
_QUARANTINE_NAME = re.compile(r"([0-9a-f]{32})\.([a-z0-9-]{1,32})(.*)")
_PART_NAME = re.compile(r"[0-9a-f]{32}")
_REASON = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,30}[a-z0-9])?")
_SUFFIX = re.compile(r"(?:\.[A-Za-z0-9]{1,16})?")


def is_full(error: OSError) -> bool:
    """Whether it says that a file can grow no more, which may pass."""
    return error.errno in _FULL


def spool_error(error: OSError, what: str) -> SpoolError:
    """The spool's own error for `error`: `SpoolFull` where no more fits, else `SpoolError`."""
    reason = os.strerror(error.errno or 0)
    if is_full(error):
        return SpoolFull("disk", f"{what}: {reason}: free space on the file system of the spool")
    return SpoolError(f"{what}: {reason}")


def is_part_name(name: str) -> bool:
    """Whether `name` may be an object's id, and so a part's name."""
    return _PART_NAME.fullmatch(name) is not None


def is_reason(word: str) -> bool:
    """Whether `word` may name a reason for quarantine."""
    return _REASON.fullmatch(word) is not None


class Directory:
    """The directory of one spool, locked for this process, with descriptors of its folders."""

    def __init__(self, path: str, suffix: str) -> None:
        """Make what is missing and lock it.

        Raises:
            SpoolError: It cannot be used, or another process has it.
        """
        if _SUFFIX.fullmatch(suffix) is None:
            raise ValueError(f"suffix {suffix!r} is not a dot and 1 to 16 letters or digits")
        self.path = path
        self.suffix = suffix
        self._descriptors: list[int] = []
        try:
            os.makedirs(path, DIRECTORY_MODE, exist_ok=True)
            self.root = self._open(path, None)
            fcntl.flock(self.root, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for folder in ("spares", "parts", "objects", "quarantine"):
                try:
                    os.mkdir(folder, DIRECTORY_MODE, dir_fd=self.root)
                except FileExistsError:
                    pass
            self.spares = self._open("spares", self.root)
            self.parts = self._open("parts", self.root)
            self.objects = self._open("objects", self.root)
            self.quarantine = self._open("quarantine", self.root)
            os.fsync(self.root)
        except BlockingIOError:
            self.close()
            raise SpoolError(f"the spool {path} is in use by another process: stop that one first") from None
        except OSError as error:
            self.close()
            raise spool_error(error, f"opening the spool's directory {path}") from error

    def _open(self, path: str, at: int | None) -> int:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=at)
        self._descriptors.append(descriptor)
        return descriptor

    def close(self) -> None:
        """Let go of the descriptors, and with them of the lock."""
        while self._descriptors:
            os.close(self._descriptors.pop())

    @property
    def index_path(self) -> str:
        """Where SQLite finds the index. SQLite itself needs a path."""
        return os.path.join(self.path, "index.db")

    def free_bytes(self) -> int:
        """Bytes of the file system that an unprivileged process may still fill."""
        figures = os.fstatvfs(self.root)
        return figures.f_bavail * figures.f_frsize

    def object_name(self, id: str, sha256: str) -> str:
        """Name of a whole object in ``objects/``."""
        return f"{id}.{sha256}{self.suffix}"

    def quarantine_name(self, id: str, reason: str) -> str:
        """Name of a refused object in ``quarantine/``."""
        return f"{id}.{reason}{self.suffix}"

    def parse_object_name(self, name: str) -> tuple[str, str] | None:
        """Id and sha256 of a name in ``objects/``, None if it is no such name."""
        match = _OBJECT_NAME.fullmatch(name)
        return (match[1], match[2]) if match and match[3] == self.suffix else None

    def parse_quarantine_name(self, name: str) -> tuple[str, str] | None:
        """Id and reason of a name in ``quarantine/``, None if it is no such name."""
        match = _QUARANTINE_NAME.fullmatch(name)
        return (match[1], match[2]) if match and match[3] == self.suffix else None


def let_go(fd: int, offset: int, length: int) -> None:
    """Let the page cache work on a range (`length` 0: to the end): dirty pages begin to be written, which
    spares the fsync to come; clean ones are given back, for a range that nobody will read again.

    It is advice, and never waits; whatever is wrong with the disk, the fsync will say.
    """
    try:
        os.posix_fadvise(fd, offset, length, os.POSIX_FADV_DONTNEED)
    except OSError:
        pass


def write_out(fd: int) -> None:
    """Write the file's dirty pages to the disk and wait for them: an fsync that follows has little to do, and
    nobody else's write waits behind more than one file. Nothing is durable before that fsync
    (sync_file_range(2)). Where the kernel, or the file, knows no such call, all is left to it.

    Raises:
        OSError: The disk failed. It is told of once for an open file, so the fsync may not say it again.
    """
    failed = _libc.sync_file_range(
        ctypes.c_int(fd), ctypes.c_int64(0), ctypes.c_int64(0), ctypes.c_uint(SYNC_FILE_RANGE_WRITE_AND_WAIT)
    )
    if failed:
        number = ctypes.get_errno()
        if number not in _NO_SUCH_CALL:
            raise OSError(number, os.strerror(number))


def discard(name: str, at: int) -> None:
    """Remove a file that may be gone already."""
    try:
        os.unlink(name, dir_fd=at)
    except FileNotFoundError:
        pass


def write_all(fd: int, views: list[memoryview], offset: int) -> None:
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
