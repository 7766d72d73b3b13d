"""The worker's side of the index: rows in and out, in one thread (the committer's).

Rows are a record of what the files already prove, and of how far deliveries are. Each method is one
transaction or one read.

Never here: threads, the files of objects.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from relay.errors import SpoolError
from relay.records import ManifestEntry
from relay.spool_schema import ENTRY_COLUMNS, SCHEMA, SCHEMA_VERSION, connect, entry_of
from relay.spool_types import DeliveryState, Entry, Facts, Status

BOOT_ID = "/proc/sys/kernel/random/boot_id"

INDEX_BYTES = 1 << 20
"""Of free disk, below which a file of SQLite's that cannot be opened or extended is taken for a full disk."""

_INSERT_OBJECT = f"INSERT INTO objects VALUES ({', '.join('?' * 15)})"
_INSERT_DELIVERY = "INSERT INTO deliveries (seq, destination, state, updated_at) VALUES (?, ?, 0, ?)"
_SETTLE = (
    "UPDATE deliveries SET state = ?, attempts = attempts + 1, status = ?, updated_at = ?, turn = ? "
    "WHERE seq = ? AND destination = ? AND state = 0"
)


@dataclass(frozen=True, slots=True)
class Mark:
    """What became of one attempt to deliver, and when: `state` WAITING is an attempt that failed."""

    seq: int
    destination: str
    state: DeliveryState
    status: Status
    at: float


@dataclass(frozen=True, slots=True)
class Refused:
    """A file that now is in quarantine under `name`, of `size` bytes."""

    id: str
    name: str
    reason: str
    detail: str
    size: int
    quarantined_at: float


@dataclass(frozen=True, slots=True)
class Admitted:
    """A file that is not in quarantine any more."""

    id: str


@dataclass(frozen=True, slots=True)
class Buried:
    """An object that is not kept, since another with the same data set is or was."""

    seq: int
    id: str
    sop_instance: str
    sha256: str


Row = Entry | Mark | Refused | Admitted | Buried
"""What the committer records, in order."""


@dataclass(frozen=True, slots=True)
class Totals:
    """The figures that triggers keep: objects and bytes each, deliveries by (destination, state)."""

    undelivered: tuple[int, int]
    retained: tuple[int, int]
    quarantined: tuple[int, int]
    counts: Mapping[tuple[str, DeliveryState], int]


def make_entry(seq: int, id: str, sha256: str, size: int, facts: Facts, stored_at: float) -> Entry:
    """An `Entry` of what is known of a whole file."""
    return Entry(
        seq=seq,
        id=id,
        sha256=sha256,
        size=size,
        data_offset=facts.data_offset,
        sop_class=facts.sop_class,
        sop_instance=facts.sop_instance,
        transfer_syntax=facts.transfer_syntax,
        grade=facts.grade,
        received_ns=facts.received_ns,
        parsed_ns=facts.parsed_ns,
        stored_at=stored_at,
    )


