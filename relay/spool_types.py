"""The words of the spool: what is known of an object, how far its deliveries are, what bounds it.

Values only: no files, no clocks, no threads. Nothing here holds patient data; a SOP Instance UID is the most
personal thing, and `repr` leaves even that out.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

MAX_HEADER_BYTES = 4096
"""Bytes of a file's header. A Part 10 header of ours is below 1 KiB; a description reads this much."""

Status: TypeAlias = int | str
"""How a delivery went, for operators: a DIMSE status, or a short fixed word. Never a peer's text."""


DROPPED = "dropped"
"""The status of a delivery that an operator gave up."""


class DeliveryState(enum.IntEnum):
    """How far the delivery of one object to one destination is."""

    WAITING = 0
    DONE = 1
    PARKED = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What the header of a file says about its object, and where the data set begins.

    `received_ns` and `parsed_ns` are CLOCK_MONOTONIC, 0 where unknown, and mean nothing after a reboot.
    """

    data_offset: int
    sop_class: str
    sop_instance: str
    transfer_syntax: str
    grade: int = 4
    received_ns: int = 0
    parsed_ns: int = 0


Describe: TypeAlias = Callable[[bytes], Facts]
"""Reads the first `MAX_HEADER_BYTES` of a file (or all of it). Raises a MedferryError if it cannot."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One whole object in custody. `seq` orders all objects of a spool as they came and is never reused.

    `size` and `sha256` (lower hex) are of the data set, which begins at `data_offset` in the file.
    `received_ns` and `parsed_ns` are 0 once the machine was rebooted. `stored_at` is UTC, seconds.
    """

    seq: int
    id: str
    sha256: str
    size: int
    data_offset: int
    sop_class: str
    sop_instance: str = field(repr=False)
    transfer_syntax: str
    grade: int
    received_ns: int
    parsed_ns: int
    stored_at: float
    attempts: int = 0
    """Deliveries tried before this one was handed out, as last recorded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpoolLimits:
    """The bounds of one spool. Sizes are bytes of files, durations seconds.

    `max_bytes` and `max_objects` bound what is not delivered yet, parts being written included: at the bound
    new objects are refused. Delivered objects are kept for `retention_seconds`, but within the same bounds:
    they are removed early, oldest first, before anything is refused for them.
    """

    max_bytes: int = 64 * 2**30
    max_objects: int = 1_000_000
    max_object_bytes: int = 16 * 2**30
    min_free_disk_bytes: int = 512 * 2**20
    """Left on the file system for everything else, the index included."""
    retention_seconds: float = 24 * 3600.0
    journal_bytes: int = 0
    """Of the journal that makes small objects durable at once (`spool_journal`); 0: none, for a spool whose
    objects nobody is told of before they are synced."""
    max_tombstones: int = 200_000
    """Ids and hashes remembered of objects already removed, for duplicates; about 200 bytes each, on disk."""
    max_quarantine_bytes: int = 4 * 2**30
    max_quarantine_objects: int = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class SpoolStats:
    """The fill of a spool. Costs nothing to ask for, however full it is.

    `undelivered_*` counts objects of which at least one delivery is waiting or parked; `retained_*` those
    that are delivered and kept; `part_*` those being written.
    """

    undelivered_objects: int
    undelivered_bytes: int
    retained_objects: int
    retained_bytes: int
    part_objects: int
    part_bytes: int
    waiting: Mapping[str, int]
    """Deliveries waiting, by destination."""
    parked: Mapping[str, int]
    """Deliveries parked, by destination, removed destinations included."""
    quarantined_objects: int
    quarantined_bytes: int
    evicted: int
    """Delivered objects removed before their retention was over, since the spool was opened."""
    refused: Mapping[str, int]
    """Refusals since the spool was opened, by the name of the bound."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovered:
    """What opening a spool found and did."""

    rebuilt: bool = False
    """The index was lost or damaged; everything is waiting again for every destination."""
    adopted: int = 0
    """Whole files without a row, now waiting for every destination."""
    restored: int = 0
    """Files made again from the journal, which a power failure had taken; among those adopted."""
    torn: int = 0
    """Files that are not what their name says, now in quarantine."""
    missing: int = 0
    """Rows whose file is gone, now removed. Somebody deleted files."""
    parts_removed: int = 0
    """Abandoned parts."""
    unconfigured: int = 0
    """Deliveries parked because their destination is not configured."""
