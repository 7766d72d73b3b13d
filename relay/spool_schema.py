"""The spool's index as SQLite keeps it, shared by the worker and by `spool_admin` in other processes.

    objects ──< deliveries >── destinations        tombstones        quarantine        totals, counts, meta

Triggers keep `totals`, `counts` and `objects.undelivered` right whichever process changes a row, so that no
figure is ever counted by walking. `deliveries.turn` orders deliveries by when they were done; one that an
operator gave up is done without a turn until the worker has logged it, and with turn 0 from then on.

Never here: files, threads.
"""

from __future__ import annotations

import sqlite3
from typing import Any

from relay.spool_types import Entry

SCHEMA_VERSION = 1

BUSY_SECONDS = 5.0
"""How long a transaction waits for one of another process. Theirs take milliseconds."""

SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value) WITHOUT ROWID;

CREATE TABLE objects (
    seq INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    sha256 BLOB NOT NULL,
    size INTEGER NOT NULL,
    data_offset INTEGER NOT NULL,
    sop_class TEXT NOT NULL,
    sop_instance TEXT NOT NULL,
    transfer_syntax TEXT NOT NULL,
    grade INTEGER NOT NULL,
    received_ns INTEGER NOT NULL,
    parsed_ns INTEGER NOT NULL,
    boot INTEGER NOT NULL,
    stored_at REAL NOT NULL,
    undelivered INTEGER NOT NULL,
    settled_at REAL
);
CREATE INDEX objects_by_instance ON objects (sop_instance);
CREATE INDEX objects_retained ON objects (settled_at) WHERE undelivered = 0;

CREATE TABLE destinations (number INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE);

CREATE TABLE deliveries (
    seq INTEGER NOT NULL,
    destination INTEGER NOT NULL,
    state INTEGER NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 0,
    status,
    updated_at REAL NOT NULL,
    turn INTEGER,
    PRIMARY KEY (seq, destination)
) WITHOUT ROWID;
CREATE INDEX deliveries_waiting ON deliveries (destination, seq) WHERE state = 0;
CREATE INDEX deliveries_done ON deliveries (destination, turn) WHERE state = 1;
CREATE INDEX deliveries_parked ON deliveries (destination, seq) WHERE state = 2;

CREATE TABLE tombstones (
    seq INTEGER PRIMARY KEY,
    id TEXT NOT NULL,
    sop_instance TEXT NOT NULL,
    sha256 BLOB NOT NULL
);
CREATE INDEX tombstones_by_id ON tombstones (id);

CREATE TABLE quarantine (
    id TEXT PRIMARY KEY,
    name TEXT NOT NULL,
    reason TEXT NOT NULL,
    detail TEXT NOT NULL,
    size INTEGER NOT NULL,
    quarantined_at REAL NOT NULL,
    released INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX quarantine_by_age ON quarantine (quarantined_at);

CREATE TABLE totals (name TEXT PRIMARY KEY, objects INTEGER NOT NULL, bytes INTEGER NOT NULL) WITHOUT ROWID;
INSERT INTO totals VALUES ('undelivered', 0, 0), ('retained', 0, 0), ('quarantined', 0, 0);

CREATE TABLE counts (
    destination INTEGER NOT NULL, state INTEGER NOT NULL, deliveries INTEGER NOT NULL,
    PRIMARY KEY (destination, state)
) WITHOUT ROWID;

CREATE TRIGGER object_in AFTER INSERT ON objects BEGIN
    UPDATE totals SET objects = objects + 1, bytes = bytes + NEW.size + NEW.data_offset
        WHERE name = iif(NEW.undelivered, 'undelivered', 'retained');
END;
CREATE TRIGGER object_out AFTER DELETE ON objects BEGIN
    UPDATE totals SET objects = objects - 1, bytes = bytes - OLD.size - OLD.data_offset
        WHERE name = iif(OLD.undelivered, 'undelivered', 'retained');
END;
CREATE TRIGGER object_settled AFTER UPDATE OF undelivered ON objects
    WHEN (OLD.undelivered = 0) <> (NEW.undelivered = 0) BEGIN
    UPDATE totals SET objects = objects - 1, bytes = bytes - NEW.size - NEW.data_offset
        WHERE name = iif(OLD.undelivered, 'undelivered', 'retained');
    UPDATE totals SET objects = objects + 1, bytes = bytes + NEW.size + NEW.data_offset
        WHERE name = iif(NEW.undelivered, 'undelivered', 'retained');
END;
CREATE TRIGGER delivery_in AFTER INSERT ON deliveries BEGIN
    INSERT INTO counts VALUES (NEW.destination, NEW.state, 1)
        ON CONFLICT DO UPDATE SET deliveries = deliveries + 1;
END;
CREATE TRIGGER delivery_out AFTER DELETE ON deliveries BEGIN
    UPDATE counts SET deliveries = deliveries - 1 WHERE destination = OLD.destination AND state = OLD.state;
END;
CREATE TRIGGER delivery_moved AFTER UPDATE OF state ON deliveries WHEN OLD.state <> NEW.state BEGIN
    UPDATE counts SET deliveries = deliveries - 1 WHERE destination = OLD.destination AND state = OLD.state;
    INSERT INTO counts VALUES (NEW.destination, NEW.state, 1)
        ON CONFLICT DO UPDATE SET deliveries = deliveries + 1;
    UPDATE objects SET undelivered = undelivered + (OLD.state = 1) - (NEW.state = 1),
        settled_at = NEW.updated_at
        WHERE seq = NEW.seq AND (OLD.state = 1) <> (NEW.state = 1);
END;
CREATE TRIGGER quarantine_in AFTER INSERT ON quarantine BEGIN
    UPDATE totals SET objects = objects + 1, bytes = bytes + NEW.size WHERE name = 'quarantined';
END;
CREATE TRIGGER quarantine_out AFTER DELETE ON quarantine BEGIN
    UPDATE totals SET objects = objects - 1, bytes = bytes - OLD.size WHERE name = 'quarantined';
END;
"""

ENTRY_COLUMNS = (
    "o.seq, o.id, o.sha256, o.size, o.data_offset, o.sop_class, o.sop_instance, o.transfer_syntax, "
    "o.grade, o.received_ns, o.parsed_ns, o.boot, o.stored_at"
)
"""What `entry_of` reads, of a query that names `objects` as ``o``."""


def connect(path: str, *, create: bool) -> sqlite3.Connection:
    """Open an index at `path` in autocommit mode, WAL and FULL; `create` makes one that is not there."""
    mode = "rwc" if create else "rw"
    quoted = path.replace("%", "%25").replace("?", "%3f").replace("#", "%23")
    database = sqlite3.connect(
        f"file:{quoted}?mode={mode}", uri=True, timeout=BUSY_SECONDS, isolation_level=None
    )
    try:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")
        database.execute("PRAGMA cache_size = -4096")
    except sqlite3.Error:
        database.close()
        raise
    return database


def entry_of(row: tuple[Any, ...], boot: int, attempts: int = 0) -> Entry:
    """The `Entry` of a row of `ENTRY_COLUMNS`; monotonic times of another boot are dropped."""
    return Entry(
        seq=row[0],
        id=row[1],
        sha256=row[2].hex(),
        size=row[3],
        data_offset=row[4],
        sop_class=row[5],
        sop_instance=row[6],
        transfer_syntax=row[7],
        grade=row[8],
        received_ns=row[9] if row[11] == boot else 0,
        parsed_ns=row[10] if row[11] == boot else 0,
        stored_at=row[12],
        attempts=attempts,
    )
