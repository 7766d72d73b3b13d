"""``medferry`` with one more kind of lane: ``fake``. The supervisor tells workers where a kind lives."""

from __future__ import annotations

from relay.cli import main
from relay.lanes import LANE_KINDS, LaneKind

LANE_KINDS["fake"] = LaneKind(
    "tests.fake_lane.lane:FakeLane", "tests.fake_lane.lane:source", "tests.fake_lane.lane:sink"
)

if __name__ == "__main__":
    main()
