"""From records to custody on side B, the records in every order that a hostile or unlucky A can send."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dicom import receipt as module
from dicom.receipt import Receipt
from dicom.settings import SpoolSettings
from dicom.spooling import Examiner, open_spool
from relay.link import Arrival
from relay.metrics import Metrics
from relay.records import Manifest, ManifestEntry, ObjectEnd, ObjectPart, ObjectStart, Record
from relay.spool import Spool
from tests.archive import Made, made
from tests.dicom.datasets import head, names
from tests.relay.spool_kit import scratch

LIMIT = 1 << 20


@dataclass
class Side:
    """A receipt over a real spool."""

    receipt: Receipt
    spool: Spool

    async def deliver(self, *records: Record) -> None:
        """As the link's end does: one after the other, each until it is done."""
        for record in records:
            waiting = self.receipt.deliver(Arrival(record=record, entered_ns=1, left_ns=2))
            if waiting is not None:
                await waiting

    def waiting(self) -> list[tuple[str, str]]:
        """Instance and hash of what waits for the destination."""
        feed = self.spool.feed("pacs")
        return [(entry.sop_instance, entry.sha256) for entry in iter(feed.next_nowait, None)]


@pytest.fixture
def directory() -> Iterator[str]:
    with scratch() as path:
        yield path


@contextlib.asynccontextmanager
async def side_b(directory: str, **bounds: Any) -> AsyncIterator[Side]:
    """A sink's receipt; opened again on the same directory it is the restarted sink's."""
    Path(directory).mkdir(parents=True, exist_ok=True)
    settings = SpoolSettings(min_free_disk_bytes=0, **bounds)
    spool = await open_spool(
        directory, settings, destinations=["pacs"], max_object_bytes=LIMIT, resumable=True
    )
    try:
        yield Side(Receipt(spool, Examiner(directory, LIMIT), Metrics("studies", "sink")), spool)
    finally:
        await spool.close()


def id_of(number: int) -> str:
    return f"{number:032x}"


def records(obj: Made, number: int = 1, step: int = 1000, **start: Any) -> list[Record]:
    """The records of `obj` as an honest A sends them."""
    fields: dict[str, Any] = {
        "sop_class": obj.sop_class,
        "sop_instance": obj.uid,
        "transfer_syntax": obj.syntax,
        "size": len(obj.data),
        "received_ns": 5,
        "parsed_ns": 6,
        "grade": 3,
        **start,
    }
    id = id_of(number)
    parts = [
        ObjectPart(id=id, offset=at, data=obj.data[at : at + step]) for at in range(0, len(obj.data), step)
    ]
    return [ObjectStart(id=id, **fields), *parts, ObjectEnd(id=id, sha256=obj.sha256)]


def manifest(*sent: tuple[int, Made]) -> Manifest:
    return Manifest(
        entries=tuple(
            ManifestEntry(id=id_of(number), size=len(obj.data), sha256=obj.sha256) for number, obj in sent
        )
    )


def parts_in(directory: str) -> Sequence[str]:
    return [path.name for path in (Path(directory) / "spool" / "parts").iterdir()]


def quarantined(directory: str) -> Sequence[str]:
    return [path.name.split(".")[1] for path in (Path(directory) / "spool" / "quarantine").iterdir()]


async def test_an_object_arrives_whole(directory: str) -> None:
    obj = made(1, 5000)
    async with side_b(directory) as side:
        await side.deliver(*records(obj))
        entry = side.spool.feed("pacs").next_nowait()
        assert entry is not None
        assert (entry.id, entry.sha256, entry.size) == (id_of(1), obj.sha256, len(obj.data))
        assert (entry.received_ns, entry.parsed_ns, entry.grade) == (5, 6, 3)
        assert (side.receipt.received, side.receipt.refused, side.receipt.missing) == (1, {}, set())


