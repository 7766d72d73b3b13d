"""Trays: memory that one process of a link writes to and the next one reads from.

    source ──writes──▶ A's tray ──read──▶ valve ──writes──▶ B's tray ──read──▶ sink

A picture of 720p has 1.4 MB. Through sockets it is cut into eleven messages, each of which the kernel copies
in and out twice; through trays each of the three processes copies it once, and its ticket passes (`valve`).

The two memories are two objects: nothing that A holds is held by B. Neither can change size, so nobody is
ended by a page that is gone. Who reads has a descriptor that is for reading alone, and where the three have
uids of their own it cannot be opened again for writing. Without those B could write to its own tray, which
nobody but B reads. No lock and no flag lies in a tray: the messages alone say whose turn it is.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from dataclasses import dataclass

from relay.valve import TRAY_BYTES

SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
"""Neither its size nor these can be changed by anyone (fcntl(2))."""


@dataclass(frozen=True, slots=True)
class Trays:
    """Descriptors of a link's two trays, in the order a fragment passes them."""

    source_end: int
    valve_in: int
    valve_out: int
    sink_end: int

    def close(self) -> None:
        """Close all four."""
        for end in (self.source_end, self.valve_in, self.valve_out, self.sink_end):
            os.close(end)


def make_trays() -> Trays:
    """The two trays of a link. They take memory as they are written to.

    Raises:
        OSError: There are no descriptors left; none stays open.
    """
    opened: list[int] = []
    try:
        for _ in range(2):
            opened.append(os.memfd_create("tray", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
            writable = opened[-1]
            os.truncate(writable, TRAY_BYTES)
            fcntl.fcntl(writable, fcntl.F_ADD_SEALS, SEALS)
            os.fchmod(writable, 0o600)
            opened.append(os.open(f"/proc/self/fd/{writable}", os.O_RDONLY | os.O_CLOEXEC))
    except OSError:
        for fd in opened:
            os.close(fd)
        raise
    return Trays(*opened)


def tray_to_write(fd: int) -> memoryview:
    """The tray of a writer's descriptor, which is closed."""
    try:
        return memoryview(mmap.mmap(fd, TRAY_BYTES))
    finally:
        os.close(fd)


def tray_to_read(fd: int) -> memoryview:
    """The tray of a reader's descriptor, which is closed. Nothing can be written to this view."""
    try:
        return memoryview(mmap.mmap(fd, TRAY_BYTES, prot=mmap.PROT_READ))
    finally:
        os.close(fd)
