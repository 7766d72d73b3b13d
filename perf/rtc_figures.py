"""Figures read out of the media benchmark's runs. Pure: lists of runs as JSON in, numbers or None out.

"Added" is what a way takes beyond the direct way of the same part, load and number of streams: plain RTP from
sender to receiver, or one WebRTC connection between the two. So encoder, decoder, SRTP and sockets of the
benchmark's own ends are in both and cancel out. Medians are over repeats.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from rtc.bench_report import percentile

Runs = Sequence[dict[str, Any]]

BASES = {"medferry-webrtc": "direct-webrtc", "aiortc": "direct-webrtc"}
"""The direct way that a way is compared with, where it is not plain RTP's."""

SUSTAINED_MS = 33.0
"""Added p99 below which a stream is kept up with: one picture interval at 30 a second."""

ARRIVED_SHARE = 0.98
"""Of a stream's pictures, which must arrive too: dropping pictures is no way to keep up."""

MAX_STREAMS = 12
"""No more are tried: beyond, the ends alone take a core, and no way that decodes and encodes can keep up."""

LANE_HOPS = ("handover", "link")
"""From the decoded picture on side A to the picture off the link on side B. The sum of the hops' medians
stands for the median of their sum."""

FIFTHS = 5
"""A slope is the last fifth's median less the first fifth's."""


def having(runs: Runs, **plan: Any) -> list[dict[str, Any]]:
    """The runs that did not fail and whose plan has all of `plan`."""
    return [
        run
        for run in runs
        if not run["failure"] and all(run["plan"][key] == value for key, value in plan.items())
    ]


def median(figures: Iterable[float | None]) -> float | None:
    """The median of those that are known; None of none."""
    known = [figure for figure in figures if figure is not None]
    return statistics.median(known) if known else None


def pooled(run: dict[str, Any], share: float) -> float | None:
    """Milliseconds of latency at `share` (0 to 1), of all streams' pictures together."""
    latencies = sorted(value for report in run["reports"] for value in report["latencies_ms"])
    return percentile(latencies, share) if latencies else None


def latency(runs: Runs, share: float, **plan: Any) -> float | None:
    """Median over repeats of the latency at `share`, ends included."""
    return median(pooled(run, share) for run in having(runs, **plan))


def added(runs: Runs, way: str, share: float, **plan: Any) -> float | None:
    """Milliseconds that `way` adds at `share` (0.5: p50, 0.99: p99). The base is without loss."""
    through = latency(runs, share, way=way, **plan)
    base = latency(runs, share, way=BASES.get(way, "direct"), **{**plan, "loss": "none", "edge": "in"})
    return None if through is None or base is None else max(through - base, 0.0)


def ratio(measured: float | None, against: float | None, least: float = 0.1) -> float | None:
    """One over the other; `least` guards against a peer that adds nothing measurable."""
    return None if measured is None or against is None else measured / max(against, least)


def share_of(runs: Runs, key: str, **plan: Any) -> float | None:
    """Percent: the median over repeats and streams of a report's share."""
    found = median(report[key] for run in having(runs, **plan) for report in run["reports"])
    return None if found is None else 100 * found


def worst(runs: Runs, key: str, **plan: Any) -> float | None:
    """The largest of one figure in any report."""
    found = (report[key] for run in having(runs, **plan) for report in run["reports"])
    return max((figure for figure in found if figure is not None), default=None)


def cpu(runs: Runs, way: str, **plan: Any) -> float | None:
    """CPU of the relay, percent of one core for each stream."""
    shares = [run["cpu_share"] / run["plan"]["streams"] for run in having(runs, way=way, **plan)]
    return 100 * statistics.median(shares) if shares else None


def sustained(runs: Runs, way: str, count: int) -> bool:
    """Whether a way kept up with so many streams in any of its tries."""
    plan = {"part": "streams", "streams": count}
    base = latency(runs, 0.99, way="direct", **plan)
    for run in having(runs, way=way, **plan):
        p99 = pooled(run, 0.99)
        arrived = min(report["arrived_share"] for report in run["reports"])
        if base is not None and p99 is not None and p99 - base < SUSTAINED_MS and arrived >= ARRIVED_SHARE:
            return True
    return False


def most_streams(runs: Runs, way: str) -> float | None:
    """The number of streams up to which a way kept up with every number.

    None where its limit was not found: it was not tried, or broken off while it still kept up, or there is
    nothing to compare it with.
    """
    counts = sorted({run["plan"]["streams"] for run in runs if _tried(run, way)})
    most = 0
    for count in counts:
        if latency(runs, 0.99, way="direct", part="streams", streams=count) is None:
            return None
        if not sustained(runs, way, count):
            return float(most)
        most = count
    return float(most) if most == MAX_STREAMS else None


def _tried(run: dict[str, Any], way: str) -> bool:
    return bool(run["plan"]["part"] == "streams" and run["plan"]["way"] == way)


def viewer_cpu(runs: Runs, way: str) -> float | None:
    """Percent of a core for each viewer beyond the first."""
    plan = {"part": "viewers", "way": way}
    counts = sorted({run["plan"]["viewers"] for run in having(runs, **plan)})
    if len(counts) < 2:
        return None
    few, many = (
        statistics.median(run["cpu_share"] for run in having(runs, viewers=count, **plan))
        for count in (counts[0], counts[-1])
    )
    return float(100 * (many - few) / (counts[-1] - counts[0]))


def lane(runs: Runs, **plan: Any) -> float | None:
    """Milliseconds at p50 of the lane itself."""
    return median(
        sum(hops[hop]["p50_ms"] for hop in LANE_HOPS)
        for run in having(runs, **plan)
        for hops in run["hops"]
        if all(hop in hops for hop in LANE_HOPS)
    )


def recovery(runs: Runs, way: str) -> float | None:
    """Seconds from the fall of the path until the latency is back."""
    return median(run["recovery_seconds"] for run in having(runs, part="fall", way=way))


def flooded(runs: Runs, share: float) -> float | None:
    """Milliseconds that the flood adds to what medferry adds; the ends' own share of it is taken off."""
    quiet, loud = (added(runs, "medferry", share, part="flood", flood=flood) for flood in (False, True))
    return None if quiet is None or loud is None else loud - quiet


def slope(runs: Runs, key: str) -> float | None:
    """The change of one series, last fifth less first fifth."""
    return median(_change(run["series"], key) for run in having(runs, part="slope"))


def _change(series: list[dict[str, float]], key: str) -> float | None:
    values = [point[key] for point in series if key in point]
    fifth = len(values) // FIFTHS
    return statistics.median(values[-fifth:]) - statistics.median(values[:fifth]) if fifth else None


def memory_keys(runs: Runs) -> list[str]:
    """The processes whose memory a slope run followed."""
    keys = {key for run in having(runs, part="slope") for point in run["series"] for key in point}
    return sorted(keys - {"minutes", "p50_ms"})


def fastest_growth(runs: Runs) -> float | None:
    """Percent that the fastest-growing process grew between the first and the last fifth."""
    growths = []
    for key in memory_keys(runs):
        change = slope(runs, key)
        first = median(run["series"][0][key] for run in having(runs, part="slope") if key in run["series"][0])
        if change is not None and first:
            growths.append(100 * change / first)
    return max(growths, default=None)
