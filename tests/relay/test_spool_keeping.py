"""The journal at work: objects share a sync, each is told of once, and a disk that fails is told of."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections.abc import AsyncIterator, Callable, Sequence

import pytest

from relay.spool_files import Directory
from relay.spool_index import make_entry
from relay.spool_journal import BLOCK, MAX_RECORD_FILE_BYTES, NAME, Journal
from relay.spool_keeping import Keeping
from relay.spool_syncer import Intake
from tests.relay.spool_kit import facts, header, scratch, sha256


class Bench:
    """A keeping, and what it told."""

    def __init__(self, directory: Directory) -> None:
        self._loop = asyncio.get_running_loop()
        self.directory = directory
        self.directory = directory
        self.told: list[tuple[list[int], OSError | None]] = []
        self.news = asyncio.Event()
        self.journal = Journal(directory, 1 << 20)
        self.keeping = Keeping(self.journal, post=self._post, told=self._tell)

    def _post(self, call: Callable[[], None]) -> None:
        self._loop.call_soon_threadsafe(call)

    def _tell(self, intakes: Sequence[Intake], error: OSError | None) -> None:
        self.told.append(([intake.entry.seq for intake in intakes], error))
        self.news.set()

    def keep(self, seq: int, size: int = 1000) -> bool:
        entry = make_entry(seq, f"{seq:032x}", sha256(bytes(size)), size, facts(), 0.0)
        return self.keeping.keep(Intake(entry, "name", None, bytearray(header() + bytes(size))))


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    with scratch() as path:
        directory = Directory(path, ".dcm")
        made = Bench(directory)
        yield made
        made.keeping.close()
        directory.close()


class SlowDisk:
    """fdatasync that takes as long as a test wants."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun = threading.Semaphore(0)
        self.go_on = threading.Semaphore(0)
        self.syncs = 0
        self._real = os.fdatasync
        monkeypatch.setattr(os, "fdatasync", self._sync)

    def _sync(self, fd: int) -> None:
        self.begun.release()
        assert self.go_on.acquire(timeout=10)
        self.syncs += 1
        self._real(fd)


async def test_what_comes_during_a_sync_shares_the_next(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = SlowDisk(monkeypatch)
    assert bench.keep(1)
    await asyncio.to_thread(disk.begun.acquire)
    assert [bench.keep(seq) for seq in (2, 3, 4)] == [True] * 3
    assert not bench.keeping.idle.is_set()
    assert bench.told == []
    disk.go_on.release(2)
    await asyncio.wait_for(bench.keeping.idle.wait(), 10)
    assert bench.told == [([1], None), ([2, 3, 4], None)]
    assert disk.syncs == 2


async def test_nobody_is_told_of_what_is_not_synced(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = SlowDisk(monkeypatch)
    bench.keep(1)
    await asyncio.to_thread(disk.begun.acquire)
    bench.keep(2)
    disk.go_on.release()
    await asyncio.wait_for(bench.news.wait(), 10)
    assert bench.told == [([1], None)]
    disk.go_on.release()
    await asyncio.wait_for(bench.keeping.idle.wait(), 10)
    assert bench.told[1:] == [([2], None)]


async def test_a_sync_that_fails_is_told_to_all_who_wait(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def fails(fd: int) -> None:
        begun.set()
        assert go_on.wait(10)
        raise OSError(errno.EIO, "bad sector")

    monkeypatch.setattr(os, "fdatasync", fails)
    bench.keep(1)
    await asyncio.to_thread(begun.wait)
    bench.keep(2)
    go_on.set()
    await asyncio.wait_for(bench.keeping.idle.wait(), 10)
    [(seqs, error)] = bench.told
    assert seqs == [1, 2]
    assert isinstance(error, OSError)
    monkeypatch.undo()
    assert not bench.keep(3)
    assert len(bench.told) == 1


async def test_a_write_that_fails_is_told_and_leaves_the_object_to_its_giver(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> int:
        raise OSError(errno.EIO, "bad sector")

    monkeypatch.setattr(os, "pwritev", fails)
    assert not bench.keep(1)
    monkeypatch.undo()
    [(seqs, error)] = bench.told
    assert seqs == []
    assert isinstance(error, OSError)
    assert bench.keeping.idle.is_set()
    assert not bench.keep(2)


async def test_what_has_no_place_is_not_kept(bench: Bench) -> None:
    assert not bench.keep(1, MAX_RECORD_FILE_BYTES)
    kept = [bench.keep(seq, 64 * BLOCK) for seq in range(2, 8)]
    assert kept == [True] * 3 + [False] * 3
    await asyncio.wait_for(bench.keeping.idle.wait(), 10)
    assert sorted(seq for seqs, _ in bench.told for seq in seqs) == [2, 3, 4]


async def test_a_full_disk_is_no_failure(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, "posix_fallocate", full)
    assert not bench.keep(1)
    monkeypatch.undo()
    assert bench.keep(2)
    await asyncio.wait_for(bench.keeping.idle.wait(), 10)
    assert bench.told == [([2], None)]
    assert bench.journal.floor == 1


async def test_a_journal_that_failed_is_left_as_it_is(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in it may be all there is of an object; truncating it might fail, too."""

    def fails(fd: int) -> None:
        raise OSError(errno.EIO, "bad sector")

    monkeypatch.setattr(os, "fdatasync", fails)
    bench.keep(1)
    await asyncio.wait_for(bench.news.wait(), 10)
    bench.journal.release(1)
    size = os.stat(NAME, dir_fd=bench.directory.root).st_size
    bench.journal.forget()
    assert os.stat(NAME, dir_fd=bench.directory.root).st_size == size > 0
