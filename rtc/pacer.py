"""Spreads a large picture over a few milliseconds, sound first. Pure: packets and times go in and out.

    sound ────────▶┌───────┐
                   │ pacer │──▶ at most `burst` at once, then `rate`
    pictures ─────▶└───────┘

A picture of usual size passes at once. A keyframe is spread, so that it does not overrun a receiver's socket
buffer or an access point's queue. What does not fit the queue is refused whole: half a picture helps nobody.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")

BURST_BYTES = 24_000
"""Bytes that may leave at once: a picture of 4 Mb/s and some; a tenth of Linux' default socket buffer."""

FAST = 120_000_000
"""Bits per second beyond a burst where nothing is known to be slow: 60 KB in 3 ms."""

SLOW = 8_000_000
"""Bits per second that the pacer never goes below: a picture of 40 KB then takes 16 ms more."""

HEADROOM = 4
"""Times a path's estimated capacity, so that a picture takes a fraction of its interval on the way out."""

MAX_QUEUE_BYTES = 512_000
"""Bytes that may wait: half a second at `SLOW`. A picture that comes beyond is refused."""

MAX_SOUND_PACKETS = 10
"""Sound packets that may wait; the oldest is dropped. They pass before pictures, so one is the rule."""


@dataclass(slots=True)
class Pacer(Generic[T]):
    """One receiver's queue. `T` is a packet; its size is told when it is added."""

    rate: int = FAST
    burst: int = BURST_BYTES
    """Bytes that may leave at once."""
    dropped_pictures: int = 0
    dropped_sounds: int = 0
    _sound: deque[tuple[int, T]] = field(default_factory=deque)
    _pictures: deque[tuple[int, T]] = field(default_factory=deque)
    _queued: int = 0
    _credit: float = 0.0
    _counted_ns: int = 0

    def __post_init__(self) -> None:
        self._credit = self.burst

    @property
    def queued_bytes(self) -> int:
        """Bytes of pictures that wait."""
        return self._queued

    def limit(self, capacity: int) -> None:
        """Follow a path whose capacity is estimated as `capacity` bits per second."""
        self.rate = min(max(capacity * HEADROOM, SLOW), FAST)

    def add_picture(self, packets: list[tuple[int, T]]) -> bool:
        """Queue one picture's packets, each with its size. False where they do not fit and are dropped."""
        size = sum(item[0] for item in packets)
        if self._queued and self._queued + size > MAX_QUEUE_BYTES:
            self.dropped_pictures += 1
            return False
        self._pictures.extend(packets)
        self._queued += size
        return True

    def add_sound(self, size: int, packet: T) -> None:
        """Queue a packet that goes before all pictures."""
        if len(self._sound) >= MAX_SOUND_PACKETS:
            self._sound.popleft()
            self.dropped_sounds += 1
        self._sound.append((size, packet))

    def take(self, now_ns: int) -> list[T]:
        """What may leave at `now_ns`."""
        earned = (now_ns - self._counted_ns) * self.rate / 8e9
        self._credit = min(self.burst, self._credit + earned)
        self._counted_ns = now_ns
        ready = [packet for _, packet in self._sound]
        self._credit -= sum(size for size, _ in self._sound)
        self._sound.clear()
        while self._pictures and self._credit > 0:
            size, packet = self._pictures.popleft()
            self._credit -= size
            self._queued -= size
            ready.append(packet)
        return ready

    def wait_ns(self) -> int | None:
        """How long after the last `take` more may leave; None where nothing waits."""
        if not self._pictures and not self._sound:
            return None
        return max(0, int(-self._credit * 8e9 / self.rate)) + 1