@pytest.mark.parametrize("taken", range(8))
async def test_a_sink_that_dies_goes_on_where_it_was(directory: str, taken: int) -> None:
    """The link forgets a record only once it is dealt with; the one under way then comes a second time."""
    obj = made(1, 5000)
    sent = records(obj)
    assert len(sent) == 8
    async with side_b(directory) as side:
        await side.deliver(*sent[:taken])
    for again in (0, 1):
        async with side_b(directory) as side:
            await side.deliver(*sent[max(taken - again, 0) :])
            assert side.spool.stats().undelivered_objects == 1
            assert side.receipt.refused == {}
        assert parts_in(directory) == []
    async with side_b(directory) as side:
        assert (await side.spool.feed("pacs").next()).sha256 == obj.sha256


@pytest.mark.parametrize("kept", [1, 4096, 9_999])
async def test_a_sink_that_dies_within_a_write_goes_on_where_it_was(directory: str, kept: int) -> None:
    """SIGKILL ends a long write(2) between two pages; the link has the whole again."""
    obj = made(1, 40_000)
    start, first, second, *rest = records(obj, step=10_000)
    async with side_b(directory) as side:
        await side.deliver(start, first)
        whole = (Path(directory) / "spool" / "parts" / id_of(1)).stat().st_size
        await side.deliver(second)
    os.truncate(Path(directory) / "spool" / "parts" / id_of(1), whole + kept)
    async with side_b(directory) as side:
        await side.deliver(second, *rest)
        assert side.waiting() == [(obj.uid, obj.sha256)]


async def test_what_began_before_the_restart_is_described_by_its_file(directory: str) -> None:
    obj = made(1, 5000)
    sent = records(obj)
    async with side_b(directory) as side:
        await side.deliver(*sent[:3])
    async with side_b(directory) as side:
        await side.deliver(*sent[3:])
        assert side.waiting() == [(obj.uid, obj.sha256)]


async def test_a_restarted_source_begins_anew(directory: str) -> None:
    obj, other = made(1, 5000), made(2, 3000)
    async with side_b(directory) as side:
        await side.deliver(*records(obj)[:3], *records(obj), *records(other, 2)[:2], *records(other, 2))
        assert side.waiting() == [(obj.uid, obj.sha256), (other.uid, other.sha256)]
        assert parts_in(directory) == []


async def test_a_restart_of_both_sides_in_the_middle(directory: str) -> None:
    obj = made(1, 5000)
    async with side_b(directory) as side:
        await side.deliver(*records(obj)[:4])
    async with side_b(directory) as side:
        await side.deliver(*records(obj))
        assert side.waiting() == [(obj.uid, obj.sha256)]
        assert parts_in(directory) == []


async def test_parts_that_come_twice_are_taken_once(directory: str) -> None:
    obj = made(1, 5000)
    start, *parts, end = records(obj)
    async with side_b(directory) as side:
        await side.deliver(start, *(part for part in parts for _ in range(2)), end, end)
        assert side.waiting() == [(obj.uid, obj.sha256)]


async def test_a_gap_gives_the_object_up_and_the_manifest_names_it(directory: str) -> None:
    obj, next_one = made(1, 5000), made(2)
    start, first, _, *rest = records(obj)
    async with side_b(directory) as side:
        await side.deliver(start, first, *rest, *records(next_one, 2))
        assert side.waiting() == [(next_one.uid, next_one.sha256)]
        assert parts_in(directory) == []
        await side.deliver(manifest((1, obj), (2, next_one)))
        assert side.receipt.missing == {id_of(1)}
        # The operator sends it again.
        await side.deliver(*records(obj), manifest((1, obj), (2, next_one)))
        assert side.receipt.missing == set()
        assert side.waiting() == [(obj.uid, obj.sha256)]


def _wrong_hash(obj: Made) -> Iterable[Record]:
    return [*records(obj)[:-1], ObjectEnd(id=id_of(1), sha256=hashlib.sha256(b"other").hexdigest())]


