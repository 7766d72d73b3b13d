"""RTP timestamps as times: wrap, sender reports, lip sync, no jumps."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rtc.clock import MAX_SLEW_NS, SECOND_NS, SenderClock, StreamClock, ntp_to_ns, widen

MS = 1_000_000


def ntp(nanoseconds: int) -> int:
    return -(-(nanoseconds << 32) // SECOND_NS)


@pytest.mark.parametrize(
    ("timestamp", "near", "wide"),
    [(5, 0, 5), (2**32 - 1, 0, -1), (0, 2**32 - 1, 2**32), (7, 3 * 2**32, 3 * 2**32 + 7)],
)
def test_widen(timestamp: int, near: int, wide: int) -> None:
    assert widen(timestamp, near) == wide


@given(st.integers(0, 2**40), st.integers(-(2**31) + 1, 2**31 - 1))
def test_widen_finds_what_was_cut(near: int, ahead: int) -> None:
    assert widen((near + ahead) % 2**32, near) == near + ahead


@given(st.integers(0, 2**62))
def test_ntp(nanoseconds: int) -> None:
    assert abs(ntp_to_ns(ntp(nanoseconds)) - nanoseconds) <= 1


def test_times_follow_timestamps_over_a_wrap_whatever_the_jitter() -> None:
    clock = StreamClock(rate=90_000)
    start = 2**32 - 5 * 3000
    times = [
        clock.time_ns((start + 3000 * i) % 2**32, 10**12 + i * 33 * MS + (i * 7 % 5) * MS) for i in range(20)
    ]
    steps = {after - before for before, after in itertools.pairwise(times)}
    assert all(abs(step - 33_333_333) <= 1 for step in steps)


def test_reports_bring_sound_and_picture_together_without_jumps() -> None:
    sender = SenderClock()
    video, audio = StreamClock(rate=90_000, sender=sender), StreamClock(rate=48_000, sender=sender)
    base, wall = 10**12, 10**18
    # Pictures arrive 80 ms after they were taken, sound 5 ms after; both were taken at the same times.
    video_times, audio_times = [], []
    for i in range(300):
        at = i * 20 * MS
        if i == 10:
            video.report(ntp(wall + at), 1_000_000 + 1800 * i, base + at + 6 * MS)
            audio.report(ntp(wall + at), 77 + 960 * i, base + at + 5 * MS)
        video_times.append(video.time_ns(1_000_000 + 1800 * i, base + at + 80 * MS))
        audio_times.append(audio.time_ns(77 + 960 * i, base + at + 5 * MS))
    assert abs(video_times[0] - audio_times[0]) > 70 * MS
    assert abs(video_times[-1] - audio_times[-1]) < MS
    for times in (video_times, audio_times):
        steps = [after - before for before, after in itertools.pairwise(times)]
        assert all(abs(step - 20 * MS) <= MAX_SLEW_NS + 1 for step in steps)


def test_a_sender_without_a_clock_is_timed_by_arrival() -> None:
    clock = StreamClock(rate=90_000)
    clock.report(0, 500, 10**12)
    assert clock.time_ns(0, 10**12) == 10**12


def test_a_jump_of_timestamps_starts_anew() -> None:
    clock = StreamClock(rate=90_000)
    clock.time_ns(0, 10**12)
    assert clock.time_ns(2**31 - 1, 10**12 + 33 * MS) == 10**12 + 33 * MS


@given(
    st.lists(
        st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**50), st.integers(0, 2**64 - 1)), max_size=30
    )
)
def test_no_time_is_negative(events: list[tuple[int, int, int]]) -> None:
    clock = StreamClock(rate=90_000)
    for timestamp, arrival_ns, ntp_time in events:
        clock.report(ntp_time, timestamp, arrival_ns)
        assert clock.time_ns(timestamp, arrival_ns) >= 0
