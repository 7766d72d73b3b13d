"""Delivery to one destination, a script here: what it answers, and what then becomes of each object."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from dicom import delivery as module
from dicom import scu
from dicom.delivery import Delivery, Verdict, verdict
from dicom.settings import Destination, DicomSink
from relay.errors import PeerError
from relay.metrics import Metrics
from relay.spool import Entry, Spool
from relay.spool_admin import SpoolAdmin
from tests.dicom.datasets import CT, EXPLICIT, IMPLICIT
from tests.relay.spool_kit import begun, facts, opened, scratch

Context = tuple[str, str]

SECONDS = 5.0
"""For anything in here; all of it takes milliseconds."""


@dataclass
class FakeAssociation:
    """What `scu.associate` returns."""

    peer: FakePeer
    contexts: Sequence[Context]
    unwanted: frozenset[Context]
    ended: bool = False
    released: bool = False

    def proposed(self, context: Context) -> bool:
        return context in self.contexts

    def accepts(self, context: Context) -> bool:
        return context in self.contexts and context not in self.unwanted

    def refusal(self, context: Context) -> str:
        return "transfer-syntax-not-accepted"

    async def store(self, **asked: Any) -> int:
        data = os.pread(asked["fd"], asked["size"], asked["offset"])
        await asyncio.sleep(0)
        outcome = self.peer.answer(asked["sop_instance"])
        if isinstance(outcome, Exception):
            self.ended = True
            raise outcome
        if outcome == 0:
            self.peer.stored.append((asked["sop_instance"], data))
            self.peer.last.append(asked["last"])
        return outcome

    async def release(self) -> None:
        self.ended = self.released = True

    def abort(self) -> None:
        self.ended = True


@dataclass
class FakePeer:
    """A destination by script."""

    answer: Callable[[str], int | Exception] = lambda instance: 0
    admit: Callable[[int], Exception | None] = lambda open_now: None
    """Whether another association is let in, while so many are open."""
    unwanted: set[Context] = field(default_factory=set)
    stored: list[tuple[str, bytes]] = field(default_factory=list)
    last: list[bool] = field(default_factory=list)
    """Whether nobody was to read each object's file after us."""
    associations: list[FakeAssociation] = field(default_factory=list)
    asked: int = 0

    @property
    def open_now(self) -> int:
        return sum(not each.ended for each in self.associations)

    @property
    def instances(self) -> list[str]:
        return [instance for instance, _ in self.stored]

    async def associate(
        self, host: str, port: int, *, contexts: Sequence[Context], **_: Any
    ) -> FakeAssociation:
        self.asked += 1
        await asyncio.sleep(0)
        refusal = self.admit(self.open_now)
        if refusal is not None:
            raise refusal
        self.associations.append(FakeAssociation(self, list(contexts), frozenset(self.unwanted)))
        return self.associations[-1]


@pytest.fixture
def directory() -> Iterator[str]:
    with scratch() as path:
        yield path


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> FakePeer:
    peer = FakePeer()
    monkeypatch.setattr(scu, "associate", peer.associate)
    return peer


@contextlib.asynccontextmanager
async def delivering(
    spool: Spool,
    *,
    max_associations: int = 1,
    release_seconds: float = 0.05,
    retry: float = 0.005,
    others: Sequence[str] = (),
) -> AsyncIterator[Delivery]:
    """A running delivery to ``pacs``, which is one of several destinations where there are `others`."""
    destination = Destination(
        name="pacs", ae_title="PACS", address="127.0.0.1:104", max_associations=max_associations
    ).model_copy(update={"release_seconds": release_seconds})
    # Times that no operator may write, so that the tests are quick.
    further = [Destination(name=name, ae_title="OTHER", address="127.0.0.1:105") for name in others]
    sink = DicomSink(destination=(destination, *further)).model_copy(
        update={"retry_seconds": retry, "max_retry_seconds": retry * 8}
    )
    delivery = Delivery(destination, sink, spool, Metrics("studies", "sink"), lambda: None)
    task = asyncio.create_task(delivery.run())
    try:
        yield delivery
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def keep(spool: Spool, *instances: str, syntax: str = EXPLICIT, sop_class: str = CT) -> list[Entry]:
    """Put objects into custody, each with its instance for data."""
    entries = []
    for instance in instances:
        known = facts(instance)
        part = begun(spool, instance.encode(), instance)
        described = type(known)(
            data_offset=known.data_offset,
            sop_class=sop_class,
            sop_instance=instance,
            transfer_syntax=syntax,
            received_ns=1,
            parsed_ns=2,
        )
        entries.append(await spool.commit(part, described))
    return entries


