"""The spool from outside: what operators list, send again, release and drop, while the worker runs or not.

Only `index.db` is shared with the worker, through SQLite's own locks; the worker notices a change within a
second and acts on it. Only `drop_quarantined` touches a file.

Never here: taking objects in, recovery, anything on an event loop.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from relay.spool_types import DeliveryState, Entry, Status


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """How far one object is on its way to one destination. `updated_at` is UTC, seconds."""

    destination: str
    state: DeliveryState
    attempts: int
    last_status: Status | None
    updated_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """One object and its deliveries."""

    entry: Entry
    deliveries: tuple[Delivery, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Quarantined:
    """One refused object. `reason` is a fixed word, `detail` a sentence; `name` its file in quarantine/."""

    id: str
    name: str
    reason: str
    detail: str
    size: int
    quarantined_at: float
    released: bool
    """Released by an operator; the worker takes it in when it runs next, or says in `detail` why it cannot."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Totals of a spool: deliveries by destination and state, and the quarantine."""

    objects: int
    bytes: int
    deliveries: Mapping[str, Mapping[DeliveryState, int]]
    quarantined_objects: int
    quarantined_bytes: int


class SpoolAdmin:
    """A spool's index opened by another process. A context manager; blocking calls, of some milliseconds."""

    def __init__(self, directory: str, *, busy_seconds: float = 5.0) -> None:
        """Open the index of the spool in `directory`, waiting up to `busy_seconds` for a lock at each call.

        Raises:
            SpoolError: There is no spool, or its index cannot be used.
        """
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the index."""
        raise NotImplementedError

    def summary(self) -> Summary:
        """Totals; no list is walked."""
        raise NotImplementedError

    def ls(
        self,
        *,
        state: DeliveryState | None = None,
        destination: str | None = None,
        limit: int = 100,
        after: int = -1,
    ) -> Sequence[Listed]:
        """Objects in the order they came, those with a delivery of `state` to `destination` where given.

        At most `limit`, with `Entry.seq` above `after`, for paging.
        """
        raise NotImplementedError

    def show(self, id: str) -> Listed:
        """One object. `id` may be a unique beginning of at least 4 digits.

        Raises:
            SpoolError: No object, or more than one.
        """
        raise NotImplementedError

    def resend(
        self, id: str | None = None, *, destination: str | None = None, parked_only: bool = False
    ) -> int:
        """Set deliveries back to waiting: of one object, or of all (`id` None, `parked_only` then required).

        Returns how many deliveries. A destination that the worker does not serve now is parked again.

        Raises:
            SpoolError: No such object, or all objects asked for without `parked_only`.
        """
        raise NotImplementedError

    def give_up(self, id: str, *, destination: str | None = None) -> int:
        """Count parked deliveries of one object as done, so that retention removes it. Returns how many."""
        raise NotImplementedError

    def quarantine_ls(self, *, limit: int = 100, after: str = "") -> Sequence[Quarantined]:
        """Refused objects by id, at most `limit`, with ids above `after`."""
        raise NotImplementedError

    def quarantine_show(self, id: str) -> Quarantined:
        """One refused object, by id or a unique beginning of it. Raises SpoolError as `show`."""
        raise NotImplementedError

    def release(self, id: str) -> Quarantined:
        """Let a refused object pass after all: the worker takes it in as waiting for every destination.

        Raises:
            SpoolError: No such object, or more than one.
        """
        raise NotImplementedError

    def drop_quarantined(self, id: str) -> Quarantined:
        """Remove a refused object and its file for good. Raises SpoolError as `quarantine_show`."""
        raise NotImplementedError
