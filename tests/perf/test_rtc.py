"""The media benchmark's plans, figures and tables: what is added, what is compared, what is missing."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from perf import report, rtc, rtc_figures, rtc_plot, rtc_report
from perf.rtc_plan import Plan, Run, carry_out, plans


def run(
    way: str, *latencies: float, part: str = "latency", share: float = 0.0, failure: str = "", **plan: Any
) -> Any:
    """A run whose streams all had these latencies."""
    made = Plan(part=part, way=way, **plan)
    one = {
        "latencies_ms": list(latencies),
        "arrived_share": 1.0,
        "frozen_share": share,
        "late_share": share,
        "longest_gap_ms": max(latencies, default=None),
    }
    return asdict(Run(plan=made, reports=[one] * made.streams, cpu_share=0.5 * made.streams, failure=failure))


RUNS = [
    run("direct", 5),
    run("direct-webrtc", 6),
    run("medferry", 13),
    run("medferry", 15),
    run("gstreamer", 11),
    run("aiortc", 56),
    run("medferry-webrtc", 16),
    run("ffmpeg", 1, failure="it did not start"),
    run("medferry", 40, part="loss", loss="1 %", share=0.004),
    run("medferry-webrtc", 900, part="loss", loss="1 %", edge="viewer", share=0.02),
]


def test_added_is_beyond_the_direct_way_of_its_kind_and_the_median_of_repeats() -> None:
    assert rtc_figures.added(RUNS, "medferry", 0.5, **rtc_report.HD) == 9
    assert rtc_figures.added(RUNS, "aiortc", 0.5, **rtc_report.HD) == 50
    assert rtc_figures.added(RUNS, "ffmpeg", 0.5, **rtc_report.HD) is None
    assert rtc_figures.added(RUNS, "medferry", 0.5, part="latency", kind="1080p30") is None


def test_percentiles_are_of_all_streams_together() -> None:
    two = run("medferry", 1, 2, 3, 4, streams=2)
    assert rtc_figures.pooled(two, 0.5) == 2
    assert rtc_figures.pooled(two, 0.99) == 4


def test_targets_say_what_was_not_measured() -> None:
    rows = {row.name: row for row in report.rows({"runs": RUNS}, rtc_report.TARGETS)}
    expected: dict[str, tuple[float | None, str]] = {
        "RTP 720p30 H.264, added p50": (9, "target"),
        "720p30 added p50 / GStreamer's": (1.5, "target"),
        "720p30 added p50 / FFmpeg's": (None, "not measured"),
        "WebRTC added p50 / plain aiortc's": (0.2, "target"),
        "frozen at 1 % loss on the way in": (0.4, "target"),
        "frozen at 1 % loss to the viewer": (2.0, "missed"),
        "longest gap with loss, any edge": (900, "target"),
        "streams of 720p30 sustained / GStreamer's": (None, "not measured"),
        "slope: memory, fastest-growing process": (None, "not measured"),
    }
    assert {name: (rows[name].measured, rows[name].verdict) for name in expected} == expected


def test_nothing_at_all_is_not_measured() -> None:
    assert {row.verdict for row in report.rows({"runs": []}, rtc_report.TARGETS)} == {"not measured"}


def test_the_tables_and_the_plot_take_what_is_missing(tmp_path: Path) -> None:
    results = {"runs": RUNS}
    assert rtc_report.runs_table(results).row_count == len(RUNS)
    assert rtc_report.notes_table(results).row_count > 3
    for name, runs in (("full", RUNS), ("empty", [])):
        rtc_plot.plot({"runs": runs}, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 1000


def test_results_of_several_sittings_make_one_report_and_one_plot(tmp_path: Path) -> None:
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    first.write_text(json.dumps({"runs": RUNS[:2]}))
    second.write_text(json.dumps({"runs": RUNS[2:]}))
    assert rtc.main(["--parts", "", "--with", str(first)]) == 0
    plot = tmp_path / "plot.png"
    arguments = ["--parts", "", "--with", str(first), str(second), "--plot", str(plot)]
    assert rtc.main(arguments) == 1, "the second has what is missed"
    whole = tmp_path / "whole.png"
    rtc_plot.plot({"runs": RUNS}, whole)
    assert plot.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("content", [None, "", "[]", "{}"])
def test_what_holds_no_results_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None
) -> None:
    path = tmp_path / "results.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit) as caught:
        rtc.options(["--with", str(path)])
    assert caught.value.code == 2
    assert "has no results of this benchmark" in capsys.readouterr().err


def keeps_up_with(counts: dict[str, int]) -> Callable[[Plan], Run]:
    """A machine on which each way keeps up with so many streams; beyond, its p99 is 50 ms more."""

    def execute(plan: Plan) -> Run:
        latency = 50.0 if plan.streams > counts.get(plan.way, 99) else 5.0
        one = {"latencies_ms": [latency], "arrived_share": 1.0}
        return Run(plan=plan, reports=[one] * plan.streams, cpu_share=0.2 * plan.streams)

    return execute


def carried_out(arguments: list[str], execute: Callable[[Plan], Run]) -> list[dict[str, Any]]:
    return [asdict(done) for done in carry_out(plans(rtc.options(arguments).choice), execute)]


def test_streams_rise_until_a_way_no_longer_keeps_up() -> None:
    arguments = ["--parts", "streams", "--ways", "direct,medferry,gstreamer", "--streams", "2"]
    runs = carried_out(arguments, keeps_up_with({"medferry": 3, "gstreamer": 5}))
    assert rtc_figures.most_streams(runs, "medferry") == 3
    assert rtc_figures.most_streams(runs, "gstreamer") == 5
    tried = [item["plan"]["streams"] for item in runs if item["plan"]["way"] == "medferry"]
    assert tried == [1, 2, 3, 4, 4], "what is not sustained is tried once more, and then no further"
    assert rtc_figures.cpu(runs, "medferry", part="streams", streams=2) == 20


def test_streams_are_measured_as_far_as_asked_and_never_beyond_the_limit() -> None:
    arguments = ["--parts", "streams", "--ways", "direct,medferry"]
    counts = [item["plan"]["streams"] for item in carried_out(arguments, keeps_up_with({"medferry": 1}))]
    assert max(counts) == 6
    runs = carried_out(arguments, keeps_up_with({}))
    assert rtc_figures.most_streams(runs, "medferry") == rtc_figures.MAX_STREAMS
    broken_off = [item for item in runs if item["plan"]["streams"] <= 4]
    assert rtc_figures.most_streams(broken_off, "medferry") is None


@pytest.mark.parametrize(("failures", "most"), [(1, 5), (2, None)])
def test_without_a_direct_way_to_compare_with_no_limit_is_claimed(failures: int, most: float | None) -> None:
    keeps_up = keeps_up_with({"medferry": 5})
    left = failures

    def execute(plan: Plan) -> Run:
        nonlocal left
        if left and plan.way == "direct" and plan.streams == 3:
            left -= 1
            return Run(plan=plan, failure="MedferryError: a port was taken")
        return keeps_up(plan)

    runs = carried_out(["--parts", "streams", "--ways", "direct,medferry"], execute)
    assert rtc_figures.most_streams(runs, "medferry") == most


def test_pictures_that_do_not_arrive_are_no_way_to_keep_up() -> None:
    base = run("direct", 5, part="streams")
    ours = run("medferry", 6, part="streams")
    assert rtc_figures.sustained([base, ours], "medferry", 1)
    ours["reports"][0]["arrived_share"] = 0.9
    assert not rtc_figures.sustained([base, ours], "medferry", 1)


def test_one_more_viewer_costs_the_difference() -> None:
    few, many = (run("aiortc", 5, part="viewers", viewers=count) for count in (1, 5))
    many["cpu_share"] = few["cpu_share"] + 0.2
    assert rtc_figures.viewer_cpu([few, many], "aiortc") == pytest.approx(5)
    assert rtc_figures.viewer_cpu([few], "aiortc") is None


def test_the_flood_is_what_it_adds_beyond_what_it_does_to_the_ends() -> None:
    quiet: dict[str, Any] = {"part": "flood", "flood": False}
    loud: dict[str, Any] = {"part": "flood", "flood": True}
    runs = [run("direct", 5, **quiet), run("medferry", 15, **quiet)]
    runs += [run("direct", 9, **loud), run("medferry", 30, **loud)]
    assert rtc_figures.flooded(runs, 0.99) == 11


def test_the_lane_is_its_handover_and_its_link() -> None:
    one = run("medferry", 5)
    one["hops"] = [{"handover": {"p50_ms": 0.4}, "link": {"p50_ms": 0.8}, "total": {"p50_ms": 9.0}}]
    assert rtc_figures.lane([one, run("medferry", 5)], **rtc_report.HD) == pytest.approx(1.2)


def test_a_slope_is_the_last_fifth_less_the_first() -> None:
    one = run("medferry", 5, part="slope")
    one["series"] = [
        {"minutes": at, "p50_ms": 10 + at / 10, "sink": 100 + at, "valve": 9} for at in range(10)
    ]
    assert rtc_figures.slope([one], "p50_ms") == pytest.approx(0.8)
    assert rtc_figures.memory_keys([one]) == ["sink", "valve"]
    assert rtc_figures.fastest_growth([one]) == pytest.approx(8)


@pytest.mark.parametrize(
    ("arguments", "count"),
    [
        # RTP ways: three kinds, and VP8 at one of them.
        (["--parts", "latency", "--ways", "direct,medferry"], 8),
        (["--parts", "latency", "--ways", "direct-webrtc,aiortc"], 4),
        (["--parts", "loss", "--ways", "direct,medferry,ffmpeg,aiortc", "--repeat", "2"], 18),
        (["--parts", "viewers"], 4),
        (["--parts", "fall"], 2),
        (["--parts", "flood"], 4),
        (["--parts", "slope"], 1),
        (["--parts", "latency,loss", "--quick"], 7 + 5),
        (["--parts", "streams", "--quick", "--ways", "direct,medferry"], 4),
    ],
)
def test_plans(arguments: list[str], count: int) -> None:
    assert len(carried_out(arguments, keeps_up_with({}))) == count


def test_the_slope_is_only_measured_on_request() -> None:
    runs = carried_out(["--quick"], keeps_up_with({}))
    assert {item["plan"]["part"] for item in runs} == {
        "latency",
        "streams",
        "viewers",
        "loss",
        "fall",
        "flood",
    }
