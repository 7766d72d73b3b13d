"""The media benchmark's table of targets, and its tables for people. Figures are read by `rtc_figures`.

A ratio to a peer is within one run on one machine. Rows that no issue sets a bound for are in `NOTES`: shown
beside the targets, without a verdict.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.table import Table

from perf.report import Results, Target
from perf.rtc_figures import (
    Runs,
    added,
    fastest_growth,
    flooded,
    lane,
    latency,
    median,
    most_streams,
    pooled,
    ratio,
    recovery,
    share_of,
    slope,
    viewer_cpu,
    worst,
)

HD = {"part": "latency", "codec": "h264", "kind": "720p30"}

Read = Callable[[Runs], float | None]


def _of(read: Read) -> Callable[[Results], float | None]:
    return lambda results: read(results.get("runs", []))


def _added(share: float, **plan: Any) -> Callable[[Results], float | None]:
    return _of(lambda runs: added(runs, "medferry", share, **{**HD, **plan}))


def _against(
    peer: str, share: float, ours: str = "medferry", **plan: Any
) -> Callable[[Results], float | None]:
    """What we add over what a peer adds."""

    def read(runs: Runs) -> float | None:
        mine, theirs = (added(runs, way, share, **{**HD, **plan}) for way in (ours, peer))
        return ratio(mine, theirs)

    return _of(read)


def _streams(runs: Runs) -> float | None:
    ours, theirs = most_streams(runs, "medferry"), most_streams(runs, "gstreamer")
    return None if not theirs else ratio(ours, theirs)


def _frozen(way: str, loss: str = "1 %", key: str = "frozen_share") -> Callable[[Results], float | None]:
    return _of(lambda runs: share_of(runs, key, part="loss", way=way, loss=loss))


def _longest_gap(runs: Runs) -> float | None:
    gaps = (worst(runs, "longest_gap_ms", part="loss", way=way) for way in ("medferry", "medferry-webrtc"))
    return max((gap for gap in gaps if gap is not None), default=None)


def _raw_flood(runs: Runs) -> float | None:
    """How much later video is under the flood, with what the flood does to the ends themselves."""
    quiet, loud = (latency(runs, 0.99, part="flood", way="medferry", flood=flood) for flood in (False, True))
    return None if quiet is None or loud is None else loud - quiet


def _at_most(
    name: str, read: Callable[[Results], float | None], target: float, goal: float, unit: str = "×"
) -> Target:
    return Target(name=name, read=read, target=target, goal=goal, unit=unit, at_most=True)


TARGETS: tuple[Target, ...] = (
    _at_most("RTP 720p30 H.264, added p50", _added(0.5), 12, 8, "ms"),
    _at_most("RTP 720p30 H.264, added p99", _added(0.99), 25, 15, "ms"),
    _at_most("720p30 added p50 / GStreamer's", _against("gstreamer", 0.5), 1.5, 1.0),
    _at_most("720p30 added p99 / GStreamer's", _against("gstreamer", 0.99), 1.2, 1.0),
    _at_most("1080p30 added p50 / GStreamer's", _against("gstreamer", 0.5, kind="1080p30"), 1.5, 1.0),
    _at_most("720p60 added p50 / GStreamer's", _against("gstreamer", 0.5, kind="720p60"), 1.5, 1.0),
    _at_most("720p30 added p50 / FFmpeg's", _against("ffmpeg", 0.5), 0.5, 0.25),
    _at_most("WebRTC added p50 / plain aiortc's", _against("aiortc", 0.5, "medferry-webrtc"), 0.25, 0.12),
    Target(name="streams of 720p30 sustained / GStreamer's", read=_of(_streams), target=0.8, goal=1.0),
    _at_most(
        "CPU of one more viewer at 2.5 Mb/s",
        _of(lambda runs: viewer_cpu(runs, "medferry-webrtc")),
        3,
        1.5,
        "%",
    ),
    _at_most(
        "the lane itself at 720p30, p50", _of(lambda runs: lane(runs, way="medferry", **HD)), 1.5, 0.5, "ms"
    ),
    _at_most("frozen at 1 % loss on the way in", _frozen("medferry"), 1.0, 0.2, "%"),
    _at_most("frozen at 1 % loss to the viewer", _frozen("medferry-webrtc"), 1.0, 0.2, "%"),
    _at_most("longest gap with loss, any edge", _of(_longest_gap), 1000, 500, "ms"),
    _at_most(
        "path falls from 4 to 1 Mb/s: back under 200 ms",
        _of(lambda runs: recovery(runs, "medferry-webrtc")),
        3,
        1,
        "s",
    ),
    _at_most("C-STORE flood: video's added p99, more", _of(lambda runs: flooded(runs, 0.99)), 10, 5, "ms"),
    _at_most(
        "slope: p50, last fifth less the first", _of(lambda runs: slope(runs, "p50_ms")), 1.0, 0.5, "ms"
    ),
    _at_most("slope: memory, fastest-growing process", _of(fastest_growth), 3, 1, "%"),
)

_VP8 = {**HD, "codec": "vp8"}
_LOST = {"part": "loss", "loss": "1 %"}

NOTES: tuple[tuple[str, str, Read], ...] = (
    ("GStreamer's added p50, 720p30 H.264", "ms", lambda runs: added(runs, "gstreamer", 0.5, **HD)),
    ("GStreamer's added p99, 720p30 H.264", "ms", lambda runs: added(runs, "gstreamer", 0.99, **HD)),
    ("VP8 720p30: medferry's added p50", "ms", lambda runs: added(runs, "medferry", 0.5, **_VP8)),
    ("VP8 720p30: GStreamer's added p50", "ms", lambda runs: added(runs, "gstreamer", 0.5, **_VP8)),
    ("WebRTC: medferry's added p50", "ms", lambda runs: added(runs, "medferry-webrtc", 0.5, **HD)),
    ("WebRTC: plain aiortc's added p50", "ms", lambda runs: added(runs, "aiortc", 0.5, **HD)),
    ("streams sustained: medferry", "", lambda runs: most_streams(runs, "medferry")),
    ("streams sustained: GStreamer", "", lambda runs: most_streams(runs, "gstreamer")),
    ("streams sustained: FFmpeg", "", lambda runs: most_streams(runs, "ffmpeg")),
    ("CPU of one more viewer: plain aiortc", "%", lambda runs: viewer_cpu(runs, "aiortc")),
    ("1 % loss: late on the way in", "%", lambda runs: share_of(runs, "late_share", way="medferry", **_LOST)),
    (
        "1 % loss: frozen, GStreamer",
        "%",
        lambda runs: share_of(runs, "frozen_share", way="gstreamer", **_LOST),
    ),
    (
        "1 % loss: frozen, plain aiortc",
        "%",
        lambda runs: share_of(runs, "frozen_share", way="aiortc", **_LOST),
    ),
    ("path falls: plain aiortc back after", "s", lambda runs: recovery(runs, "aiortc")),
    ("C-STORE flood: p99 more, the ends' own share included", "ms", _raw_flood),
)


def notes_table(results: Results) -> Table:
    """What was measured beside the targets; what was not is left out."""
    shown = Table(title="For information", title_justify="left")
    shown.add_column("figure")
    shown.add_column("measured", justify="right")
    for name, unit, read in NOTES:
        value = read(results.get("runs", []))
        if value is not None:
            shown.add_row(name, f"{value:.2f} {unit}".strip())
    return shown


COLUMNS = ("p50", "p99", "added p50", "added p99", "arrived", "frozen", "gap ms", "CPU/stream", "ends")


def _shown(value: float | None, pattern: str = "{:.1f}") -> str:
    return "-" if value is None else pattern.format(value)


def runs_table(results: Results) -> Table:
    """Every run that was made, and what failed. Latencies are in milliseconds, the ends' own included."""
    shown = Table(title="Runs: from a picture sent to the same one decoded", title_justify="left")
    for column in ("run", "way"):
        shown.add_column(column)
    for column in COLUMNS:
        shown.add_column(column, justify="right")
    for run in results.get("runs", []):
        shown.add_row(_load(run), run["plan"]["way"], *_cells(results["runs"], run))
    return shown


