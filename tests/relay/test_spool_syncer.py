"""Making a group of objects durable: in which order, and what becomes of those that fail."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator

import pytest

from relay import spool_files, spool_syncer
from relay.errors import SpoolError, SpoolFull
from relay.spool_files import Directory, write_all, write_out
from relay.spool_index import make_entry
from relay.spool_spares import Spares
from relay.spool_syncer import Intake, make_durable
from tests.relay.spool_kit import facts, folders, header, names, sha256

DATA = b"data set"


@pytest.fixture
def directory() -> Iterator[Directory]:
    with folders() as held:
        yield held


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

    def written(fd: int, views: list[memoryview], offset: int) -> None:
        write_all(fd, views, offset)
        done.append(("written", os.fstat(fd).st_size))

    def written_out(fd: int) -> None:
        done.append(("written out", os.fstat(fd).st_size))
        write_out(fd)

    def synced(fd: int) -> None:
        done.append(("directory" if fd == directory.objects else "file", os.fstat(fd).st_size))
        sync(fd)

    sync = os.fsync
    monkeypatch.setattr(spool_syncer, "write_all", written)
    monkeypatch.setattr(spool_syncer, "write_out", written_out)
    monkeypatch.setattr(os, "fsync", synced)
    group = intakes(directory, 3)
    size = len(header()) + len(DATA)
    make_durable(group, directory, Spares(directory))
    assert done[:-1] == [("written", size), ("written out", size)] * 3 + [("file", size)] * 3
    assert done[-1][0] == "directory"
    assert names(directory.path, "objects") == sorted(intake.name for intake in group)
    assert [(intake.error, intake.data) for intake in group] == [(None, None)] * 3


@pytest.mark.parametrize("step", ["write_out", "fsync"])
@pytest.mark.parametrize(("code", "error"), [(errno.EIO, SpoolError), (errno.ENOSPC, SpoolFull)])
def test_one_that_fails_does_not_keep_the_others(
    directory: Directory, step: str, code: int, error: type[SpoolError], monkeypatch: pytest.MonkeyPatch
) -> None:
    where = {"write_out": spool_syncer, "fsync": os}[step]
    act, calls = getattr(where, step), iter(range(9))

    def failing(fd: int) -> None:
        if next(calls) == 1:
            raise OSError(code, os.strerror(code))
        act(fd)

    monkeypatch.setattr(where, step, failing)
    group = intakes(directory, 3)
    make_durable(group, directory, Spares(directory))
    assert [type(intake.error) for intake in group] == [type(None), error, type(None)]
    assert names(directory.path, "objects") == [group[0].name, group[2].name]
    assert group[1].data is not None, "it is in the journal still and is tried again"


def test_what_somebody_waits_for_begins_at_once(
    directory: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool_syncer, "write_out", pytest.fail)
    group = intakes(directory, 3)
    for intake in group:
        intake.committing = True
    make_durable(group, directory, Spares(directory))
    assert [intake.error for intake in group] == [None] * 3


class FakeLibc:
    """A C library whose sync_file_range fails."""

    def __init__(self, code: int) -> None:
        self._code = code

    def sync_file_range(self, *arguments: object) -> int:
        ctypes.set_errno(self._code)
        return -1


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fails_tells_it_once_and_is_heard(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool_files, "_libc", FakeLibc(code))
    with pytest.raises(OSError, match=os.strerror(code)):
        write_out(0)


def test_where_there_is_no_such_call_the_sync_does_it_all(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    write_out(writing)
    os.close(reading)
    os.close(writing)
    for code in (errno.ENOSYS, errno.EPERM):
        monkeypatch.setattr(spool_files, "_libc", FakeLibc(code))
        write_out(0)