class Index:
    """The open index. Made by `open_index`; used by the thread that made it."""

    def __init__(self, database: sqlite3.Connection, *, fresh: bool) -> None:
        self.fresh = fresh
        self._database = database
        self.seen = self.foreign_changes()
        """What `foreign_changes` was when all that others had changed was acted on."""
        self._numbers: dict[str, int] = {}
        self._names: dict[int, str] = {}
        self._active: tuple[int, ...] = ()
        self._read_destinations()
        self.boot = self._this_boot()
        row = self._database.execute("SELECT value FROM meta WHERE key = 'journal_floor'").fetchone()
        self.floor = 0 if row is None else int(row[0])
        """No record of the journal up to this seq is needed."""
        (self._turn,) = self._one("SELECT coalesce(max(turn), 0) FROM deliveries WHERE state = 1")

    def _one(self, query: str, *values: object) -> tuple[Any, ...]:
        row: tuple[Any, ...] = self._database.execute(query, values).fetchone()
        return row

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        self._database.execute("BEGIN IMMEDIATE")
        try:
            yield self._database
            self._database.execute("COMMIT")
        finally:
            if self._database.in_transaction:
                self._database.execute("ROLLBACK")

    def _read_destinations(self) -> None:
        self._numbers = dict(self._database.execute("SELECT name, number FROM destinations"))
        self._names = {number: name for name, number in self._numbers.items()}

    def _this_boot(self) -> int:
        """A number that rises with each boot of the machine that this index sees."""
        with open(BOOT_ID, encoding="ascii") as file:
            boot_id = file.read().strip()
        row = self._database.execute("SELECT value FROM meta WHERE key = 'boot_id'").fetchone()
        if row is None or row[0] != boot_id:
            with self._transaction() as database:
                database.execute("INSERT OR REPLACE INTO meta VALUES ('boot_id', ?)", (boot_id,))
                database.execute(
                    "INSERT INTO meta VALUES ('boot', 1) ON CONFLICT DO UPDATE SET value = value + 1"
                )
        return int(self._one("SELECT value FROM meta WHERE key = 'boot'")[0])

    def wait_for_others(self, seconds: float) -> None:
        """Wait at most so long for a transaction of another process, from now on."""
        self._database.execute(f"PRAGMA busy_timeout = {round(seconds * 1000)}")

    def close(self) -> None:
        """Close the database; the last connection folds the log into it."""
        self._database.close()

    # ---- destinations ------------------------------------------------------------------------------------

    def serve(self, destinations: Sequence[str]) -> int:
        """Deliver to `destinations` from now on; park what waits for any other. Returns how many."""
        with self._transaction() as database:
            database.executemany(
                "INSERT INTO destinations (name) VALUES (?) ON CONFLICT DO NOTHING",
                [(name,) for name in destinations],
            )
            database.execute("INSERT OR REPLACE INTO meta VALUES ('served', ?)", (json.dumps(destinations),))
        self._read_destinations()
        self._active = tuple(self._numbers[name] for name in destinations)
        return self.park_unserved()

    def park_unserved(self) -> int:
        """Park what waits for a destination that is not served. Returns how many."""
        parked = 0
        for number in self._names.keys() - set(self._active):
            with self._transaction() as database:
                parked += database.execute(
                    "UPDATE deliveries SET state = 2, status = 'unconfigured', updated_at = ? "
                    "WHERE destination = ? AND state = 0",
                    (time.time(), number),
                ).rowcount
        return parked

    def dropped(self, limit: int) -> Mapping[str, Sequence[tuple[int, str]]]:
        """Seq and id of what operators gave up and nobody was told of, by destination, at most `limit` each.

        It is not removed (`forget`) before `told`.
        """
        found: dict[str, list[tuple[int, str]]] = {}
        for name, number in self._numbers.items():
            rows = self._database.execute(
                "SELECT d.seq, o.id FROM deliveries d JOIN objects o USING (seq) "
                "WHERE d.destination = ? AND d.state = 1 AND d.turn IS NULL LIMIT ?",
                (number, limit),
            ).fetchall()
            if rows:
                found[name] = rows
        return found

    def told(self, destination: str, seqs: Sequence[int]) -> None:
        """That these deliveries were given up is in the log."""
        number = self._numbers[destination]
        with self._transaction() as database:
            database.executemany(
                "UPDATE deliveries SET turn = 0 WHERE seq = ? AND destination = ? AND state = 1",
                [(seq, number) for seq in seqs],
            )

    # ---- recording ---------------------------------------------------------------------------------------

    def record(self, rows: Sequence[Row], floor: int = 0) -> list[str]:
        """Write `rows`, and the journal's floor if it has risen, in one transaction.

        Returns names in quarantine that newer ones of the id replace.
        """
        objects = [row for row in rows if type(row) is Entry]
        marks = [row for row in rows if type(row) is Mark]
        replaced: list[str] = []
        with self._transaction() as database:
            database.executemany(_INSERT_OBJECT, [self._object_values(entry) for entry in objects])
            database.executemany(
                _INSERT_DELIVERY,
                [(entry.seq, number, entry.stored_at) for entry in objects for number in self._active],
            )
            database.executemany(_SETTLE, [self._mark_values(mark) for mark in marks])
            for row in rows:
                if type(row) is Refused:
                    replaced += self._quarantine(row)
                elif type(row) is Admitted:
                    database.execute("DELETE FROM quarantine WHERE id = ?", (row.id,))
                elif type(row) is Buried:
                    values = (row.seq, row.id, row.sop_instance, bytes.fromhex(row.sha256))
                    database.execute("INSERT INTO tombstones VALUES (?, ?, ?, ?)", values)
            if floor > self.floor:
                database.execute("INSERT OR REPLACE INTO meta VALUES ('journal_floor', ?)", (floor,))
        self.floor = max(self.floor, floor)
        return replaced

    def _object_values(self, entry: Entry) -> tuple[object, ...]:
        return (
            entry.seq,
            entry.id,
            bytes.fromhex(entry.sha256),
            entry.size,
            entry.data_offset,
            entry.sop_class,
            entry.sop_instance,
            entry.transfer_syntax,
            entry.grade,
            entry.received_ns,
            entry.parsed_ns,
            self.boot,
            entry.stored_at,
            len(self._active),
            None,
        )

    def _mark_values(self, mark: Mark) -> tuple[object, ...]:
        turn = None
        if mark.state is DeliveryState.DONE:
            self._turn += 1
            turn = self._turn
        return (mark.state, mark.status, mark.at, turn, mark.seq, self._numbers[mark.destination])

    def _quarantine(self, row: Refused) -> list[str]:
        old = self._database.execute("SELECT name FROM quarantine WHERE id = ?", (row.id,)).fetchall()
        self._database.execute("DELETE FROM quarantine WHERE id = ?", (row.id,))
        self._database.execute(
            "INSERT INTO quarantine VALUES (?, ?, ?, ?, ?, ?, 0)",
            (row.id, row.name, row.reason, row.detail, row.size, row.quarantined_at),
        )
        return [name for (name,) in old if name != row.name]

    def doubt(self, destination: str, byte_count: int) -> int:
        """See `Spool.doubt`."""
        number = self._numbers[destination]
        doubted = []
        newest = self._database.execute(
            "SELECT d.seq, o.size FROM deliveries d JOIN objects o USING (seq) "
            "WHERE d.destination = ? AND d.state = 1 AND d.turn > 0 ORDER BY d.turn DESC",
            (number,),
        )
        for seq, size in newest:
            if byte_count <= 0:
                break
            byte_count -= size
            doubted.append((time.time(), seq, number))
        newest.close()
        with self._transaction() as database:
            database.executemany(
                "UPDATE deliveries SET state = 0, updated_at = ?, turn = NULL "
                "WHERE seq = ? AND destination = ?",
                doubted,
            )
        return len(doubted)

    def unpark(self, sop_instance: str, sha256: bytes) -> int:
        """See `Spool.unpark`."""
        found = self._database.execute(
            "SELECT seq FROM objects WHERE sop_instance = ? AND sha256 = ?", (sop_instance, sha256)
        ).fetchall()
        with self._transaction() as database:
            return sum(
                database.execute(
                    "UPDATE deliveries SET state = 0, updated_at = ?, turn = NULL "
                    "WHERE seq = ? AND destination = ? AND state = 2",
                    (time.time(), seq, number),
                ).rowcount
                for (seq,) in found
                for number in self._active
            )

    def forget(self, settled_before: float, limit: int, max_tombstones: int) -> list[tuple[str, str]]:
        """Remove up to `limit` delivered objects, oldest first; returns id and sha256 of their files.

        They become tombstones, of which the newest `max_tombstones` stay.
        """
        gone = self._database.execute(
            "SELECT seq, id, sha256 FROM objects WHERE undelivered = 0 AND settled_at <= ? "
            "AND NOT EXISTS (SELECT 1 FROM deliveries d WHERE d.seq = objects.seq AND d.turn IS NULL) "
            "ORDER BY settled_at LIMIT ?",
            (settled_before, limit),
        ).fetchall()
        if not gone:
            return []
        with self._transaction() as database:
            for seq, _, _ in gone:
                database.execute(
                    "INSERT INTO tombstones SELECT seq, id, sop_instance, sha256 FROM objects WHERE seq = ?",
                    (seq,),
                )
                self._delete(seq)
            database.execute(
                "DELETE FROM tombstones WHERE seq <= "
                "(SELECT seq FROM tombstones ORDER BY seq DESC LIMIT 1 OFFSET ?)",
                (max(max_tombstones, limit),),
            )
        return [(id, sha256.hex()) for _, id, sha256 in gone]

    def _delete(self, seq: int) -> None:
        self._database.execute("DELETE FROM deliveries WHERE seq = ?", (seq,))
        self._database.execute("DELETE FROM objects WHERE seq = ?", (seq,))

    def delete(self, seqs: Sequence[int]) -> None:
        """Remove the rows of objects whose files are gone, without a tombstone."""
        with self._transaction():
            for seq in seqs:
                self._delete(seq)

    # ---- reading -----------------------------------------------------------------------------------------

    def totals(self) -> Totals:
        """All figures; costs the same however many objects there are."""
        rows = self._database.execute("SELECT name, objects, bytes FROM totals")
        figures = {name: (objects, size) for name, objects, size in rows}
        counts = {
            (self._names[number], DeliveryState(state)): deliveries
            for number, state, deliveries in self._database.execute("SELECT * FROM counts")
        }
        return Totals(figures["undelivered"], figures["retained"], figures["quarantined"], counts)

    def waiting(self, destination: str, after: int, limit: int) -> list[Entry]:
        """Objects waiting for `destination` with `seq` above `after`, in order, at most `limit`."""
        rows = self._database.execute(
            f"SELECT {ENTRY_COLUMNS}, d.attempts FROM deliveries d JOIN objects o USING (seq) "
            "WHERE d.destination = ? AND d.state = 0 AND d.seq > ? ORDER BY d.seq LIMIT ?",
            (self._numbers[destination], after, limit),
        )
        return [entry_of(row, self.boot, attempts=row[-1]) for row in rows]

    def recent(self, destination: str, limit: int) -> tuple[ManifestEntry, ...]:
        """See `Spool.recent`."""
        rows = self._database.execute(
            "SELECT o.id, o.size, o.sha256 FROM deliveries d JOIN objects o USING (seq) "
            "WHERE d.destination = ? AND d.state = 1 AND d.turn > 0 ORDER BY d.turn DESC LIMIT ?",
            (self._numbers[destination], limit),
        )
        return tuple(ManifestEntry(id=id, size=size, sha256=sha256.hex()) for id, size, sha256 in rows)

    def last_seq(self) -> int:
        """The highest `Entry.seq` that is known to have been given."""
        (seq,) = self._one(
            "SELECT max(coalesce((SELECT max(seq) FROM objects), 0), "
            "coalesce((SELECT max(seq) FROM tombstones), 0))"
        )
        return max(int(seq), self.floor)

    def file_of(self, id: str) -> tuple[int, str] | None:
        """`seq` and sha256 of the object `id`; None if there is no row."""
        row = self._database.execute("SELECT seq, sha256 FROM objects WHERE id = ?", (id,)).fetchone()
        return (row[0], row[1].hex()) if row else None

    def is_buried(self, id: str) -> bool:
        """Whether `id` has a tombstone: it was delivered and removed."""
        row = self._database.execute("SELECT 1 FROM tombstones WHERE id = ? LIMIT 1", (id,)).fetchone()
        return row is not None

    def files(self) -> Iterator[tuple[int, str, str]]:
        """`seq`, id and sha256 of every row."""
        for seq, id, sha256 in self._database.execute("SELECT seq, id, sha256 FROM objects"):
            yield seq, id, sha256.hex()

    def quarantined(self, *, released: bool = False) -> list[tuple[str, str]]:
        """Id and file name of what is in quarantine, oldest first; only what an operator released."""
        return self._database.execute(
            "SELECT id, name FROM quarantine WHERE released >= ? ORDER BY quarantined_at", (released,)
        ).fetchall()

    def refuse_release(self, id: str, why: str) -> None:
        """Say why an object that an operator released stays in quarantine."""
        with self._transaction() as database:
            database.execute("UPDATE quarantine SET released = 0, detail = ? WHERE id = ?", (why, id))

    def foreign_changes(self) -> int:
        """A number that changes when another connection has changed the index."""
        return int(self._one("PRAGMA data_version")[0])


