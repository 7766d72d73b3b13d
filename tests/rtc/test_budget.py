"""Who gets the pixels, as tables: arrivals of several streams in, what each of them lost out."""

from __future__ import annotations

import threading
from collections.abc import Hashable

import pytest

from rtc.budget import ASSUMED_RATE, PixelBudget

START = 10**9
PIXELS = 640 * 360
SHARE = PIXELS * 30


def run(budget: PixelBudget, rates: dict[Hashable, float], seconds: float = 10) -> dict[Hashable, int]:
    """Pictures of `PIXELS` that each stream lost while all sent at their rates."""
    arrivals = sorted(
        (START + int(index * 1e9 / rate) + place, key)
        for place, (key, rate) in enumerate(rates.items())
        for index in range(round(rate * seconds))
    )
    lost = dict.fromkeys(rates, 0)
    for now_ns, key in arrivals:
        lost[key] += not budget.spend(key, PIXELS, now_ns)
    return lost


def budget_of(*keys: Hashable, shares: float, max_rate: float = 240) -> PixelBudget:
    budget = PixelBudget(round(shares * SHARE), max_rate)
    for key in keys:
        budget.enter(key)
        assert budget.reserve(key, PIXELS)
    return budget


def test_a_greedy_stream_takes_nothing_from_a_modest_one() -> None:
    lost = run(budget_of("modest", "greedy", shares=2), {"modest": 30, "greedy": 240})
    assert lost["modest"] == 0
    assert 0.8 < lost["greedy"] / (210 * 10) < 1.0


@pytest.mark.parametrize(("shares", "least"), [(2, 250), (3, 0)])
def test_what_nobody_reserved_is_lent(shares: float, least: int) -> None:
    lost = run(budget_of("modest", "fast", shares=shares), {"modest": 30, "fast": 60})
    assert lost["modest"] == 0
    assert least <= lost["fast"] <= 300 * (shares < 3)


def test_nobody_has_more_than_the_greatest_rate() -> None:
    lost = run(budget_of("one", shares=100, max_rate=60), {"one": 120})
    assert 450 < lost["one"] < 600


def test_a_rate_a_little_above_the_declared_one_costs_nothing() -> None:
    assert run(budget_of("one", shares=1), {"one": 30.5}, 60) == {"one": 0}


def test_what_comes_in_one_go_after_a_hold_is_not_too_much() -> None:
    budget = budget_of("one", shares=1)
    assert all(budget.spend("one", PIXELS, START + index * 33_333_333) for index in range(30))
    held_ns = START + 2 * 10**9
    assert sum(budget.spend("one", PIXELS, held_ns) for _ in range(100)) in range(14, 19)


def test_one_stream_more_than_fits_is_refused_until_another_leaves() -> None:
    budget = budget_of("one", "two", shares=2)
    budget.enter("three")
    assert not budget.reserve("three", PIXELS)
    assert not budget.spend("three", PIXELS, START)
    budget.leave("one")
    assert budget.reserve("three", PIXELS)


def test_what_is_used_beyond_the_share_is_not_given_to_others() -> None:
    budget = budget_of("fast", shares=2)
    assert run(budget, {"fast": 60}) == {"fast": 0}
    budget.enter("late")
    assert not budget.reserve("late", PIXELS)


def test_another_size_is_reserved_anew_or_the_old_one_stays() -> None:
    budget = budget_of("one", shares=2)
    assert budget.reserve("one", 2 * PIXELS)
    assert budget.held == 2 * SHARE
    assert not budget.reserve("one", 3 * PIXELS)
    assert budget.held == 2 * SHARE
    assert budget.reserve("one", PIXELS, rate=15)
    assert budget.held == SHARE / 2


def test_the_declared_rate_is_bounded_too() -> None:
    budget = PixelBudget(SHARE, 20)
    budget.enter("one")
    assert budget.reserve("one", PIXELS, rate=240)
    assert budget.held == PIXELS * 20


def test_whoever_has_left_gets_nothing_from_another_thread() -> None:
    budget = budget_of("one", shares=1)
    budget.leave("one")
    asked: list[bool] = []
    thread = threading.Thread(target=lambda: asked.append(budget.reserve("one", PIXELS)))
    thread.start()
    thread.join()
    assert asked == [False]
    assert budget.held == 0
    assert "0 shares" in repr(budget)


def test_the_assumed_rate_is_what_an_undeclared_stream_reserves() -> None:
    assert budget_of("one", shares=5).held == PIXELS * ASSUMED_RATE
