"""What a benchmark of live media says: from sightings of stamped pictures to figures, a table and a plot.

Pure but for `plot`, which writes a picture.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

FREEZE_MS = 500.0
"""Without a new picture for so long, a viewer sees a freeze."""

FROZEN_INTERVALS, FROZEN_MS = 3, 150.0
"""An interval between two pictures is frozen time where it is at least so many usual ones, or a usual one and
so many milliseconds, whichever is longer: 183 ms at 30 a second (W3C webrtc-stats, totalFreezesDuration)."""

LATE_INTERVALS = 2
"""What an interval between two pictures has beyond so many usual ones is lateness that a keen eye sees."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sighting:
    """A stamped picture was seen. Both times are microseconds of one clock."""

    counter: int
    painted_us: int
    seen_us: int
    timestamp: int = 0
    """RTP timestamp that it came with."""

    @property
    def latency_ms(self) -> float:
        """From painted to decoded."""
        return (self.seen_us - self.painted_us) / 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """One measurement. A latency is from a picture painted to the same one decoded."""

    name: str
    pictures: int
    """Seen, each counted once."""
    sent: int
    dropped: int
    """Painted within the measured time and never seen."""
    p50_ms: float
    p95_ms: float
    p99_ms: float
    max_ms: float
    jitter_ms: float
    """Mean difference between the latencies of pictures that follow each other."""
    freezes: int
    longest_gap_ms: float
    out_of_order: int
    frozen_share: float = 0.0
    """Of the measured time, within frozen intervals."""
    late_share: float = 0.0
    """Of the measured time, beyond the second picture interval in a row without a new picture."""
    bitrate: float = 0.0
    """Bits a second that were received."""
    latencies_ms: list[float] = field(default_factory=list, repr=False)

    def as_json(self) -> dict[str, Any]:
        """All figures, JSON-able: None where there was nothing to take one of."""
        figures = asdict(self)
        return {key: None if value != value else value for key, value in figures.items()}


def percentile(ordered: Sequence[float], share: float) -> float:
    """The smallest value that `share` (0 to 1) of them do not exceed; NaN of none."""
    if not ordered:
        return math.nan
    return ordered[min(len(ordered) - 1, max(0, math.ceil(share * len(ordered)) - 1))]


def evaluate(
    name: str, sightings: Sequence[Sighting], sent: Sequence[int], rate: float = 30.0, bitrate: float = 0.0
) -> Report:
    """The figures of one measurement.

    Args:
        name: What was measured.
        sightings: In the order they were seen; a picture seen twice counts once, the first time.
        sent: Counters of the pictures that count, rising. Sightings of others are left out.
        rate: Pictures a second, to know how long nothing was seen at the beginning and at the end.
        bitrate: Bits a second received.
    """
    wanted = set(sent)
    first: dict[int, Sighting] = {}
    for sighting in sightings:
        if sighting.counter in wanted:
            first.setdefault(sighting.counter, sighting)
    seen = list(first.values())
    latencies = [sighting.latency_ms for sighting in seen]
    ordered = sorted(latencies)
    pairs = list(itertools.pairwise(seen))
    gaps = [(after.seen_us - before.seen_us) / 1000 for before, after in pairs]
    # Where nothing was seen at first, or at last, or at all, that is a gap too.
    unseen = [seen[0].counter - sent[0], sent[-1] - seen[-1].counter] if seen else [len(sent)]
    gaps += [1000 * max(count, 0) / rate for count in unseen]
    interval_ms = 1000 / rate
    frozen_ms = max(FROZEN_INTERVALS * interval_ms, interval_ms + FROZEN_MS)
    whole_ms = max(len(sent), 1) * interval_ms
    changes = [abs(after.latency_ms - before.latency_ms) for before, after in pairs]
    return Report(
        name=name,
        pictures=len(seen),
        sent=len(wanted),
        dropped=len(wanted) - len(seen),
        p50_ms=round(percentile(ordered, 0.50), 3),
        p95_ms=round(percentile(ordered, 0.95), 3),
        p99_ms=round(percentile(ordered, 0.99), 3),
        max_ms=round(percentile(ordered, 1.0), 3),
        jitter_ms=round(sum(changes) / len(changes), 3) if changes else math.nan,
        freezes=sum(gap > FREEZE_MS for gap in gaps),
        longest_gap_ms=round(max(gaps), 3),
        frozen_share=round(sum(gap for gap in gaps if gap >= frozen_ms) / whole_ms, 5),
        late_share=round(sum(max(gap - LATE_INTERVALS * interval_ms, 0) for gap in gaps) / whole_ms, 5),
        out_of_order=sum(after.counter < before.counter for before, after in pairs),
        bitrate=round(bitrate),
        latencies_ms=[round(latency, 3) for latency in latencies],
    )


ROWS: tuple[tuple[str, str], ...] = (
    ("p50", "{p50_ms:.1f} ms"),
    ("p95", "{p95_ms:.1f} ms"),
    ("p99", "{p99_ms:.1f} ms"),
    ("max", "{max_ms:.1f} ms"),
    ("jitter", "{jitter_ms:.2f} ms"),
    ("pictures", "{pictures} of {sent}"),
    ("dropped", "{dropped}"),
    ("freezes", "{freezes}"),
    ("longest gap", "{longest_gap_ms:.0f} ms"),
    ("time frozen", "{frozen_share:.2%}"),
)
"""Label and format of each line that people read."""


def lines(report: Report) -> list[tuple[str, str]]:
    """Label and figure of each line, for a table."""
    figures = asdict(report)
    return [(label, pattern.format(**figures)) for label, pattern in ROWS]


def plot(reports: Sequence[Report], path: str) -> None:
    """Write the latencies over time, and their distribution, as a picture (PNG or SVG by its name).

    Raises:
        ImportError: matplotlib is not installed (``pip install medferry[perf]``).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    over_time, distribution = figure.subplots(1, 2)
    for report in reports:
        over_time.plot(report.latencies_ms, linewidth=0.8, label=report.name)
        ordered = sorted(report.latencies_ms)
        shares = [(index + 1) / len(ordered) for index in range(len(ordered))]
        distribution.plot(ordered, shares, linewidth=1.4, label=report.name)
    over_time.set(xlabel="picture", ylabel="latency, ms", ylim=(0, None))
    distribution.set(xlabel="latency, ms", ylabel="share of pictures", xlim=(0, None), ylim=(0, 1))
    distribution.legend(loc="lower right", frameon=False)
    figure.savefig(path, dpi=120)
