"""The media benchmark's table of targets, its tables for people, and its plot."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from rich.table import Table

from perf.report import COLOURS, Results, Target

WAY_COLOURS = {
    **COLOURS,
    "gstreamer": "#c46a2b",
    "ffmpeg": "#7a9a3a",
    "medferry-webrtc": "#4db3dd",
    "aiortc": "#8e5ea2",
}


def runs(results: Results, **wanted: Any) -> list[dict[str, Any]]:
    """The runs that did not fail and whose plan has all of `wanted`."""
    return [
        item
        for item in results.get("runs", [])
        if not item["failure"] and all(item["plan"][key] == value for key, value in wanted.items())
    ]


def figure(results: Results, key: str, **plan: Any) -> float | None:
    """Median of one figure over repeats and streams; None where nothing was measured."""
    plan = {"streams": 1, "loss": "none", **plan}
    return _median(report[key] for item in runs(results, **plan) for report in item["reports"])


def _median(figures: Iterable[float | None]) -> float | None:
    known = [figure for figure in figures if figure is not None]
    return statistics.median(known) if known else None


def added(results: Results, way: str, key: str, **plan: Any) -> float | None:
    """Milliseconds that a way adds at p50 or p99 to no relay at all (of the same load, without loss)."""
    through = figure(results, key, way=way, **plan)
    base = figure(results, key, way="direct", **{**plan, "loss": "none"})
    return None if through is None or base is None else max(through - base, 0.0)


def cpu(results: Results, way: str, **plan: Any) -> float | None:
    """CPU of the relay, percent of one core for each stream."""
    plan = {"streams": 1, "loss": "none", **plan}
    found = [item["cpu_share"] / item["plan"]["streams"] for item in runs(results, way=way, **plan)]
    return 100 * statistics.median(found) if found else None


def _added(way: str, key: str, **plan: Any) -> Callable[[Results], float | None]:
    return lambda results: added(results, way, key, **plan)


def _shorter(other: str, ours: str, key: str, **plan: Any) -> Callable[[Results], float | None]:
    """How many times less than `other` ours adds."""

    def read(results: Results) -> float | None:
        theirs, mine = added(results, other, key, **plan), added(results, ours, key, **plan)
        return None if theirs is None or mine is None else theirs / max(mine, 0.1)

    return read


def _worst_gap(results: Results) -> float | None:
    gaps = [
        report["longest_gap_ms"]
        for item in results.get("runs", [])
        if item["plan"]["way"] == "medferry" and item["plan"]["loss"] != "none" and not item["failure"]
        for report in item["reports"]
        if report["longest_gap_ms"] is not None
    ]
    return max(gaps, default=None)


HD = {"codec": "h264", "height": 720}

TARGETS: tuple[Target, ...] = (
    Target(
        name="RTP 720p30 H.264, added p50",
        read=_added("medferry", "p50_ms", **HD),
        target=12,
        goal=8,
        unit="ms",
        at_most=True,
    ),
    Target(
        name="RTP 720p30 H.264, added p99",
        read=_added("medferry", "p99_ms", **HD),
        target=25,
        goal=15,
        unit="ms",
        at_most=True,
    ),
    Target(
        name="FFmpeg's added p50 / ours",
        read=_shorter("ffmpeg", "medferry", "p50_ms", **HD),
        target=2,
        goal=4,
    ),
    Target(
        name="GStreamer's added p50 / ours",
        read=_shorter("gstreamer", "medferry", "p50_ms", **HD),
        target=0.4,
        goal=0.8,
    ),
    Target(
        name="aiortc's added p50 / ours (WebRTC)",
        read=_shorter("aiortc", "medferry-webrtc", "p50_ms", **HD),
        target=3,
        goal=5,
    ),
    Target(name="longest gap with loss", read=_worst_gap, target=1000, goal=500, unit="ms", at_most=True),
)


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def runs_table(results: Results) -> Table:
    """Every run that was made, and what failed."""
    shown = Table(
        title="Glass to glass, of the benchmark's own encoder and decoder too", title_justify="left"
    )
    for column in ("load", "loss", "way"):
        shown.add_column(column)
    for column in ("p50", "p95", "p99", "added p50", "added p99", "seen", "gap ms", "CPU/stream"):
        shown.add_column(column, justify="right")
    for item in results.get("runs", []):
        plan = item["plan"]
        load = f"{plan['height']}p {plan['codec']}" + (f" × {plan['streams']}" if plan["streams"] > 1 else "")
        if item["failure"]:
            shown.add_row(load, plan["loss"], plan["way"], f"[bold red]{item['failure'][:50]}[/]")
            continue
        same = {key: plan[key] for key in ("codec", "height", "streams", "loss")}
        reports = item["reports"]
        typical = [_median(report[key] for report in reports) for key in ("p50_ms", "p95_ms", "p99_ms")]
        extra = [added(results, plan["way"], key, **same) for key in ("p50_ms", "p99_ms")]
        shown.add_row(
            load,
            plan["loss"],
            plan["way"],
            *map(_shown, typical),
            *("-" if plan["way"] == "direct" else _shown(value) for value in extra),
            f"{sum(r['pictures'] for r in reports)}/{sum(r['sent'] for r in reports)}",
            _shown(_median(report["longest_gap_ms"] for report in reports)),
            "-" if plan["way"] == "direct" else f"{100 * item['cpu_share'] / plan['streams']:.0f} %",
        )
    return shown


def plot(results: Results, path: Path) -> None:
    """Added latency, CPU by number of streams, and what loss does, as one picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    whole = Figure(figsize=(13, 4.5), layout="constrained")
    FigureCanvasAgg(whole)
    latency, load, loss = whole.subplots(1, 3)
    _added_bars(latency, results)
    _by_streams(load, results)
    _by_loss(loss, results)
    for axes in (latency, load, loss):
        axes.spines[["top", "right"]].set_visible(False)
    whole.savefig(path, dpi=130)