async def until(condition: Callable[[], bool]) -> None:
    """Return once `condition` holds."""
    async with asyncio.timeout(SECONDS):
        while not condition():
            await asyncio.sleep(0.002)


def uids(count: int, first: int = 0) -> list[str]:
    return [f"1.2.{number}" for number in range(first, first + count)]


# ---- the table ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (0x0000, Verdict.DONE),
        (0x0001, Verdict.DONE),
        (0x0107, Verdict.DONE),
        (0x0116, Verdict.DONE),
        (0xB000, Verdict.DONE),
        (0xB006, Verdict.DONE),
        (0xB007, Verdict.DONE),
        (0xBFFF, Verdict.DONE),
        (0xA700, Verdict.BUSY),
        (0xA7FF, Verdict.BUSY),
        (0x0213, Verdict.BUSY),
        (0x0110, Verdict.AGAIN),
        (0xA900, Verdict.PARK),
        (0xA800, Verdict.PARK),
        (0xC000, Verdict.PARK),
        (0xCFFF, Verdict.PARK),
        (0x0122, Verdict.PARK),
        (0x0124, Verdict.PARK),
        (0x0117, Verdict.PARK),
        (0x0002, Verdict.PARK),
        (0xFF00, Verdict.PARK),
        (0xFFFF, Verdict.PARK),
    ],
)
def test_what_a_status_means(status: int, expected: Verdict) -> None:
    assert verdict(status) is expected


# ---- associations ---------------------------------------------------------------------------------------


async def test_objects_arrive_in_order_on_one_association(directory: str, peer: FakePeer) -> None:
    async with opened(directory) as spool, delivering(spool) as delivery:
        await keep(spool, *uids(5))
        await until(lambda: delivery.delivered == 5)
        assert peer.stored == [(uid, uid.encode()) for uid in uids(5)]
        assert len(peer.associations) == 1
        # Kept while there is something to send, then let go, so that the device is free for others.
        await until(lambda: peer.associations[0].released)
        await keep(spool, "1.2.99")
        await until(lambda: delivery.delivered == 6)
        assert len(peer.associations) == 2
        assert spool.stats().waiting == {"pacs": 0}


async def test_contexts_are_proposed_from_what_waits_and_from_what_was_needed(
    directory: str, peer: FakePeer
) -> None:
    mr = "1.2.840.10008.5.1.4.1.1.4"
    async with opened(directory) as spool:
        await keep(spool, "1.2.1")
        await keep(spool, "1.2.2", syntax=IMPLICIT)
        async with delivering(spool) as delivery:
            await until(lambda: delivery.delivered == 2)
            assert len(peer.associations) == 1
            assert set(peer.associations[0].contexts) == {(CT, EXPLICIT), (CT, IMPLICIT)}
            await keep(spool, "1.2.3", sop_class=mr)
            await until(lambda: delivery.delivered == 3)
            assert peer.associations[0].released
            assert set(peer.associations[1].contexts) == {(CT, EXPLICIT), (CT, IMPLICIT), (mr, EXPLICIT)}
            assert peer.associations[1].contexts[0] == (mr, EXPLICIT)


