"""The journal: what was appended and synced is found again, whole, whatever else was lost, and only that."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay import spool_bridge, spool_committer
from relay.errors import SpoolError
from relay.spool import Entry
from relay.spool_files import Directory
from relay.spool_index import make_entry
from relay.spool_journal import BLOCK, HEADER_BYTES, MAX_RECORD_FILE_BYTES, NAME, Journal
from relay.spool_types import Recovered
from tests.relay.spool_kit import (
    HEADER_BYTES as FILE_HEADER_BYTES,
)
from tests.relay.spool_kit import (
    LIMITS,
    begun,
    data_of,
    deliver,
    facts,
    header,
    names,
    opened,
    scratch,
    sha256,
    stored,
    written,
)

JOURNALED = replace(LIMITS, journal_bytes=1 << 20)


@pytest.fixture
def directory() -> Iterator[str]:
    with scratch() as path:
        yield path


@contextmanager
def journal(path: str, max_bytes: int = 1 << 20) -> Iterator[Journal]:
    folders = Directory(path, ".dcm")
    made = Journal(folders, max_bytes)
    try:
        yield made
    finally:
        made.close()
        folders.close()


def kept(journal: Journal, seq: int, data: bytes) -> tuple[Entry, bool]:
    """Append an object of `data`; its entry, and whether there was a place for it."""
    entry = make_entry(seq, f"{seq:032x}", sha256(data), len(data), facts(), 0.0)
    return entry, journal.append(entry, bytearray(header() + data))


def found(path: str, floor: int = 0) -> dict[int, bytes]:
    """What a new process finds, by seq: the data sets."""
    objects = {}
    with journal(path, 0) as again:
        for record in again.replay(floor):
            fd = os.memfd_create("restored")
            try:
                again.copy_to(record, fd)
                whole = os.pread(fd, 1 << 21, 0)
            finally:
                os.close(fd)
            assert whole[: record.data_offset] == header()
            objects[record.seq] = whole[record.data_offset :]
    return objects


def test_what_was_kept_is_found_in_order(directory: str) -> None:
    objects = {seq: os.urandom(seq * 1000) for seq in (7, 1, 3)}
    with journal(directory) as first:
        for seq, data in objects.items():
            assert kept(first, seq, data)[1]
        first.sync()
    assert list(found(directory).items()) == sorted(objects.items())
    assert list(found(directory, floor=3)) == [7]


@pytest.mark.parametrize("at", [0, 5, 20, 50, HEADER_BYTES + 3, HEADER_BYTES + FILE_HEADER_BYTES + 100])
def test_a_damaged_record_is_none(directory: str, at: int) -> None:
    with journal(directory) as first:
        for seq in (1, 2):
            kept(first, seq, b"%d" % seq * 1000)
        first.sync()
    with open(os.path.join(directory, NAME), "r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes((byte[0] ^ 1,)))
    assert list(found(directory)) == [2]


def test_a_record_that_is_cut_short_is_none(directory: str) -> None:
    with journal(directory) as first:
        kept(first, 1, b"x" * 1000)
        kept(first, 2, b"y" * 10_000)
    os.truncate(os.path.join(directory, NAME), 2 * BLOCK)
    assert list(found(directory)) == [1]


def test_an_object_too_long_or_without_a_place_is_not_taken(directory: str) -> None:
    with journal(directory, max_bytes=4 * BLOCK) as small:
        assert not kept(small, 1, bytes(MAX_RECORD_FILE_BYTES))[1]
        assert [kept(small, seq, bytes(3000))[1] for seq in range(2, 7)] == [True] * 4 + [False]
        small.release(3)
        assert not kept(small, 7, bytes(3000))[1]
        small.release(2)
        assert [kept(small, seq, bytes(3000))[1] for seq in (8, 9, 10)] == [True, True, False]
        assert small.floor == 3


def test_the_floor_is_below_what_is_still_needed(directory: str) -> None:
    with journal(directory) as first:
        for seq in (4, 5, 6):
            kept(first, seq, b"data")
        assert first.floor == 3
        first.release(5)
        assert first.floor == 3
        first.release(4)
        assert first.floor == 5
        first.release(6)
        first.release(6)
        assert first.floor == 6


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 20_000), st.booleans()), max_size=60), st.randoms())
def test_whatever_is_still_needed_is_found(steps: list[tuple[int, bool]], dice: object) -> None:
    """Objects of any size come and go in any order in a ring of ten blocks; none is overwritten too early."""
    with scratch() as path:
        needed: dict[int, bytes] = {}
        with journal(path, max_bytes=10 * BLOCK) as ring:
            for seq, (size, releases) in enumerate(steps, 1):
                data = os.urandom(size)
                if kept(ring, seq, data)[1]:
                    needed[seq] = data
                if releases and needed:
                    gone = dice.choice(list(needed))  # type: ignore[attr-defined]
                    ring.release(gone)
                    del needed[gone]
                assert all(seq > ring.floor for seq in needed)
            floor = ring.floor
            ring.sync()
        assert found(path, floor).items() >= needed.items()


# ---- a spool with a journal --------------------------------------------------------------------------------


def after_power_failure(directory: str, copy: str, entries: Sequence[Entry], *, lost: str) -> None:
    """Copy the spool as it is, without what was never synced: `lost` says how its files come back."""
    shutil.copytree(directory, copy)
    for entry in entries:
        path = Path(copy, "objects", f"{entry.id}.{entry.sha256}.dcm")
        assert not path.exists(), "the test means files that are not there yet"
        if lost == "empty":
            path.write_bytes(b"")
        elif lost == "short":
            path.write_bytes(header() + b"dat")


@pytest.mark.parametrize("lost", ["missing", "empty", "short"])
async def test_a_power_failure_takes_nothing_that_was_committed(
    directory: str, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    monkeypatch.setattr(spool_committer, "MAX_SEAL_DELAY_SECONDS", 3600.0)
    copy = directory + "-copy"
    async with opened(directory, JOURNALED) as spool:
        await written(spool)
        entries = [await stored(spool, b"object %d" % number * 500) for number in range(5)]
        after_power_failure(directory, copy, entries, lost=lost)
    async with opened(copy, JOURNALED) as spool:
        assert spool.recovered == Recovered(adopted=5, restored=5)
        assert spool.stats().waiting == {"pacs": 5}
        for number in range(5):
            entry = await spool.feed("pacs").next()
            assert (entry.id, entry.seq > entries[-1].seq) == (entries[number].id, True)
            assert data_of(spool, entry) == b"object %d" % number * 500


async def test_a_whole_file_is_not_made_again(directory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool_committer, "MAX_SEAL_DELAY_SECONDS", 3600.0)
    copy = directory + "-copy"
    async with opened(directory, JOURNALED) as spool:
        await written(spool)
        entry = await stored(spool)
        shutil.copytree(directory, copy)
        with open(os.path.join(copy, "objects", f"{entry.id}.{entry.sha256}.dcm"), "wb") as file:
            file.write(header() + b"data")
    async with opened(copy, JOURNALED) as spool:
        assert spool.recovered == Recovered(adopted=1)


async def test_what_was_delivered_and_removed_does_not_come_back(directory: str) -> None:
    limits = replace(JOURNALED, retention_seconds=0.0, max_tombstones=0)
    async with opened(directory, limits) as spool:
        await stored(spool)
        await deliver(spool, 1)
        await written(spool)
        await spool.sweep()
        assert names(directory, "objects") == []
    assert os.stat(os.path.join(directory, NAME)).st_size > 0
    async with opened(directory, limits) as spool:
        assert spool.recovered == Recovered()
        assert spool.feed("pacs").next_nowait() is None


async def test_nothing_stays_in_a_journal_that_nobody_uses(
    directory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool_committer, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(spool_committer, "FORGET_SECONDS", 0.2)
    path = Path(directory, NAME)
    async with opened(directory, JOURNALED) as spool:
        await stored(spool, b"of a patient")
        assert b"of a patient" in path.read_bytes()
        async with asyncio.timeout(10):
            while path.stat().st_size:
                await asyncio.sleep(0.01)
        again = await stored(spool, b"and again")
        assert b"and again" in path.read_bytes()
        assert data_of(spool, again) == b"and again"
    async with opened(directory, JOURNALED) as spool:
        assert spool.stats().waiting == {"pacs": 2}


async def test_seqs_of_the_journal_are_not_given_again(
    directory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a record left from before could pass for one of a later object."""
    monkeypatch.setattr(spool_committer, "MAX_SEAL_DELAY_SECONDS", 3600.0)
    copy = directory + "-copy"
    async with opened(directory, JOURNALED) as spool:
        await written(spool)
        entries = [await stored(spool, b"%d" % number) for number in range(3)]
        after_power_failure(directory, copy, entries, lost="missing")
    async with opened(copy, JOURNALED) as spool:
        assert (await stored(spool, b"next")).seq > entries[-1].seq + 3


