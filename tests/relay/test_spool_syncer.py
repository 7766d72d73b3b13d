"""Making a group of objects durable: in which order, and what becomes of those that fail."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from relay import spool_syncer
from relay.errors import SpoolError
from relay.spool_files import Directory, write_out
from relay.spool_index import make_entry
from relay.spool_spares import Spares
from relay.spool_syncer import Intake, make_durable
from tests.relay.spool_kit import facts, header, names, scratch, sha256

DATA = b"data set"


@pytest.fixture
def directory() -> Iterator[Directory]:
    with scratch() as path:
        folders = Directory(path, ".dcm")
        yield folders
        folders.close()


def intakes(directory: Directory, count: int) -> list[Intake]:
    """Objects that are in memory only."""
    made = []
    for number in range(count):
        entry = make_entry(number, f"{number:032x}", sha256(DATA), len(DATA), facts(), 1.0)
        name = directory.object_name(entry.id, entry.sha256)
        made.append(Intake(entry, name, None, bytearray(header() + DATA)))
    return made


def test_one_file_after_the_other_goes_to_the_disk_and_then_all_are_synced(
    directory: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[tuple[str, int]] = []

    def written_out(fd: int) -> None:
        done.append(("written out", os.fstat(fd).st_size))
        write_out(fd)

    def synced(fd: int) -> None:
        done.append(("directory" if fd == directory.objects else "file", os.fstat(fd).st_size))
        sync(fd)

    sync = os.fsync
    monkeypatch.setattr(spool_syncer, "write_out", written_out)
    monkeypatch.setattr(os, "fsync", synced)
    group = intakes(directory, 3)
    size = len(header()) + len(DATA)
    make_durable(group, directory, Spares(directory))
    assert done[:-1] == [("written out", size)] * 3 + [("file", size)] * 3
    assert done[-1][0] == "directory"
    assert names(directory.path, "objects") == sorted(intake.name for intake in group)
    assert [(intake.error, intake.data) for intake in group] == [(None, None)] * 3


def test_one_that_fails_does_not_keep_the_others(
    directory: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync, calls = os.fsync, iter(range(9))

    def synced(fd: int) -> None:
        if next(calls) == 1:
            raise OSError(5, "Input/output error")
        sync(fd)

    monkeypatch.setattr(os, "fsync", synced)
    group = intakes(directory, 3)
    make_durable(group, directory, Spares(directory))
    assert [type(intake.error) for intake in group] == [type(None), SpoolError, type(None)]
    assert names(directory.path, "objects") == [group[0].name, group[2].name]
    assert group[1].data is not None, "it is in the journal still and is tried again"


def test_what_a_disk_cannot_write_out_is_left_to_the_sync_to_tell() -> None:
    reading, writing = os.pipe()
    write_out(writing)
    os.close(reading)
    os.close(writing)
