"""Custody: what goes in comes out once, in order, unchanged; every bound holds; a bad disk loses nothing."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import resource
import sqlite3
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from relay import spool_committer
from relay.errors import SpoolError, SpoolFull
from relay.spool import DeliveryState, Entry, Spool
from relay.spool_admin import SpoolAdmin
from relay.spool_index import Index, Row
from tests.relay.spool_kit import (
    HEADER_BYTES,
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

pytestmark = pytest.mark.asyncio


@pytest.fixture
def directory() -> Iterator[str]:
    with scratch() as path:
        yield path


# ---- in and out --------------------------------------------------------------------------------------------


async def test_an_object_comes_out_as_it_went_in(directory: str) -> None:
    data = os.urandom(300_000)
    async with opened(directory) as spool:
        part = spool.begin(header("1.2.9"))
        for offset in range(0, len(data), 7001):
            block = memoryview(data)[offset : offset + 7001]
            part.write([block[:1000], b"", bytearray(block[1000:])])
        assert (part.size, part.sha256) == (len(data), sha256(data))
        with part.view() as seen:
            assert bytes(seen) == data
        entry = await spool.commit(part, facts("1.2.9"))
        assert names(directory, "objects") == [f"{entry.id}.{sha256(data)}.dcm"]
        assert names(directory, "parts") == []
        handed = await spool.feed("pacs").next()
        assert handed == entry
        assert (entry.size, entry.sha256, entry.sop_instance) == (len(data), sha256(data), "1.2.9")
        assert data_of(spool, entry) == data


async def test_more_buffers_than_the_kernel_takes_at_once(directory: str) -> None:
    pieces = [bytes([n % 251]) * (n % 3) for n in range(5000)]
    async with opened(directory) as spool:
        part = spool.begin(header())
        part.write(pieces)
        assert data_of(spool, await spool.commit(part, facts())) == b"".join(pieces)


async def test_a_kernel_that_takes_one_byte_at_a_time(
    directory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = os.pwritev
    async with opened(directory) as spool:
        part = spool.begin(header())
        monkeypatch.setattr(os, "pwritev", lambda fd, views, at: whole(fd, [views[0][:1]], at))
        part.write([b"abc", b"defg"])
        monkeypatch.undo()
        assert data_of(spool, await spool.commit(part, facts())) == b"abcdefg"


async def test_objects_come_out_in_the_order_they_came(directory: str) -> None:
    async with opened(directory) as spool:
        committed = await asyncio.gather(*(stored(spool, b"%d" % n) for n in range(300)))
        delivered = await deliver(spool, 300)
        assert [entry.id for entry in delivered] == [entry.id for entry in committed]
        assert [entry.seq for entry in delivered] == sorted(entry.seq for entry in delivered)


async def test_each_destination_gets_each_object(directory: str) -> None:
    async with opened(directory, destinations=("pacs", "ris")) as spool:
        entry = await stored(spool)
        await deliver(spool, 1, "pacs")
        await written(spool)
        assert spool.stats().waiting == {"pacs": 0, "ris": 1}
        assert spool.stats().undelivered_objects == 1
        assert (await spool.feed("ris").next()).id == entry.id
        spool.park(entry, "ris", 0xA900)
        await written(spool)
        assert (spool.stats().waiting["ris"], spool.stats().parked["ris"]) == (0, 1)


async def test_figures_are_right_before_and_after_rows_are_written(directory: str) -> None:
    async with opened(directory) as spool:
        part = begun(spool, b"x" * 10)
        assert (spool.stats().part_objects, spool.stats().part_bytes) == (1, 10 + HEADER_BYTES)
        await spool.commit(part, facts())
        for _ in range(2):
            stats = spool.stats()
            assert (stats.undelivered_objects, stats.undelivered_bytes) == (1, 10 + HEADER_BYTES)
            assert (stats.part_objects, stats.part_bytes, stats.waiting["pacs"]) == (0, 0, 1)
            await written(spool)


async def test_commit_is_durable_in_the_right_order(directory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []

    def spied(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **other: Any) -> Any:
            target = os.readlink(f"/proc/self/fd/{args[0]}") if name == "fsync" else args[1]
            steps.append(f"{name} {os.path.basename(os.path.dirname(target)) or target[32:]}")
            if name == "fsync" and target.endswith("/objects"):
                steps[-1] = "fsync objects/"
            return real(*args, **other)

        return call

    async with opened(directory) as spool:
        # By then there are spare files.
        await written(spool)
        part = begun(spool)
        monkeypatch.setattr(os, "fsync", spied("fsync", os.fsync))
        monkeypatch.setattr(os, "rename", spied("rename", os.rename))
        await spool.commit(part, facts())
        monkeypatch.undo()
    assert steps[0] == "fsync spares"
    assert steps[1].startswith("rename")
    assert steps[2] == "fsync objects/"


async def test_commits_that_wait_together_share_one_directory_fsync(
    directory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, directories = os.fsync, 0
    all_wait = threading.Event()

    def counting(fd: int) -> None:
        nonlocal directories
        all_wait.wait()
        directories += os.path.isdir(f"/proc/self/fd/{fd}")
        real(fd)

    async with opened(directory) as spool:
        parts = [begun(spool) for _ in range(40)]
        monkeypatch.setattr(os, "fsync", counting)
        commits = [asyncio.create_task(spool.commit(part, facts())) for part in parts]
        await asyncio.sleep(0)
        all_wait.set()
        await asyncio.gather(*commits)
        monkeypatch.undo()
    assert 1 <= directories <= 2


async def test_a_sealed_object_is_there_at_once_and_durable_soon(directory: str) -> None:
    async with opened(directory) as spool:
        entry = spool.seal(begun(spool), facts(), sha256(b"data"))
        assert names(directory, "objects") == [f"{entry.id}.{entry.sha256}.dcm"]
        assert spool.feed("pacs").peek(5) == (entry,)
        assert spool.has(entry.id)
        assert (await spool.feed("pacs").next()).id == entry.id
        await spool.durable(entry)
        await spool.durable(entry)


async def test_a_delivery_that_is_over_before_the_file_is_synced_stays_over(
    directory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool_committer, "MAX_SEAL_DELAY_SECONDS", 0.3)
    async with opened(directory) as spool:
        # Reading the feed's first page would hurry the file.
        assert spool.feed("pacs").next_nowait() is None
        await asyncio.sleep(0.05)
        entry = spool.seal(begun(spool), facts())
        assert spool.feed("pacs").next_nowait() == entry
        spool.done(entry, "pacs")
        # Longer than rows wait for others, shorter than the file.
        await asyncio.sleep(0.1)
        await spool.durable(entry)
        await asyncio.sleep(0.1)
        assert (spool.stats().waiting, spool.stats().retained_objects) == ({"pacs": 0}, 1)
    async with opened(directory) as spool:
        assert spool.stats().waiting == {"pacs": 0}


async def test_a_seal_with_another_hash_leaves_the_part(directory: str) -> None:
    async with opened(directory) as spool:
        part = begun(spool)
        with pytest.raises(SpoolError, match="not the one"):
            spool.seal(part, facts(), "0" * 64)
        spool.quarantine(part, "hash", "it came damaged")
        assert names(directory, "objects") == []
        assert spool.stats().quarantined_objects == 1


@pytest.mark.parametrize("ending", ["abandon", "commit", "quarantine"])
async def test_a_part_ends_once(directory: str, ending: str) -> None:
    async with opened(directory) as spool:
        part = begun(spool)
        if ending == "abandon":
            part.abandon()
        elif ending == "commit":
            await spool.commit(part, facts())
        else:
            spool.quarantine(part, "test")
        part.abandon()
        with pytest.raises(SpoolError, match="not being written"):
            part.write([b"x"])
        with pytest.raises(SpoolError):
            await spool.commit(part, facts())
        with pytest.raises(SpoolError):
            spool.quarantine(part, "test")
        stats = spool.stats()
        assert (stats.part_objects, stats.part_bytes, names(directory, "parts")) == (0, 0, [])
        assert len(names(directory, "objects")) == (ending == "commit")


async def test_what_is_not_an_object_is_refused(directory: str) -> None:
    async with opened(directory) as spool:
        with pytest.raises(SpoolError, match="no data set"):
            await spool.commit(spool.begin(header()), facts())
        with pytest.raises(ValueError, match="header"):
            spool.begin(b"")
        with pytest.raises(ValueError, match="hex"):
            spool.begin(header(), id="../../etc/passwd")
        with pytest.raises(ValueError, match="reason"):
            pass_reason = "../x reason"
            spool.quarantine(begun(spool), pass_reason)
        with pytest.raises(ValueError, match="72"):
            await spool.commit(begun(spool), replace(facts(), data_offset=1))
        with pytest.raises(SpoolError, match="no destination"):
            spool.feed("nobody")


async def test_one_id_is_written_and_kept_once(directory: str) -> None:
    async with opened(directory) as spool:
        id = "ab" * 16
        part = begun(spool, id=id)
        with pytest.raises(SpoolError, match="already"):
            spool.begin(header(), id=id)
        await spool.commit(part, facts())
        again = begun(spool, id=id)
        with pytest.raises(SpoolError, match="in custody already"):
            await spool.commit(again, facts())


async def test_duplicates_are_known_before_and_after_removal(directory: str) -> None:
    async with opened(directory, replace(LIMITS, retention_seconds=0)) as spool:
        entry = await stored(spool, b"data", "1.2.77")
        for moment in ("unrecorded", "recorded", "removed"):
            assert spool.has(entry.id), moment
            assert spool.known("1.2.77", entry.sha256) == (moment != "removed"), moment
            assert not spool.known("1.2.77", "0" * 64), moment
            assert not spool.known("1.2.78", entry.sha256), moment
            assert not spool.has("0" * 32), moment
            if moment == "unrecorded":
                await deliver(spool, 1)
                await written(spool)
            elif moment == "recorded":
                assert await spool.sweep() == 1
                with pytest.raises(SpoolError):
                    spool.open_data(entry)


async def test_what_was_parked_waits_again_where_it_is_served(directory: str) -> None:
    async with opened(directory) as spool:
        entry, other = await stored(spool, b"data", "1.2.77"), await stored(spool, b"more", "1.2.78")
        for each in (entry, other):
            await spool.feed("pacs").next()
            spool.park(each, "pacs", 0xC000)
        assert await spool.unpark("1.2.77", other.sha256) == 0
        assert await spool.unpark("1.2.77", entry.sha256) == 1
        assert (spool.stats().waiting, spool.stats().parked) == ({"pacs": 1}, {"pacs": 1})
        assert (await spool.feed("pacs").next()).id == entry.id


async def test_tombstones_are_bounded(directory: str) -> None:
    limits = replace(LIMITS, retention_seconds=0, max_tombstones=100)
    async with opened(directory, limits) as spool:
        entries = await asyncio.gather(*(stored(spool, b"%d" % n) for n in range(250)))
        await deliver(spool, 250)
        assert await spool.sweep() == 250
        remembered = [spool.has(entry.id) for entry in entries]
        assert remembered == [False] * 150 + [True] * 100


# ---- bounds ------------------------------------------------------------------------------------------------


async def test_the_object_bound(directory: str) -> None:
    async with opened(directory, replace(LIMITS, max_objects=3)) as spool:
        await stored(spool)
        part = begun(spool)
        begun(spool)
        with pytest.raises(SpoolFull) as full:
            spool.admit()
        assert full.value.bound == "objects"
        with pytest.raises(SpoolFull):
            spool.begin(header())
        part.abandon()
        spool.admit()
        assert spool.stats().refused == {"objects": 2}


async def test_the_byte_bound_holds_for_objects_that_grow_unannounced(directory: str) -> None:
    async with opened(directory, replace(LIMITS, max_bytes=1000)) as spool:
        part = begun(spool, b"x" * 500)
        with pytest.raises(SpoolFull) as full:
            part.write([b"x" * 500])
        assert full.value.bound == "bytes"
        assert part.size == 500
        with pytest.raises(SpoolFull):
            spool.admit(500)
        entry = await spool.commit(part, facts())
        assert data_of(spool, entry) == b"x" * 500


async def test_a_declared_size_is_reserved(directory: str) -> None:
    async with opened(directory, replace(LIMITS, max_bytes=1000)) as spool:
        part = spool.begin(header(), size=900)
        with pytest.raises(SpoolFull):
            spool.admit(100)
        part.write([b"x" * 900])
        part.abandon()
        spool.admit(900)


async def test_the_bound_of_one_object(directory: str) -> None:
    async with opened(directory, replace(LIMITS, max_object_bytes=100)) as spool:
        with pytest.raises(SpoolFull) as full:
            spool.admit(101)
        assert full.value.bound == "object"
        part = begun(spool, b"x" * 100)
        with pytest.raises(SpoolFull):
            part.write([b"x"])
        await spool.commit(part, facts())


async def test_the_disk_bound(directory: str) -> None:
    async with opened(directory, replace(LIMITS, min_free_disk_bytes=2**62)) as spool:
        with pytest.raises(SpoolFull) as full:
            spool.admit()
        assert full.value.bound == "disk"
        assert names(directory, "parts") == []


async def test_a_disk_that_runs_low_takes_delivered_objects_first(
    directory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = 2**40
    monkeypatch.setattr("relay.spool_files.Directory.free_bytes", lambda _: free)
    async with opened(directory, replace(LIMITS, min_free_disk_bytes=2**30)) as spool:
        await stored(spool, b"delivered")
        await stored(spool, b"waiting")
        await deliver(spool, 1)
        await written(spool)
        assert spool.stats().evicted == 0
        free = 2**30 + 2**20
        await stored(spool, b"last")
        await deliver(spool, 1)
        async with asyncio.timeout(5):
            while spool.stats().evicted < 2:
                await asyncio.sleep(0.01)
        assert len(names(directory, "objects")) == 1


async def test_delivered_objects_make_room_oldest_first(directory: str) -> None:
    async with opened(directory, replace(LIMITS, max_objects=10)) as spool:
        entries = []
        for n in range(25):
            entries.append(await stored(spool, b"%d" % n))
            await deliver(spool, 1)
            await written(spool)
        stats = spool.stats()
        assert stats.undelivered_objects == 0
        assert stats.retained_objects + stats.evicted == 25
        assert stats.retained_objects <= 10
        assert stats.refused == {}
        kept = [os.path.exists(os.path.join(directory, "objects", f"{e.id}.{e.sha256}.dcm")) for e in entries]
        assert kept == sorted(kept)


async def test_retention_keeps_what_is_young_and_what_is_not_delivered(directory: str) -> None:
    async with opened(directory, replace(LIMITS, retention_seconds=3600)) as spool:
        await stored(spool)
        await deliver(spool, 1)
        assert await spool.sweep() == 0
    async with opened(directory, replace(LIMITS, retention_seconds=0)) as spool:
        await stored(spool)
        assert await spool.sweep() == 1
        assert len(names(directory, "objects")) == 1
        assert spool.stats().evicted == 0


async def test_the_quarantine_is_bounded(directory: str) -> None:
    limits = replace(LIMITS, max_quarantine_objects=2)
    async with opened(directory, limits) as spool:
        for _ in range(2):
            spool.quarantine(begun(spool), "bad")
            await written(spool)
        part = begun(spool)
        with pytest.raises(SpoolFull) as full:
            spool.quarantine(part, "bad")
        assert full.value.bound == "quarantine"
        part.abandon()
        assert spool.stats().quarantined_objects == 2
        assert len(names(directory, "quarantine")) == 2


# ---- bad disks ---------------------------------------------------------------------------------------------


def failing(code: int) -> Callable[..., Any]:
    def fail(*_: object, **__: object) -> Any:
        raise OSError(code, os.strerror(code))

    return fail


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
async def test_a_disk_that_fills_during_a_write(
    directory: str, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    async with opened(directory) as spool:
        kept = await stored(spool, b"kept")
        part = begun(spool, b"half")
        monkeypatch.setattr(os, "pwritev", failing(code))
        with pytest.raises(SpoolFull) as full:
            part.write([b"more"])
        monkeypatch.undo()
        assert full.value.bound == "disk"
        assert part.size == 4
        part.write([b" whole"])
        assert data_of(spool, await spool.commit(part, facts())) == b"half whole"
        assert data_of(spool, kept) == b"kept"


@pytest.mark.parametrize(
    ("code", "free", "words"),
    [
        (sqlite3.SQLITE_FULL, 2**40, "index.db: the disk is full: free space on its file system"),
        (sqlite3.SQLITE_IOERR | 19 << 8, 4096, "index.db: the disk is full: free space on its file system"),
        (sqlite3.SQLITE_CANTOPEN, 0, "index.db: the disk is full: free space on its file system"),
        (sqlite3.SQLITE_IOERR, 2**40, "index.db failed: no luck"),
        (sqlite3.SQLITE_BUSY, 0, "index.db failed: no luck"),
    ],
)
async def test_opening_on_a_full_disk_says_where_and_what_to_do(
    directory: str, monkeypatch: pytest.MonkeyPatch, code: int, free: int, words: str
) -> None:
    def fail(*_: object) -> None:
        error = sqlite3.OperationalError("no luck")
        error.sqlite_errorcode = code
        raise error

    monkeypatch.setattr("relay.spool_index.Index.serve", fail)
    monkeypatch.setattr("relay.spool_files.Directory.free_bytes", lambda _: free)
    with pytest.raises(SpoolError) as failed:
        async with opened(directory):
            pass
    assert str(failed.value) == f"the spool's index {directory}/{words}"


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
@pytest.mark.parametrize("used", [False, True])
async def test_a_disk_that_really_is_full(tmp_path: Path, used: bool) -> None:
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "none", tmp_path], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("this host lets nobody mount")
    directory = str(tmp_path / "spool")
    try:
        if used:
            async with opened(directory) as spool:
                await stored(spool)
        with contextlib.suppress(OSError), open(tmp_path / "fill", "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        with pytest.raises(SpoolError, match=f"{directory}.*free space on"):
            async with opened(directory):
                pass
        os.unlink(tmp_path / "fill")
        async with opened(directory) as spool:
            assert spool.stats().undelivered_objects == used
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)


async def test_a_file_size_limit_is_a_full_disk(directory: str) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    async with opened(directory) as spool:
        part = begun(spool, b"x" * 100)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
        try:
            with pytest.raises(SpoolFull):
                part.write([b"y" * 300_000])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert os.fstat(part.fileno()).st_size == HEADER_BYTES + 100
        part.abandon()
        assert names(directory, "parts") == []


async def test_a_disk_that_is_full_for_a_header(directory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(directory) as spool:
        monkeypatch.setattr(os, "pwrite", failing(errno.ENOSPC))
        with pytest.raises(SpoolFull):
            spool.begin(header())
        monkeypatch.undo()
        assert names(directory, "parts") == []
        assert spool.stats().part_objects == spool.stats().part_bytes == 0


@pytest.mark.parametrize(
    ("call", "code", "expected"),
    [
        ("fsync", errno.EIO, SpoolError),
        ("fsync", errno.ENOSPC, SpoolFull),
        ("rename", errno.EIO, SpoolError),
        ("rename", errno.ENOSPC, SpoolFull),
    ],
)
async def test_a_commit_that_fails_leaves_nothing(
    directory: str, monkeypatch: pytest.MonkeyPatch, call: str, code: int, expected: type[SpoolError]
) -> None:
    async with opened(directory) as spool:
        part = begun(spool)
        monkeypatch.setattr(os, call, failing(code))
        with pytest.raises(SpoolError) as failed:
            await spool.commit(part, facts())
        monkeypatch.undo()
        assert type(failed.value) is expected
        assert names(directory, "objects") == names(directory, "parts") == []
        assert spool.stats().undelivered_objects == spool.stats().undelivered_bytes == 0
        assert spool.feed("pacs").next_nowait() is None
        assert (await stored(spool, b"next")).size == 4


async def test_one_bad_file_does_not_spoil_its_group(directory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync
    async with opened(directory) as spool:
        parts = [begun(spool, b"%d" % n) for n in range(8)]
        bad = parts[3].fileno()

        def fsync(fd: int) -> None:
            if fd == bad:
                raise OSError(errno.EIO, "bad sector")
            real(fd)

        monkeypatch.setattr(os, "fsync", fsync)
        results = await asyncio.gather(
            *(spool.commit(part, facts()) for part in parts), return_exceptions=True
        )
        monkeypatch.undo()
        assert [isinstance(result, SpoolError) for result in results] == [n == 3 for n in range(8)]
        assert len(names(directory, "objects")) == 7


async def test_a_sealed_object_whose_fsync_fails_ends_the_spool_and_keeps_the_file(
    directory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(directory) as spool:
        monkeypatch.setattr(os, "fsync", failing(errno.EIO))
        entry = spool.seal(begun(spool), facts())
        with pytest.raises(SpoolError, match="durable"):
            await spool.durable(entry)
        monkeypatch.undo()
        with pytest.raises(SpoolError):
            await spool.failed()
        with pytest.raises(SpoolError):
            spool.admit()
    async with opened(directory) as spool:
        assert spool.recovered.adopted == 1
        assert (await spool.feed("pacs").next()).id == entry.id


async def test_an_index_that_is_damaged_under_way_ends_the_spool(
    directory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(directory) as spool:
        waiting = [asyncio.create_task(spool.feed("pacs").next()) for _ in range(2)]
        failed = asyncio.create_task(spool.failed())
        await asyncio.sleep(0)

        def damaged(*_: object) -> None:
            raise sqlite3.DatabaseError("database disk image is malformed")

        monkeypatch.setattr(Index, "record", damaged)
        entry = await stored(spool)
        with pytest.raises(SpoolError, match="malformed"):
            await failed
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert entry in results
        assert {type(result) for result in results} == {Entry, SpoolError}
        with pytest.raises(SpoolError, match="malformed"):
            spool.begin(header())
        with pytest.raises(SpoolError, match="malformed"):
            await spool.sweep()


async def test_a_full_disk_under_the_index_is_waited_out(
    directory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, tries = Index.record, 0

    def full(index: Index, rows: Sequence[Row], floor: int = 0) -> list[str]:
        nonlocal tries
        tries += 1
        if tries < 3:
            error = sqlite3.OperationalError("database or disk is full")
            error.sqlite_errorcode = sqlite3.SQLITE_FULL
            raise error
        return real(index, rows, floor)

    async with opened(directory) as spool:
        monkeypatch.setattr(Index, "record", full)
        await stored(spool, b"one")
        await stored(spool, b"two")
        await deliver(spool, 1)
        await written(spool)
        assert tries == 3
        assert spool.stats().waiting == {"pacs": 1}


async def test_an_index_that_cannot_be_written_for_a_while_delays_nothing_but_itself(directory: str) -> None:
    async with opened(directory) as spool:
        with SpoolAdmin(directory) as admin:
            admin._database.execute("BEGIN IMMEDIATE")
            entry = await stored(spool)
            assert spool.has(entry.id)
            assert spool.feed("pacs").peek(1) == (entry,)
            admin._database.execute("ROLLBACK")
        await written(spool)


# ---- what others set back ----------------------------------------------------------------------------------


async def test_doubt_sends_the_newest_again(directory: str) -> None:
    async with opened(directory) as spool:
        entries = [await stored(spool, b"x" * 100) for _ in range(10)]
        await deliver(spool, 10)
        assert await spool.doubt("pacs", 0) == 0
        assert await spool.doubt("pacs", 201) == 3
        assert spool.stats().waiting["pacs"] == 3
        again = [await spool.feed("pacs").next() for _ in range(3)]
        assert [entry.id for entry in again] == [entry.id for entry in entries[-3:]]
        assert await spool.doubt("pacs", 10**9) == 7


async def test_recent_names_what_was_delivered_last_first(directory: str) -> None:
    async with opened(directory) as spool:
        entries = [await stored(spool, b"%d" % n) for n in range(5)]
        await deliver(spool, 4)
        recent = await spool.recent("pacs", 3)
        assert [(entry.id, entry.sha256) for entry in recent] == [
            (entry.id, entry.sha256) for entry in reversed(entries[1:4])
        ]


async def test_a_cancelled_commit_is_still_in_custody(directory: str) -> None:
    async with opened(directory) as spool:
        task = asyncio.create_task(spool.commit(begun(spool), facts()))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert (await spool.feed("pacs").next()).size == 4


async def test_a_second_process_is_told_so(directory: str) -> None:
    async with opened(directory):
        with pytest.raises(SpoolError, match="in use"):
            async with opened(directory):
                pass


async def test_a_relative_directory_and_one_behind_a_descriptor(
    directory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkdir(directory)
    monkeypatch.chdir(directory)
    async with opened(".") as spool:
        entry = await stored(spool)
    fd = os.open(directory, os.O_RDONLY)
    try:
        async with opened(f"/proc/self/fd/{fd}") as spool:
            assert (await spool.feed("pacs").next()).id == entry.id
    finally:
        os.close(fd)


async def test_repr_tells_the_state_and_no_instance(directory: str) -> None:
    async with opened(directory) as spool:
        part = begun(spool, sop_instance="1.2.999")
        assert repr(part) == f"<Part {part.id} 4 bytes>"
        entry: Entry = await spool.commit(part, facts("1.2.999"))
        assert "1.2.999" not in repr(entry) + repr(part) + repr(spool)
        assert repr(part) == f"<Part {part.id} 4 bytes closed>"
        assert "objects=1/" in repr(spool)
    assert isinstance(spool, Spool) and "failed: the spool is closed" in repr(spool)


async def test_attempts_are_counted_across_openings(directory: str) -> None:
    async with opened(directory) as spool:
        await stored(spool)
        feed = spool.feed("pacs")
        feed.put_back(await feed.next(), "away")
        assert (await feed.next()).attempts == 1
    async with opened(directory) as spool:
        assert (await spool.feed("pacs").next()).attempts == 1
        with SpoolAdmin(directory) as admin:
            (delivery,) = admin.ls()[0].deliveries
            assert (delivery.last_status, delivery.state) == ("away", DeliveryState.WAITING)
