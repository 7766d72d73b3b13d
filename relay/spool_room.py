"""The room left in a spool: every bound in one place, and who was refused by which.

The spool tells it what is recorded and what waits to be; parts take from it as they grow, so that an object
whose size nobody declared cannot outgrow a bound either.

Never here: files. The free disk is asked through a function that is given.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from relay.errors import SpoolFull
from relay.spool_types import SpoolLimits

DISK_CHECK_SECONDS = 1.0
"""How old the figure of the free disk may be. What parts took since then is subtracted."""


class Room:
    """What is in use of each bound. Bytes are those of whole files, headers included."""

    def __init__(
        self, limits: SpoolLimits, free_bytes: Callable[[], int], clock: Callable[[], float]
    ) -> None:
        self.limits = limits
        self.refused: Counter[str] = Counter()
        self.recorded_objects = 0
        self.recorded_bytes = 0
        self.pending_objects = 0
        self.pending_bytes = 0
        self.part_objects = 0
        self.part_bytes = 0
        self._free_bytes = free_bytes
        self._clock = clock
        self._free = 0
        self._free_until = -1.0

    def __repr__(self) -> str:
        return f"<Room objects={self.objects}/{self.limits.max_objects} bytes={self.bytes}>"

    @property
    def objects(self) -> int:
        """Objects undelivered, parts included."""
        return self.recorded_objects + self.pending_objects + self.part_objects

    @property
    def bytes(self) -> int:
        """Bytes undelivered, parts included."""
        return self.recorded_bytes + self.pending_bytes + self.part_bytes

    @property
    def full(self) -> str | None:
        """The bound that leaves no place for any new object now; None if there is room."""
        if self.objects >= self.limits.max_objects:
            return "objects"
        if self.bytes >= self.limits.max_bytes:
            return "bytes"
        return "disk" if self._free_now() <= self.limits.min_free_disk_bytes else None

    def check_object(self, size: int) -> None:
        """Raise SpoolFull ``object`` if one data set of `size` bytes is too long by itself."""
        if size > self.limits.max_object_bytes:
            self._refuse("object", f"an object is over {self.limits.max_object_bytes} bytes")

    def check_new(self, size: int) -> None:
        """Raise SpoolFull if a new object of `size` bytes (0: unknown) has no place."""
        self.check_object(size)
        if self.objects >= self.limits.max_objects:
            self._refuse("objects", f"{self.objects} objects are undelivered: see why they are not taken")
        self.check_growth(max(size, 1))

    def check_growth(self, size: int) -> None:
        """Raise SpoolFull if `size` more bytes have no place."""
        if self.bytes + size > self.limits.max_bytes:
            self._refuse("bytes", f"{self.bytes} bytes are undelivered: see why they are not taken")
        if self._free_now() - size < self.limits.min_free_disk_bytes:
            self._free_until = self._clock()
            self._refuse("disk", f"{self._free} bytes are free on the disk: free some")

    def _free_now(self) -> int:
        """Bytes free on the disk as of `DISK_CHECK_SECONDS` ago at most, less what parts took since."""
        now = self._clock()
        if now >= self._free_until:
            self._free = self._free_bytes()
            self._free_until = now + DISK_CHECK_SECONDS
        return self._free

    def take(self, size: int) -> None:
        """Let a part grow by `size` bytes; raises SpoolFull."""
        self.check_growth(size)
        self.part_bytes += size
        self._free -= size

    def give(self, size: int) -> None:
        """A part is `size` bytes shorter, or gone."""
        self.part_bytes -= size

    def _refuse(self, bound: str, detail: str) -> None:
        self.refused[bound] += 1
        raise SpoolFull(bound, f"the spool is full ({bound}): {detail}")
