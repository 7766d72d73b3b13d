"""Where codecs' threads run, and whom they give way to.

A slice of each picture on each processor, where there are no more of them (`one_slice_each`).

x264 wakes the threads of all slices at once, from one processor. The fair scheduler gives the first an idle
processor and, on a machine of two, has none for the second: as often as not that one is queued behind the
first and stays there for the slice's whole time, while the processor that woke both falls idle. Threads that
are bound to one processor each cannot meet. Where processors are left over, the scheduler finds idle ones
itself, and nothing is bound: what is bound cannot give way.

All of them give way (`give_way`): they run as SCHED_BATCH (sched(7)), which takes no right that a worker
lacks. A thread of that policy does not preempt who wakes it, nor anyone else. A usual one took the processor
of the thread that hands out the slices before that had handed out the second, in every tenth picture or so,
and encoded both, one after the other. And with several streams it took that of a loop or a valve, which need
it for microseconds and hold up every picture until they have it.
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


def give_way() -> None:
    """Let the calling thread, and those that it starts from now on, preempt no other."""
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


@contextlib.contextmanager
def one_slice_each(slices: int) -> Iterator[list[int]]:
    """Bind the threads that are started in the block to one processor each, in turn, if `slices` take all.

    Yields a list that has their numbers after the block. A thread that another part of the process starts in
    the same moment is taken for one of them; it then runs on one processor, as well as before.
    """
    own = processors()
    started: list[int] = []
    with _turn:
        before = _threads()
        yield started
        started += sorted(_threads() - before)
        if not 1 < len(own) <= slices:
            return
        for number, thread in enumerate(started):
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(thread, {own[number % len(own)]})
