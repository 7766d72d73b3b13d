"""When does a file arrive? The kernel says so (inotify), so that the receiver is neither patched nor polled.

An arrival is the closing of a file that was written, or its renaming into the directory. Times are
CLOCK_MONOTONIC nanoseconds of when the notice was read, which is within a millisecond of the event.
"""

from __future__ import annotations

import ctypes
import os
import select
import struct
import time
from collections.abc import Callable, Collection
from pathlib import Path
from types import TracebackType

IN_CLOSE_WRITE, IN_MOVED_TO, IN_Q_OVERFLOW = 0x08, 0x80, 0x4000

_BUFFER_BYTES = 1 << 18
_HEADER = struct.Struct("iIII")

_libc = ctypes.CDLL(None, use_errno=True)


class Overflow(Exception):
    """The kernel dropped notices (fs.inotify.max_queued_events): the run cannot be timed."""


class Arrivals:
    """The files that arrive in `directory` while this context manager is open: `times` by key.

    The key is the file's name after the first dot, which for DCMTK's storescp is the SOP Instance UID.
    """

    def __init__(self, directory: Path) -> None:
        self.times: dict[str, int] = {}
        self._descriptor: int = _libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
        if self._descriptor < 0:
            raise OSError(ctypes.get_errno(), "inotify_init1")
        watch = _libc.inotify_add_watch(
            self._descriptor, os.fsencode(directory), IN_CLOSE_WRITE | IN_MOVED_TO
        )
        if watch < 0:
            os.close(self._descriptor)
            raise OSError(ctypes.get_errno(), f"inotify_add_watch {directory}")

    def __enter__(self) -> Arrivals:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)

    def wait(
        self,
        wanted: Collection[str],
        seconds: float,
        progress: Callable[[int], None] = lambda count: None,
    ) -> bool:
        """Whether all of `wanted` arrived within `seconds`. `progress` hears how many have, now and then."""
        missing = set(wanted) - self.times.keys()
        deadline = time.monotonic() + seconds
        while missing:
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            if select.select([self._descriptor], [], [], min(left, 0.5))[0]:
                missing -= self._read()
            progress(len(wanted) - len(missing))
        return True

    def first(self, count: int, seconds: float) -> list[int]:
        """The times of the first `count` arrivals, in order.

        Raises:
            TimeoutError: Fewer arrived within `seconds`.
        """
        deadline = time.monotonic() + seconds
        while len(self.times) < count:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"{len(self.times)} of {count} objects arrived within {seconds:.0f} s")
            if select.select([self._descriptor], [], [], left)[0]:
                self._read()
        return sorted(self.times.values())[:count]

    def _read(self) -> set[str]:
        buffer = os.read(self._descriptor, _BUFFER_BYTES)
        now = time.monotonic_ns()
        keys = set()
        at = 0
        while at < len(buffer):
            _, mask, _, length = _HEADER.unpack_from(buffer, at)
            if mask & IN_Q_OVERFLOW:
                raise Overflow("raise fs.inotify.max_queued_events")
            at += _HEADER.size
            name = buffer[at : at + length].rstrip(b"\0").decode()
            at += length
            keys.add(name.partition(".")[2])
        self.times |= dict.fromkeys(keys - self.times.keys(), now)
        return keys
