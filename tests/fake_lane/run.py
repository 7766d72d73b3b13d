"""``medferry`` with two more kinds of lane: ``fake``, and ``fake-live`` that is treated as media are.

The supervisor tells workers where a kind lives.
"""

from __future__ import annotations

from relay.cli import main
from relay.lanes import LANE_KINDS, LaneKind

for kind, live in (("fake", False), ("fake-live", True)):
    LANE_KINDS[kind] = LaneKind(
        "tests.fake_lane.lane:FakeLane",
        "tests.fake_lane.lane:source",
        "tests.fake_lane.lane:sink",
        live=live,
    )

if __name__ == "__main__":
    main()
