"""How many slices a picture is encoded in, a thread each: as many as it has use for, one where others wait.

    size, codec, processors ─▶ most_slices ─┐
    waiting of the threads  ─▶ Slicing ─────┴─▶ slices of the next encoder

On a machine with processors to spare, a picture of 720p is ready 0.7 ms sooner in two slices. Waking their
threads, and what each finds gone from the caches, costs a tenth of a stream's time on processors; where many
streams share those, nobody gains by it, since a slice then waits for a processor as long as it runs. So when
an encoder's threads have waited too long, the next encoder gets no more slices than keep it in time, and when
they have not for a while, all that it has use for.

Pure, but for `scheduled`, which asks the kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from rtc.placement import processors

SLICE_PIXELS = 320_000
"""H.264 pictures are encoded in slices of at least so many pixels, a thread each: two at 720p. Smaller ones
cost more in waking threads than they save. VP8 has one thread: libvpx's wait for each other by
spinning, which on a machine with few free cores costs far more than it gains."""

MAX_SLICES = 4
"""A slice cannot predict from the one above it; more of them cost bits."""

LOOK_PICTURES = 15
"""Between two looks at how long threads waited."""

CROWDED = 0.8
ROOMY = 0.2
"""How long they waited for processors, in parts of how long they ran. Two processors, 720p30: with two slices
0.1 to 0.2 with up to five streams, 0.6 beside a C-STORE flood, where two slices are still the better choice,
and 1.1 to 1.6 with seven streams; with one slice 0.1 to 0.2 with five and 0.7 with seven."""

CROWDED_LOOKS = 2
ROOMY_LOOKS = 20
"""So many looks in a row make up the mind: a second, and ten. The other way costs an encoder each time."""

TIMELY = 0.5
"""Of the time between two pictures, what encoding one may take at most in the fewest slices."""

Scheduled = Callable[[int], tuple[int, int]]
"""For a thread's number: nanoseconds that it ran, and that it waited for a processor."""


def scheduled(thread: int) -> tuple[int, int]:
    """What the kernel says of a thread of this process (``/proc/PID/task/TID/schedstat``): ns run, ns waited.

    Zeros where it is no more, or where the kernel keeps no such account.
    """
    try:
        with open(f"/proc/self/task/{thread}/schedstat", "rb") as file:
            ran, waited, _ = file.read().split()
    except (FileNotFoundError, ProcessLookupError):
        return 0, 0
    return int(ran), int(waited)


def most_slices(codec: str, width: int, height: int) -> int:
    """How many slices a picture has use for: never more than there are processors."""
    if codec != "h264":
        return 1
    return max(1, min(width * height // SLICE_PIXELS, len(processors()), MAX_SLICES))


class Slicing:
    """For one stream's encoders, one after the other: how many slices the next one is to have.

    Belongs to the thread that encodes.
    """

    def __init__(self, scheduled: Scheduled = scheduled) -> None:
        self.crowded = False
        self._scheduled = scheduled
        self._threads: tuple[int, ...] = ()
        self._ran_ns = self._waited_ns = 0
        self._pictures = 0
        self._looks = 0
        """In a row, that spoke for the other way."""
        self._picture_ns = 0
        """What a picture took of the processors, when they were found crowded."""

    def __repr__(self) -> str:
        return f"<Slicing {'crowded' if self.crowded else 'roomy'} looks={self._looks}>"

    def slices(self, most: int, rate: float) -> int:
        """How many slices the next encoder is to have, of `most`, at `rate` pictures a second."""
        if not self.crowded:
            return most
        return min(most, max(1, math.ceil(self._picture_ns * rate / 1e9 / TIMELY)))

    def watch(self, threads: Iterable[int]) -> None:
        """These threads encode from now on; none where their pictures have use for one slice only."""
        self._threads = tuple(threads)
        self._pictures = self._looks = 0
        self._ran_ns, self._waited_ns = self._sums()

    def encoded(self) -> bool:
        """One more picture is encoded. Whether processors were found crowded with it, or roomy again."""
        self._pictures += 1
        if self._pictures < LOOK_PICTURES or not self._threads:
            return False
        before = self._ran_ns, self._waited_ns
        self._ran_ns, self._waited_ns = self._sums()
        changed = self._look(self._ran_ns - before[0], self._waited_ns - before[1])
        self._pictures = 0
        return changed

    def _sums(self) -> tuple[int, int]:
        accounts = [self._scheduled(thread) for thread in self._threads]
        return sum(ran for ran, _ in accounts), sum(waited for _, waited in accounts)

    def _look(self, ran_ns: int, waited_ns: int) -> bool:
        against = waited_ns < ROOMY * ran_ns if self.crowded else waited_ns > CROWDED * ran_ns
        # Less than nothing: a thread that was taken for one of these has ended.
        self._looks = self._looks + 1 if against and ran_ns > 0 else 0
        if self._looks < (ROOMY_LOOKS if self.crowded else CROWDED_LOOKS):
            return False
        self.crowded = not self.crowded
        self._looks = 0
        self._picture_ns = ran_ns // LOOK_PICTURES
        return True
