"""The link as sources and sinks see it: an Outlet to send records on, an Inlet to receive them from.

Which link is behind the seam (the valve on one machine, UDP through an optical diode, a cluster's queue) is
the supervisor's business; nothing in `dicom` or `rtc` may ask. Records keep their order within an outlet.
Nothing comes back from an inlet, ever: an outlet knows only whether the link takes the next fragment.

Never here: what a record means.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from relay.records import Record

HEARTBEAT_SECONDS = 1.0
"""Between two heartbeats of a source."""

SILENCE_SECONDS = 3.0
"""Without any fragment for so long, B says that the link is silent."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """A record that crossed, with the link's own two timestamps (CLOCK_MONOTONIC ns)."""

    record: Record
    entered_ns: int
    left_ns: int
    held: bool = False
    """Whether the link keeps this record after it is done: it forgets it together with others that follow."""
    pixels: memoryview | None = None
    """All planes of a picture in a row, in memory that is the picture's own: it may be kept, without a copy.
    None where the record's buffers are only valid until `deliver` is done."""


class Outlet(Protocol):
    """Side A's end of the link."""

    async def send(self, *records: Record) -> None:
        """Send `records` in order, adjacent to each other; wait while the link is full.

        Cancelling between two fragments of one record leaves the rest unsent; B drops what it had of it.
        """

    @property
    def congested(self) -> bool:
        """Whether a send would have to wait (now, or because another send is waiting)."""


Deliver = Callable[[Arrival], Awaitable[None] | None]
"""Called once per record. When it returns (or its awaitable does), the link may forget the record."""


class Inlet(Protocol):
    """Side B's end of the link."""

    async def pump(self, deliver: Deliver) -> None:
        """Call `deliver` for each record, in order, until A's side has ended for good.

        A fragment is taken off the link only after `deliver` is done with all its records, so a sink that
        dies in between sees them again after its restart. While `deliver` waits, the link fills and blocks.
        Buffers inside a record are only valid until `deliver` is done: copy what must live longer, or keep
        `Arrival.pixels`.
        """

    @property
    def epoch(self) -> int:
        """The run of side A that is heard: it rises when A starts anew; -1 before the first fragment."""

    @property
    def silent(self) -> bool:
        """Whether nothing at all came for `SILENCE_SECONDS` while `pump` was listening: time in which a
        delivery waits (a full spool) does not count, since nothing is read then."""
