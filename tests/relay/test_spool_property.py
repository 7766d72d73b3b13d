"""Random lives of a spool against a model of ten lines: custody, order, figures, restarts, lost indexes."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from relay.spool import Entry, Spool
from tests.relay.spool_kit import LIMITS, begun, data_of, facts, names, opened, scratch, written

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("commit"), st.binary(min_size=1, max_size=50)),
        st.tuples(st.just("seal"), st.binary(min_size=1, max_size=50)),
        st.tuples(
            st.sampled_from(["abandon", "quarantine", "take", "back", "done", "park", "doubt"]), st.none()
        ),
        st.tuples(st.sampled_from(["rewind", "reopen", "lose"]), st.none()),
    ),
    max_size=40,
)


class Model:
    """What a spool should hold: data by id in order; what waits, is held, is done, is parked."""

    def __init__(self) -> None:
        self.data: dict[str, bytes] = {}
        self.waiting: list[str] = []
        self.held: dict[str, Entry] = {}
        self.done: list[str] = []
        self.parked: list[str] = []
        self.quarantined = 0

    def add(self, entry: Entry, data: bytes) -> None:
        self.data[entry.id] = data
        self.waiting.append(entry.id)

    def forget_deliveries(self) -> None:
        self.waiting, self.done, self.parked, self.held = list(self.data), [], [], {}

    def release_held(self) -> None:
        order = list(self.data)
        self.waiting = sorted([*self.waiting, *self.held], key=order.index)
        self.held = {}


async def live(directory: str, steps: list[tuple[str, bytes | None]], journal_bytes: int) -> None:
    model = Model()
    remaining = list(steps)
    while True:
        async with opened(directory, replace(LIMITS, journal_bytes=journal_bytes)) as spool:
            action = await until_reopened(spool, model, remaining)
        model.release_held()
        if action is None:
            return
        if action == "lose":
            for name in os.listdir(directory):
                if name.startswith("index.db"):
                    os.unlink(os.path.join(directory, name))
            model.forget_deliveries()


async def until_reopened(spool: Spool, model: Model, steps: list[tuple[str, bytes | None]]) -> str | None:
    feed = spool.feed("pacs")
    while steps:
        action, data = steps.pop(0)
        held = next(iter(model.held.values()), None)
        if action in ("reopen", "lose"):
            return action
        if action == "commit" and data is not None:
            model.add(await spool.commit(begun(spool, data), facts()), data)
        elif action == "seal" and data is not None:
            model.add(spool.seal(begun(spool, data), facts()), data)
        elif action == "abandon":
            begun(spool).abandon()
        elif action == "quarantine":
            spool.quarantine(begun(spool), "bad")
            model.quarantined += 1
        elif action == "rewind":
            feed.rewind()
            model.waiting.sort(key=list(model.data).index)
        elif action == "take" and model.waiting:
            entry = await asyncio.wait_for(feed.next(), 5)
            assert entry.id == model.waiting.pop(0)
            assert data_of(spool, entry) == model.data[entry.id]
            model.held[entry.id] = entry
        elif action == "back" and held:
            feed.put_back(held)
            model.waiting.insert(0, held.id)
            del model.held[held.id]
        elif action in ("done", "park") and held:
            (spool.done if action == "done" else spool.park)(held, "pacs", 0)
            (model.done if action == "done" else model.parked).append(held.id)
            del model.held[held.id]
        elif action == "doubt" and model.done:
            assert await spool.doubt("pacs", 1) == 1
            model.waiting.append(model.done.pop())
            model.waiting.sort(key=list(model.data).index)
        await check(spool, model)
    return None


async def check(spool: Spool, model: Model) -> None:
    for _ in range(2):
        stats = spool.stats()
        assert stats.waiting["pacs"] == len(model.waiting) + len(model.held)
        assert stats.parked["pacs"] == len(model.parked)
        assert stats.quarantined_objects == model.quarantined
        assert stats.part_objects == stats.part_bytes == 0
        await written(spool)
    assert stats.undelivered_objects == len(model.data) - len(model.done)
    assert stats.retained_objects == len(model.done)
    recent = await spool.recent("pacs", 100)
    assert [entry.id for entry in recent] == model.done[::-1]
    assert all(spool.has(id) for id in model.data)


def lives(examples: int) -> None:
    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
    @given(STEPS, st.sampled_from([0, 8 * 4096]))
    def one(steps: list[tuple[str, bytes | None]], journal_bytes: int) -> None:
        with scratch() as directory:
            asyncio.run(live(directory, steps, journal_bytes))
            assert names(directory, "parts") == []

    one()


def test_short_lives() -> None:
    lives(15)


@pytest.mark.slow
def test_many_lives() -> None:
    lives(600)