@pytest.mark.parametrize(
    ("hostile", "reason"),
    [
        (_wrong_hash(made(1, 3000)), "integrity"),
        (records(made(1, 3000), size=3000 + 5000), "integrity"),
        (records(made(1, 3000), size=100), "integrity"),
        (records(made(1, 3000), sop_instance="2.25.1"), "mismatch"),
        (records(made(1, 3000), sop_class="1.2.840.10008.5.1.4.1.1.4"), "mismatch"),
        (records(Made(uid="2.25.77", data=names(instance="2.25.77")[:-1])), "length"),
        # Side A puts encodings right, so what needs it here did not come through A's checks.
        (
            records(
                Made(
                    uid="2.25.77",
                    data=names(instance="2.25.77") + head(0x00091001, "OB", 2, reserved=7) + b"ab",
                )
            ),
            "mismatch",
        ),
    ],
    ids=["hash", "too short", "too long", "instance", "class", "cut", "unsound encoding"],
)
async def test_what_a_must_not_let_pass_is_quarantined(
    directory: str, hostile: Iterable[Record], reason: str
) -> None:
    good = made(2)
    async with side_b(directory) as side:
        await side.deliver(*hostile, *records(good, 2))
        assert side.receipt.refused == {reason: 1} and quarantined(directory) == [reason]
        assert side.waiting() == [(good.uid, good.sha256)]
        # It came, so it is not called missing.
        await side.deliver(manifest((1, made(1, 3000)), (2, good)))
        assert side.receipt.missing == set()


async def test_records_of_nothing_known_are_passed_over(directory: str) -> None:
    good = made(2)
    start, part, end = records(made(1))[0], records(made(1))[1], records(made(1))[-1]
    async with side_b(directory) as side:
        await side.deliver(part, end, end, start, end, *records(good, 2), part, end)
        assert side.waiting() == [(good.uid, good.sha256)]
        assert side.receipt.refused == {"integrity": 1}


async def test_parts_of_another_object_do_not_mix(directory: str) -> None:
    obj, other = made(1, 3000), made(2, 3000)
    async with side_b(directory) as side:
        start, *rest = records(obj)
        await side.deliver(start, records(other, 2)[1], *rest)
        assert side.waiting() == [(obj.uid, obj.sha256)]


@pytest.mark.parametrize("restarted", [False, True])
async def test_a_duplicate_is_suppressed_and_not_missed(directory: str, restarted: bool) -> None:
    """A sender that got no answer stores again: the same data set under two ids. A may repeat an id too."""
    obj = made(1)
    async with side_b(directory) as side:
        await side.deliver(*records(obj, 1), *records(obj, 2), *records(obj, 1))
        assert side.waiting() == [(obj.uid, obj.sha256)]
        assert side.receipt.duplicates == 2
        assert parts_in(directory) == []
        if not restarted:
            await side.deliver(manifest((1, obj), (2, obj)))
            assert side.receipt.missing == set()
    if restarted:
        async with side_b(directory) as side:
            await side.deliver(manifest((1, obj), (2, obj)), *records(obj, 2))
            assert (side.receipt.missing, side.receipt.duplicates) == (set(), 1)


async def test_a_duplicate_of_what_was_parked_lets_that_wait_again(directory: str) -> None:
    """The destination refused it, was mended, and somebody sends the study once more."""
    obj = made(1)
    async with side_b(directory) as side:
        await side.deliver(*records(obj, 1))
        entry = await side.spool.feed("pacs").next()
        side.spool.park(entry, "pacs", 0x0124)
        await side.deliver(*records(obj, 2))
        assert side.spool.stats().parked == {"pacs": 0}
        assert (await side.spool.feed("pacs").next()).id == entry.id
        assert side.receipt.duplicates == 1


async def test_what_retention_removed_is_delivered_again(directory: str) -> None:
    obj = made(1)
    async with side_b(directory, retention_seconds=0) as side:
        await side.deliver(*records(obj, 1))
        side.spool.done(await side.spool.feed("pacs").next(), "pacs")
        await side.spool.recent("pacs", 1)
        assert await side.spool.sweep() == 1
        await side.deliver(*records(obj, 1))
        assert side.waiting() == [], "the link repeats an id; nobody sent it again"
        await side.deliver(*records(obj, 2))
        assert side.waiting() == [(obj.uid, obj.sha256)]


