"""The one table that knows which package serves which kind of lane.

`relay` imports neither `dicom` nor `rtc`; it finds them here by the lane's ``kind``. Each kind names a
pydantic model for its ``[[lane]]`` table (a subclass of `config.LaneSettings`) and two coroutine functions,
one per side, that take a `worker.SourceSide` or `worker.SinkSide` and return when the lane has drained.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class LaneKind:
    """Where a kind of lane lives, as ``module:name`` each."""

    settings: str
    source: str
    sink: str
    live: bool = False
    """Late is lost: its processes go before others (`Confinement.nice`), its link has trays (`trays`)."""


LANE_KINDS: dict[str, LaneKind] = {
    "dicom": LaneKind("dicom.settings:DicomLane", "dicom.source:run", "dicom.sink:run"),
    "media": LaneKind("rtc.settings:MediaLane", "rtc.source:run", "rtc.sink:run", live=True),
}


def load(reference: str) -> Any:
    """The object that a ``module:name`` reference of `LANE_KINDS` names."""
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)