async def test_a_journal_that_fails_is_left_and_nothing_is_lost(
    directory: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(fd: int) -> None:
        raise OSError(errno.EIO, "bad sector")

    async with opened(directory, JOURNALED) as spool:
        first = await stored(spool, b"first")
        monkeypatch.setattr(os, "fdatasync", fails)
        second = await stored(spool, b"second")
        monkeypatch.undo()
        assert (data_of(spool, first), data_of(spool, second)) == (b"first", b"second")
        assert "journal failed" in caplog.text
    async with opened(directory, JOURNALED) as spool:
        assert spool.stats().waiting == {"pacs": 2}


async def test_a_journaled_file_that_cannot_be_synced_ends_the_spool(
    directory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(fd: int) -> None:
        raise OSError(errno.EIO, "bad sector")

    async with opened(directory, JOURNALED) as spool:
        monkeypatch.setattr(os, "fsync", fails)
        await stored(spool)
        with pytest.raises(SpoolError):
            await spool.failed()
        monkeypatch.undo()
    async with opened(directory, JOURNALED) as spool:
        assert spool.stats().waiting == {"pacs": 1}


async def test_a_disk_that_is_full_for_a_while_delays_files_that_the_journal_has(
    directory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, tries = os.fsync, 0

    def full(fd: int) -> None:
        nonlocal tries
        tries += 1
        if tries <= 6:
            raise OSError(errno.ENOSPC, "no space")
        real(fd)

    monkeypatch.setattr(spool_committer, "RETRY_SECONDS", 0.01)
    async with opened(directory, JOURNALED) as spool:
        await written(spool)
        monkeypatch.setattr(os, "fsync", full)
        entries = [await stored(spool, b"object %d" % number) for number in range(3)]
        await deliver(spool, 3)
        await written(spool)
        monkeypatch.undo()
        assert tries > 6
        assert spool.stats().retained_objects == 3
        assert [data_of(spool, entry) for entry in entries] == [b"object %d" % n for n in range(3)]
    async with opened(directory, JOURNALED) as spool:
        assert spool.recovered == Recovered()


async def test_a_disk_that_stays_full_at_the_end_leaves_the_journal_to_the_next_opening(
    directory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(spool_committer, "RETRY_SECONDS", 0.01)
    async with opened(directory, JOURNALED) as spool:
        await written(spool)
        monkeypatch.setattr(os, "fsync", full)
        await stored(spool, b"data")
    monkeypatch.undo()
    async with opened(directory, JOURNALED) as spool:
        assert spool.recovered == Recovered(adopted=1, restored=1)


async def test_a_commit_without_journal_and_without_disk_leaves_nothing(
    directory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "bad sector")

    async with opened(directory, JOURNALED) as spool:
        part = begun(spool)
        monkeypatch.setattr(os, "fdatasync", fails)
        monkeypatch.setattr(os, "rename", fails)
        with pytest.raises(SpoolError):
            await spool.commit(part, facts())
        monkeypatch.undo()
        assert names(directory, "objects") == []
        assert spool.stats().undelivered_objects == 0
        assert (await stored(spool, b"next")).size == 4


async def test_what_has_just_come_is_read_from_memory_and_later_from_its_file(
    directory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool_committer, "MAX_SEAL_DELAY_SECONDS", 3600.0)
    async with opened(directory, JOURNALED) as spool:
        await written(spool)
        entry = await stored(spool, b"just come")
        assert names(directory, "objects") == []
        assert bytes(spool.fresh(entry) or b"") == data_of(spool, entry) == b"just come"
        await written(spool)
        assert names(directory, "objects") == [f"{entry.id}.{entry.sha256}.dcm"]
        assert spool.fresh(entry) is None
        assert data_of(spool, entry) == b"just come"


@pytest.mark.parametrize("size", [MAX_RECORD_FILE_BYTES - FILE_HEADER_BYTES, MAX_RECORD_FILE_BYTES])
@pytest.mark.parametrize("ending", ["commit", "quarantine", "abandon"])
async def test_a_part_outgrows_memory_and_nothing_else_changes(
    directory: str, size: int, ending: str
) -> None:
    data = os.urandom(size)
    async with opened(directory, JOURNALED) as spool:
        part = spool.begin(header())
        for start in range(0, size, 100_000):
            part.write([data[start : start + 100_000]])
        with part.view() as view:
            assert view == data
        if ending == "commit":
            entry = await spool.commit(part, facts())
            assert data_of(spool, entry) == data
        elif ending == "quarantine":
            spool.quarantine(part, "bad")
            (name,) = names(directory, "quarantine")
            assert Path(directory, "quarantine", name).read_bytes() == header() + data
        else:
            part.abandon()
        assert spool.stats().part_objects == spool.stats().part_bytes == 0


async def test_memory_is_bounded_by_the_journal(directory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """When nothing can be synced, objects beyond the journal's room wait for their own files."""
    monkeypatch.setattr(spool_committer, "MAX_SEAL_DELAY_SECONDS", 3600.0)
    monkeypatch.setattr(spool_committer, "MAX_DEFERRED_BYTES", 1 << 40)
    async with opened(directory, JOURNALED) as spool:
        await written(spool)
        entries = [await stored(spool, bytes(200_000)) for _ in range(12)]
        fresh = [entry for entry in entries if spool.fresh(entry) is not None]
        assert sum(entry.size for entry in fresh) <= JOURNALED.journal_bytes
        assert len(fresh) < len(entries) == spool.stats().undelivered_objects


async def test_objects_without_a_file_are_bounded_however_many_come_at_once(
    directory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool_committer, "MAX_SEAL_DELAY_SECONDS", 3600.0)
    monkeypatch.setattr(spool_bridge, "MAX_OPEN", 4)
    async with opened(directory, JOURNALED) as spool:
        await written(spool)
        parts = [begun(spool, b"%d" % number) for number in range(9)]
        entries = await asyncio.gather(*(spool.commit(part, facts()) for part in parts))
        assert sum(spool.fresh(entry) is not None for entry in entries) == 4
        assert spool.stats().undelivered_objects == 9


async def test_many_at_once_share_one_sync(directory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real, syncs = os.fdatasync, 0

    def counting(fd: int) -> None:
        nonlocal syncs
        syncs += 1
        real(fd)

    async with opened(directory, JOURNALED) as spool:
        parts = [begun(spool, b"%d" % number) for number in range(40)]
        monkeypatch.setattr(os, "fdatasync", counting)
        entries = await asyncio.gather(*(spool.commit(part, facts()) for part in parts))
        monkeypatch.undo()
        assert 1 <= syncs <= 40
        assert len({entry.id for entry in entries}) == spool.stats().undelivered_objects == 40
