"""What `medferry status` makes of a relay's state, for a person and for an exit status."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
from rich.console import Console

from relay.status import complaints, duration, print_status, well

PART = {
    "pid": 11,
    "state": "running",
    "restarts": 0,
    "up_seconds": 90.0,
    "last_exit": None,
    "figures": {},
    "isolation": {
        "uid": "61184",
        "own uid": True,
        "network namespace": "empty",
        "no new privileges": True,
        "own view of files": False,
    },
}
LATENCY = {"p50_ms": 1.5, "p95_ms": 2.0, "p99_ms": 3.0, "max_ms": 4.0, "count": 7}
GOOD: dict[str, Any] = {
    "relay": "edge-1",
    "pid": 10,
    "state": "ready",
    "up_seconds": 90.0,
    "claim": "protocol separation",
    "isolation_possible": {},
    "not_started": {},
    "lanes": [
        {
            "name": "studies",
            "kind": "dicom",
            "lab": True,
            "state": "running",
            "source": {**PART, "figures": {"objects": 5, "link": {"fragments": 9}}},
            "valve": {**PART, "figures": {"fragments": 9}},
            "sink": {
                **PART,
                "figures": {
                    "latency": {"total": LATENCY},
                    "destinations": ["pacs", "backup"],
                    "link": {"silent": False, "missing": 0, "refused": {}},
                },
            },
        }
    ],
}


def state(**changes: Any) -> dict[str, Any]:
    """The good state with values changed by path, as in ``sink__figures__link__silent=True``."""
    made = copy.deepcopy(GOOD)
    for path, value in changes.items():
        *way, last = path.split("__")
        table = made["lanes"][0]
        for step in way:
            table = table[step]
        table[last] = value
    return made


def shown(made: dict[str, Any]) -> str:
    text = io.StringIO()
    print_status(made, Console(file=text, width=200))
    return text.getvalue()


def test_all_is_well() -> None:
    assert well(GOOD)
    text = shown(GOOD)
    for part in (
        "edge-1",
        "studies (dicom, lab)",
        "61184 (own)",
        "empty",
        "p50 1.5 p99 3.0 max 4.0 ms (of 7)",
    ):
        assert part in text
    assert "pacs, backup" in text
    assert "All is well." in text


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"state": "degraded"}, "lane studies is degraded"),
        ({"sink__figures__link__silent": True}, "nothing crosses the link"),
        ({"sink__figures__link__missing": 3}, "3 fragments were lost"),
        ({"sink__figures__link__refused": {"mac": 2, "stale": 1}}, "refused 3 fragments"),
        ({"source__figures__complaints": ["the spool is full"]}, "lane studies: the spool is full"),
        ({"valve__restarts": 3, "valve__up_seconds": 5.0}, "its valve was started again 3 times"),
    ],
)
def test_each_thing_that_is_not_well_is_said(change: dict[str, Any], complaint: str) -> None:
    made = state(**change)
    assert not well(made)
    assert complaint in complaints(made)[0]
    assert complaint in shown(made)
    assert "All is well" not in shown(made)


def test_restarts_of_long_ago_are_forgiven() -> None:
    assert well(state(valve__restarts=50, valve__up_seconds=3600.0))


def test_a_lane_that_could_not_be_put_back_is_said() -> None:
    made = copy.deepcopy(GOOD)
    made["not_started"] = {"camera": "cannot listen"}
    assert complaints(made) == ["lane camera is not started: cannot listen"]


def test_a_worker_that_has_told_nothing_yet_is_shown() -> None:
    made = state(state="starting", source__figures={}, sink__figures={}, source__pid=None)
    assert "starting" in shown(made)


def test_words_of_a_worker_are_neither_markup_nor_control() -> None:
    made = state(
        source__figures={"[/] [red]": "[/foo] \x1b[2J", "list": ["[/]"]},
        sink__figures={"complaints": ["[/bar] \x1b[31m"]},
    )
    text = shown(made)
    assert "[/foo]" in text and "[/bar]" in text and "[red]" in text
    assert "\x1b" not in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.6, "60 s"), (60, "1 min"), (3599, "59 min"), (7500, "2 h 5 min"), (356_400, "4 d 3 h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
