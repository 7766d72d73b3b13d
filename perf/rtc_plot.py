"""The media benchmark's picture: added latency, CPU by streams, what loss does, and the slope if it ran."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from perf.report import COLOURS, Results
from perf.rtc_figures import Runs, added, cpu, having, memory_keys, share_of

WAY_COLOURS = {
    **COLOURS,
    "gstreamer": "#c46a2b",
    "ffmpeg": "#7a9a3a",
    "medferry-webrtc": "#4db3dd",
    "aiortc": "#8e5ea2",
}

PROCESSES = {"valve.py": "valve", "relay.cli": "supervisor", "relay.worker": "worker"}
"""What a command line has in it, and what that process is."""

BAR = 0.8
"""Of the room between two groups of bars."""


def plot(results: Results, path: Path) -> None:
    """Write the picture (PNG or SVG by its name).

    Raises:
        ImportError: matplotlib is not installed (``pip install medferry[perf]``).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    whole = Figure(figsize=(13, 9), layout="constrained")
    FigureCanvasAgg(whole)
    (latency, load), (loss, slope) = whole.subplots(2, 2)
    runs = results.get("runs", [])
    _added_bars(latency, runs)
    _by_streams(load, runs)
    _by_loss(loss, runs)
    _over_time(slope, runs)
    for axes in (latency, load, loss, slope):
        axes.spines[["top", "right"]].set_visible(False)
    whole.savefig(path, dpi=130)


def _colour(way: str) -> str:
    return WAY_COLOURS.get(way, "#999999")


def _ways(runs: Runs, **plan: Any) -> list[str]:
    found = [run["plan"]["way"] for run in having(runs, **plan)]
    return [way for way in dict.fromkeys(found) if not way.startswith("direct")]


def _legend(axes: Any) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, framealpha=0.85, edgecolor="none")


def _process(name: str) -> str:
    """A process as the legend calls it: the second worker's name ends with " #2"."""
    command, _, number = name.partition(" #")
    kind = next((kind for word, kind in PROCESSES.items() if word in command), command[-24:])
    return f"{kind} {number}".rstrip()


def _offset(number: int, count: int) -> float:
    """Where bar `number` of `count` stands beside the middle of its group."""
    return (number - (count - 1) / 2) * BAR / count


def _added_bars(axes: Any, runs: Runs) -> None:
    loads = sorted({(run["plan"]["kind"], run["plan"]["codec"]) for run in having(runs, part="latency")})
    ways = _ways(runs, part="latency")
    for number, way in enumerate(ways):
        for at, (kind, codec) in enumerate(loads):
            p50, p99 = (
                added(runs, way, share, part="latency", kind=kind, codec=codec) for share in (0.5, 0.99)
            )
            if p50 is None or p99 is None:
                continue
            x = at + _offset(number, len(ways))
            label = way if way not in axes.get_legend_handles_labels()[1] else None
            axes.bar(x, p50, 0.9 * BAR / len(ways), color=_colour(way), label=label)
            axes.plot([x, x], [p50, p99], color="black", linewidth=1)
    axes.set_xticks(range(len(loads)), [f"{kind} {codec}" for kind, codec in loads], fontsize=8)
    axes.set_yscale("symlog", linthresh=1)
    axes.set_title("Added latency, ms (bar p50, line to p99)", loc="left", fontsize=10)
    _legend(axes)


def _by_streams(axes: Any, runs: Runs) -> None:
    for way in _ways(runs, part="streams"):
        counts = sorted({run["plan"]["streams"] for run in having(runs, part="streams", way=way)})
        shares = [cpu(runs, way, part="streams", streams=count) for count in counts]
        axes.plot(counts, shares, "-o", ms=4, color=_colour(way), label=way)
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.set_xlabel("streams at once")
    axes.set_title("CPU for each 720p30 stream, % of a core", loc="left", fontsize=10)
    _legend(axes)


def _by_loss(axes: Any, runs: Runs) -> None:
    losses = list(dict.fromkeys(run["plan"]["loss"] for run in having(runs, part="loss")))
    ways = _ways(runs, part="loss")
    for number, way in enumerate(ways):
        shares = [share_of(runs, "frozen_share", part="loss", way=way, loss=loss) or 0.0 for loss in losses]
        places = [at + _offset(number, len(ways)) for at in range(len(losses))]
        axes.bar(places, shares, 0.9 * BAR / len(ways), color=_colour(way), label=way)
    axes.set_xticks(range(len(losses)), losses, fontsize=8)
    axes.set_title("Time frozen, %, by loss at an RTT of 40 ms", loc="left", fontsize=10)
    _legend(axes)


def _over_time(axes: Any, runs: Runs) -> None:
    """Each series as a share of its first value, so that latency and memory fit one picture."""
    for run in having(runs, part="slope"):
        series = run["series"]
        for key in ["p50_ms", *memory_keys(runs)]:
            points = [(point["minutes"], point[key]) for point in series if key in point]
            if points and points[0][1]:
                first = points[0][1]
                label = "latency p50" if key == "p50_ms" else f"memory, {_process(key)}"
                axes.plot([x for x, _ in points], [100 * y / first for _, y in points], label=label)
    axes.set_xlabel("minutes")
    axes.set_title("Latency and memory over time, % of the first value", loc="left", fontsize=10)
    _legend(axes)