async def test_another_data_set_under_the_same_instance_is_no_duplicate(directory: str) -> None:
    obj = made(1)
    changed = Made(uid=obj.uid, data=obj.data[:-2] + b"\1\2")
    async with side_b(directory) as side:
        await side.deliver(*records(obj, 1), *records(changed, 2))
        assert [sha for _, sha in side.waiting()] == [obj.sha256, changed.sha256]


async def test_a_full_spool_holds_the_link_until_there_is_room(
    directory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FULL_RETRY_SECONDS", 0.01)
    one, two = made(1), made(2)
    async with side_b(directory, max_objects=1) as side:
        await side.deliver(*records(one, 1))
        waiting = asyncio.create_task(side.deliver(*records(two, 2)))
        await asyncio.sleep(0.05)
        assert not waiting.done() and side.receipt.full
        entry = side.spool.feed("pacs").next_nowait()
        assert entry is not None
        side.spool.done(entry, "pacs")
        side.receipt.room.set()
        await asyncio.wait_for(waiting, 5)
        assert not side.receipt.full
        assert side.waiting() == [(two.uid, two.sha256)]


async def test_a_restart_while_the_spool_is_full_waits_too(
    directory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FULL_RETRY_SECONDS", 0.01)
    one, two = made(1, 600_000), made(2, 600_000)
    sent = records(two, 2, step=100_000)
    async with side_b(directory, max_bytes=2 << 20) as side:
        await side.deliver(*records(one, 1, step=100_000), *sent[:4])
    # The operator has since given the spool less room than what it holds.
    async with side_b(directory, max_bytes=1 << 20) as side:
        waiting = asyncio.create_task(side.deliver(*sent[3:]))
        entry = await side.spool.feed("pacs").next()
        side.spool.done(entry, "pacs")
        await asyncio.wait_for(waiting, 5)
        assert side.waiting() == [(two.uid, two.sha256)]


async def test_an_object_over_the_limit_is_given_up_and_does_not_hold_the_link(directory: str) -> None:
    good = made(2)
    huge = Made(uid="2.25.77", data=names(instance="2.25.77") + bytes(LIMIT))
    lying = records(huge, 3, step=100_000, size=1000)
    async with side_b(directory) as side:
        await side.deliver(*records(huge, 1, step=100_000), *lying, *records(good, 2))
        assert side.receipt.refused == {"too-large": 2}
        assert side.waiting() == [(good.uid, good.sha256)]
        assert parts_in(directory) == [] and side.spool.stats().part_bytes == 0


async def test_what_is_not_on_the_disk_yet_is_bounded(
    directory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_UNSYNCED_BYTES", 3000)
    async with side_b(directory) as side:
        for number in range(1, 6):
            await side.deliver(*records(made(number), number))
            assert side.receipt._unsynced_bytes <= 3000
        assert len(side.waiting()) == 5


async def test_many_missing_are_counted_and_some_named(
    directory: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "MAX_NAMED_MISSING", 3)
    sent = manifest(*((number, made(1)) for number in range(1, 11)))
    async with side_b(directory) as side:
        await side.deliver(sent, sent)
        assert caplog.text.count("never arrived") == 3
        assert "10.0" in side.receipt._metrics.exposition().decode()


ANY_RECORDS = st.lists(st.tuples(st.integers(1, 2), st.integers(0, 4)), max_size=30)


@settings(max_examples=40, deadline=None)
@given(ANY_RECORDS)
def test_whatever_order_only_whole_objects_come_out(order: list[tuple[int, int]]) -> None:
    """Every sequence of genuine records, however mixed: what comes out is one of the objects, whole."""
    objects = {1: made(1, 2000), 2: made(2, 2000)}
    pool = {number: records(obj, number) for number, obj in objects.items()}

    async def play(directory: str) -> list[tuple[str, str]]:
        async with side_b(directory) as side:
            for number, index in order:
                await side.deliver(pool[number][index % len(pool[number])])
            await side.deliver(*pool[1], *pool[2])
            return side.waiting()

    with scratch() as directory:
        out = asyncio.run(play(directory))
    assert sorted(out) == sorted((obj.uid, obj.sha256) for obj in objects.values())
