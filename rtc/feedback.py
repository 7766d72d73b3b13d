"""What viewers say, made into what the encoder does: keyframe requests coalesced, bitrates agreed. Pure.

PLI, FIR, a viewer who joins ─▶ KeyframeGate ─▶ one forced keyframe
REMB, loss in receiver reports ─▶ ViewerRate (one a viewer) ─▶ agree ─▶ the encoder's bitrate
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

KEYFRAME_INTERVAL_NS = 300_000_000
"""Between two forced keyframes: six viewers with loss must not make a stream of keyframes, and one who joins
must see a picture within 0.5 s."""

ESTIMATE_LIFE_NS = 5_000_000_000
"""A receiver's own estimate (REMB) holds so long; they come several times a second."""

FALLEN = 0.8
"""A new estimate below this share of the one before it: the path has become slower, and what was sent beyond
it stands in its queue."""

DRAIN_NS = 1_000_000_000
DRAIN_SHARE = 0.5
"""Of the estimate, what is voted for so long after a fall. The other half empties the queue and carries what
was lost in it; a stream that used all of the path would go on losing there."""

HEAVY_LOSS = 0.10
LIGHT_LOSS = 0.02
"""Share of packets lost: above the one the rate falls, below the other it rises (GCC, loss-based part)."""

RISE = 1.08
"""A report with light loss raises the rate by so much; reports come about once a second."""

FAIR_QUANTILE = 0.25
"""One encoder serves all: its bitrate is what three of four viewers can take. One bad link is not followed
by the many; of up to three viewers the slowest decides."""


@dataclass(slots=True)
class KeyframeGate:
    """Many requests, one keyframe, and not too often."""

    requests: int = 0
    _wanted_ns: int | None = None
    _made_ns: int | None = None

    def request(self, now_ns: int) -> None:
        """Someone needs a keyframe."""
        self.requests += 1
        if self._wanted_ns is None:
            self._wanted_ns = now_ns

    def due_ns(self) -> int | None:
        """When the wanted keyframe may be made; None where none is wanted."""
        if self._wanted_ns is None:
            return None
        if self._made_ns is None:
            return self._wanted_ns
        return max(self._wanted_ns, self._made_ns + KEYFRAME_INTERVAL_NS)

    def is_due(self, now_ns: int) -> bool:
        """Whether the next picture shall be a keyframe."""
        due = self.due_ns()
        return due is not None and now_ns >= due

    def made(self, asked_ns: int) -> None:
        """A keyframe was made; its encoding began at `asked_ns`, and requests since then still count."""
        self._made_ns = asked_ns
        if self._wanted_ns is not None and self._wanted_ns <= asked_ns:
            self._wanted_ns = None


@dataclass(slots=True)
class ViewerRate:
    """What one viewer's path can take, in bits per second, between `floor` and `ceiling`."""

    floor: int
    ceiling: int
    _by_loss: float = 0.0
    _estimate: int | None = None
    _estimated_ns: int = 0
    _drained_ns: int = 0

    def __post_init__(self) -> None:
        self._by_loss = float(self.ceiling)

    def estimated(self, bits_per_second: int, now_ns: int) -> None:
        """The viewer's own estimate came (REMB)."""
        before = self._estimate
        if before is not None and bits_per_second < min(FALLEN * before, self.ceiling):
            self._drained_ns = now_ns + DRAIN_NS
        self._estimate, self._estimated_ns = bits_per_second, now_ns

    def lost(self, share: float) -> None:
        """A receiver report came; `share` (0 to 1) of the packets since the last one was lost."""
        if share > HEAVY_LOSS:
            self._by_loss *= 1 - share / 2
        elif share < LIGHT_LOSS:
            self._by_loss *= RISE
        self._by_loss = min(max(self._by_loss, float(self.floor)), float(self.ceiling))

    def value(self, now_ns: int) -> int:
        """The viewer's vote."""
        rate = int(self._by_loss)
        if self._estimate is not None and now_ns - self._estimated_ns < ESTIMATE_LIFE_NS:
            share = DRAIN_SHARE if now_ns < self._drained_ns else 1.0
            rate = min(rate, int(share * self._estimate))
        return min(max(rate, self.floor), self.ceiling)


def agree(votes: Iterable[int]) -> int | None:
    """The bitrate for all: the vote at `FAIR_QUANTILE` from below; None without votes."""
    ordered = sorted(votes)
    return ordered[int(len(ordered) * FAIR_QUANTILE)] if ordered else None
