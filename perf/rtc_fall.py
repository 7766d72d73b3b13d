"""How long a stream takes to be live again once its path has become slow. Pure: sightings in, seconds out."""

from __future__ import annotations

from collections.abc import Iterable

from rtc.bench_report import FROZEN_INTERVALS, FROZEN_MS, Sighting

BACK_MS = 200.0
"""Latency, ends and delay of the path included, below which a stream is live."""

STEADY_SECONDS = 2.0
"""It is back when it stays so for this long, so one lucky picture does not count."""


def recovery_seconds(seen: Iterable[Sighting], fell_us: int, end_us: int, rate: float) -> float:
    """Seconds from the fall until no picture is late and no freeze follows, for `STEADY_SECONDS`.

    Args:
        seen: In the order they were seen.
        fell_us: When the path fell.
        end_us: When watching ended.
        rate: Pictures a second.

    Returns:
        0.0 where nothing was felt; where it did not come back, all the time that was watched.
    """
    interval_ms = 1000 / rate
    frozen_us = 1000 * max(FROZEN_INTERVALS * interval_ms, interval_ms + FROZEN_MS)
    back_us = last_us = fell_us
    for sighting in seen:
        if sighting.seen_us < fell_us:
            continue
        if sighting.latency_ms >= BACK_MS or sighting.seen_us - last_us >= frozen_us:
            back_us = sighting.seen_us
        elif sighting.seen_us - back_us >= STEADY_SECONDS * 1e6:
            break
        last_us = sighting.seen_us
    else:
        # Nothing came for long at the end, or what came was not steady for long enough.
        return (end_us - fell_us) / 1e6
    return (back_us - fell_us) / 1e6
