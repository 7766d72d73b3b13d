"""The ``[[lane]]`` table of a DICOM lane: what is refused, and that the message says what to write."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import ValidationError

from dicom.settings import GIB, DicomLane

LANE: dict[str, Any] = {
    "name": "studies",
    "kind": "dicom",
    "lab": True,
    "source": {
        "listen": "127.0.0.1:11112",
        "accept": [{"ae_title": "*", "from": ["127.0.0.0/8"]}],
    },
    "sink": {"destination": [{"name": "pacs", "ae_title": "PACS", "address": "127.0.0.1:11113"}]},
}
"""The least that works."""


def changed(path: str, value: Any) -> dict[str, Any]:
    """`LANE` with the value at the dotted `path` set; ``-`` removes it."""
    lane = copy.deepcopy(LANE)
    *parents, last = path.split(".")
    table: Any = lane
    for parent in parents:
        table = table[int(parent)] if parent.isdigit() else table.setdefault(parent, {})
    if value == "-":
        del table[last]
    else:
        table[last] = value
    return lane


def test_the_least_that_works_has_the_defaults() -> None:
    lane = DicomLane.model_validate(LANE)
    assert lane.source.ae_title == lane.sink.ae_title == "MEDFERRY"
    assert lane.source.max_object_bytes == lane.sink.max_object_bytes == 4 * GIB
    assert lane.sink.destination[0].max_associations == 4
    assert [(each.name, each.kind) for each in lane.source.listeners()] == [("dicom", "tcp")]
    assert lane.sink.listeners() == []


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("lab", False, "write lab = true"),
        ("source.accept", [], "at least 1 item"),
        ("source.accept", "-", "Field required"),
        ("source.accept.0.from", [], "at least 1 item"),
        ("source.accept.0.from", ["10.1.2.3/24"], "write one as in 10.1.2.0/24"),
        ("source.accept.0.from", ["here"], "write one as in 10.1.2.0/24"),
        ("source.ae_title", "SEVENTEEN_LETTERS", "write 1 to 16 printable ASCII"),
        ("source.ae_title", "   ", "write 1 to 16 printable ASCII"),
        ("source.ae_title", "A\\B", "write 1 to 16 printable ASCII"),
        ("source.ae_title", "影像", "write 1 to 16 printable ASCII"),
        ("source.private_sop_classes", ["1.2.x"], "write digits and dots"),
        ("source.private_sop_classes", ["1." + "2" * 63], "write digits and dots"),
        ("source.max_associations", 0, "greater than or equal to 1"),
        ("source.max_pdu", 100, "greater than or equal to 4096"),
        ("source.spool.max_bytes", 10, "greater than or equal to 1048576"),
        ("source.typo", 1, "Extra inputs are not permitted"),
        ("sink.destination", [], "at least 1 item"),
        ("sink.destination", LANE["sink"]["destination"] * 2, "give each its own"),
        ("sink.destination.0.name", "Not A Name", "pattern"),
        ("sink.destination.0.max_associations", 17, "less than or equal to 16"),
        ("sink.destination.0.timeout_seconds", 0, "greater than or equal to 1"),
        ("sink.max_object_bytes", GIB, "sink.max_object_bytes"),
        ("sink.spool.max_bytes", GIB, "sink.spool.max_bytes"),
    ],
)
def test_what_is_wrong_is_said(path: str, value: Any, says: str) -> None:
    with pytest.raises(ValidationError) as refused:
        DicomLane.model_validate(changed(path, value))
    assert says in str(refused.value)


@pytest.mark.parametrize(
    ("path", "value", "get"),
    [
        ("source.ae_title", " CT 1 ", lambda lane: lane.source.ae_title == "CT 1"),
        (
            "source.accept.0.from",
            ["fd00::/8", "10.1.2.3"],
            lambda lane: len(lane.source.accept[0].from_) == 2,
        ),
        ("source.max_object_bytes", GIB, lambda lane: lane.sink.max_object_bytes == 4 * GIB),
        ("source.spool.max_bytes", 1 << 20, lambda lane: lane.source.spool.max_bytes == 1 << 20),
    ],
)
def test_what_is_unusual_and_right(path: str, value: Any, get: Callable[[DicomLane], object]) -> None:
    assert get(DicomLane.model_validate(changed(path, value)))


def test_settings_cannot_be_changed() -> None:
    lane = DicomLane.model_validate(LANE)
    with pytest.raises(ValidationError):
        lane.source.ae_title = "OTHER"
