"""Memory for large records, used again once nobody looks at it any more.

A picture's memory is taken for 30 or 60 pictures a second. Fresh memory costs a page fault each 4 KiB, 0.2 ms
for one 720p picture, and is zeroed twice; memory that was used before is warm. Whoever holds a view of it
keeps it: CPython counts references, a view counts as one, and only memory that the pool alone refers to is
given out again. What it held before is still in it, so whoever takes it must fill it before showing it.
"""

from __future__ import annotations

import sys
from collections import deque

MAX_KEPT = 8
"""Pieces of memory that are remembered: of one stream one is filled, one waits, one is encoded and one was
encoded last. More than these are taken fresh, and forgotten."""


class Memories:
    """For one thread."""

    def __init__(self) -> None:
        self._kept: deque[bytearray] = deque(maxlen=MAX_KEPT)
        self._free = _references(deque([bytearray()]))

    def __repr__(self) -> str:
        return f"<Memories kept={len(self._kept)}>"

    def take(self, size: int) -> bytearray:
        """`size` bytes with anything in them, or more. Free memory that is too small is given up."""
        for _ in range(len(self._kept)):
            # The one that was looked at goes to the end, so that the oldest is tried first.
            self._kept.rotate(-1)
            if _references(self._kept) != self._free:
                continue
            if len(self._kept[-1]) >= size:
                return self._kept[-1]
            self._kept.pop()
        memory = bytearray(size)
        self._kept.append(memory)
        return memory


def _references(kept: deque[bytearray]) -> int:
    return sys.getrefcount(kept[-1])
