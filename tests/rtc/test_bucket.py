"""The token bucket."""

from __future__ import annotations

from rtc.bucket import Bucket

START = 10**12


def test_a_bucket_refills_at_its_rate() -> None:
    bucket = Bucket(per_second=10, seconds=0.2)
    taken = [bucket.take_whole(at) for at in (0, 0, 0, 100_000_000, 100_000_000, 1_000_000_000)]
    assert taken == [True, True, False, True, False, True]


def test_only_a_whole_token_is_not_overdrawn() -> None:
    bucket = Bucket(per_second=10, seconds=0.15)
    assert [bucket.take_whole(0), bucket.take_whole(0)] == [True, False]
    assert [bucket.take(0), bucket.take(0)] == [True, False]


def test_times_out_of_order_earn_nothing() -> None:
    bucket = Bucket(10, 0.5)
    assert bucket.credit == 5
    assert bucket.take(START, 5)
    assert not bucket.has(START)
    assert bucket.take(START + 10**8)
    assert not bucket.has(START)
    assert not bucket.has(START + 10**8)


def test_a_slower_bucket_holds_less() -> None:
    bucket = Bucket(per_second=100, seconds=0.5)
    bucket.change(10)
    assert [bucket.take(0) for _ in range(6)] == [True] * 5 + [False]