async def test_no_more_contexts_are_proposed_than_an_association_has(directory: str, peer: FakePeer) -> None:
    async with opened(directory) as spool:
        for number in range(150):
            await keep(spool, f"1.2.{number}", sop_class=f"1.2.840.{number}")
        async with delivering(spool, release_seconds=1) as delivery:
            await until(lambda: delivery.delivered == 150)
        assert len(peer.associations[0].contexts) == 128
        assert len(peer.associations) == 2
        assert peer.instances == uids(150)


async def test_slots_open_while_much_waits_and_close_again(directory: str, peer: FakePeer) -> None:
    widest = 0

    def answer(instance: str) -> int:
        nonlocal widest
        widest = max(widest, peer.open_now)
        return 0

    peer.answer = answer
    async with opened(directory) as spool:
        await keep(spool, *uids(200))
        async with delivering(spool, max_associations=3) as delivery:
            await until(lambda: delivery.delivered == 200)
            assert widest == 3
            await until(lambda: peer.open_now == 0)
            assert delivery.figures()["associations"] == 1
        assert sorted(peer.instances) == sorted(uids(200))


async def test_few_objects_do_not_open_a_second_association(directory: str, peer: FakePeer) -> None:
    async with opened(directory) as spool:
        await keep(spool, *uids(module.PARALLEL_AT))
        async with delivering(spool, max_associations=4) as delivery:
            await until(lambda: delivery.delivered == module.PARALLEL_AT)
        assert len(peer.associations) == 1


async def test_a_device_that_takes_one_association_is_served_by_one(directory: str, peer: FakePeer) -> None:
    peer.admit = lambda open_now: PeerError("rejected-transient", "one at a time") if open_now else None
    async with opened(directory) as spool:
        await keep(spool, *uids(100))
        async with delivering(spool, max_associations=4) as delivery:
            await until(lambda: delivery.delivered == 100)
            # It is asked once for another, and then not again for a while; and it is not "away".
            assert (peer.asked, len(peer.associations)) == (2, 1)
            assert delivery.state == "sending"
        assert sorted(peer.instances) == sorted(uids(100))


# ---- a destination that is away -------------------------------------------------------------------------


