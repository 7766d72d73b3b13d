"""What of a sequence has not come: since when each gap is open, and when its numbers are asked for again.

    open(first, end) ─▶ [ gap | gap | gap ] ─▶ `since_ns` of the oldest
                    └─▶ [ fresh … ] ─▶ due(now): up to a batch of numbers ─▶ [ again … ] ─▶ …

A gap is two numbers however wide it is, so a sender who leaves large ones costs no more than one who leaves
small ones: nothing here walks over what is missing, but for the numbers that a request names.

Sans-I/O: numbers and times go in and out. Whether a number has come in the meantime is the caller's to know.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Container
from dataclasses import dataclass, field

TRIES = 8
"""Requests for one packet."""

BATCH = 128
"""Sequence numbers in one request, so that it fits a packet whatever the pattern."""


@dataclass(slots=True)
class _Ask:
    """Numbers from `first` to before `end`, of which those that are missing still are to be asked for."""

    first: int
    end: int
    next_ns: int
    tries: int = 0

    def take(self, most: int, low: int, kept: Container[int]) -> list[int]:
        """Cut off the first `most` numbers that are missing still; those."""
        found: list[int] = []
        self.first = max(self.first, low)
        while self.first < self.end and len(found) < most:
            if self.first not in kept:
                found.append(self.first)
            self.first += 1
        return found


@dataclass(slots=True)
class Gaps:
    """The gaps of one sequence, in its order."""

    _open: deque[tuple[int, int]] = field(default_factory=deque)
    """(end, since_ns) of each gap."""
    _fresh: deque[_Ask] = field(default_factory=deque)
    """Not asked for yet."""
    _again: deque[_Ask] = field(default_factory=deque)
    """In the order of their time, as long as the interval does not shrink; then one may be late by that."""
    _asked: OrderedDict[int, None] = field(default_factory=OrderedDict)
    """Numbers that were asked for and have not come; in order, since they are asked for in order."""

    def open(self, first: int, end: int, now_ns: int) -> None:
        """The numbers from `first` to before `end` were passed over: ask for them at once."""
        self._open.append((end, now_ns))
        self._fresh.append(_Ask(first, end, now_ns))

    def clear(self) -> None:
        """Nothing is missed any more."""
        self._open.clear()
        self._fresh.clear()
        self._again.clear()
        self._asked.clear()

    def since_ns(self, first: int) -> int:
        """Since when the gap is open that `first`, the lowest missing number, is in."""
        while self._open[0][0] <= first:
            self._open.popleft()
        return self._open[0][1]

    @property
    def next_ns(self) -> int | None:
        """When something is to be asked for; None for never."""
        asks = self._fresh or self._again
        return asks[0].next_ns if asks else None

    def due(self, now_ns: int, interval_ns: int, low: int, kept: Container[int]) -> list[int]:
        """The numbers to ask for now, `BATCH` at most; again after `interval_ns`, `TRIES` times in all.

        Args:
            now_ns: The time.
            interval_ns: Between two requests for one number.
            low: Nothing below is missed any more.
            kept: The numbers from there on that have come.
        """
        found: list[int] = []
        for asks in (self._fresh, self._again):
            while asks and asks[0].next_ns <= now_ns and len(found) < BATCH:
                ask = asks[0]
                taken = ask.take(BATCH - len(found), low, kept)
                found += taken
                if ask.first >= ask.end:
                    asks.popleft()
                if taken and ask.tries + 1 < TRIES:
                    again = _Ask(taken[0], taken[-1] + 1, now_ns + interval_ns, ask.tries + 1)
                    self._again.append(again)
        self._asked.update(dict.fromkeys(found))
        return sorted(found)

    def came(self, number: int) -> None:
        """A missing number is there."""
        self._asked.pop(number, None)

    def forget(self, end: int) -> list[int]:
        """Give up all before `end`; those of them that were asked for."""
        given_up = []
        while self._asked and (first := next(iter(self._asked))) < end:
            del self._asked[first]
            given_up.append(first)
        return given_up
