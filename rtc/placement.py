"""Where an encoder's threads run: a slice of each picture on each processor, where there are no more of them.

x264 wakes the threads of all slices at once, from one processor. The fair scheduler gives the first an idle
processor and, on a machine of two, has none for the second: as often as not that one is queued behind the
first and stays there for the slice's whole time, while the processor that woke both falls idle. Threads that
are bound to one processor each cannot meet. Where processors are left over, the scheduler finds idle ones
itself, and nothing is bound: what is bound cannot give way.

They also run as SCHED_BATCH (sched(7)), which takes no right that a worker lacks. A thread of that policy
does not preempt who wakes it. A usual one did, in every tenth picture or so: it took the processor of the
thread that hands out the slices before that had handed out the second, and encoded both, one after the other.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator

_turn = threading.Lock()


def processors() -> list[int]:
    """The processors that this process may use."""
    return sorted(os.sched_getaffinity(0))


def _threads() -> set[int]:
    try:
        return set(map(int, os.listdir("/proc/self/task")))
    except FileNotFoundError:
        return set()


@contextlib.contextmanager
def one_slice_each(slices: int) -> Iterator[None]:
    """Bind the threads that are started in the block to one processor each, in turn, if `slices` take all.
    They then preempt no other thread.

    A thread that another part of the process starts in the same moment is taken for one of them; it then runs
    on one processor, as well as before.
    """
    own = processors()
    if not 1 < len(own) <= slices:
        yield
        return
    with _turn:
        before = _threads()
        yield
        for number, thread in enumerate(sorted(_threads() - before)):
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(thread, {own[number % len(own)]})
                os.sched_setscheduler(thread, os.SCHED_BATCH, os.sched_param(0))
