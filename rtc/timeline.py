"""A stream's times on side B: media time to one timeline, timeline to RTP timestamps and reports. Pure.

Sound and pictures of a stream share one `Timeline`, so a receiver that compares their sender reports plays
lips and voice together. The timeline runs on this machine's monotonic clock but with the spacing of the
publisher's media clock, goes on when a publisher comes anew, and reveals nothing of side A's timestamps:
every RTP stream has its own random start.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field

from rtc.clock import SECOND_NS

NTP_EPOCH = 2_208_988_800
"""Seconds from 1900 to 1970."""

JUMP_NS = 500_000_000
"""Media time that strays so far from capture time is another clock: the timeline is anchored anew."""

SLEW = 256
"""Each picture or packet corrects one part in so many of the drift between media clock and ours."""


@dataclass(slots=True)
class Timeline:
    """Media times of one stream, from any epoch, as times that a receiver can follow."""

    _epoch: int | None = None
    _offset_ns: int = 0
    lag_ns: int = 0
    """How far the timeline is behind capture, smoothed: the media clock's drift since it was anchored."""

    def at(self, epoch: int, media_ns: int, captured_ns: int) -> int:
        """The time of what was captured, in nanoseconds near CLOCK_MONOTONIC."""
        drift = captured_ns - (media_ns + self._offset_ns)
        if epoch != self._epoch or abs(drift - self.lag_ns) > JUMP_NS:
            self._epoch = epoch
            self._offset_ns = captured_ns - media_ns
            self.lag_ns = drift = 0
        self.lag_ns += (drift - self.lag_ns) // SLEW
        return media_ns + self._offset_ns


def ntp(wall_ns: int) -> int:
    """A Unix time in nanoseconds as NTP's 32.32 fixed point (RFC 3550 §4)."""
    return ((wall_ns + NTP_EPOCH * SECOND_NS) << 32) // SECOND_NS & (1 << 64) - 1


@dataclass(slots=True, kw_only=True)
class RtpClock:
    """One outgoing RTP stream's timestamps, counted in `rate` hertz from a random start."""

    rate: int
    start: int = field(default_factory=lambda: secrets.randbits(32))

    def timestamp(self, timeline_ns: int) -> int:
        """The RTP timestamp of a time on the timeline."""
        return (self.start + timeline_ns * self.rate // SECOND_NS) & 0xFFFFFFFF

    def report(self, timeline: Timeline, now_ns: int) -> int:
        """The RTP timestamp of what is captured at `now_ns`: a sender report's, beside the wall time."""
        return self.timestamp(now_ns - timeline.lag_ns)
