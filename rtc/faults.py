"""One log event per fault of a stream, within a bound that says how many it left out. No clock, no timer.

    note ─▶ an event with count 1, MAX_EVENTS of them between two flushes
    flush ─▶ for each reason one event more, with the count of those that were left out

The counts of a stream's events add up to what the metric ``media_faults`` counted.
"""

from __future__ import annotations

import logging
from collections import Counter

MAX_EVENTS = 5
"""Events of one stream between two flushes, a second: enough to see what is wrong. Damaged media can have
hundreds of faults a second, and must not fill a disk with them."""

log = logging.getLogger("medferry.rtc")


class FaultLog:
    """The faults of one stream."""

    def __init__(self, stream: str) -> None:
        self._stream = stream
        self._told = 0
        self._left_out: Counter[str] = Counter()

    def note(self, reason: str, detail: str) -> None:
        """A fault: `reason` is a fixed word, `detail` is for people."""
        if self._told < MAX_EVENTS:
            self._told += 1
            self._tell(reason, 1, detail or reason)
        else:
            self._left_out[reason] += 1

    def flush(self) -> None:
        """Tell what was left out, and begin anew. To be called each second and at the stream's end."""
        left_out, self._left_out = self._left_out, Counter()
        self._told = 0
        for reason, count in left_out.items():
            self._tell(reason, count, f"{count} more of this kind, not told one by one: {reason}")

    def _tell(self, reason: str, count: int, text: str) -> None:
        extra = {"event": "media_fault", "stream": self._stream, "reason": reason, "count": count}
        log.warning("stream %s: %s", self._stream, text, extra=extra)
