"""The spool: durable custody of objects on one side of a lane. One worker process owns it, one loop uses it.

    begin ──▶ parts/<id> ──▶ write… ──▶ commit ──▶ objects/<id>.<sha256><suffix> ──▶ feed ──▶ done
                                │                                                        └──▶ park
                                └──▶ quarantine/<id>.<reason><suffix>, or abandon

A file is a header that the caller gives, then the data set; `sha256` is over the data set. The name carries
id and hash and the header everything else, so custody does not depend on `index.db`: a row may follow its
file by some milliseconds, and an index that is lost is rebuilt from the files when the spool is opened.

Never here: what is in a header or a data set.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

from relay.records import ManifestEntry
from relay.spool_feed import Feed
from relay.spool_part import Part
from relay.spool_types import (
    MAX_HEADER_BYTES,
    DeliveryState,
    Describe,
    Entry,
    Facts,
    Recovered,
    SpoolLimits,
    SpoolStats,
    Status,
)

__all__ = [
    "MAX_HEADER_BYTES",
    "DeliveryState",
    "Describe",
    "Entry",
    "Facts",
    "Feed",
    "Part",
    "Recovered",
    "Spool",
    "SpoolLimits",
    "SpoolStats",
    "Status",
]


class Spool:
    """Objects in custody, in one directory, used from one event loop. Other processes: `spool_admin`."""

    recovered: Recovered
    """What opening found."""

    @classmethod
    async def open(
        cls,
        directory: str,
        limits: SpoolLimits,
        *,
        destinations: Sequence[str],
        suffix: str,
        describe: Describe,
        resumable: bool = False,
    ) -> Self:
        """Open the spool in `directory` (made if absent; never resolved), after recovering what a crash left.

        Args:
            destinations: Whom each new object is to be delivered to, at least one. A destination new to the
                spool gets nothing old; deliveries waiting for one that is not named are parked.
            suffix: Ends the names of whole files, as in ``.dcm``.
            describe: Reads a header; see `Describe`.
            resumable: Keep the parts of an earlier process for `resume` (side B) instead of removing them
                (side A, where an unfinished object was never acknowledged).

        Raises:
            SpoolError: The directory or its index cannot be used, or another process has it open.
        """
        raise NotImplementedError

    # ---- taking objects in -------------------------------------------------------------------------------

    def admit(self, size: int = 0) -> None:
        """Check that an object of `size` bytes (0: unknown) could be taken in now. Costs microseconds.

        Raises:
            SpoolFull: `bound` is ``bytes``, ``objects``, ``disk`` or ``object`` (`size` is over the limit of
                one object).
        """
        raise NotImplementedError

    def begin(self, header: bytes, *, id: str | None = None, size: int = 0) -> Part:
        """Begin an object with `header`; a part of the same id that is there starts anew.

        Args:
            header: First bytes of the file, at most `MAX_HEADER_BYTES`.
            id: 32 lower hex digits; a random one if None.
            size: Bytes of the data set if known, for `admit`.

        Raises:
            SpoolFull: As `admit`.
            SpoolError: An object of this id is being written through another Part.
        """
        raise NotImplementedError

    def resume(self) -> Sequence[tuple[str, int]]:
        """Parts of an earlier process: id and bytes of data set present. Empty unless `resumable`."""
        raise NotImplementedError

    def reopen(self, id: str) -> Part:
        """Continue a part that `resume` named; `Part.size` is where the next byte goes.

        Hashes what is there, which takes 1 s per GB or so, in the loop's thread.

        Raises:
            SpoolError: No such part, or its header cannot be described.
        """
        raise NotImplementedError

    async def commit(self, part: Part, facts: Facts) -> Entry:
        """Put a whole object into custody; durable when this returns (side A).

        The order is write, fsync of the file, rename into ``objects/``, fsync of the directory; commits
        that wait at the same time share one pass. Then the object is in every feed.

        Cancelling does not undo the commit.

        Raises:
            SpoolFull: The disk is full. The part is gone.
            SpoolError: The disk failed. The part is gone and the object is not in custody.
        """
        raise NotImplementedError

    def seal(self, part: Part, facts: Facts, sha256: str | None = None) -> Entry:
        """Put a whole object into custody so that the end of this process loses nothing (side B).

        Renames at once, in the loop's thread, and hands the object to every feed; fsync and index row follow
        in the next pass. The end of the machine before that may lose it: see `durable`.

        Raises:
            SpoolError: The data set's hash is not `sha256` (the part is still there: quarantine or abandon
                it), or the disk failed.
        """
        raise NotImplementedError

    async def durable(self, entry: Entry) -> None:
        """Wait until a sealed object would survive a power failure.

        Raises:
            SpoolError: It would not: fsync failed. The file is left for the next opening to judge.
        """
        raise NotImplementedError

    def quarantine(self, part: Part, reason: str, detail: str = "") -> None:
        """Keep a refused object for a person, instead of `commit`.

        Args:
            reason: A fixed word of 1 to 32 of a-z, 0-9 and inner hyphens; it becomes part of the name.
            detail: One line that a person understands, at most 500 characters, without patient data.

        Raises:
            SpoolFull: The quarantine is full (``quarantine``); the part is still there.
        """
        raise NotImplementedError

    # ---- duplicates --------------------------------------------------------------------------------------

    def has(self, id: str) -> bool:
        """Whether an object of this id is in custody, or was (see `SpoolLimits.max_tombstones`)."""
        raise NotImplementedError

    def known(self, sop_instance: str, sha256: str) -> bool:
        """Whether this instance with exactly this data set is in custody, or was."""
        raise NotImplementedError

    # ---- handing objects out -----------------------------------------------------------------------------

    def feed(self, destination: str) -> Feed:
        """The feed of one configured destination; always the same one.

        Raises:
            SpoolError: Not a destination of this spool.
        """
        raise NotImplementedError

    def open_data(self, entry: Entry) -> int:
        """A descriptor for reading the file, positioned at the data set. The caller closes it.

        Raises:
            SpoolError: The object is not in custody any more.
        """
        raise NotImplementedError

    def done(self, entry: Entry, destination: str, status: Status = 0) -> None:
        """Record a delivery; written with the next group, some milliseconds later."""
        raise NotImplementedError

    def park(self, entry: Entry, destination: str, status: Status) -> None:
        """Record that delivery is refused for good; an operator may send it again."""
        raise NotImplementedError

    async def doubt(self, destination: str, byte_count: int) -> int:
        """Set the newest done deliveries that cover `byte_count` bytes of data set back to waiting.

        For a link whose buffers were lost: what had entered it last may not have left it. Returns how many.
        """
        raise NotImplementedError

    async def recent(self, destination: str, limit: int) -> tuple[ManifestEntry, ...]:
        """What was delivered last, newest first, as far as it is still in custody."""
        raise NotImplementedError

    # ---- housekeeping ------------------------------------------------------------------------------------

    def stats(self) -> SpoolStats:
        """The fill, at no cost."""
        raise NotImplementedError

    async def sweep(self) -> int:
        """Remove delivered objects whose retention is over, oldest first; returns how many. Call each minute.

        What presses on the bounds is removed without being asked for.
        """
        raise NotImplementedError

    async def failed(self) -> None:
        """Wait until the spool cannot go on, as a task beside the worker's others.

        Raises:
            SpoolError: Always: why the committer thread ended.
        """
        raise NotImplementedError

    async def close(self) -> None:
        """Finish what waits, write all rows, close. Parts that are open stay as they are."""
        raise NotImplementedError
