"""Each fault is told of once, alone or in a count."""

from __future__ import annotations

import logging
from collections import Counter

import pytest

from rtc.faults import MAX_EVENTS, FaultLog


def told(caplog: pytest.LogCaptureFixture) -> Counter[str]:
    """Faults by reason, as the log's events say."""
    found: Counter[str] = Counter()
    for record in caplog.records:
        fields = record.__dict__
        assert (fields["event"], fields["stream"], record.levelno) == ("media_fault", "room", logging.WARNING)
        found[fields["reason"]] += fields["count"]
    return found


def test_the_first_are_told_one_by_one_and_the_rest_in_counts(caplog: pytest.LogCaptureFixture) -> None:
    faults = FaultLog("room")
    for index in range(100):
        faults.note("decode" if index % 2 else "size", "damaged")
    assert len(caplog.records) == MAX_EVENTS
    assert "damaged" in caplog.text
    faults.flush()
    assert len(caplog.records) == MAX_EVENTS + 2
    assert told(caplog) == {"decode": 50, "size": 50}
    faults.flush()
    assert len(caplog.records) == MAX_EVENTS + 2, "nothing is told twice"


def test_after_a_flush_they_are_told_one_by_one_again(caplog: pytest.LogCaptureFixture) -> None:
    faults = FaultLog("room")
    for _ in range(2):
        for _ in range(MAX_EVENTS + 1):
            faults.note("decode", "")
        faults.flush()
    assert told(caplog) == {"decode": 2 * MAX_EVENTS + 2}
    assert len(caplog.records) == 2 * MAX_EVENTS + 2
