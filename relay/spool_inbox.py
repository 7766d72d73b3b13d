"""The committer's inbox: one thread puts, another takes, and is woken only for what cannot wait.

    put(item, by) ──▶ [ items ] ──▶ wait_until(due) … take()

Most of what a spool records may wait for tens of milliseconds. A thread that is woken for each such item
costs the loop more than the item does: it takes the interpreter, finds that nothing is due, sleeps again.

Never here: what an item is.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class Inbox(Generic[T]):
    """One putting thread, one taking thread."""

    def __init__(self) -> None:
        self._items: deque[T] = deque()
        self._wake = threading.Event()
        self._wakes_at = -math.inf
        """When the taking thread looks again by itself (CLOCK_MONOTONIC, seconds); -inf while it is awake."""

    def __repr__(self) -> str:
        return f"<Inbox {len(self._items)}>"

    def __bool__(self) -> bool:
        return bool(self._items)

    def put(self, item: T, by: float) -> None:
        """Leave an item that is to be taken by `by` (CLOCK_MONOTONIC, seconds; 0: at once). Never blocks."""
        self._items.append(item)
        if by < self._wakes_at:
            self._wake.set()

    def take(self) -> T | None:
        """The oldest item; None when there is none."""
        return self._items.popleft() if self._items else None

    def wait_until(self, due: float) -> None:
        """Sleep until `due`, or until something comes that may not wait so long, or is there already."""
        self._wakes_at = due
        # What was put before the line above woke nobody; what is put after it does.
        if not self._items:
            self._wake.wait(max(0.0, due - time.monotonic()))
        self._wakes_at = -math.inf
        self._wake.clear()
