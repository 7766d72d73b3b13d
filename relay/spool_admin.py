"""The spool from outside: what operators list, send again, release and drop, while the worker runs or not.

Only `index.db` is shared with the worker, through SQLite's own locks; the worker notices a change within a
second and acts on it. Only `drop_quarantined` touches a file.

Never here: taking objects in, recovery, anything on an event loop.
"""

from __future__ import annotations

import json
import os
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from relay.errors import SpoolError
from relay.spool_schema import ENTRY_COLUMNS, SCHEMA_VERSION, connect, entry_of
from relay.spool_types import DROPPED, DeliveryState, Entry, Status

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

    def _at_most_one(self, query: str, id: str) -> tuple[Any, ...] | None:
        """The row whose id begins with `id`, None if there is none."""
        if len(id) < MIN_ID_DIGITS:
            raise SpoolError(f"give at least {MIN_ID_DIGITS} digits of the id")
        with self._mapped() as database:
            rows = database.execute(f"{query} id >= ? AND id < ? LIMIT 2", (id, id + "g")).fetchall()
        if len(rows) > 1:
            raise SpoolError(f"more than one object has an id that begins with {id}: give more digits")
        return rows[0] if rows else None

    def _one(self, query: str, id: str) -> tuple[Any, ...]:
        """The one row whose id begins with `id`."""
        row = self._at_most_one(query, id)
        if row is None:
            raise SpoolError(f"no object has an id that begins with {id}")
        return row

    def full_id(self, id: str, *, quarantined: bool) -> str | None:
        """The whole id that begins with `id`, of an object in custody or in quarantine; None if not here.

        Raises:
            SpoolError: `id` is too short, or begins the ids of more than one.
        """
        table = "quarantine" if quarantined else "objects"
        row = self._at_most_one(f"SELECT id FROM {table} WHERE", id)
        return None if row is None else str(row[0])

    def destinations(self) -> Mapping[str, bool]:
        """All that this spool ever had, and whether the worker that had it last delivers to them."""
        with self._mapped() as database:
            names = [name for (name,) in database.execute("SELECT name FROM destinations ORDER BY name")]
            row = database.execute("SELECT value FROM meta WHERE key = 'served'").fetchone()
        served = names if row is None else json.loads(row[0])
        return {name: name in served for name in names}

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

        Returns how many deliveries. Those to a destination that is not served stay as they are.

        Raises:
            SpoolError: No such object, or all objects asked for without `parked_only`.
        """
        if id is None and not parked_only:
            raise SpoolError("name an object, or ask for all that are parked")
        seq = None if id is None else self.show(id).entry.seq
        states = (DeliveryState.PARKED,) if parked_only else (DeliveryState.DONE, DeliveryState.PARKED)
        names = [name for name, served in self.destinations().items() if served]
        if destination is not None:
            names = [name for name in names if name == destination]
        return self._move(seq, names, states, DeliveryState.WAITING)

    def parked(self, id: str | None = None) -> Mapping[str, int]:
        """Parked deliveries of one object, or of all, by destination; only those that have any."""
        seq = None if id is None else self.show(id).entry.seq
        with self._mapped() as database:
            counts = database.execute(
                "SELECT n.name, count(*) FROM deliveries d JOIN destinations n ON n.number = d.destination "
                "WHERE d.state = 2 AND d.seq = coalesce(?, d.seq) GROUP BY n.name ORDER BY n.name",
                (seq,),
            )
            return dict(counts.fetchall())

    def drop(self, id: str | None = None, *, destination: str | None = None) -> int:
        """Give up parked deliveries: of one object, or all to `destination` (`id` None). Returns how many.

        They count as done, so that retention removes the object once no other delivery of it is open; until
        then `resend` takes it back. The worker logs each before anything is removed.

        Raises:
            SpoolError: No such object, or neither object nor destination named.
        """
        if id is None and destination is None:
            raise SpoolError("name an object, or the destination of all that are to be dropped")
        seq = None if id is None else self.show(id).entry.seq
        names = [destination] if destination is not None else list(self.destinations())
        return self._move(seq, names, (DeliveryState.PARKED,), DeliveryState.DONE, DROPPED)

    def _move(
        self,
        seq: int | None,
        names: Sequence[str],
        states: Sequence[DeliveryState],
        target: DeliveryState,
        status: Status | None = None,
    ) -> int:
        """Set deliveries of one object (or of all) to `names` in one of `states` to `target`.

        A `status` replaces that of the last attempt.
        """
        moved = 0
        with self._mapped() as database:
            for number, name in database.execute("SELECT number, name FROM destinations").fetchall():
                if name not in names:
                    continue
                for state in states:
                    where = f"destination = ? AND state = {int(state)}" + (
                        "" if seq is None else " AND seq = ?"
                    )
                    moved += database.execute(
                        "UPDATE deliveries SET state = ?, updated_at = ?, turn = NULL, "
                        f"status = coalesce(?, status) WHERE {where}",
                        (target, time.time(), status, number) + (() if seq is None else (seq,)),
                    ).rowcount
        return moved

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
