"""What both sides of a DICOM lane do with a spool: open it, describe its files, examine what
was received, say what a person should look at.

    file in the spool = Part 10 header made anew (part10.py) + data set as it travelled

Never here: associations, the link.
"""

from __future__ import annotations

import asyncio
import logging
import os
import tempfile
import time
from collections.abc import Collection, Sequence
from dataclasses import asdict
from typing import BinaryIO

from dicom import part10
from dicom.inflate import InflateLimits, examine
from dicom.settings import SpoolSettings
from dicom.walk import Outline, WalkLimits, rebuilt
from relay.spool import Facts, Part, Recovered, Spool, SpoolLimits

SUFFIX = ".dcm"
SPOOL_DIRECTORY = "spool"

EXAMINE_INLINE_BYTES = 1 << 20
"""A data set up to this size is examined on the loop (a CT takes 0.2 ms; headers alone could take 30 ms); a
larger one, which may hold millions of elements, on a thread."""

EXAMINE_SECONDS = 20.0
"""Time for examining one data set."""

SWEEP_SECONDS = 30.0
"""Between two looks for objects whose retention is over."""

log = logging.getLogger(__name__)


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
    spool = await Spool.open(
        os.path.join(state, SPOOL_DIRECTORY),
        limits,
        destinations=destinations,
        suffix=SUFFIX,
        describe=describe,
        resumable=resumable,
    )
    for level, text in findings(spool.recovered):
        log.log(level, "opening the spool: %s", text)
    return spool


_FINDINGS: tuple[tuple[str, int, str], ...] = (
    (
        "rebuilt",
        logging.WARNING,
        "its index was lost or damaged: all is delivered again to every destination",
    ),
    ("missing", logging.ERROR, "{} objects are gone, their files were deleted: send them again"),
    ("torn", logging.ERROR, "{} files are not what their names say: see medferry quarantine ls"),
    ("unconfigured", logging.WARNING, "{} deliveries are parked, their destinations are not configured"),
    ("restored", logging.INFO, "{} objects were made again from the journal"),
    ("adopted", logging.INFO, "{} objects were not in the index yet"),
    ("parts_removed", logging.INFO, "{} unfinished objects, which nobody was told of, are removed"),
)
"""What `Recovered` may say: its field, how grave it is, and in words."""


def findings(recovered: Recovered) -> list[tuple[int, str]]:
    """What opening a spool found, each with the level to log it at."""
    return [
        (level, text.format(getattr(recovered, field)))
        for field, level, text in _FINDINGS
        if getattr(recovered, field)
    ]


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


def figures(spool: Spool) -> dict[str, object]:
    """The fill of a spool and what opening it found, for status."""
    stats = spool.stats()
    return {
        "waiting": dict(stats.waiting),
        "parked": dict(stats.parked),
        "undelivered": stats.undelivered_objects,
        "undelivered bytes": stats.undelivered_bytes,
        "kept": stats.retained_objects,
        "quarantined": stats.quarantined_objects,
        "refused full": dict(stats.refused),
        "at opening": {name: count for name, count in asdict(spool.recovered).items() if count},
    }


def complaints(spool: Spool, served: Collection[str]) -> list[str]:
    """What an operator should look at in a spool that delivers to `served`, one sentence each."""
    stats = spool.stats()
    grave = [text for level, text in findings(spool.recovered) if level == logging.ERROR]
    found = [f"opening the spool: {text}" for text in grave]
    if stats.quarantined_objects:
        found.append(f"{stats.quarantined_objects} objects are in quarantine; see medferry quarantine ls")
    for name, count in stats.parked.items():
        if count and name not in served:
            found.append(
                f"{count} objects wait for destination {name}, which is not configured; configure it again, "
                f"or medferry spool drop --destination {name}"
            )
    return found
