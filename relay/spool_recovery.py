"""What opening a spool does after a crash: make index and files agree again, and lose nothing silently.

    journal                    what is whole there, has no row and no whole file gets its file again
    objects/ without a row     whole → taken in as waiting; torn → quarantine; already delivered → removed
    row without a file         removed, counted, said
    parts/                     removed, unless they may be resumed
    spares/                    emptied; one that held something was a part
    quarantine/ without a row  listed again with the reason in its name; row without a file: removed

Runs in the committer's thread, before anything else.

Never here: an event loop.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sqlite3
import time
import uuid
from dataclasses import dataclass

from relay.errors import MedferryError, SpoolError
from relay.spool_files import FILE_MODE, Directory, discard, is_part_name
from relay.spool_index import Admitted, Index, Refused, Row, make_entry, open_index
from relay.spool_journal import NAME as JOURNAL
from relay.spool_journal import Journal, Record
from relay.spool_spares import Spares
from relay.spool_types import MAX_HEADER_BYTES, Describe, Facts, Recovered

READ_BYTES = 1 << 20
"""Read at once while a file is hashed."""

GROUP = 1000
"""Rows in one transaction of a rebuild."""

MAX_NAMED_GONE = 100
"""Objects without a file that are named one by one; the rest are only counted."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Judged:
    """A file read from end to end: its facts, its data set's size and hash."""

    facts: Facts
    size: int
    sha256: str


def judge(name: str, at: int, describe: Describe) -> Judged:
    """Read the whole file `name` in folder `at`.

    Raises:
        MedferryError: Its header cannot be described, or there is no data set.
        OSError: It cannot be read.
    """
    with open(os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=at), "rb", buffering=0) as file:
        facts = describe(file.read(MAX_HEADER_BYTES))
        size = os.fstat(file.fileno()).st_size - facts.data_offset
        if size <= 0:
            raise SpoolError("the file ends before its data set begins")
        file.seek(facts.data_offset)
        digest = hashlib.sha256()
        while block := file.read(READ_BYTES):
            digest.update(block)
    return Judged(facts, size, digest.hexdigest())


def open_or_rebuild(path: str) -> tuple[Index, bool]:
    """The index at `path`; a damaged one is set aside as ``index.db.damaged`` and an empty one made.

    Returns the index, and whether it is to be filled from the files.
    """
    try:
        index = open_index(path)
    except sqlite3.OperationalError:
        raise
    except sqlite3.DatabaseError as error:
        log.warning("the spool's index %s is damaged (%s) and set aside as index.db.damaged", path, error)
        os.replace(path, path + ".damaged")
        for suffix in ("-wal", "-shm"):
            if os.path.exists(path + suffix):
                os.unlink(path + suffix)
        index = open_index(path)
    return index, index.fresh


