"""A source in the wrong hands, with the lane's key, against the real valve and the real sink's end.

Whatever it writes is refused and counted, costs no memory, and stops with it: the next source is heard.
"""

from __future__ import annotations

import asyncio
import random
import socket
import tracemalloc
from collections.abc import Iterator

import pytest

from relay import wire
from relay.errors import WireError
from relay.link import Arrival
from relay.records import Record
from relay.valve import waiting
from relay.valve_link import ValveInlet, ValveOutlet
from tests.oneway.kit import NEWEST, Valve, link, until
from tests.relay.samples import KEY, LANE, OTHER_KEY, end, picture
from tests.relay.test_wire import authentic, encode, encoder

MEMORY = 2 << 20
"""Bytes that either process may grow by: allocator's noise. One split record alone may be 25 MB."""


def _noise(chance: random.Random) -> bytes:
    return chance.randbytes(
        chance.choice((1, 40, 56, 57, 500, 4096, wire.MAX_FRAGMENT, wire.MAX_FRAGMENT + 5))
    )


def _structured(chance: random.Random, numbers: Iterator[int]) -> bytearray:
    """A signed fragment of its own epoch with payload, shape and announced size at random."""
    payload = chance.randbytes(chance.randrange(1, 300))
    if chance.random() < 0.5:
        payload = bytes([chance.randrange(12)]) + len(payload).to_bytes(4, "big") + payload
    return authentic(
        payload,
        shape=chance.randrange(1, 5),
        total=chance.choice((0, 300, wire.MAX_PAYLOAD + 1, wire.MAX_RECORD, 2**32 - 1)),
        seq=next(numbers),
    )


def _changed(chance: random.Random, numbers: Iterator[int]) -> bytearray:
    """A good fragment with a bit of its header changed afterwards; epoch and number have their own tests."""
    fragment = authentic(b"\x08\0\0\0\x08" + bytes(8), seq=next(numbers))
    fragment[chance.choice([*range(8), *range(12, 16), *range(24, wire.HEADER.size)])] ^= (
        1 << chance.randrange(8)
    )
    return fragment


async def _attack(valve: Valve, rounds: int, seed: int) -> ValveInlet:
    """Write `rounds` messages of all sorts, then speak as the next source; the sink must hear that one."""
    sink = ValveInlet(valve.pairs.sink_end, wire.Decoder(lane=LANE, key=KEY))
    heard: list[Record] = []
    enough = asyncio.Event()

    def deliver(arrival: Arrival) -> None:
        if arrival.record == end(99):
            heard.append(arrival.record)
            enough.set()

    pump = asyncio.create_task(sink.pump(deliver))
    chance, numbers = random.Random(seed), iter(range(2**62))
    outlet = valve.pairs.source_end
    outlet.setblocking(False)
    for number in range(rounds):
        kind = chance.randrange(10)
        message = (
            b""
            if kind == 0
            else _noise(chance)
            if kind < 4
            else _changed(chance, numbers)
            if kind < 6
            else _structured(chance, numbers)
        )
        await _write(outlet, message)
        if number == rounds // 10:
            tracemalloc.start()
            before = valve.resident_bytes()
    grown = valve.resident_bytes() - before
    traced, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert grown < MEMORY
    # One record that is put together, and one that was given up, where the beginning of the next came to lie.
    assert traced < MEMORY + 2 * wire.MAX_RECORD
    # The supervisor kills what it takes for hostile and starts the next, with the next epoch.
    await ValveOutlet(outlet, wire.Encoder(lane=LANE, key=KEY, epoch=NEWEST)).send(end(99))
    await asyncio.wait_for(enough.wait(), 30)
    pump.cancel()
    assert heard == [end(99)]
    assert valve.process.poll() is None
    return sink


async def _write(sock: socket.socket, message: bytes | bytearray) -> None:
    """Send one message, of no bytes too, which asyncio's own calls leave out."""
    while True:
        try:
            sock.send(message)
            return
        except BlockingIOError:
            await asyncio.sleep(0.001)


async def test_noise_structure_and_empty_messages_stop_nothing() -> None:
    with link() as valve:
        sink = await _attack(valve, 4_000, seed=3)
        assert sink.decoder.counters.refused["malformed"] > 100
        assert sink.decoder.counters.refused["record"] > 10


@pytest.mark.slow
@pytest.mark.timeout(1200)
async def test_noise_structure_and_empty_messages_for_long() -> None:
    with link() as valve:
        await _attack(valve, 500_000, seed=4)


