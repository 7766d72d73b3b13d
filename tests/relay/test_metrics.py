"""Figures of one side: counted, shown for Prometheus, and bounded."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from relay.metrics import HIGHEST_US, MAX_SCOPES, QUANTILES, Latency, Metrics


def samples(metrics: Metrics) -> dict[str, list[tuple[dict[str, str], float]]]:
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in text_string_to_metric_families(metrics.exposition().decode()):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def test_counters_and_gauges_carry_lane_and_side() -> None:
    metrics = Metrics("studies", "sink")
    metrics.count("objects", "Objects")
    metrics.count("objects", "Objects", 2)
    metrics.count("refused", "Refused", reason="size")
    metrics.gauge("depth", "Depth", 3)
    metrics.gauge("depth", "Depth", 1)
    found = samples(metrics)
    labels = {"lane": "studies", "side": "sink"}
    assert found["medferry_objects_total"] == [(labels, 3.0)]
    assert found["medferry_refused_total"] == [({**labels, "reason": "size"}, 1.0)]
    assert found["medferry_depth"] == [(labels, 1.0)]


def test_latencies_are_a_summary_by_hop() -> None:
    metrics = Metrics("studies", "sink")
    for milliseconds in range(1, 101):
        metrics.latency("total").record_ns(milliseconds * 1_000_000)
    found = samples(metrics)
    quantiles = {labels["quantile"]: value for labels, value in found["medferry_latency_seconds"]}
    assert quantiles["0.5"] == pytest.approx(0.050, rel=0.01)
    assert quantiles["0.99"] == pytest.approx(0.099, rel=0.01)
    assert quantiles["1.0"] == pytest.approx(0.100, rel=0.01)
    assert found["medferry_latency_seconds_count"][0][1] == 100
    assert found["medferry_latency_seconds_sum"][0][1] == pytest.approx(5.05)


def test_a_summary_for_status() -> None:
    latency = Latency()
    assert latency.summary() == {"p50_ms": 0.0, "p95_ms": 0.0, "p99_ms": 0.0, "max_ms": 0.0, "count": 0}
    latency.record_ns(2_000_000)
    assert latency.summary()["p50_ms"] == pytest.approx(2.0, rel=0.01)
    assert latency.tally() == {"count": 1, "sum_ms": 2.0}


@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=200))
def test_quantiles_are_the_librarys_own(durations: list[int]) -> None:
    latency = Latency()
    for nanoseconds in durations:
        latency.record_ns(nanoseconds)
    expected = latency._histogram.get_percentile_to_value_dict([100 * item for item in QUANTILES])
    assert [latency.quantile_ms(item) * 1000 for item in QUANTILES] == pytest.approx(
        [expected[100 * item] for item in QUANTILES]
    )


@pytest.mark.parametrize(
    ("nanoseconds", "milliseconds"), [(-5, 0.001), (0, 0.001), (10**18, HIGHEST_US / 1000)]
)
def test_what_no_clock_can_have_measured_is_cut(nanoseconds: int, milliseconds: float) -> None:
    latency = Latency()
    latency.record_ns(nanoseconds)
    assert latency.quantile_ms(1.0) == pytest.approx(milliseconds, rel=0.01)


def test_latencies_of_streams_are_apart() -> None:
    metrics = Metrics("camera", "sink")
    metrics.latency("total", "a").record_ns(1_000_000)
    metrics.latency("encode", "b").record_ns(1_000_000)
    assert metrics.latencies("a").keys() == {"total"}
    assert metrics.latencies("b").keys() == {"encode"}
    assert metrics.latencies() == {}


def test_streams_of_ever_new_names_do_not_pile_up() -> None:
    metrics = Metrics("camera", "source")
    for number in range(MAX_SCOPES * 2):
        for hop in ("receive", "decode"):
            metrics.latency(hop, f"stream-{number}").record_ns(1)
    assert len(metrics._latencies) == 2 * MAX_SCOPES
    assert metrics.latencies("stream-0") == {}
    assert metrics.latencies(f"stream-{MAX_SCOPES * 2 - 1}").keys() == {"receive", "decode"}