def index_error(error: sqlite3.Error, path: str, free_bytes: int) -> SpoolError:
    """The spool's own error for one of SQLite at the index `path`, on a disk with so much free.

    On a full disk some of SQLite's files cannot even be opened, which it calls an I/O error.
    """
    code = getattr(error, "sqlite_errorcode", None) or 0
    no_room = code & 0xFF in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN) and free_bytes < INDEX_BYTES
    if code == sqlite3.SQLITE_FULL or no_room:
        return SpoolError(f"the spool's index {path}: the disk is full: free space on its file system")
    return SpoolError(f"the spool's index {path} failed: {error}")


def open_index(path: str) -> Index:
    """Open the index at `path`, making one if there is none.

    Raises:
        SpoolError: It was made by a later version.
        sqlite3.DatabaseError: It is damaged.
    """
    database = connect(path, create=True)
    try:
        (version,) = database.execute("PRAGMA user_version").fetchone()
        if version not in (0, SCHEMA_VERSION):
            raise SpoolError(f"the index has version {version}, this program knows {SCHEMA_VERSION}: upgrade")
        if version == 0:
            database.executescript(f"BEGIN; {SCHEMA} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")
        return Index(database, fresh=version == 0)
    except (sqlite3.Error, SpoolError, OSError):
        database.close()
        raise
