"""A token bucket. Pure: the time goes in."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Bucket:
    """Tokens that come `per_second`, of which those of `seconds` may be saved. It is full at first."""

    per_second: float
    seconds: float
    credit: float = field(init=False)
    _filled_ns: int = 0

    def __post_init__(self) -> None:
        self.credit = self.per_second * self.seconds

    def has(self, now_ns: int) -> bool:
        """Whether anything is left. Times (ns, any origin) may come out of order."""
        self._fill(now_ns)
        return self.credit > 0

    def take(self, now_ns: int, amount: float = 1) -> bool:
        """Take `amount`, where anything is left; the last token may be overdrawn."""
        if not self.has(now_ns):
            return False
        self.credit -= amount
        return True

    def take_whole(self, now_ns: int) -> bool:
        """Take one token, where a whole one is left: nothing is overdrawn."""
        self._fill(now_ns)
        if self.credit < 1:
            return False
        self.credit -= 1
        return True

    def _fill(self, now_ns: int) -> None:
        if now_ns > self._filled_ns:
            earned = (now_ns - self._filled_ns) * self.per_second / 1e9
            self.credit = min(self.credit + earned, self.per_second * self.seconds)
            self._filled_ns = now_ns

    def change(self, per_second: float) -> None:
        """Change the rate; what was saved beyond it is lost."""
        self.per_second = per_second
        self.credit = min(self.credit, per_second * self.seconds)
