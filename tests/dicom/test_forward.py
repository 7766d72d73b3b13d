"""From custody onto the link: what crosses, in which order, and what is done about what cannot."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from dicom import forward as module
from dicom.forward import LINK, Forwarder
from relay.metrics import Metrics
from relay.records import MAX_PART_BYTES, Manifest, ObjectEnd, ObjectPart, ObjectStart, Record
from relay.spool import Entry, Spool
from tests.relay.spool_kit import begun, facts, opened, scratch

SECONDS = 5.0


class FakeOutlet:
    """Keeps what is sent, as the link would: copied before `send` returns."""

    def __init__(self, takes: int = 1_000_000) -> None:
        self.sends: list[list[Record]] = []
        self._takes = takes
        self.blocked = asyncio.Event()
        self.blocked.set()

    async def send(self, *records: Record) -> None:
        await self.blocked.wait()
        kept: list[Record] = []
        for record in records:
            if isinstance(record, ObjectPart):
                record = ObjectPart(id=record.id, offset=record.offset, data=bytes(record.data))
            kept.append(record)
        self.sends.append(kept)
        if len(self.sends) == self._takes:
            self.blocked.clear()

    @property
    def congested(self) -> bool:
        return not self.blocked.is_set()

    @property
    def records(self) -> list[Record]:
        return [record for sent in self.sends for record in sent]

    def objects(self) -> dict[str, bytes]:
        """Data sets by id, put together in the order the parts came; only of those that ended."""
        data: dict[str, bytes] = {}
        whole: dict[str, bytes] = {}
        for record in self.records:
            if isinstance(record, ObjectStart):
                data[record.id] = b""
            elif isinstance(record, ObjectPart):
                assert record.offset == len(data[record.id])
                data[record.id] += bytes(record.data)
            elif isinstance(record, ObjectEnd):
                whole[record.id] = data[record.id]
        return whole


@pytest.fixture
def directory() -> Iterator[str]:
    with scratch() as path:
        yield path


@contextlib.asynccontextmanager
async def forwarding(spool: Spool, outlet: FakeOutlet) -> AsyncIterator[Forwarder]:
    forwarder = Forwarder(spool, outlet, Metrics("studies", "source"))
    task = asyncio.create_task(forwarder.run())
    try:
        yield forwarder
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def keep(spool: Spool, data: bytes, instance: str = "1.2.3") -> Entry:
    return await spool.commit(begun(spool, data, instance), facts(instance))


async def idle(forwarder: Forwarder) -> None:
    await asyncio.wait_for(forwarder.idle(), SECONDS)


async def test_a_small_object_leaves_in_one_go(directory: str) -> None:
    outlet = FakeOutlet()
    async with opened(directory, destinations=[LINK]) as spool, forwarding(spool, outlet) as forwarder:
        entry = await keep(spool, b"data set", "1.2.99")
        await idle(forwarder)
    ((start, part, end),) = outlet.sends
    assert isinstance(start, ObjectStart) and isinstance(part, ObjectPart) and isinstance(end, ObjectEnd)
    assert (start.id, start.sop_instance, start.size) == (entry.id, "1.2.99", 8)
    assert (start.received_ns, start.parsed_ns, start.grade) == (7, 8, 4)
    assert (part.offset, bytes(part.data)) == (0, b"data set")
    assert end.sha256 == entry.sha256
    assert forwarder.sent == 1


@pytest.mark.parametrize("size", [MAX_PART_BYTES - 1, MAX_PART_BYTES, MAX_PART_BYTES + 1, 3_000_000])
async def test_a_large_object_is_cut_into_parts(directory: str, size: int) -> None:
    data = os.urandom(size)
    outlet = FakeOutlet()
    async with opened(directory, destinations=[LINK]) as spool, forwarding(spool, outlet) as forwarder:
        entry = await keep(spool, data)
        await idle(forwarder)
        assert outlet.objects() == {entry.id: data}
        assert len(outlet.sends) == -(-size // MAX_PART_BYTES)
        assert (await spool.recent(LINK, 9))[0].id == entry.id


async def test_objects_leave_in_the_order_they_came(directory: str) -> None:
    outlet = FakeOutlet()
    async with opened(directory, destinations=[LINK]) as spool, forwarding(spool, outlet) as forwarder:
        entries = [await keep(spool, b"x", f"1.2.{number}") for number in range(20)]
        await idle(forwarder)
    starts = [record.id for record in outlet.records if isinstance(record, ObjectStart)]
    assert starts == [entry.id for entry in entries]


async def test_what_was_half_sent_when_the_source_died_is_sent_anew(directory: str) -> None:
    data = os.urandom(MAX_PART_BYTES * 2)
    outlet = FakeOutlet(takes=1)
    async with opened(directory, destinations=[LINK]) as spool, forwarding(spool, outlet):
        entry = await keep(spool, data)
        async with asyncio.timeout(SECONDS):
            while not outlet.congested:
                await asyncio.sleep(0)
    assert len(outlet.sends) == 1
    assert outlet.objects() == {}
    outlet = FakeOutlet()
    async with opened(directory, destinations=[LINK]) as spool, forwarding(spool, outlet) as forwarder:
        await idle(forwarder)
    assert outlet.objects() == {entry.id: data}


@pytest.mark.parametrize("fault", ["gone", "short", "unreadable"])
async def test_a_file_that_cannot_be_read_does_not_hold_up_the_rest(
    directory: str, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    outlet = FakeOutlet()
    async with opened(directory, destinations=[LINK]) as spool:
        bad = await keep(spool, b"bad data set", "1.2.1")
        good = await keep(spool, b"good", "1.2.2")
        (path,) = Path(directory, "objects").glob(f"{bad.id}*")
        if fault == "gone":
            path.unlink()
        elif fault == "short":
            os.truncate(path, path.stat().st_size - 3)
        else:
            real_preadv = os.preadv

            def preadv(fd: int, buffers: list[bytearray], offset: int) -> int:
                if os.readlink(f"/proc/self/fd/{fd}") == str(path):
                    raise OSError(5, "Input/output error")
                return real_preadv(fd, buffers, offset)

            monkeypatch.setattr(os, "preadv", preadv)
        async with forwarding(spool, outlet) as forwarder:
            await idle(forwarder)
        assert outlet.objects() == {good.id: b"good"}
        assert spool.stats().parked == {LINK: 1}


async def test_a_broken_link_is_no_fault_of_the_object(directory: str) -> None:
    class Broken(FakeOutlet):
        async def send(self, *records: Record) -> None:
            raise BrokenPipeError

    async with opened(directory, destinations=[LINK]) as spool:
        await keep(spool, b"data set")
        with pytest.raises(BrokenPipeError):
            await Forwarder(spool, Broken(), Metrics("studies", "source")).run()
        assert spool.stats().parked == {LINK: 0} and spool.stats().waiting == {LINK: 1}


async def test_a_blocked_link_blocks_only_the_forwarder(directory: str) -> None:
    outlet = FakeOutlet()
    outlet.blocked.clear()
    async with opened(directory, destinations=[LINK]) as spool, forwarding(spool, outlet) as forwarder:
        entries = [await keep(spool, b"x", f"1.2.{number}") for number in range(5)]
        assert spool.stats().waiting == {LINK: 5} and outlet.sends == []
        outlet.blocked.set()
        await idle(forwarder)
        assert list(outlet.objects()) == [entry.id for entry in entries]


async def test_a_manifest_names_what_was_sent_lately(directory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MANIFEST_SECONDS", 0.01)
    outlet = FakeOutlet()
    async with opened(directory, destinations=[LINK]) as spool, forwarding(spool, outlet) as forwarder:
        manifests = asyncio.create_task(forwarder.manifests())
        await asyncio.sleep(0.05)
        assert outlet.sends == []
        entry = await keep(spool, b"data set")
        async with asyncio.timeout(SECONDS):
            while not isinstance(outlet.records[-1:] and outlet.records[-1], Manifest):
                await asyncio.sleep(0.01)
        manifests.cancel()
        last = outlet.records[-1]
        assert isinstance(last, Manifest)
        assert [(each.id, each.size, each.sha256) for each in last.entries] == [
            (entry.id, entry.size, entry.sha256)
        ]
