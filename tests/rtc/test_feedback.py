"""Requests coalesced, votes counted."""

from __future__ import annotations

import pytest

from rtc.feedback import (
    DRAIN_NS,
    ESTIMATE_LIFE_NS,
    KEYFRAME_INTERVAL_NS,
    KeyframeGate,
    ViewerRate,
    agree,
)

MS = 1_000_000


def test_many_requests_make_one_keyframe() -> None:
    gate = KeyframeGate()
    assert not gate.is_due(0)
    for number in range(20):
        gate.request(number * MS)
    assert gate.is_due(20 * MS)
    gate.made(20 * MS)
    assert not gate.is_due(10**12)
    assert gate.requests == 20


def test_the_next_one_has_to_wait_but_comes() -> None:
    gate = KeyframeGate()
    gate.request(0)
    gate.made(0)
    gate.request(10 * MS)
    assert not gate.is_due(KEYFRAME_INTERVAL_NS - 1)
    assert gate.is_due(KEYFRAME_INTERVAL_NS)


def test_a_request_during_encoding_still_counts() -> None:
    gate = KeyframeGate()
    gate.request(0)
    gate.made(5 * MS)
    gate.request(6 * MS)
    gate.made(5 * MS)
    assert gate.due_ns() == 5 * MS + KEYFRAME_INTERVAL_NS


def test_a_flood_makes_few_keyframes() -> None:
    gate = KeyframeGate()
    made = 0
    for now in range(0, 10_000 * MS, 5 * MS):
        gate.request(now)
        if gate.is_due(now):
            gate.made(now)
            made += 1
    assert made <= 10_000 * MS // KEYFRAME_INTERVAL_NS + 1


def test_loss_lowers_and_its_absence_raises() -> None:
    rate = ViewerRate(300_000, 4_000_000)
    assert rate.value(0) == 4_000_000
    rate.lost(0.5)
    assert rate.value(0) == 3_000_000
    rate.lost(0.05)
    assert rate.value(0) == 3_000_000
    rate.lost(0.0)
    assert 3_000_000 < rate.value(0) < 4_000_000
    for _ in range(50):
        rate.lost(1.0)
    assert rate.value(0) == 300_000
    for _ in range(100):
        rate.lost(0.0)
    assert rate.value(0) == 4_000_000


def test_an_estimate_holds_for_a_while_and_within_bounds() -> None:
    rate = ViewerRate(300_000, 4_000_000)
    rate.estimated(1_000_000, 0)
    assert rate.value(0) == 1_000_000
    assert rate.value(ESTIMATE_LIFE_NS) == 4_000_000
    rate.estimated(1, 0)
    assert rate.value(0) == 300_000
    rate.estimated(2**60, 0)
    assert rate.value(0) == 4_000_000


@pytest.mark.parametrize(
    ("estimates", "at_once", "in_the_end"),
    [
        ((3_000_000, 1_600_000), 800_000, 1_600_000),
        ((3_000_000, 2_500_000, 2_100_000), 2_100_000, 2_100_000),
        ((9_000_000, 4_500_000), 4_000_000, 4_000_000),
        ((1_000_000, 500_000), 300_000, 500_000),
        ((500_000,), 500_000, 500_000),
    ],
    ids=["a fall", "a slope", "beyond what is sent anyway", "no less than the least", "the first"],
)
def test_after_a_fall_half_of_the_estimate_empties_the_queue(
    estimates: tuple[int, ...], at_once: int, in_the_end: int
) -> None:
    rate = ViewerRate(300_000, 4_000_000)
    for estimate in estimates:
        rate.estimated(estimate, 0)
    assert rate.value(0) == rate.value(DRAIN_NS - 1) == at_once
    assert rate.value(DRAIN_NS) == in_the_end


@pytest.mark.parametrize(
    ("votes", "bitrate"),
    [([], None), ([5], 5), ([5, 1], 1), ([5, 1, 4], 1), ([9, 1, 8, 7], 7), ([9, 8, 1, 2, 7, 6, 5, 4], 4)],
)
def test_one_bad_link_of_many_is_not_followed(votes: list[int], bitrate: int | None) -> None:
    assert agree(votes) == bitrate
