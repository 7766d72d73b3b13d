"""Opening a spool after a crash, a lost index or a meddler: what is whole is there once, nothing vanishes."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from dataclasses import replace

import pytest

from relay.errors import SpoolError
from relay.spool import Recovered
from relay.spool_admin import SpoolAdmin
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

pytestmark = pytest.mark.asyncio


@pytest.fixture
def directory() -> Iterator[str]:
    with scratch() as path:
        yield path


def lose_index(directory: str) -> None:
    for name in os.listdir(directory):
        if name.startswith("index.db"):
            os.unlink(os.path.join(directory, name))


async def test_a_lost_index_is_rebuilt_from_the_files_in_their_order(directory: str) -> None:
    async with opened(directory) as spool:
        entries = [await stored(spool, b"%d" % n, f"1.2.{n + 1}") for n in range(20)]
        await deliver(spool, 5)
        spool.quarantine(begun(spool), "structure", "a sequence without an end")
    lose_index(directory)
    async with opened(directory) as spool:
        assert spool.recovered == Recovered(rebuilt=True, adopted=20)
        again = await deliver(spool, 20)
        assert [(e.id, e.sha256, e.sop_instance) for e in again] == [
            (e.id, e.sha256, e.sop_instance) for e in entries
        ]
        assert data_of(spool, again[7]) == b"7"
        assert spool.stats().quarantined_objects == 1
        with SpoolAdmin(directory) as admin:
            assert [refused.reason for refused in admin.quarantine_ls()] == ["structure"]


@pytest.mark.parametrize(
    "damage", [b"this is no database, is it? " * 400, b"SQLite format 3\0" + b"\xff" * 8000]
)
async def test_a_damaged_index_is_set_aside_and_rebuilt(directory: str, damage: bytes) -> None:
    async with opened(directory) as spool:
        await stored(spool)
    lose_index(directory)
    with open(os.path.join(directory, "index.db"), "wb") as file:
        file.write(damage)
    async with opened(directory) as spool:
        assert spool.recovered == Recovered(rebuilt=True, adopted=1)
    assert os.path.getsize(os.path.join(directory, "index.db.damaged")) == len(damage)


async def test_an_index_of_a_later_version_is_left_alone(directory: str) -> None:
    async with opened(directory):
        pass
    with sqlite3.connect(os.path.join(directory, "index.db")) as database:
        database.execute("PRAGMA user_version = 99")
    database.close()
    with pytest.raises(SpoolError, match="upgrade"):
        async with opened(directory):
            pass
    with pytest.raises(SpoolError, match="version"):
        SpoolAdmin(directory)


@pytest.mark.parametrize("harm", ["cut", "flipped", "header", "empty"])
async def test_a_torn_file_goes_to_quarantine(directory: str, harm: str) -> None:
    async with opened(directory) as spool:
        whole = await stored(spool, b"whole" * 100)
        torn = await stored(spool, b"torn" * 100)
    lose_index(directory)
    path = os.path.join(directory, "objects", f"{torn.id}.{torn.sha256}.dcm")
    with open(path, "r+b") as file:
        if harm == "cut":
            file.truncate(300)
        elif harm == "flipped":
            file.seek(200)
            file.write(b"X")
        elif harm == "header":
            file.write(b"XXXX")
        else:
            file.truncate(0)
    async with opened(directory) as spool:
        assert (spool.recovered.adopted, spool.recovered.torn) == (1, 1)
        assert names(directory, "quarantine") == [f"{torn.id}.torn.dcm"]
        assert (await spool.feed("pacs").next()).id == whole.id
        assert spool.stats().quarantined_objects == 1


async def test_strange_files_are_kept_for_a_person(directory: str) -> None:
    async with opened(directory) as spool:
        entry = await stored(spool)
    for name in ("note.txt", f"{entry.id}.{'0' * 64}.dcm"):
        with open(os.path.join(directory, "objects", name), "wb") as file:
            file.write(b"?")
    async with opened(directory) as spool:
        assert (spool.recovered.torn, spool.recovered.adopted) == (2, 0)
        assert all(".stray" in name for name in names(directory, "quarantine"))
        assert names(directory, "objects") == [f"{entry.id}.{entry.sha256}.dcm"]


async def test_a_deleted_file_is_missed(directory: str) -> None:
    async with opened(directory) as spool:
        gone = await stored(spool, b"gone")
        kept = await stored(spool, b"kept")
    os.unlink(os.path.join(directory, "objects", f"{gone.id}.{gone.sha256}.dcm"))
    async with opened(directory) as spool:
        assert spool.recovered == Recovered(missing=1)
        assert [entry.id for entry in await deliver(spool, 1)] == [kept.id]
        assert spool.stats().undelivered_objects <= 1


async def test_a_removed_object_whose_file_stayed_is_not_delivered_again(directory: str) -> None:
    limits = replace(LIMITS, retention_seconds=0)
    async with opened(directory, limits) as spool:
        entry = await stored(spool)
        path = os.path.join(directory, "objects", f"{entry.id}.{entry.sha256}.dcm")
        os.link(path, os.path.join(directory, "kept"))
        await deliver(spool, 1)
        assert await spool.sweep() == 1
    os.rename(os.path.join(directory, "kept"), path)
    async with opened(directory, limits) as spool:
        assert spool.recovered == Recovered()
        assert names(directory, "objects") == []


async def test_abandoned_parts_are_removed_where_they_were_never_acknowledged(directory: str) -> None:
    async with opened(directory) as spool:
        await written(spool)  # by then there are spares
        begun(spool)
    spares = os.path.join(directory, "spares")
    assert sum(os.stat(os.path.join(spares, name)).st_size > 0 for name in os.listdir(spares)) == 1
    with open(os.path.join(directory, "parts", "12" * 16), "wb") as file:
        file.write(header() + b"of an older version")
    async with opened(directory) as spool:
        assert spool.recovered == Recovered(parts_removed=2)
        assert spool.resume() == ()
    assert names(directory, "parts") == []
    assert all(os.stat(os.path.join(spares, name)).st_size == 0 for name in os.listdir(spares))


async def test_parts_are_resumed_where_they_may_be(directory: str) -> None:
    id = "cd" * 16
    async with opened(directory, resumable=True) as spool:
        begun(spool, b"first half, ", id=id)
        begun(spool, b"to be begun anew", id="ef" * 16)
    with open(os.path.join(directory, "parts", "12" * 16), "wb") as file:
        file.write(header()[:20])
    async with opened(directory, resumable=True) as spool:
        assert sorted(spool.resume()) == [(id, 12), ("ef" * 16, 16)]
        assert spool.recovered == Recovered(parts_removed=1)
        part = spool.reopen(id)
        assert (part.size, part.sha256) == (12, sha256(b"first half, "))
        part.write([b"second half"])
        entry = spool.seal(part, facts(), sha256(b"first half, second half"))
        assert data_of(spool, entry) == b"first half, second half"
        anew = spool.begin(header(), id="ef" * 16)
        anew.write([b"new"])
        assert data_of(spool, spool.seal(anew, facts(), sha256(b"new"))) == b"new"
        assert spool.resume() == ()
        with pytest.raises(SpoolError, match="no part"):
            spool.reopen(id)


async def test_a_destination_that_went_away_is_parked_and_a_new_one_gets_nothing_old(directory: str) -> None:
    async with opened(directory, destinations=("old", "pacs")) as spool:
        await stored(spool)
    async with opened(directory, destinations=("pacs", "new")) as spool:
        assert spool.recovered == Recovered(unconfigured=1)
        assert spool.stats().parked == {"old": 1, "pacs": 0, "new": 0}
        assert spool.stats().waiting == {"old": 0, "pacs": 1, "new": 0}
        await stored(spool)
        assert spool.stats().waiting == {"old": 0, "pacs": 2, "new": 1}


async def test_monotonic_times_do_not_outlive_the_boot(
    directory: str, tmp_path: os.PathLike[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(directory) as spool:
        await stored(spool)
    async with opened(directory) as spool:
        entry = await spool.feed("pacs").next()
        assert (entry.received_ns, entry.parsed_ns) == (7, 8)
    other = os.path.join(tmp_path, "boot_id")
    with open(other, "w") as file:
        file.write("another boot")
    monkeypatch.setattr("relay.spool_index.BOOT_ID", other)
    async with opened(directory) as spool:
        entry = await spool.feed("pacs").next()
        assert (entry.received_ns, entry.parsed_ns) == (0, 0)
