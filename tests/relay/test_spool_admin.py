"""Operators and the worker at the same spool at the same time."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest

from relay.errors import SpoolError
from relay.spool import DeliveryState, Entry, Spool
from relay.spool_admin import SpoolAdmin
from tests.relay.spool_kit import (
    LIMITS,
    begun,
    data_of,
    deliver,
    header,
    names,
    opened,
    scratch,
    stored,
    written,
)

pytestmark = pytest.mark.asyncio

WITHIN = 5.0
"""Seconds for the worker to notice."""

RESEND = (
    "import sys; from relay.spool_admin import SpoolAdmin; print(SpoolAdmin(sys.argv[1]).resend(sys.argv[2]))"
)


@pytest.fixture
def directory() -> Iterator[str]:
    with scratch() as path:
        yield path


@pytest.fixture(autouse=True)
def looking_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relay.spool_committer.POLL_SECONDS", 0.02)


async def fed(spool: Spool) -> Entry:
    return await asyncio.wait_for(spool.feed("pacs").next(), WITHIN)


async def test_listing(directory: str) -> None:
    async with opened(directory, destinations=("pacs", "ris")) as spool:
        entries = [await stored(spool, b"%d" % n) for n in range(5)]
        await deliver(spool, 2)
        spool.park(await spool.feed("ris").next(), "ris", 0xA900)
        await written(spool)
        with SpoolAdmin(directory) as admin:
            assert [listed.entry.id for listed in admin.ls()] == [entry.id for entry in entries]
            assert [listed.entry.id for listed in admin.ls(limit=2)] == [entry.id for entry in entries[:2]]
            assert len(admin.ls(state=DeliveryState.DONE)) == 2
            assert len(admin.ls(state=DeliveryState.WAITING, destination="pacs")) == 3
            (parked,) = admin.ls(state=DeliveryState.PARKED)
            assert [(d.destination, d.last_status, d.attempts) for d in parked.deliveries] == [
                ("pacs", 0, 1),
                ("ris", 0xA900, 1),
            ]
            assert admin.show(entries[0].id[:12]).entry.id == entries[0].id


@pytest.mark.parametrize("id", ["ab", "", "zzzzzz", "0" * 32, "%", "' OR 1=1 --"])
async def test_an_id_that_is_no_id(directory: str, id: str) -> None:
    async with opened(directory) as spool:
        await stored(spool)
        await written(spool)
        with SpoolAdmin(directory) as admin:
            for call in (admin.show, admin.resend, admin.release, admin.drop_quarantined, admin.drop):
                with pytest.raises(SpoolError):
                    call(id)


async def test_no_spool(directory: str) -> None:
    with pytest.raises(SpoolError, match="no spool"):
        SpoolAdmin(directory)
    assert not os.path.exists(directory)


async def test_another_process_sends_again_while_the_worker_runs(directory: str) -> None:
    async with opened(directory) as spool:
        entry = await stored(spool)
        await stored(spool, b"other")
        await deliver(spool, 2)
        await written(spool)
        waiting = asyncio.create_task(fed(spool))
        done = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-c", RESEND, directory, entry.id[:8]],
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout == "1\n"
        again = await waiting
        assert (again.id, again.attempts) == (entry.id, 1)
        assert data_of(spool, again) == b"data"
        assert spool.feed("pacs").next_nowait() is None


async def test_all_parked_are_sent_again_and_a_held_one_is_not_handed_out_twice(directory: str) -> None:
    async with opened(directory) as spool:
        for n in range(3):
            await stored(spool, b"%d" % n)
        feed = spool.feed("pacs")
        first, second, held = [await feed.next() for _ in range(3)]
        spool.park(first, "pacs", "refused")
        spool.park(second, "pacs", "refused")
        await written(spool)
        with SpoolAdmin(directory) as admin:
            with pytest.raises(SpoolError, match="all that are parked"):
                admin.resend()
            assert admin.resend(parked_only=True) == 2
        assert [(await fed(spool)).seq, (await fed(spool)).seq] == [first.seq, second.seq]
        assert feed.next_nowait() is None
        spool.done(held, "pacs")


async def parked(spool: Spool, count: int = 1, destination: str = "pacs") -> list[Entry]:
    """Objects that their destination refused, recorded."""
    entries = []
    for n in range(count):
        await stored(spool, b"%d" % n)
        entries.append(await asyncio.wait_for(spool.feed(destination).next(), WITHIN))
        spool.park(entries[-1], destination, 0xA900)
    await written(spool)
    return entries


async def test_what_is_dropped_is_logged_and_then_removed_by_retention(
    directory: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(directory, replace(LIMITS, retention_seconds=0)) as spool:
        entries = await parked(spool, 2)
        with SpoolAdmin(directory) as admin:
            assert admin.parked() == {"pacs": 2}
            assert admin.parked(entries[0].id) == {"pacs": 1}
            assert admin.drop(entries[0].id, destination="ris") == 0
            assert admin.drop(entries[0].id) == 1
            assert admin.drop(entries[0].id) == 0
            (delivery,) = admin.show(entries[0].id).deliveries
            assert (delivery.state, delivery.last_status) == (DeliveryState.DONE, "dropped")
        async with asyncio.timeout(WITHIN):
            while spool.stats().undelivered_objects > 1 or not caplog.records:
                await asyncio.sleep(0.02)
        assert await spool.sweep() == 1
        assert names(directory, "objects") == [f"{entries[1].id}.{entries[1].sha256}.dcm"]
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == f"an operator dropped 1 objects, not delivered to pacs: {entries[0].id}"


async def test_what_is_dropped_while_no_worker_runs_is_logged_by_the_next(
    directory: str, caplog: pytest.LogCaptureFixture
) -> None:
    limits = replace(LIMITS, retention_seconds=0)
    async with opened(directory, limits) as spool:
        entries = await parked(spool, 3)
    with SpoolAdmin(directory) as admin:
        assert admin.drop(destination="pacs") == 3
        assert not admin.parked()
    async with opened(directory, limits) as spool:
        # Nothing goes before it is told of, however early retention comes.
        async with asyncio.timeout(WITHIN):
            while spool.stats().retained_objects:
                if await spool.sweep():
                    assert all(entry.id in caplog.text for entry in entries)
                await asyncio.sleep(0)
    assert all(caplog.text.count(entry.id) == 1 for entry in entries)
    assert names(directory, "objects") == []


async def test_many_dropped_are_named_a_few_at_a_time(
    directory: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relay.spool_committer.MAX_DROPPED_TOLD", 5)
    monkeypatch.setattr("relay.spool_committer.IDS_PER_LINE", 2)
    async with opened(directory) as spool:
        entries = await parked(spool, 7)
        with SpoolAdmin(directory) as admin:
            admin.drop(destination="pacs")
        async with asyncio.timeout(WITHIN):
            while len(caplog.records) < 4:
                await asyncio.sleep(0.02)
    assert [record.getMessage().split()[3] for record in caplog.records] == ["2", "2", "1", "2"]
    assert all(caplog.text.count(entry.id) == 1 for entry in entries)


async def test_what_is_dropped_was_never_sent(directory: str) -> None:
    """No manifest names it, and a new link does not doubt it."""
    async with opened(directory) as spool:
        await parked(spool)
        with SpoolAdmin(directory) as admin:
            admin.drop(destination="pacs")
        async with asyncio.timeout(WITHIN):
            while spool.stats().undelivered_objects:
                await asyncio.sleep(0.02)
        assert await spool.recent("pacs", 9) == ()
        assert await spool.doubt("pacs", 10**9) == 0


async def test_what_was_dropped_can_be_taken_back_while_it_is_kept(directory: str) -> None:
    async with opened(directory) as spool:
        (entry,) = await parked(spool)
        with SpoolAdmin(directory) as admin:
            assert admin.drop(entry.id) == 1
            assert admin.resend(entry.id) == 1
        assert (await fed(spool)).id == entry.id


async def test_only_what_is_parked_can_be_dropped(directory: str) -> None:
    async with opened(directory, destinations=("pacs", "ris")) as spool:
        (entry,) = await parked(spool)
        with SpoolAdmin(directory) as admin:
            with pytest.raises(SpoolError, match="name an object"):
                admin.drop()
            assert admin.drop(entry.id, destination="ris") == 0
            assert admin.drop(entry.id) == 1
        async with asyncio.timeout(WITHIN):
            while spool.stats().parked["pacs"]:
                await asyncio.sleep(0.02)
        assert spool.stats().undelivered_objects == 1, "ris still waits for it"
        assert (await asyncio.wait_for(spool.feed("ris").next(), WITHIN)).id == entry.id


async def test_a_released_object_is_delivered(directory: str) -> None:
    async with opened(directory) as spool:
        part = begun(spool, b"suspicious", "1.2.66")
        spool.quarantine(part, "private-class", "its class\nis not allowed")
        await written(spool)
        with SpoolAdmin(directory) as admin:
            (refused,) = admin.quarantine_ls()
            assert (refused.reason, refused.detail) == ("private-class", "its class is not allowed")
            assert names(directory, "quarantine") == [refused.name]
            admin.release(part.id[:6])
        entry = await fed(spool)
        assert (entry.id, entry.sop_instance) == (part.id, "1.2.66")
        assert data_of(spool, entry) == b"suspicious"
        await written(spool)
        assert names(directory, "quarantine") == []
        assert spool.stats().quarantined_objects == 0


async def test_a_release_while_no_worker_runs_is_done_when_one_does(directory: str) -> None:
    async with opened(directory) as spool:
        id = begun(spool).id
        spool.quarantine(spool._parts._open[id], "bad")
    with SpoolAdmin(directory) as admin:
        admin.release(id)
        assert admin.quarantine_show(id).released
    async with opened(directory) as spool:
        assert (await fed(spool)).id == id


async def test_what_cannot_be_released_says_why(directory: str) -> None:
    async with opened(directory) as spool:
        part = spool.begin(header())
        spool.quarantine(part, "empty")
        await written(spool)
        with SpoolAdmin(directory) as admin:
            admin.release(part.id)
            async with asyncio.timeout(WITHIN):
                while admin.quarantine_show(part.id).released:
                    await asyncio.sleep(0.02)
            assert admin.quarantine_show(part.id).detail.startswith("cannot be released: ")
        assert len(names(directory, "quarantine")) == 1


async def test_dropping_removes_row_and_file(directory: str) -> None:
    async with opened(directory) as spool:
        part = begun(spool)
        spool.quarantine(part, "bad")
        await written(spool)
        with SpoolAdmin(directory) as admin:
            admin.drop_quarantined(part.id)
            assert admin.quarantine_ls() == []
        assert names(directory, "quarantine") == []


async def test_nothing_is_sent_again_to_a_destination_that_is_gone(directory: str) -> None:
    async with opened(directory, destinations=("old",)) as spool:
        entry = await stored(spool)
    async with opened(directory) as spool:
        with SpoolAdmin(directory) as admin:
            assert admin.destinations() == {"old": False, "pacs": True}
            assert admin.resend(entry.id) == admin.resend(parked_only=True) == 0
            assert admin.parked() == {"old": 1}
        assert spool.stats().waiting["old"] == 0
    async with opened(directory, destinations=("pacs", "old")) as spool:
        with SpoolAdmin(directory) as admin:
            assert admin.resend(entry.id) == 1
        assert (await asyncio.wait_for(spool.feed("old").next(), WITHIN)).id == entry.id


async def test_an_index_that_does_not_say_whom_it_serves_is_believed(directory: str) -> None:
    """One of an earlier version; the worker parks again what it does not serve."""
    async with opened(directory, destinations=("old",)) as spool:
        entry = await stored(spool)
    async with opened(directory) as spool:
        with SpoolAdmin(directory) as admin:
            admin._database.execute("DELETE FROM meta WHERE key = 'served'")
            assert admin.resend(entry.id, destination="old") == 1
            async with asyncio.timeout(WITHIN):
                while admin.show(entry.id).deliveries[0].state is not DeliveryState.PARKED:
                    await asyncio.sleep(0.02)
        assert spool.stats().waiting["old"] == 0
