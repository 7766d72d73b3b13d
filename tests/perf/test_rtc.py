"""The media benchmark's figures: what is added, what is compared, what is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from perf import report, rtc, rtc_report


def run(way: str, p50: float | None, *, loss: str = "none", streams: int = 1, failure: str = "") -> Any:
    plan = {"way": way, "codec": "h264", "height": 720, "streams": streams, "loss": loss}
    figures = {"p50_ms": p50, "p95_ms": p50, "p99_ms": p50, "longest_gap_ms": p50, "pictures": 1, "sent": 1}
    return {"plan": plan, "reports": [figures] * streams, "cpu_share": 0.5 * streams, "failure": failure}


RESULTS = {
    "runs": [
        run("direct", 5),
        run("medferry", 13),
        run("medferry", 15),
        run("ffmpeg", 45),
        run("gstreamer", None, loss="5 %"),
        run("medferry", 40, loss="5 %"),
        run("medferry", 16, streams=2),
        run("aiortc", 1, failure="it did not start"),
    ]
}


def test_added_is_beyond_the_direct_way_and_the_median_of_repeats() -> None:
    assert rtc_report.added(RESULTS, "medferry", "p50_ms", **rtc_report.HD) == 9
    assert rtc_report.added(RESULTS, "medferry", "p50_ms", loss="5 %", **rtc_report.HD) == 35
    assert rtc_report.added(RESULTS, "gstreamer", "p50_ms", loss="5 %", **rtc_report.HD) is None
    assert rtc_report.added(RESULTS, "aiortc", "p50_ms", **rtc_report.HD) is None


def test_cpu_is_for_each_stream() -> None:
    assert rtc_report.cpu(RESULTS, "medferry", streams=2, **rtc_report.HD) == 50


def test_targets_say_what_was_not_measured() -> None:
    verdicts = {row.name: row.verdict for row in report.rows(RESULTS, rtc_report.TARGETS)}
    assert verdicts["RTP 720p30 H.264, added p50"] == "target"
    assert verdicts["FFmpeg's added p50 / ours"] == "goal"
    assert verdicts["GStreamer's added p50 / ours"] == "not measured"
    assert verdicts["longest gap with loss"] == "goal"


def test_the_tables_and_the_plot_take_what_is_missing(tmp_path: Path) -> None:
    assert rtc_report.runs_table(RESULTS).row_count == len(RESULTS["runs"])
    rtc_report.plot(RESULTS, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "count"),
    [
        (["--parts", "latency", "--ways", "direct,medferry"], 8),
        (["--parts", "latency", "--ways", "aiortc"], 2),
        (["--parts", "streams", "--ways", "medferry", "--streams", "1,2,6"], 3),
        (["--parts", "loss", "--ways", "medferry,ffmpeg", "--repeat", "2"], 12),
    ],
)
def test_plans(arguments: list[str], count: int) -> None:
    assert len(list(rtc.plans(rtc.options(arguments)))) == count
