"""Verdicts from results, and that the picture can be drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from perf.report import DICOM_TARGETS, Row, median_rate, plot, rates_table, rows, table


def transfer(way: str, set_: str, seconds: float, **other: Any) -> dict[str, Any]:
    plan = {"way": way, "set": set_, "associations": 1, "nodelay": True, "stock_receiver": False}
    plan |= {key: other.pop(key) for key in list(other) if key in plan}
    process = {"pid": 1, "name": "x", "cpu_seconds": 0.5, "peak_bytes": other.pop("peak_bytes", 90_000_000)}
    found = {"objects": 100, "bytes": 10_000_000, "seconds": seconds, "slowest_share": 1.0}
    return {"plan": plan, **found, "identical": 100, "failure": "", "processes": [process], **other}


def verdict(results: dict[str, Any], name: str) -> tuple[float | None, str]:
    row = next(row for row in rows(results) if row.name == name)
    return row.measured, row.verdict


@pytest.mark.parametrize(
    ("measured", "at_most", "expected"),
    [
        (None, False, "not measured"),
        (0.59, False, "target"),
        (0.6, False, "goal"),
        (0.3, False, "target"),
        (0.29, False, "missed"),
        (0.29, True, "goal"),
        (0.45, True, "missed"),
    ],
)
def test_a_row_is_held_to_both_bounds(measured: float | None, at_most: bool, expected: str) -> None:
    low, high = (0.4, 0.3) if at_most else (0.3, 0.6)
    row = Row(name="x", measured=measured, target=low, goal=high, at_most=at_most)
    assert row.verdict == expected
    assert row.as_json()["verdict"] == expected


def test_nothing_measured_passes_nothing() -> None:
    assert {row.verdict for row in rows({})} == {"not measured"}
    assert len(rows({})) == len(DICOM_TARGETS) == 16


def test_rates_are_medians_and_failures_do_not_count() -> None:
    results = {
        "transfers": [
            transfer("direct", "ct", 1.0),
            transfer("direct", "ct", 2.0),
            transfer("direct", "ct", 50.0),
            transfer("direct", "ct", 0.001, failure="3 objects never arrived"),
        ]
    }
    assert median_rate(results, "direct", "ct") == 50
    assert median_rate(results, "direct", "ct", nodelay=False) is None
    assert median_rate(results, "medferry", "ct") is None


def test_ratios_compare_the_same_plan() -> None:
    results = {
        "transfers": [
            transfer("direct", "small", 1.0),
            transfer("medferry", "small", 4.0),
            transfer("direct", "small", 40.0, nodelay=False),
            transfer("medferry", "small", 4.0, nodelay=False),
        ]
    }
    assert verdict(results, "small 10 KB / direct") == (0.25, "target")
    assert verdict(results, "small 10 KB / direct, stock senders") == (10, "missed")
    assert verdict(results, "CT 0.5 MB / direct") == (None, "not measured")


def test_relays_are_compared_with_a_receiver_as_it_comes() -> None:
    results = {
        "transfers": [
            transfer("pynetdicom", "ct", 1.0),
            transfer("medferry", "ct", 0.25),
            transfer("pynetdicom", "ct", 5.0, stock_receiver=True),
        ]
    }
    assert verdict(results, "CT / pynetdicom relay") == (None, "not measured")
    results["transfers"].append(transfer("medferry", "ct", 0.5, stock_receiver=True))
    assert verdict(results, "CT / pynetdicom relay") == (10, "target")
    assert rates_table(results).row_count == 4


def test_the_worst_set_counts() -> None:
    results = {
        "transfers": [
            transfer("medferry", "small", 1.0, peak_bytes=100_000_000),
            transfer("medferry", "small", 0.5, associations=4, slowest_share=0.95),
            transfer("medferry", "ct", 1.0, peak_bytes=260_000_000),
            transfer("medferry", "ct", 1.25, associations=4, slowest_share=0.5),
        ]
    }
    assert verdict(results, "four associations / one (worst set)") == (0.8, "missed")
    assert verdict(results, "slowest of four / their mean (worst set)") == (0.5, "missed")
    assert verdict(results, "memory of the largest process") == (260, "missed")


def test_latency_is_read_in_milliseconds_and_idle_in_percent() -> None:
    results = {
        "latency": {"medferry": {"custody_to_delivered": {"p50_ms": 4.0, "p99_ms": 5.5}}},
        "echo": {"medferry": {}},
        "idle": {"medferry": {"share_of_a_core": 0.004}},
    }
    assert verdict(results, "one CT, custody to delivered, p50") == (4.0, "target")
    assert verdict(results, "one CT, custody to delivered, p99") == (5.5, "goal")
    assert verdict(results, "C-ECHO round trip, p50") == (None, "not measured")
    assert verdict(results, "64 idle associations, CPU") == (0.4, "target")


def test_tables_and_picture_of_partial_results(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    results = {
        "transfers": [
            transfer("direct", "ct", 1.0),
            transfer("medferry", "ct", 2.0),
            transfer("orthanc", "ct", 0.0, failure="100 objects never arrived"),
        ],
        "curves": {
            "size": [{"way": "medferry", "x": 10, "seconds_each": 0.1}],
            "associations": [{"way": "medferry", "x": 1, "rate": 0.0, "failure": "refused"}],
            "waiting": [{"way": "medferry", "x": 10, "rate_in": 300.0, "rate_out": 200.0}],
        },
    }
    assert rates_table(results).row_count == 3
    assert table(rows(results), "Targets").row_count == len(DICOM_TARGETS)
    plot(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