async def test_an_absent_destination_is_tried_again_ever_more_rarely(
    directory: str, peer: FakePeer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    refusals = iter([PeerError("unreachable", "no route")] * 7)
    peer.admit = lambda open_now: next(refusals, None)
    async with opened(directory) as spool, delivering(spool) as delivery:
        await keep(spool, *uids(3))
        await until(lambda: delivery.state == "away")
        assert delivery.figures()["last error"] == "unreachable"
        await until(lambda: delivery.delivered == 3)
        assert peer.instances == uids(3)
        assert delivery.figures()["last error"] == "none"
    # Half to all of 5, 10, 20, 40, 40 … ms.
    waits = [float(wait) for wait in re.findall(r"next try in ([0-9.]+) s", caplog.text)]
    assert len(waits) == 7 and all(wait <= 0.04 for wait in waits)
    assert next(record.levelname for record in caplog.records if "is away" in record.message) == "WARNING"


async def test_the_wait_is_bounded_and_has_jitter(
    directory: str, peer: FakePeer, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    real_sleep = asyncio.sleep

    async def sleep(seconds: float) -> None:
        if seconds > 0.1:
            waits.append(seconds)
        await real_sleep(0)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    refusals = iter([PeerError("unreachable", "no route")] * 8)
    peer.admit = lambda open_now: next(refusals, None)
    async with opened(directory) as spool, delivering(spool, retry=1) as delivery:
        await keep(spool, "1.2.1")
        async with asyncio.timeout(SECONDS):
            while not delivery.delivered:
                await real_sleep(0.001)
    limits = [1, 2, 4, 8, 8, 8, 8, 8]
    assert len(waits) == len(limits)
    assert all(limit / 2 <= wait <= limit for wait, limit in zip(waits, limits, strict=True))
    assert len(set(waits)) == len(waits)


async def test_a_full_destination_gets_the_same_object_again_and_nothing_is_held_against_it(
    directory: str, peer: FakePeer
) -> None:
    answers = iter([0xA700] * (module.MAX_ATTEMPTS + 5))
    peer.answer = lambda instance: next(answers, 0)
    async with opened(directory) as spool:
        await keep(spool, *uids(3))
        async with delivering(spool, retry=0.001) as delivery:
            await until(lambda: delivery.delivered == 3)
        assert peer.instances == uids(3)
        assert len(peer.associations) == 1
        assert spool.stats().parked == {"pacs": 0}


async def test_a_destination_that_fails_on_everything_gets_everything_in_the_end(
    directory: str, peer: FakePeer
) -> None:
    failures = iter([PeerError("aborted", "closed")] * (3 * module.MAX_ATTEMPTS))
    peer.answer = lambda instance: next(failures, 0)
    async with opened(directory) as spool:
        await keep(spool, *uids(2))
        async with delivering(spool, retry=0.001) as delivery:
            await until(lambda: delivery.state == "away")
            await until(lambda: delivery.delivered == 2)
        assert sorted(peer.instances) == uids(2)
        assert spool.stats().parked == {"pacs": 0}


# ---- objects that fail ----------------------------------------------------------------------------------


@pytest.mark.parametrize("failure", [PeerError("aborted", "closed"), 0x0110], ids=["breaks off", "status"])
async def test_an_object_that_fails_alone_waits_aside_and_is_parked_in_the_end(
    directory: str, peer: FakePeer, failure: int | Exception
) -> None:
    tries = 0

    def answer(instance: str) -> int | Exception:
        nonlocal tries
        if instance == "1.2.666":
            tries += 1
            return failure
        return 0

    peer.answer = answer
    async with opened(directory) as spool:
        await keep(spool, "1.2.666", *uids(3))
        async with delivering(spool, retry=0.001) as delivery:
            await until(lambda: delivery.delivered == 3)
            assert peer.instances == uids(3)
            number = 100
            while not delivery.parked:
                # Others go on meanwhile, so that it is this object that is at fault.
                await keep(spool, f"1.2.{number}")
                await until(lambda: f"1.2.{number}" in peer.instances)  # noqa: B023
                number += 1
                assert number < 1000
            assert tries >= module.MAX_ATTEMPTS
            assert spool.stats().waiting == {"pacs": 0}


@pytest.mark.parametrize("answer", [PeerError("aborted", "closed"), 0x0110, 0xA700])
async def test_an_object_that_always_fails_lets_those_pass_that_come_later(
    directory: str, peer: FakePeer, answer: int | Exception
) -> None:
    """However often it was tried alone before: what is new goes first."""
    tries = []

    def answered(instance: str) -> int | Exception:
        tries.append(instance)
        return answer if instance == "1.2.666" else 0

    peer.answer = answered
    async with opened(directory) as spool, delivering(spool, retry=0.001) as delivery:
        await keep(spool, "1.2.666")
        for number in range(3):
            await until(lambda: len(tries) > 20 * (number + 1))  # noqa: B023
            before = len(tries)
            await keep(spool, f"1.2.{number}")
            await until(lambda: f"1.2.{number}" in peer.instances)  # noqa: B023
            assert tries.index(f"1.2.{number}") - before <= 2
        assert delivery.parked == 0
        await until(lambda: any("fails on 1 objects" in each for each in delivery.complaints()))


@pytest.mark.parametrize("bad", [1, 10])
async def test_objects_that_are_answered_as_if_all_were_full_hold_up_no_others(
    directory: str, peer: FakePeer, bad: int
) -> None:
    """A PACS may answer 0xA7xx for what it dislikes, however much room it has."""
    disliked = set(uids(bad, first=600))
    peer.answer = lambda instance: 0xA700 if instance in disliked else 0
    async with opened(directory) as spool, delivering(spool, retry=0.001) as delivery:
        await keep(spool, *sorted(disliked), *uids(3))
        await until(lambda: delivery.delivered == 3)
        number = 100
        while delivery.parked < bad:
            await keep(spool, f"1.2.{number}")
            await until(lambda: f"1.2.{number}" in peer.instances)  # noqa: B023
            number += 1
            assert number < 1000
        assert spool.stats().waiting == {"pacs": 0}


async def test_what_found_no_room_is_not_forgotten_when_the_next_one_is_refused(
    directory: str, peer: FakePeer
) -> None:
    answers = {"1.2.0": iter([0xA700] * (module.BUSY_PATIENCE + 1)), "1.2.1": iter([0xC000])}
    peer.answer = lambda instance: next(answers.get(instance, iter([])), 0)
    async with opened(directory) as spool, delivering(spool, retry=0.001) as delivery:
        await keep(spool, *uids(2))
        await until(lambda: peer.instances == ["1.2.0"])
        assert delivery.parked == 1


async def test_the_wait_of_an_object_aside_grows(
    directory: str, peer: FakePeer, caplog: pytest.LogCaptureFixture
) -> None:
    peer.answer = lambda instance: 0x0110
    async with opened(directory) as spool, delivering(spool, retry=0.01):
        await keep(spool, "1.2.1")
        await until(lambda: len(caplog.records) >= 5)
    delays = [float(str(record.args[3])) for record in caplog.records[:5] if isinstance(record.args, tuple)]
    assert delays == pytest.approx([0.01, 0.02, 0.04, 0.08, 0.08])


async def test_one_object_alone_that_fails_is_never_given_up(directory: str, peer: FakePeer) -> None:
    failures = iter([PeerError("timeout", "no answer")] * 25)
    peer.answer = lambda instance: next(failures, 0)
    async with opened(directory) as spool, delivering(spool, retry=0.001) as delivery:
        await keep(spool, "1.2.1")
        await until(lambda: delivery.delivered == 1)
        assert delivery.parked == 0


@pytest.mark.parametrize("status", [0x0122, 0xA900, 0xC123])
async def test_what_is_refused_for_good_is_parked_with_its_status(
    directory: str, peer: FakePeer, status: int
) -> None:
    peer.answer = lambda instance: status if instance == "1.2.0" else 0
    async with opened(directory) as spool, delivering(spool) as delivery:
        await keep(spool, *uids(3))
        await until(lambda: delivery.delivered == 2)
        assert delivery.parked == 1 and peer.instances == ["1.2.1", "1.2.2"]
        assert len(peer.associations) == 1


async def test_a_context_that_is_not_accepted_parks_its_objects_only(directory: str, peer: FakePeer) -> None:
    peer.unwanted = {(CT, IMPLICIT)}
    async with opened(directory) as spool, delivering(spool) as delivery:
        await keep(spool, "1.2.1", syntax=IMPLICIT)
        await keep(spool, "1.2.2")
        await until(lambda: delivery.delivered == 1 and delivery.parked == 1)
        assert peer.instances == ["1.2.2"]


async def test_what_is_sent_again_asks_anew_for_a_context_that_was_refused(
    directory: str, peer: FakePeer
) -> None:
    peer.unwanted = {(CT, IMPLICIT)}
    async with opened(directory) as spool, delivering(spool, release_seconds=5) as delivery:
        (entry,) = await keep(spool, "1.2.1", syntax=IMPLICIT)
        await until(lambda: delivery.parked == 1)
        peer.unwanted = set()
        await until(lambda: spool.stats().undelivered_objects == 1)
        with SpoolAdmin(directory) as admin:
            async with asyncio.timeout(SECONDS):
                while not admin.resend(entry.id):
                    await asyncio.sleep(0.01)
        await until(lambda: delivery.delivered == 1)
        assert len(peer.associations) == 2


@pytest.mark.parametrize("fault", ["gone", "short"])
async def test_a_file_that_cannot_be_read_is_parked_and_the_next_goes_on(
    directory: str, peer: FakePeer, fault: str
) -> None:
    async with opened(directory) as spool:
        await keep(spool, *uids(2))
        objects = Path(directory, "objects").iterdir()
        victim = next(path for path in objects if b"1.2.0" in path.read_bytes())
        if fault == "gone":
            os.unlink(victim)
        else:
            os.truncate(victim, 10)
            peer.answer = lambda instance: OSError("the file ends early") if instance == "1.2.0" else 0
        async with delivering(spool) as delivery:
            await until(lambda: delivery.delivered == 1 and delivery.parked == 1)
        assert peer.instances == ["1.2.1"]


async def test_what_waits_aside_is_bounded(
    directory: str, peer: FakePeer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_ASIDE", 3)
    peer.answer = lambda instance: 0x0110
    async with opened(directory) as spool:
        await keep(spool, *uids(10))
        async with delivering(spool, retry=0.05) as delivery:
            await until(lambda: delivery.figures()["aside"] == 3)
            for _ in range(50):
                await asyncio.sleep(0.002)
                assert delivery.figures()["aside"] <= 3
            peer.answer = lambda instance: 0
            await until(lambda: delivery.delivered == 10)


# ---- the end --------------------------------------------------------------------------------------------


async def test_idle_waits_for_what_can_be_delivered(directory: str, peer: FakePeer) -> None:
    async with opened(directory) as spool:
        await keep(spool, *uids(20))
        async with delivering(spool) as delivery:
            await asyncio.wait_for(delivery.idle(), SECONDS)
            assert delivery.delivered == 20


async def test_idle_does_not_wait_for_who_is_away_or_for_what_is_aside(
    directory: str, peer: FakePeer
) -> None:
    peer.admit = lambda open_now: PeerError("unreachable", "no route")
    async with opened(directory) as spool:
        await keep(spool, *uids(2))
        async with delivering(spool, retry=0.2) as delivery:
            await asyncio.wait_for(delivery.idle(), SECONDS)
            assert delivery.state == "away" and delivery.delivered == 0
            assert repr(delivery) == "<Delivery pacs away slots=1 aside=0>"
        assert spool.stats().waiting == {"pacs": 2}


async def test_two_destinations_do_not_wait_for_each_other(directory: str, peer: FakePeer) -> None:
    """Feeds are apart: that the other has not got it changes nothing here."""
    async with opened(directory, destinations=("pacs", "other")) as spool:
        async with delivering(spool) as delivery:
            await keep(spool, *uids(3))
            await until(lambda: delivery.delivered == 3)
        assert spool.stats().waiting == {"pacs": 0, "other": 3}


@pytest.mark.parametrize("others", [(), ("other",)], ids=["alone", "one of two"])
async def test_the_page_cache_keeps_what_another_destination_will_read(
    directory: str, peer: FakePeer, others: tuple[str, ...]
) -> None:
    async with (
        opened(directory, destinations=("pacs", *others)) as spool,
        delivering(spool, others=others) as delivery,
    ):
        await keep(spool, *uids(2))
        await until(lambda: delivery.delivered == 2)
    assert peer.last == [not others] * 2


async def test_an_association_that_the_peer_ended_is_replaced(directory: str, peer: FakePeer) -> None:
    async with opened(directory) as spool, delivering(spool, release_seconds=1) as delivery:
        await keep(spool, "1.2.1")
        await until(lambda: delivery.delivered == 1)
        peer.associations[0].ended = True
        await keep(spool, "1.2.2")
        await until(lambda: delivery.delivered == 2)
        assert len(peer.associations) == 2
