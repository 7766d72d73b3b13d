"""The pacer, by table and by property."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rtc.pacer import BURST_BYTES, FAST, MAX_QUEUE_BYTES, MAX_SOUND_PACKETS, SLOW, Pacer

MS = 1_000_000


def packets(count: int, size: int = 1200, start: int = 0) -> list[tuple[int, int]]:
    return [(size, start + number) for number in range(count)]


def test_a_usual_picture_leaves_at_once() -> None:
    pacer: Pacer[int] = Pacer()
    assert pacer.add_picture(packets(14))
    assert pacer.take(0) == list(range(14))
    assert pacer.wait_ns() is None


def test_a_keyframe_is_spread_over_a_few_milliseconds() -> None:
    pacer: Pacer[int] = Pacer()
    pacer.add_picture(packets(60))
    now = 0
    sent = pacer.take(now)
    assert 15 < len(sent) < 30
    while (wait := pacer.wait_ns()) is not None:
        now += max(wait, MS)
        batch = pacer.take(now)
        assert sum(1200 for _ in batch) <= BURST_BYTES + 1200
        sent += batch
    assert sent == list(range(60))
    assert now <= 6 * MS


def test_where_nothing_is_known_to_be_slow_more_may_leave_at_once() -> None:
    pacer: Pacer[int] = Pacer(burst=64_000)
    pacer.add_picture(packets(80))
    sent = pacer.take(0)
    assert 64_000 <= 1200 * len(sent) < 64_000 + 1200
    # As much again only when the path has had time to carry it.
    assert 1200 * len(pacer.take(MS)) <= 16_000
    assert pacer.take(60_000 * MS) and not pacer.queued_bytes


def test_sound_goes_first() -> None:
    pacer: Pacer[int] = Pacer()
    pacer.add_picture(packets(60))
    sent = pacer.take(0)
    pacer.add_sound(200, -1)
    assert pacer.take(0) == [-1]
    pacer.add_sound(200, -2)
    assert pacer.take(5 * MS)[0] == -2
    assert sent == list(range(len(sent)))


def test_overfilled_with_pictures_it_refuses_whole_ones() -> None:
    pacer: Pacer[int] = Pacer(rate=SLOW)
    fits = 0
    while pacer.add_picture(packets(40)):
        fits += 1
    assert pacer.queued_bytes <= MAX_QUEUE_BYTES
    assert pacer.dropped_pictures == 1
    assert pacer.queued_bytes == fits * 40 * 1200


def test_overfilled_with_sound_it_drops_the_oldest() -> None:
    pacer: Pacer[int] = Pacer()
    for number in range(MAX_SOUND_PACKETS + 3):
        pacer.add_sound(100, number)
    assert pacer.take(0) == list(range(3, MAX_SOUND_PACKETS + 3))
    assert pacer.dropped_sounds == 3


def test_it_follows_a_path_within_bounds() -> None:
    pacer: Pacer[int] = Pacer()
    for capacity, rate in ((0, SLOW), (5_000_000, 20_000_000), (10**9, FAST)):
        pacer.limit(capacity)
        assert pacer.rate == rate


@given(st.lists(st.tuples(st.integers(1, 90), st.integers(0, 40)), max_size=30))
def test_order_is_kept_and_nothing_is_lost(pictures: list[tuple[int, int]]) -> None:
    pacer: Pacer[int] = Pacer()
    now, count = 0, 0
    expected: list[int] = []
    got: list[int] = []
    for size, gap in pictures:
        if pacer.add_picture(packets(size, start=count)):
            expected += range(count, count + size)
        count += size
        got += pacer.take(now)
        now += gap * MS
    while (wait := pacer.wait_ns()) is not None:
        now += wait
        got += pacer.take(now)
    assert got == expected