def _ways(results: Results, **plan: Any) -> list[str]:
    found = [item["plan"]["way"] for item in runs(results, **plan)]
    return [way for way in dict.fromkeys(found) if way != "direct"]


def _added_bars(axes: Any, results: Results) -> None:
    kinds = sorted({(i["plan"]["height"], i["plan"]["codec"]) for i in runs(results, streams=1, loss="none")})
    ways = _ways(results, streams=1, loss="none")
    width = 0.8 / max(len(ways), 1)
    for number, way in enumerate(ways):
        for at, (height, codec) in enumerate(kinds):
            p50 = added(results, way, "p50_ms", height=height, codec=codec)
            p99 = added(results, way, "p99_ms", height=height, codec=codec)
            if p50 is None or p99 is None:
                continue
            x = at + (number - (len(ways) - 1) / 2) * width
            label = way if at == 0 else None
            axes.bar(x, p50, width * 0.9, color=WAY_COLOURS.get(way, "#999999"), label=label)
            axes.plot([x, x], [p50, p99], color="black", linewidth=1)
    axes.set_xticks(range(len(kinds)), [f"{height}p {codec}" for height, codec in kinds], fontsize=8)
    axes.set_yscale("log")
    axes.set_title("Added latency, ms (bar p50, line to p99)", loc="left", fontsize=10)
    axes.legend(fontsize=8, frameon=False)


def _by_streams(axes: Any, results: Results) -> None:
    for way in _ways(results, loss="none", **HD):
        counts = sorted({item["plan"]["streams"] for item in runs(results, way=way, loss="none", **HD)})
        shares = [cpu(results, way, streams=count, **HD) for count in counts]
        axes.plot(counts, shares, "-o", ms=4, color=WAY_COLOURS.get(way, "#999999"), label=way)
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.set_xlabel("streams at once")
    axes.set_title("CPU for each 720p30 stream, % of a core", loc="left", fontsize=10)
    axes.legend(fontsize=8, frameon=False)


def _by_loss(axes: Any, results: Results) -> None:
    kinds = list(dict.fromkeys(item["plan"]["loss"] for item in runs(results, streams=1)))
    ways = [way for way in _ways(results, streams=1) if runs(results, way=way, loss=kinds[-1])]
    width = 0.8 / max(len(ways), 1)
    for number, way in enumerate(ways):
        for at, kind in enumerate(kinds):
            seen, sent = (figure(results, key, way=way, loss=kind, **HD) for key in ("pictures", "sent"))
            if seen is None or sent is None:
                continue
            x = at + (number - (len(ways) - 1) / 2) * width
            label = way if at == 0 else None
            axes.bar(x, 100 * seen / sent, width * 0.9, color=WAY_COLOURS.get(way, "#999999"), label=label)
    axes.set_ylim(0, 105)
    axes.set_xticks(range(len(kinds)), kinds, fontsize=8)
    axes.set_title("Pictures that arrived whole, %, by loss on the way in", loc="left", fontsize=10)
