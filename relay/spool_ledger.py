"""The loop's books: what the index says, and what is on its way into it.

Every row is counted as pending from the moment it is true until the committer says that it is written; then
the figures that come with that message hold it. So the fill is right at any moment, and costs nothing to ask.

Never here: files, the index itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from relay.errors import SpoolFull
from relay.spool_committer import Recorded
from relay.spool_index import Buried, Mark, Refused, Row, Totals
from relay.spool_room import Room
from relay.spool_types import DeliveryState, Entry, SpoolLimits, SpoolStats

_NOTHING = Totals((0, 0), (0, 0), (0, 0), {})


class Ledger:
    """Figures and unwritten rows of one spool."""

    def __init__(self, limits: SpoolLimits, room: Room, destinations: Sequence[str]) -> None:
        self._limits = limits
        self._room = room
        self._destinations = destinations
        self._totals = _NOTHING
        self._entries: dict[str, Entry] = {}
        self._instances: set[tuple[str, str]] = set()
        self._buried: set[str] = set()
        self._pending: Counter[tuple[str, DeliveryState]] = Counter()
        self._quarantined = [0, 0]
        self._evicted = 0

    def has(self, id: str) -> bool:
        """Whether an object in custody, or one that is not kept, has no row yet."""
        return id in self._entries or id in self._buried

    def known(self, sop_instance: str, sha256: str) -> bool:
        """Whether this data set is in custody and has no row yet."""
        return (sop_instance, sha256) in self._instances

    def add(self, entry: Entry) -> None:
        """An object is in custody; its row is on its way."""
        self._entries[entry.id] = entry
        self._instances.add((entry.sop_instance, entry.sha256))
        for destination in self._destinations:
            self._pending[destination, DeliveryState.WAITING] += 1

    def put(self, row: Mark | Refused | Buried) -> None:
        """A delivery, a refusal or a duplicate is on its way into the index."""
        self._count(row, 1)

    def _count(self, row: Row, sign: int) -> None:
        if type(row) is Mark and row.state is not DeliveryState.WAITING:
            self._pending[row.destination, row.state] += sign
            self._pending[row.destination, DeliveryState.WAITING] -= sign
        elif type(row) is Refused:
            self._quarantined[0] += sign
            self._quarantined[1] += sign * row.size
        elif type(row) is Buried and sign > 0:
            self._buried.add(row.id)
        elif type(row) is Buried:
            self._buried.discard(row.id)

    def recorded(self, news: Recorded) -> None:
        """Rows are written."""
        for row in news.rows:
            if type(row) is Entry:
                del self._entries[row.id]
                self._instances.discard((row.sop_instance, row.sha256))
                self._room.pending_objects -= 1
                self._room.pending_bytes -= row.size + row.data_offset
                for destination in self._destinations:
                    self._pending[destination, DeliveryState.WAITING] -= 1
            else:
                self._count(row, -1)
        self._totals = news.totals
        self._room.recorded_objects, self._room.recorded_bytes = news.totals.undelivered
        self._evicted += news.evicted

    def check_quarantine(self, size: int) -> None:
        """Raise SpoolFull ``quarantine`` if a refused file of `size` bytes has no place."""
        limits = self._limits
        objects = self._totals.quarantined[0] + self._quarantined[0]
        held = self._totals.quarantined[1] + self._quarantined[1]
        fits = objects < limits.max_quarantine_objects and held + size <= limits.max_quarantine_bytes
        if not fits:
            self._room.refused["quarantine"] += 1
            raise SpoolFull("quarantine", f"{objects} objects are in quarantine: release or drop some")

    def stats(self) -> SpoolStats:
        """See `Spool.stats`."""
        room, totals = self._room, self._totals
        served = {(name, state) for name in self._destinations for state in DeliveryState}
        counts = {
            key: totals.counts.get(key, 0) + self._pending[key]
            for key in sorted(served | totals.counts.keys())
        }
        return SpoolStats(
            undelivered_objects=room.recorded_objects + room.pending_objects,
            undelivered_bytes=room.recorded_bytes + room.pending_bytes,
            retained_objects=totals.retained[0],
            retained_bytes=totals.retained[1],
            part_objects=room.part_objects,
            part_bytes=room.part_bytes,
            waiting={name: n for (name, state), n in counts.items() if state is DeliveryState.WAITING},
            parked={name: n for (name, state), n in counts.items() if state is DeliveryState.PARKED},
            quarantined_objects=totals.quarantined[0] + self._quarantined[0],
            quarantined_bytes=totals.quarantined[1] + self._quarantined[1],
            evicted=self._evicted,
            refused=dict(room.refused),
        )
