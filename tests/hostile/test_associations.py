"""Peers that misbehave on the way to, in and out of an association; and whoever comes next is served.

Every attack is made on a running server, and after it a proper peer stores an object within a second.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import random
import resource
import time
from collections.abc import Awaitable, Callable

import pytest

from dicom.scp import AcceptRule
from tests.dicom.associations import (
    ABORT,
    BOTH,
    CT,
    EXPLICIT,
    INSTANCE,
    RELEASE_RQ,
    abort,
    data_pdu,
    echo_message,
    pdv,
    rejection,
    request,
    store_command,
    store_message,
)
from tests.dicom.callers import Caller, Station, serving, until

FOUR_GIB = b"\xff\xff\xff\xff"
MIB = 1 << 20


async def stores(station: Station) -> None:
    """A proper peer is served, at once."""
    async with asyncio.timeout(1):
        caller = await station.associate()
        assert await caller.store(b"proper") == 0
        await caller.release()


async def wreck(station: Station, data: bytes, *, associated: bool) -> Caller:
    """A caller that says `data`, with or without an association before it."""
    caller = await (station.associate() if associated else station.call())
    caller.send(data)
    return caller


def huge_request() -> bytes:
    contexts = [(f"1.2.840.10008.5.1.4.1.1.{n}", [f"1.2.3.{n}.{m}" for m in range(30)]) for n in range(128)]
    return request(contexts)


BEFORE: dict[str, bytes] = {
    "half a header": b"\x01\0\0",
    "half a request": request()[:100],
    "4 GiB of request": b"\x01\0" + FOUR_GIB + bytes(1000),
    "4 GiB of data": b"\x04\0" + FOUR_GIB + bytes(1000),
    "4 GiB of unknown": b"\x99\0" + FOUR_GIB,
    "data": store_message(b"data"),
    "release": RELEASE_RQ,
    "abort": ABORT,
    "HTTP": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "TLS": bytes.fromhex("1603010200010001fc0303") + os.urandom(500),
    "zeros": bytes(5000),
    "noise": random.Random(1).randbytes(5000),
    "unknown AE": request(calling="STRANGER"),
    "wrong called AE": request(called="WRONG"),
    "titles of spaces": request()[:10] + b" " * 32 + request()[42:],
    "titles of control characters": request()[:10] + b"\x1b[2J\r\n\0\xff" * 4 + request()[42:],
    "128 contexts of 30 transfer syntaxes, none of ours": huge_request(),
    "a request twice": request() + request(),
    "a request and no reading of the answer": request() * 1,
}

WITHIN: dict[str, bytes] = {
    "4 GiB of data": b"\x04\0" + FOUR_GIB + bytes(1000),
    "4 GiB of release": b"\x05\0" + FOUR_GIB,
    "half a PDU": store_message(b"x" * 5000)[:2000],
    "a command without end": data_pdu(pdv(3, 1, b"x" * 8000)) * 12,
    "empty fragments without end": data_pdu(*[pdv(3, 1, b"")] * 2000) * 4,
    "PDVs of length zero": data_pdu(*[b"\0\0\0\0\x03\x03"] * 100),
    "a data set without a command": data_pdu(pdv(3, 0, b"x" * 5000)),
    "a context never accepted": data_pdu(pdv(253, 3, store_command())),
    "abort in mid-object": store_message(b"x" * 50_000)[:20_000] + ABORT,
    "a request in mid-object": store_message(b"x" * 50_000)[:16_200] + request(),
    "two commands in one PDU": data_pdu(pdv(3, 3, store_command()), pdv(3, 3, store_command())),
    "two hundred requests at once": b"".join(store_message(b"y", message_id=n) for n in range(1, 201)),
    "release, and then data": RELEASE_RQ + store_message(b"late"),
    "a response": data_pdu(pdv(3, 3, store_command().replace(b"\0\1\2\0\0\0\1\0", b"\0\1\2\0\0\0\1\x80"))),
    "noise": random.Random(2).randbytes(5000),
    "a command of noise": data_pdu(pdv(3, 3, random.Random(3).randbytes(5000))),
}


@pytest.mark.parametrize("hang_up", [True, False], ids=["and hangs up", "and waits"])
@pytest.mark.parametrize(
    ("when", "what"), [*(("before", each) for each in BEFORE), *(("within", each) for each in WITHIN)]
)
async def test_after_any_attack_the_next_is_served(when: str, what: str, hang_up: bool) -> None:
    associated = when == "within"
    async with serving(accept=(AcceptRule("SENDER", ("127.0.0.0/8",)),), request_seconds=0.2) as station:
        attacker = await wreck(station, (WITHIN if associated else BEFORE)[what], associated=associated)
        if hang_up:
            attacker.reset()
        await stores(station)
        assert [each for each in station.archive.stored() if each not in (b"y", b"data")] == [b"proper"]


@pytest.mark.parametrize("name", ["4 GiB of request", "4 GiB of data", "4 GiB of unknown", "HTTP", "TLS"])
async def test_what_is_no_request_is_answered_at_once(name: str) -> None:
    async with serving(request_seconds=60) as station:
        attacker = await wreck(station, BEFORE[name], associated=False)
        async with asyncio.timeout(1):
            assert await attacker.closed() == abort(0, 0)


async def test_a_length_of_4_gib_in_an_association_is_answered_at_once() -> None:
    async with serving() as station:
        attacker = await wreck(station, b"\x04\0" + FOUR_GIB, associated=True)
        async with asyncio.timeout(1):
            assert await attacker.closed() == abort(2, 6)


async def test_silence_and_trickle_end_with_the_time_for_a_request() -> None:
    async with serving(request_seconds=0.3) as station:
        silent = await station.call()
        trickling = await station.call()
        began = time.monotonic()

        async def trickle() -> None:
            for byte in request():
                trickling.send(bytes((byte,)))
                await asyncio.sleep(0.01)

        task = asyncio.create_task(trickle())
        assert await silent.closed() == b""
        assert await trickling.closed() == b""
        assert time.monotonic() - began < 1.0
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, ConnectionError):
            await task


async def many(station: Station, count: int, attack: Callable[[int], Awaitable[object]]) -> None:
    await asyncio.gather(*(attack(number) for number in range(count)))


async def test_twenty_misbehaving_peers_do_not_stop_the_twenty_first() -> None:
    async with serving(max_associations=40) as station:

        async def misbehave(number: int) -> None:
            within = number % 2 == 1
            attacks = list((WITHIN if within else BEFORE).values())
            attacker = await wreck(station, attacks[number // 2 % len(attacks)], associated=within)
            if number % 5 == 0:
                attacker.reset()

        await many(station, 20, misbehave)
        await stores(station)


async def test_five_hundred_silent_connections_make_room_for_one_that_speaks() -> None:
    async with serving(request_seconds=60) as station:

        async def connect(number: int) -> None:
            await station.call()

        for _ in range(5):
            await many(station, 100, connect)
        await until(lambda: station.server.stats()["evicted"] >= 430)
        assert station.server.stats()["unassociated"] <= 64
        await stores(station)


async def test_an_address_that_takes_all_its_associations_leaves_room_for_others() -> None:
    async with serving(max_associations=20, max_associations_per_address=10) as station:
        for _ in range(10):
            await station.associate()
        greedy = await station.call()
        greedy.send(request())
        assert await greedy.whole() == rejection(2, 3, 2)
        reader, writer = await asyncio.open_connection("127.0.0.1", station.port, local_addr=("127.0.0.2", 0))
        other = Caller(reader, writer)
        station.callers.append(other)
        other.send(request())
        assert (await other.pdu())[0] == 2
        assert await other.store(b"proper") == 0


async def test_rejected_peers_that_do_not_close_are_closed() -> None:
    async with serving(accept=(AcceptRule("SENDER", ("127.0.0.0/8",)),)) as station:

        async def ask(number: int) -> None:
            caller = await station.call()
            caller.send(request(calling="STRANGER"))
            assert (await caller.pdu())[0] == 3

        for _ in range(4):
            await many(station, 50, ask)
        assert len(station.server._closing) <= 64
        await stores(station)


def kib_of_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


async def flood(caller: Caller, data: bytes, total: int) -> None:
    """Send `data` until `total` bytes are gone or the server has had enough."""
    with contextlib.suppress(ConnectionError):
        for _ in range(total // len(data)):
            caller.send(data)
            await caller.writer.drain()


@pytest.mark.parametrize(
    "data",
    [
        store_message(b"x" * 100_000),
        data_pdu(pdv(3, 3, store_command())) + data_pdu(pdv(3, 0, b"")) * 1000,
        echo_message() * 100,
    ],
    ids=["objects", "empty fragments", "echoes"],
)
async def test_memory_stays_flat_whatever_is_poured_in(data: bytes) -> None:
    async with serving() as station:
        station.archive.refuse_with = 0xA700
        caller = await station.associate()
        await flood(caller, data, MIB)
        gc.collect()
        before = kib_of_memory()
        reading = asyncio.create_task(caller.reader.read())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                await flood(caller, data, 64 * MIB)
        assert kib_of_memory() - before < 16_000
        reading.cancel()
        caller.reset()
        await stores_refused(station)


async def stores_refused(station: Station) -> None:
    """A proper peer is heard, though the handler refuses its object."""
    async with asyncio.timeout(1):
        caller = await station.associate()
        assert await caller.store(b"proper") == 0xA700
        await caller.release()


async def test_data_after_an_abort_is_read_by_nobody() -> None:
    async with serving() as station:
        caller = await wreck(station, b"\x04\0" + FOUR_GIB, associated=True)
        assert (await caller.pdu())[0] == 7
        await flood(caller, bytes(65536), 8 * MIB)
        await caller.closed()
        assert station.archive.objects == []
        await stores(station)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(200))
async def test_random_conversations(seed: int) -> None:
    """Whatever is said, in whatever order and pieces, ends without an error of ours."""
    dice = random.Random(seed)
    phrases = [
        request(),
        *BEFORE.values(),
        *WITHIN.values(),
        echo_message(),
        store_message(b"ok"),
        RELEASE_RQ,
    ]
    async with serving(request_seconds=0.5, pdu_seconds=0.5) as station:
        failed = asyncio.create_task(station.server.failed())
        for _ in range(10):
            caller = await station.call()
            said = b"".join(dice.choices(phrases, k=dice.randint(1, 6)))
            if dice.random() < 0.7:
                said = request(BOTH) + said
            with contextlib.suppress(ConnectionError):
                while said:
                    size = dice.choice([1, 7, 100, 5000, len(said)])
                    caller.send(said[:size])
                    said = said[size:]
                    if dice.random() < 0.1:
                        await asyncio.sleep(0)
            if dice.random() < 0.5:
                caller.reset()
        await stores(station)
        assert not failed.done()
        failed.cancel()


def test_the_attacks_are_what_they_say() -> None:
    assert BEFORE["a request twice"].count(CT.encode()) == 2
    assert INSTANCE.encode() in WITHIN["half a PDU"] and EXPLICIT.encode() in BEFORE["a request twice"]
    assert len(huge_request()) > 60_000
