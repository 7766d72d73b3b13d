"""The spool from outside: what operators list, send again, release and drop, while the worker runs or not.

Only `index.db` is shared with the worker, through SQLite's own locks; the worker notices a change within a
second and acts on it. Only `drop_quarantined` touches a file.

Never here: taking objects in, recovery, anything on an event loop.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from relay.errors import SpoolError
from relay.spool_schema import ENTRY_COLUMNS, SCHEMA_VERSION, connect, entry_of
from relay.spool_types import DeliveryState, Entry, Status

MIN_ID_DIGITS = 4
"""Digits of an id that operators may shorten it to."""

_QUARANTINED = "SELECT id, name, reason, detail, size, quarantined_at, released FROM quarantine "


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
    """Released by an operator: the worker takes it in when it runs next, or says in `detail` why not."""


class SpoolAdmin:
    """A spool's index opened by another process. A context manager; blocking calls, of some milliseconds."""

    def __init__(self, directory: str) -> None:
        """Open the index of the spool in `directory`. Each call waits up to `BUSY_SECONDS` for a lock.

        Raises:
            SpoolError: There is no spool, or its index cannot be used.
        """
        self._directory = directory
        try:
            self._database = connect(os.path.join(directory, "index.db"), create=False)
        except sqlite3.Error as error:
            raise SpoolError(f"there is no spool that can be read in {directory}: {error}") from error
        try:
            self._boot = self._check_version()
        except (sqlite3.Error, SpoolError) as error:
            self._database.close()
            raise SpoolError(f"the spool's index in {directory} cannot be used: {error}") from error

    def _check_version(self) -> int:
        (version,) = self._database.execute("PRAGMA user_version").fetchone()
        if version != SCHEMA_VERSION:
            raise SpoolError(f"it has version {version}, this program knows {SCHEMA_VERSION}")
        row = self._database.execute("SELECT value FROM meta WHERE key = 'boot'").fetchone()
        return int(row[0]) if row else 0

    @contextmanager
    def _mapped(self) -> Iterator[sqlite3.Connection]:
        """SQLite's errors become the spool's."""
        try:
            yield self._database
        except sqlite3.Error as error:
            raise SpoolError(f"the spool's index cannot be used: {error}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the index."""
        self._database.close()

    def ls(
        self,
        *,
        state: DeliveryState | None = None,
        destination: str | None = None,
        limit: int = 100,
    ) -> Sequence[Listed]:
        """Objects in the order they came, those with a delivery of `state` to `destination` where given.

        At most `limit`.
        """
        query = f"SELECT {ENTRY_COLUMNS} FROM objects o"
        if state is not None or destination is not None:
            query += (
                " WHERE EXISTS (SELECT 1 FROM deliveries d JOIN destinations n ON n.number = d.destination"
                " WHERE d.seq = o.seq AND d.state = coalesce(:state, d.state)"
                " AND n.name = coalesce(:destination, n.name))"
            )
        values = {"state": state, "destination": destination, "limit": limit}
        with self._mapped() as database:
            rows = database.execute(f"{query} ORDER BY o.seq LIMIT :limit", values).fetchall()
            return [self._listed(row) for row in rows]

    def _listed(self, row: tuple[Any, ...]) -> Listed:
        entry = entry_of(row, self._boot)
        deliveries = self._database.execute(
            "SELECT n.name, d.state, d.attempts, d.status, d.updated_at FROM deliveries d "
            "JOIN destinations n ON n.number = d.destination WHERE d.seq = ? ORDER BY n.name",
            (entry.seq,),
        )
        return Listed(
            entry=entry,
            deliveries=tuple(
                Delivery(
                    destination=name,
                    state=DeliveryState(state),
                    attempts=attempts,
                    last_status=status,
                    updated_at=updated_at,
                )
                for name, state, attempts, status, updated_at in deliveries
            ),
        )

    def _one(self, query: str, id: str) -> tuple[Any, ...]:
        """The one row whose id begins with `id`."""
        if len(id) < MIN_ID_DIGITS:
            raise SpoolError(f"give at least {MIN_ID_DIGITS} digits of the id")
        with self._mapped() as database:
            rows = database.execute(f"{query} id >= ? AND id < ? LIMIT 2", (id, id + "g")).fetchall()
        if len(rows) != 1:
            found = "no object has" if not rows else "more than one object has"
            raise SpoolError(f"{found} an id that begins with {id}")
        row: tuple[Any, ...] = rows[0]
        return row

    def show(self, id: str) -> Listed:
        """One object. `id` may be a unique beginning of at least 4 digits.

        Raises:
            SpoolError: No object, or more than one.
        """
        row = self._one(f"SELECT {ENTRY_COLUMNS} FROM objects o WHERE", id)
        with self._mapped():
            return self._listed(row)

    def resend(
        self, id: str | None = None, *, destination: str | None = None, parked_only: bool = False
    ) -> int:
        """Set deliveries back to waiting: of one object, or of all (`id` None, `parked_only` then required).

        Returns how many deliveries. A destination that the worker does not serve now is parked again.

        Raises:
            SpoolError: No such object, or all objects asked for without `parked_only`.
        """
        if id is None and not parked_only:
            raise SpoolError("name an object, or ask for all that are parked")
        seq = None if id is None else self.show(id).entry.seq
        states = (DeliveryState.PARKED,) if parked_only else (DeliveryState.DONE, DeliveryState.PARKED)
        return self._move(seq, destination, states, DeliveryState.WAITING)

    def _move(
        self,
        seq: int | None,
        destination: str | None,
        states: Sequence[DeliveryState],
        target: DeliveryState,
    ) -> int:
        """Set deliveries of one object (or of all) in one of `states` to `target`."""
        moved = 0
        with self._mapped() as database:
            for number, name in database.execute("SELECT number, name FROM destinations").fetchall():
                if destination not in (None, name):
                    continue
                for state in states:
                    where = f"destination = ? AND state = {int(state)}" + (
                        "" if seq is None else " AND seq = ?"
                    )
                    moved += database.execute(
                        f"UPDATE deliveries SET state = ?, updated_at = ?, turn = NULL WHERE {where}",
                        (target, time.time(), number) + (() if seq is None else (seq,)),
                    ).rowcount
        return moved

    def give_up(self, id: str, *, destination: str | None = None) -> int:
        """Count parked deliveries of one object as done, so that retention removes it. Returns how many."""
        seq = self.show(id).entry.seq
        return self._move(seq, destination, (DeliveryState.PARKED,), DeliveryState.DONE)

    def quarantine_ls(self, *, limit: int = 100) -> Sequence[Quarantined]:
        """Refused objects by id, at most `limit`."""
        with self._mapped() as database:
            rows = database.execute(f"{_QUARANTINED} ORDER BY id LIMIT ?", (limit,))
            return [_quarantined(row) for row in rows]

    def quarantine_show(self, id: str) -> Quarantined:
        """One refused object, by id or a unique beginning of it. Raises SpoolError as `show`."""
        return _quarantined(self._one(f"{_QUARANTINED} WHERE", id))

    def release(self, id: str) -> Quarantined:
        """Let a refused object pass after all: the worker takes it in as waiting for every destination.

        Raises:
            SpoolError: No such object, or more than one.
        """
        found = self.quarantine_show(id)
        with self._mapped() as database:
            database.execute("UPDATE quarantine SET released = 1 WHERE id = ?", (found.id,))
        return found

    def drop_quarantined(self, id: str) -> Quarantined:
        """Remove a refused object and its file for good. Raises SpoolError as `quarantine_show`."""
        found = self.quarantine_show(id)
        with self._mapped() as database:
            database.execute("DELETE FROM quarantine WHERE id = ?", (found.id,))
        try:
            os.unlink(os.path.join(self._directory, "quarantine", found.name))
        except FileNotFoundError:
            pass
        return found


def _quarantined(row: tuple[Any, ...]) -> Quarantined:
    id, name, reason, detail, size, quarantined_at, released = row
    return Quarantined(
        id=id,
        name=name,
        reason=reason,
        detail=detail,
        size=size,
        quarantined_at=quarantined_at,
        released=bool(released),
    )