async def _what_passes(valve: Valve, fragments: list[bytearray]) -> tuple[list[Record], wire.DecoderCounters]:
    """Write fragments, then an end of the newest epoch; what the sink was given before that."""
    sink = ValveInlet(valve.pairs.sink_end, wire.Decoder(lane=LANE, key=KEY))
    heard: list[Record] = []
    done = asyncio.Event()

    def deliver(arrival: Arrival) -> None:
        heard.append(arrival.record)
        if arrival.record == end(99):
            done.set()

    pump = asyncio.create_task(sink.pump(deliver))
    valve.pairs.source_end.setblocking(False)
    for fragment in fragments:
        await _write(valve.pairs.source_end, fragment)
    await _write(valve.pairs.source_end, encode(end(99), by=encoder(epoch=NEWEST))[0])
    await asyncio.wait_for(done.wait(), 10)
    pump.cancel()
    return heard[:-1], sink.decoder.counters


def _in_order(count: int, **fields: object) -> list[bytearray]:
    source = encoder(**fields)
    return [encode(end(number), by=source)[0] for number in range(count)]


async def test_replayed_fragments_are_dropped_by_the_valve() -> None:
    with link() as valve:
        sent = _in_order(3)
        heard, counters = await _what_passes(valve, [*sent, *sent, sent[1]])
    assert heard == [end(0), end(1), end(2)]
    assert counters.duplicates == 0, "they did not even reach B"


async def test_replayed_fragments_are_dropped_by_b_where_the_valve_is_new() -> None:
    with link() as valve:
        sent = _in_order(3)
        sink = wire.Decoder(lane=LANE, key=KEY)
        valve.pairs.source_end.setblocking(False)
        valve.pairs.sink_end.settimeout(10)
        for fragment in sent:
            await _write(valve.pairs.source_end, fragment)
            sink.decode(memoryview(valve.pairs.sink_end.recv(1000)), 0)
        # Killed between sending and taking, it would repeat the last one of its own accord.
        until(lambda: waiting(valve.pairs.valve_in) == 0, "the last fragment is taken")
        valve.restart()
        for fragment in sent:
            await _write(valve.pairs.source_end, fragment)
            assert sink.decode(memoryview(valve.pairs.sink_end.recv(1000)), 0) == []
        assert sink.counters.duplicates == 3


async def test_fragments_out_of_order_are_dropped() -> None:
    with link() as valve:
        first, second, third = _in_order(3)
        heard, _ = await _what_passes(valve, [first, third, second])
    assert heard == [end(0), end(2)]


async def test_a_record_signed_with_another_key_is_refused_by_b() -> None:
    with link() as valve:
        heard, counters = await _what_passes(valve, _in_order(3, key=OTHER_KEY))
    assert heard == []
    assert counters.refused == {"mac": 3}


async def test_a_fragment_of_another_lane_is_refused_by_the_valve() -> None:
    with link() as valve:
        heard, counters = await _what_passes(valve, _in_order(3, lane=LANE + 1))
    assert heard == []
    assert counters.refused == {}


async def test_an_epoch_that_is_over_is_refused_by_the_valve_and_by_b() -> None:
    """What a recorded source of yesterday says again today."""
    old, current = _in_order(2, epoch=5), _in_order(2, epoch=6)
    with link() as valve:
        heard, counters = await _what_passes(valve, [*current, *old])
    assert heard == [end(0), end(1)]
    assert counters.refused == {}
    sink = wire.Decoder(lane=LANE, key=KEY)
    for fragment in current:
        sink.decode(memoryview(fragment), 0)
    for fragment in old:
        with pytest.raises(WireError, match="stale"):
            sink.decode(memoryview(fragment), 0)


async def test_an_epoch_of_the_future_cannot_lock_out_the_next_source() -> None:
    with link() as valve:
        heard, _ = await _what_passes(valve, _in_order(2, epoch=2**32 - 1))
    assert heard == []


async def test_the_last_number_of_an_epoch_locks_out_that_epoch_only() -> None:
    poison = authentic(b"\x08\0\0\0\x08" + bytes(8), seq=2**64 - 1)
    with link() as valve:
        heard, _ = await _what_passes(valve, [poison, *_in_order(2)])
    assert len(heard) == 1


@pytest.mark.parametrize("count", [1, 3])
async def test_a_picture_that_never_ends_costs_one_picture_of_memory(count: int) -> None:
    whole = encode(picture(1280, 720), by=encoder())
    with link() as valve:
        heard, counters = await _what_passes(valve, whole[:-1] * count)
    assert heard == []
    assert counters.refused == {}


async def test_good_records_between_bad_ones_arrive() -> None:
    source = encoder()
    sent: list[bytearray] = []
    for number in range(20):
        sent += [encode(end(number), by=source)[0], bytearray(b"noise"), bytearray(b"\0" * 60)]
    with link() as valve:
        heard, counters = await _what_passes(valve, sent)
    assert heard == [end(number) for number in range(20)]
    assert counters.refused == {}, "the valve keeps noise from B"