class Recovery:
    """One pass over a spool's directory, before it is used."""

    def __init__(
        self, directory: Directory, index: Index, describe: Describe, spares: Spares, *, resumable: bool
    ) -> None:
        self._directory = directory
        self._index = index
        self._describe = describe
        self._spares = spares
        self._resumable = resumable
        self._rows: list[Row] = []
        self._adopted: set[str] = set()
        self._seq = index.last_seq()
        self._torn = 0
        self._parts_removed = 0
        self.parts: dict[str, int] = {}
        """Parts that may be resumed: bytes of data set there, by id."""

    def run(self, *, rebuilt: bool, unconfigured: int) -> Recovered:
        """Do all of it."""
        restored = self._replay_journal()
        self._scan_quarantine()
        adopted, missing = self._scan_objects()
        self._scan_parts()
        self._parts_removed += self._spares.adopt()
        self._index.record([], self._seq)
        return Recovered(
            rebuilt=rebuilt and adopted > 0,
            adopted=adopted,
            restored=restored,
            torn=self._torn,
            missing=missing,
            parts_removed=self._parts_removed,
            unconfigured=unconfigured,
        )

    def _replay_journal(self) -> int:
        """Make the files again that a power failure took; returns how many."""
        if not os.access(JOURNAL, os.F_OK, dir_fd=self._directory.root):
            return 0
        restored = 0
        journal = Journal(self._directory, 0)
        try:
            for record in journal.replay(self._index.floor):
                # The seq was given once, and is not given again.
                self._seq = max(self._seq, record.seq)
                if self._index.file_of(record.id) or self._index.is_buried(record.id):
                    continue
                restored += self._restore(journal, record)
            self._seq = max(self._seq, journal.floor)
        finally:
            journal.close()
        if restored:
            os.fsync(self._directory.objects)
        return restored

    def _restore(self, journal: Journal, record: Record) -> bool:
        """Write the file of a journal's record, unless it is there and whole."""
        directory = self._directory
        name = directory.object_name(record.id, record.sha256)
        try:
            judged = judge(name, directory.objects, self._describe)
            if judged.sha256 == record.sha256:
                return False
        except (FileNotFoundError, MedferryError):
            pass  # torn, or not there: it is made again
        flags = os.O_CREAT | os.O_TRUNC | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
        fd = os.open(record.id, flags, FILE_MODE, dir_fd=directory.parts)
        try:
            journal.copy_to(record, fd)
            # Finer than the file system does it: restored objects keep their order.
            now = time.time_ns()
            os.utime(fd, ns=(now, now))
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(record.id, name, src_dir_fd=directory.parts, dst_dir_fd=directory.objects)
        return True

    def _scan_objects(self) -> tuple[int, int]:
        """Adopt files without rows, in the order of their times; drop rows without files."""
        found: list[tuple[int, str]] = []
        known = 0
        with os.scandir(self._directory.objects) as files:
            for file in files:
                parsed = self._directory.parse_object_name(file.name)
                row = self._index.file_of(parsed[0]) if parsed else None
                if parsed and row and row[1] == parsed[1]:
                    known += 1
                elif parsed and self._index.is_buried(parsed[0]):
                    discard(file.name, self._directory.objects)
                else:
                    found.append((file.stat(follow_symlinks=False).st_mtime_ns, file.name))
        adopted = 0
        for mtime_ns, name in sorted(found):
            adopted += self._adopt(name, mtime_ns / 1e9)
        self._flush()
        total = self._index.totals()
        rows = total.undelivered[0] + total.retained[0]
        return adopted, self._drop_rows_without_files() if rows > known + adopted else 0

    def _adopt(self, name: str, stored_at: float) -> bool:
        parsed = self._directory.parse_object_name(name)
        if parsed is None:
            self._set_aside(name, uuid.uuid4().hex, "stray", "this file has no name of ours")
            return False
        id, sha256 = parsed
        if self._index.file_of(id) or id in self._adopted:
            self._set_aside(name, uuid.uuid4().hex, "stray", "a second file of the same object")
            return False
        try:
            judged = judge(name, self._directory.objects, self._describe)
        except MedferryError as error:
            self._set_aside(name, id, "torn", str(error))
            return False
        if judged.sha256 != sha256:
            self._set_aside(name, id, "torn", "the data set is not the one that the file's name tells of")
            return False
        self._adopted.add(id)
        self._seq += 1
        self._add(make_entry(self._seq, id, sha256, judged.size, judged.facts, stored_at))
        return True

    def _set_aside(self, name: str, id: str, reason: str, detail: str) -> None:
        directory = self._directory
        target = directory.quarantine_name(id, reason)
        os.rename(name, target, src_dir_fd=directory.objects, dst_dir_fd=directory.quarantine)
        self._torn += 1
        self._list_refused(target, id, reason, detail)

    def _list_refused(self, name: str, id: str, reason: str, detail: str) -> None:
        figures = os.stat(name, dir_fd=self._directory.quarantine, follow_symlinks=False)
        self._add(Refused(id, name, reason, detail, figures.st_size, time.time()))

    def _drop_rows_without_files(self) -> int:
        gone = []
        for seq, id, sha256 in self._index.files():
            name = self._directory.object_name(id, sha256)
            if not os.access(name, os.F_OK, dir_fd=self._directory.objects):
                gone.append(seq)
                if len(gone) <= MAX_NAMED_GONE:
                    log.error("object %s is gone: somebody deleted its file", id)
        self._index.delete(gone)
        return len(gone)

    def _scan_quarantine(self) -> None:
        listed = {name: id for id, name in self._index.quarantined()}
        with os.scandir(self._directory.quarantine) as files:
            names = {file.name for file in files}
        for name in sorted(names - listed.keys()):
            parsed = self._directory.parse_quarantine_name(name) or (uuid.uuid4().hex, "stray")
            self._list_refused(name, *parsed, "found in quarantine without a record")
        self._rows += [Admitted(id) for name, id in listed.items() if name not in names]
        self._flush()

    def _scan_parts(self) -> None:
        with os.scandir(self._directory.parts) as files:
            names = [file.name for file in files]
        for name in names:
            size = self._resumable_size(name) if self._resumable and is_part_name(name) else None
            if size is None:
                discard(name, self._directory.parts)
                self._parts_removed += 1
            else:
                self.parts[name] = size

    def _resumable_size(self, name: str) -> int | None:
        """Bytes of data set in the part `name`; None if its header is not whole."""
        with open(os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._directory.parts), "rb") as file:
            try:
                facts = self._describe(file.read(MAX_HEADER_BYTES))
            except MedferryError:
                return None
            size = os.fstat(file.fileno()).st_size - facts.data_offset
        return size if size >= 0 else None

    def _add(self, row: Row) -> None:
        self._rows.append(row)
        if len(self._rows) >= GROUP:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            for name in self._index.record(self._rows):
                discard(name, self._directory.quarantine)
            self._rows.clear()
            self._adopted.clear()