def _load(run: dict[str, Any]) -> str:
    plan = run["plan"]
    words = [plan["part"], plan["kind"], plan["codec"]]
    words += [f"× {plan['streams']}"] if plan["streams"] > 1 else []
    words += [f"{plan['viewers']} viewers"] if plan["viewers"] > 1 else []
    words += [f"loss {plan['loss']} {plan['edge']}"] if plan["loss"] != "none" else []
    words += [f"flood of {run['stored']} objects"] if plan["flood"] else []
    return " ".join(words)


def _cells(runs: Runs, run: dict[str, Any]) -> list[str]:
    if run["failure"]:
        return [f"[bold red]{run['failure'][:50]}[/]"]
    plan, reports = run["plan"], run["reports"]
    same = {key: plan[key] for key in ("part", "codec", "kind", "streams", "loss", "edge", "flood")}
    direct = plan["way"].startswith("direct")
    extra = [None if direct else added(runs, plan["way"], share, **same) for share in (0.5, 0.99)]
    return [
        *(_shown(pooled(run, share)) for share in (0.5, 0.99)),
        *map(_shown, extra),
        _shown(min(report["arrived_share"] for report in reports), "{:.1%}"),
        # Where only some keyframe intervals are decoded, what lies between is no freeze.
        *([_shown(_middle(reports, "frozen_share"), "{:.1%}")] if plan["every"] == 1 else ["-"]),
        *([_shown(_middle(reports, "longest_gap_ms"), "{:.0f}")] if plan["every"] == 1 else ["-"]),
        "-" if direct else f"{100 * run['cpu_share'] / plan['streams']:.0f} %",
        f"{100 * run['ends_cpu_share']:.0f} %",
    ]


def _middle(reports: list[dict[str, Any]], key: str) -> float | None:
    return median(report[key] for report in reports)
