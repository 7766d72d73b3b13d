"""RTP timestamps as times, and streams of one sender on one clock (RFC 3550 §4, §6.4.1).

An RTP timestamp counts a stream's own clock from a random start and wraps. `StreamClock` turns it into
nanoseconds on this machine's monotonic clock: at first by the arrival of the first packet; once the sender's
reports say when, on the sender's clock, a timestamp was taken, by that. Audio and video of one sender share a
`SenderClock`, so their times can be compared: lip sync.

What a new report corrects is applied slowly, so that times never jump within a stream.

Pure: no clock is read here.
"""

from __future__ import annotations

from dataclasses import dataclass, field

SECOND_NS = 1_000_000_000

MAX_SLEW_NS = 1_000_000
"""Correction applied to one picture or packet: 1 ms cannot be seen, and 50 ms are corrected within 2 s."""

STEP_NS = 500_000_000
"""A larger error is not drift but another clock: it is corrected at once."""


def widen(timestamp: int, near: int, bits: int = 32) -> int:
    """The number with `timestamp` as its low `bits` that is nearest to `near`."""
    size = 1 << bits
    ahead = (timestamp - near + size // 2) % size - size // 2
    return near + ahead


def ntp_to_ns(ntp: int) -> int:
    """A 32.32 fixed-point time in nanoseconds."""
    return ntp * SECOND_NS >> 32


@dataclass(slots=True)
class SenderClock:
    """One sender's wall clock on ours: the smallest delay seen stands for none."""

    offset_ns: int | None = None
    """Local monotonic minus sender's NTP time."""

    def report(self, ntp_ns: int, arrival_ns: int) -> None:
        """A sender report, written at `ntp_ns` on the sender's clock, arrived."""
        offset = arrival_ns - ntp_ns
        if self.offset_ns is None or abs(offset - self.offset_ns) > STEP_NS:
            self.offset_ns = offset
        else:
            # Follows a faster path at once, and a slower one or drift by a sixteenth.
            self.offset_ns = min(offset, self.offset_ns + (offset - self.offset_ns) // 16)


@dataclass(slots=True, kw_only=True)
class StreamClock:
    """Times of one stream. `rate` is its RTP clock in hertz."""

    rate: int
    sender: SenderClock = field(default_factory=SenderClock)
    _last: int | None = None
    """The latest timestamp, widened."""
    _zero_ns: int = 0
    """Local time of (wide) timestamp 0, as in use."""
    _reported: tuple[int, int] | None = None
    """Wide timestamp and sender's time of the last report."""

    def _span(self, ticks: int) -> int:
        return ticks * SECOND_NS // self.rate

    def report(self, ntp: int, timestamp: int, arrival_ns: int) -> None:
        """A sender report (RFC 3550 §6.4.1): `timestamp` was taken at `ntp` on the sender's clock."""
        ntp_ns = ntp_to_ns(ntp)
        if ntp_ns == 0:
            # The sender has no notion of time and says so.
            return
        self.sender.report(ntp_ns, arrival_ns)
        wide = timestamp if self._last is None else widen(timestamp, self._last)
        self._reported = (wide, ntp_ns)

    def restart(self) -> None:
        """The sender started over with new timestamps: forget the old ones."""
        self._last = None
        self._reported = None

    def time_ns(self, timestamp: int, arrival_ns: int) -> int:
        """When what carries `timestamp` was captured, on the local clock; differences are what counts."""
        if self._last is None:
            first = timestamp if self._reported is None else widen(timestamp, self._reported[0])
            self._last = first
            self._zero_ns = arrival_ns - self._span(first)
            self._zero_ns += self._error() or 0
            return max(self._zero_ns + self._span(first), 0)
        wide = widen(timestamp, self._last)
        if abs(self._zero_ns + self._span(wide) - arrival_ns) > 20 * STEP_NS:
            # Ten seconds off: timestamps jumped without any other sign of a restart.
            self.restart()
            return self.time_ns(timestamp, arrival_ns)
        self._last = max(wide, self._last)
        error = self._error()
        if error is not None:
            step = abs(error) > STEP_NS
            self._zero_ns += error if step else max(-MAX_SLEW_NS, min(error, MAX_SLEW_NS))
        return max(self._zero_ns + self._span(wide), 0)

    def _error(self) -> int | None:
        """How far the time of timestamp 0 is from what reports say; None before the first."""
        if self._reported is None or self.sender.offset_ns is None:
            return None
        wide, ntp_ns = self._reported
        return ntp_ns + self.sender.offset_ns - self._span(wide) - self._zero_ns
