"""What both sides of a DICOM lane do with a spool: open it, describe its files, examine what was received.

    file in the spool = Part 10 header made anew (part10.py) + data set as it travelled

Never here: associations, the link.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import Sequence
from typing import BinaryIO

from dicom import part10
from dicom.inflate import InflateLimits, examine
from dicom.settings import SpoolSettings
from dicom.walk import Outline, WalkLimits, rebuilt
from relay.spool import Facts, Part, Spool, SpoolLimits, SpoolStats

SUFFIX = ".dcm"
SPOOL_DIRECTORY = "spool"

EXAMINE_INLINE_BYTES = 1 << 20
"""A data set up to this size is examined on the loop (a CT takes 0.2 ms; headers alone could take 30 ms); a
larger one, which may hold millions of elements, on a thread."""

EXAMINE_SECONDS = 20.0
"""Time for examining one data set."""

SWEEP_SECONDS = 30.0
"""Between two looks for objects whose retention is over."""


def describe(head: bytes) -> Facts:
    """What the header of one of our own files says; `relay.spool.Describe`."""
    found = part10.parse(head)
    return Facts(
        data_offset=found.data_offset,
        sop_class=found.sop_class,
        sop_instance=found.sop_instance,
        transfer_syntax=found.transfer_syntax,
    )


async def open_spool(
    state: str,
    settings: SpoolSettings,
    *,
    destinations: Sequence[str],
    max_object_bytes: int,
    journal_bytes: int = 0,
    resumable: bool = False,
) -> Spool:
    """Open the spool of one side, below its state directory."""
    limits = SpoolLimits(
        max_bytes=settings.max_bytes,
        max_objects=settings.max_objects,
        max_object_bytes=max_object_bytes,
        min_free_disk_bytes=settings.min_free_disk_bytes,
        retention_seconds=settings.retention_seconds,
        max_quarantine_bytes=settings.max_quarantine_bytes,
        journal_bytes=journal_bytes,
    )
    return await Spool.open(
        os.path.join(state, SPOOL_DIRECTORY),
        limits,
        destinations=destinations,
        suffix=SUFFIX,
        describe=describe,
        resumable=resumable,
    )


class Examiner:
    """Runs the checks of `walk.py` and `inflate.py` on parts of one spool."""

    def __init__(self, state: str, max_object_bytes: int) -> None:
        self._directory = os.path.join(state, SPOOL_DIRECTORY)
        self._walk = WalkLimits(seconds=EXAMINE_SECONDS, clock=time.monotonic)
        self._inflate = InflateLimits(
            max_bytes=max_object_bytes, seconds=EXAMINE_SECONDS, clock=time.monotonic
        )

    def _scratch(self) -> BinaryIO:
        # In the spool's own directory: the same disk, the same limits, and gone when closed.
        return tempfile.TemporaryFile(dir=self._directory)

    def _examine(self, part: Part, transfer_syntax: str) -> Outline:
        with part.view() as data:
            return examine(
                data, transfer_syntax, scratch=self._scratch, limits=self._walk, inflate_limits=self._inflate
            )

    def normalised(self, spool: Spool, part: Part, outline: Outline) -> Part:
        """A new part with the edits of `outline` done; `part` stays as it is.

        Raises:
            SpoolFull: There is no room for it.
        """
        head = part10.header(outline.sop_class, outline.sop_instance, outline.transfer_syntax)
        fresh = spool.begin(head, size=part.size)
        try:
            with part.view() as data:
                for piece in rebuilt(data, outline.edits):
                    try:
                        fresh.write([piece])
                    finally:
                        if isinstance(piece, memoryview):
                            piece.release()
        except BaseException:
            fresh.abandon()
            raise
        return fresh

    def examined(self, part: Part, transfer_syntax: str) -> Outline | None:
        """The outline of a whole data set in `part` that is quickly examined; None for a long one.

        Raises:
            Refused: It may not pass; the reason and the status say why.
        """
        return self._examine(part, transfer_syntax) if part.size <= EXAMINE_INLINE_BYTES else None

    async def examine(self, part: Part, transfer_syntax: str) -> Outline:
        """The outline of a whole data set in `part`.

        Raises:
            Refused: It may not pass; the reason and the status say why.
        """
        outline = self.examined(part, transfer_syntax)
        if outline is None:
            outline = await asyncio.to_thread(self._examine, part, transfer_syntax)
        return outline


def figures(stats: SpoolStats) -> dict[str, object]:
    """The fill of a spool, for status."""
    return {
        "waiting": dict(stats.waiting),
        "parked": dict(stats.parked),
        "undelivered": stats.undelivered_objects,
        "undelivered bytes": stats.undelivered_bytes,
        "kept": stats.retained_objects,
        "quarantined": stats.quarantined_objects,
        "refused full": dict(stats.refused),
    }
