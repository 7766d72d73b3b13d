"""Pixels a second that streams share: each has what it was admitted with, and the rest is lent. Pure.

    reserve (size, rate) ─▶ share ─┐
                                   ├▶ spend (a picture) ─▶ yes, or the picture is left out
    what nobody reserved ─▶ spare ─┘

A stream whose pictures come faster than its share pays from the spare, which shrinks with each stream that
is admitted: only the one that exceeds its share loses pictures. Nobody has more than `max_rate` pictures a
second. A stream is admitted where its reservation fits beside what the others reserved or, where that is
more, really use.

Reservations are made on decoders' threads, pictures are paid for on the loop; a lock of a few instructions is
between them. Never here: clocks, codecs, what is done with a picture that is left out.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable
from dataclasses import dataclass, field

from rtc.bucket import Bucket

ASSUMED_RATE = 30.0
"""Pictures a second of a stream that declared none."""

BURST_SECONDS = 0.5
"""How much of a rate may be spent at once: what a jitter buffer or a stalled link lets go in one go."""

RATE_SLACK = 1.1
"""Clocks differ and networks bunch: a stream at its declared rate must never pay for that with a picture."""

USE_NS = 1_000_000_000
"""Over which a stream's use is measured."""


@dataclass(slots=True)
class _Share:
    pictures: Bucket
    """The lane's greatest rate, in pictures."""
    pixels: int = 0
    """Of the picture that it was reserved for; 0 before."""
    reserved: float = 0.0
    """Pixels a second."""
    own: Bucket = field(default_factory=lambda: Bucket(0.0, BURST_SECONDS))
    used: float = 0.0
    """Pixels a second, over the last full `USE_NS`."""
    _spent: int = 0
    _since_ns: int = 0

    @property
    def held(self) -> float:
        """Pixels a second that nobody else may be promised."""
        return max(self.reserved, self.used)

    def count(self, pixels: int, now_ns: int) -> None:
        """Measure the use."""
        if now_ns - self._since_ns >= USE_NS:
            self.used = self._spent * 1e9 / (now_ns - self._since_ns)
            self._spent, self._since_ns = 0, now_ns
        self._spent += pixels


class PixelBudget:
    """The budget of one side. Keys are whatever tells its users apart."""

    def __init__(self, per_second: int, max_rate: float) -> None:
        self.per_second = per_second
        self._max_rate = max_rate
        self._lock = threading.Lock()
        self._shares: dict[Hashable, _Share] = {}
        self._spare = Bucket(per_second, BURST_SECONDS)

    def __repr__(self) -> str:
        return f"<PixelBudget {self.held:.0f} of {self.per_second} in {len(self._shares)} shares>"

    @property
    def held(self) -> float:
        """Pixels a second that are reserved or used."""
        with self._lock:
            return sum(share.held for share in self._shares.values())

    def enter(self, key: Hashable) -> None:
        """Let `key` take part; it has nothing until it reserves."""
        with self._lock:
            self._shares[key] = _Share(Bucket(self._max_rate * RATE_SLACK, BURST_SECONDS))

    def leave(self, key: Hashable) -> None:
        """Give back what `key` had. What it still asks for, from another thread, is refused."""
        with self._lock:
            self._shares.pop(key, None)
            self._lend()

    def reserve(self, key: Hashable, pixels: int, rate: float = 0.0) -> bool:
        """Promise `key` pictures of so many pixels, `rate` a second (0: not declared).

        False where there is no room, and what it had stays as it was. Asking again for the same size is free.
        """
        with self._lock:
            share = self._shares.get(key)
            if share is None:
                return False
            if share.pixels == pixels:
                return True
            wanted = pixels * min(rate or ASSUMED_RATE, self._max_rate)
            others = sum(item.held for item in self._shares.values() if item is not share)
            if others + wanted > self.per_second:
                return False
            share.pixels, share.reserved, share.used = pixels, wanted, 0.0
            share.own = Bucket(wanted * RATE_SLACK, BURST_SECONDS)
            self._lend()
            return True

    def has_room(self, pixels: int, rate: float = 0.0) -> bool:
        """Whether someone new could be promised as much as `reserve` promises."""
        return self.held + pixels * min(rate or ASSUMED_RATE, self._max_rate) <= self.per_second

    def _lend(self) -> None:
        """The spare is what nobody reserved."""
        reserved = sum(share.reserved for share in self._shares.values())
        self._spare.change(max(self.per_second - reserved, 0.0))

    def spend(self, key: Hashable, pixels: int, now_ns: int) -> bool:
        """Whether a picture of so many pixels may go on; it is paid for then."""
        with self._lock:
            share = self._shares.get(key)
            if share is None or not share.pictures.has(now_ns):
                return False
            if not share.own.take(now_ns, pixels) and not self._spare.take(now_ns, pixels):
                return False
            share.pictures.credit -= 1
            share.count(pixels, now_ns)
            return True
