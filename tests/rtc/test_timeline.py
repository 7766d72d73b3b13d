"""Times on side B."""

from __future__ import annotations

import itertools

from rtc.clock import SECOND_NS
from rtc.timeline import JUMP_NS, RtpClock, Timeline, ntp

MS = 1_000_000
STEP = 33_333_333


def test_media_spacing_is_kept_whatever_the_arrival() -> None:
    timeline = Timeline()
    times = [timeline.at(1, 10**12 + i * STEP, 5 * 10**9 + i * STEP + (i % 3) * 4 * MS) for i in range(90)]
    assert {b - a for a, b in itertools.pairwise(times)} == {STEP}


def test_a_new_publisher_goes_on_at_the_present() -> None:
    timeline = Timeline()
    timeline.at(1, 77, 10 * SECOND_NS)
    assert timeline.at(2, 10**15, 12 * SECOND_NS) == 12 * SECOND_NS


def test_a_jump_of_the_media_clock_is_another_clock() -> None:
    timeline = Timeline()
    timeline.at(1, 0, SECOND_NS)
    assert timeline.at(1, 3600 * SECOND_NS, SECOND_NS + STEP) == SECOND_NS + STEP
    assert timeline.at(1, 3600 * SECOND_NS + STEP, SECOND_NS + 2 * STEP) == SECOND_NS + 2 * STEP


def test_drift_is_followed_so_reports_stay_true() -> None:
    timeline = Timeline()
    # A media clock that loses 200 ppm, for ten minutes.
    for i in range(600 * 30):
        captured = SECOND_NS + i * STEP
        timeline.at(1, i * STEP - i * STEP // 5000, captured)
    true_lag = 600 * SECOND_NS // 5000
    assert abs(timeline.lag_ns - true_lag) < 5 * MS
    assert timeline.lag_ns < JUMP_NS


def test_sound_and_picture_of_one_moment_report_one_moment() -> None:
    timeline = Timeline()
    timeline.at(1, 0, SECOND_NS)
    for rate in (48_000, 90_000):
        clock = RtpClock(rate=rate)
        sent = clock.timestamp(timeline.at(1, STEP, SECOND_NS + STEP))
        reported = clock.report(timeline, SECOND_NS + STEP)
        assert abs((sent - reported) & 0xFFFFFFFF) <= rate // 1000


def test_timestamps_wrap() -> None:
    clock = RtpClock(rate=90_000, start=0xFFFFFFFF)
    assert clock.timestamp(SECOND_NS) == 89_999


def test_ntp() -> None:
    assert ntp(0) == 2_208_988_800 << 32
    assert ntp(500_000_000) & 0xFFFFFFFF == 1 << 31
