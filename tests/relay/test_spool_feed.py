"""Feeds: order, exclusive hand-out, a bounded window, and a cost that does not grow with what waits."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from relay.spool import Entry, Spool
from relay.spool_feed import FEED_PAGE, FEED_WINDOW, Feed
from relay.spool_index import Index, make_entry
from relay.spool_recovery import open_or_rebuild
from tests.relay.spool_kit import LIMITS, begun, deliver, facts, opened, scratch, stored, written

pytestmark = pytest.mark.asyncio


@pytest.fixture
def directory() -> Iterator[str]:
    with scratch() as path:
        yield path


async def sealed(spool: Spool, count: int) -> list[Entry]:
    entries = [spool.seal(begun(spool, b"%d" % n), facts()) for n in range(count)]
    await spool.durable(entries[-1])
    return entries


async def test_more_than_the_window_comes_out_in_order_once(directory: str) -> None:
    count = FEED_WINDOW + 3 * FEED_PAGE + 7
    async with opened(directory) as spool:
        entries = await sealed(spool, count)
        feed = spool.feed("pacs")
        assert len(feed.peek(count)) == FEED_WINDOW
        assert [entry.id for entry in await deliver(spool, count)] == [entry.id for entry in entries]
        assert feed.next_nowait() is None
        await written(spool)
        assert spool.stats().waiting == {"pacs": 0}


async def test_consumers_share_a_feed_and_none_gets_what_another_holds(directory: str) -> None:
    async with opened(directory) as spool:
        taken: list[str] = []

        async def consume() -> None:
            while True:
                entry = await spool.feed("pacs").next()
                taken.append(entry.id)
                await asyncio.sleep(0)
                spool.done(entry, "pacs")

        consumers = [asyncio.create_task(consume()) for _ in range(5)]
        entries = await sealed(spool, FEED_WINDOW + 300)
        while len(taken) < len(entries):
            await asyncio.sleep(0.001)
        for consumer in consumers:
            consumer.cancel()
        await asyncio.gather(*consumers, return_exceptions=True)
        assert sorted(taken) == sorted(entry.id for entry in entries)


async def test_what_is_put_back_comes_first_and_what_is_held_does_not_come_again(directory: str) -> None:
    async with opened(directory) as spool:
        first, second, third = await sealed(spool, 3)
        feed = spool.feed("pacs")
        assert [await feed.next(), await feed.next()] == [first, second]
        feed.put_back(first)
        feed.put_back(first)
        feed.rewind()
        assert [(await feed.next()).seq, (await feed.next()).seq] == [first.seq, third.seq]
        assert feed.next_nowait() is None


async def test_a_rewind_while_a_page_is_read_hands_nothing_out_twice(directory: str) -> None:
    async with opened(directory) as spool:
        entries = await sealed(spool, 20)
        feed = spool.feed("pacs")
        held = [await feed.next() for _ in range(5)]
        feed.rewind()
        assert feed.next_nowait() is None  # the page is on its way
        feed.put_back(held[0])
        spool.done(held[1], "pacs")
        rest = [await feed.next() for _ in range(16)]
        assert sorted(entry.seq for entry in rest) == [held[0].seq, *(entry.seq for entry in entries[5:])]
        assert feed.next_nowait() is None


async def test_a_cancelled_consumer_takes_nothing_with_it(directory: str) -> None:
    async with opened(directory) as spool:
        task = asyncio.create_task(spool.feed("pacs").next())
        await asyncio.sleep(0)
        spool.seal(begun(spool), facts())
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert (await spool.feed("pacs").next()).size == 4


async def test_what_waits_is_fed_after_a_restart(directory: str) -> None:
    async with opened(directory) as spool:
        entries = await sealed(spool, 30)
        await deliver(spool, 10)
    async with opened(directory) as spool:
        again = await deliver(spool, 20)
        assert [entry.id for entry in again] == [entry.id for entry in entries[10:]]
        assert (await stored(spool)).seq > entries[-1].seq


async def test_a_sequence_number_is_never_used_again(directory: str) -> None:
    async with opened(directory, replace(LIMITS, retention_seconds=0)) as spool:
        last = (await sealed(spool, 3))[-1]
        await deliver(spool, 3)
        assert await spool.sweep() == 3
    async with opened(directory) as spool:
        assert (await stored(spool)).seq > last.seq


def filled(path: str, count: int) -> None:
    """An index with `count` objects waiting, without their files."""
    index, _ = open_or_rebuild(path)
    index.serve(["pacs"])
    for first in range(0, count, 5000):
        index.record(
            [
                make_entry(seq + 1, f"{seq:032x}", "ab" * 32, 10, facts(f"1.2.{seq}"), 0.0)
                for seq in range(first, min(first + 5000, count))
            ]
        )
    index.close()


def page_cost(path: str) -> float:
    """Seconds for the first pages of an index, the best of some tries."""
    index: Index = open_or_rebuild(path)[0]
    index.serve(["pacs"])
    costs = []
    for _ in range(7):
        started = time.perf_counter()
        cursor = -1
        for _ in range(3):
            cursor = index.waiting("pacs", cursor, FEED_PAGE)[-1].seq
        index.totals()
        costs.append(time.perf_counter() - started)
    index.close()
    return min(costs)


async def test_a_page_costs_the_same_however_many_wait() -> None:
    costs = []
    for count in (1000, 10_000):
        with scratch() as path:
            filled(path, count)
            costs.append(page_cost(path))
    assert costs[1] < 3 * costs[0]


async def test_repr_tells_the_state(directory: str) -> None:
    async with opened(directory) as spool:
        feed: Feed = spool.feed("pacs")
        await sealed(spool, 3)
        await feed.next()
        assert repr(feed) == "<Feed pacs ready=2 held=1>"
        feed.rewind()
        assert repr(feed) == "<Feed pacs ready=0+ held=1>"
