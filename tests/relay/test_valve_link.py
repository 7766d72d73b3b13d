"""The link's two ends: they wait, wake, and give up without losing or tearing a fragment."""

from __future__ import annotations

import asyncio
import errno
import os
import select
import signal
import socket
from collections.abc import Awaitable, Iterator

import pytest

from relay import wire
from relay.link import SILENCE_SECONDS, Arrival
from relay.records import ObjectPart, Record, VideoFrame
from relay.valve import TRAY_BYTES
from relay.valve_link import SOCKET_BUFFER, Pairs, ValveInlet, ValveOutlet, make_pairs
from tests.oneway.kit import link, mapped
from tests.relay.samples import KEY, LANE, end, part, picture


@pytest.fixture
def pairs() -> Iterator[Pairs]:
    made = make_pairs()
    yield made
    made.close()


def outlet(sock: socket.socket, epoch: int = 1, tray: memoryview | None = None) -> ValveOutlet:
    return ValveOutlet(sock, wire.Encoder(lane=LANE, key=KEY, epoch=epoch), tray)


def inlet(sock: socket.socket, tray: memoryview | None = None) -> ValveInlet:
    return ValveInlet(sock, wire.Decoder(lane=LANE, key=KEY), tray)


def test_the_pairs_go_one_way(pairs: Pairs) -> None:
    pairs.source_end.send(b"x")
    assert pairs.valve_in.recv(9) == b"x"
    with pytest.raises(OSError) as caught:
        pairs.sink_end.send(b"x")
    assert caught.value.errno == errno.EPIPE
    pairs.close()
    assert all(
        end.fileno() == -1 for end in (pairs.source_end, pairs.valve_in, pairs.valve_out, pairs.sink_end)
    )


@pytest.mark.parametrize("side", ["nobody", "source", "sink"])
def test_only_the_pair_that_was_shut_on_purpose_is_renewed(pairs: Pairs, side: str) -> None:
    if side == "source":
        pairs.source_end.shutdown(socket.SHUT_WR)
    if side == "sink":
        pairs.sink_end.shutdown(socket.SHUT_RD)
    new = pairs.renewed()
    assert (new.source_end is not pairs.source_end, new.sink_end is not pairs.sink_end) == (
        side == "source",
        side == "sink",
    )
    new.source_end.send(b"x")
    assert new.valve_in.recv(9) == b"x"
    new.valve_out.send(b"y")
    assert new.sink_end.recv(9) == b"y"
    new.close()


def test_a_pair_in_which_something_waits_is_not_renewed_before_it_is_taken(pairs: Pairs) -> None:
    pairs.source_end.send(b"last words")
    pairs.source_end.shutdown(socket.SHUT_WR)
    assert pairs.renewed().source_end is pairs.source_end
    assert pairs.valve_in.recv(99) == b"last words"
    new = pairs.renewed()
    assert new.source_end is not pairs.source_end
    new.close()


class Received:
    """Collects what arrives; `enough` is set at the expected number."""

    def __init__(self, expected: int) -> None:
        self.records: list[Record] = []
        self.enough = asyncio.Event()
        self.expected = expected

    def __call__(self, arrival: Arrival) -> None:
        record = arrival.record
        if isinstance(record, ObjectPart):
            record = ObjectPart(id=record.id, offset=record.offset, data=bytes(record.data))
        self.records.append(record)
        if len(self.records) >= self.expected:
            self.enough.set()


async def test_records_cross_the_real_valve_in_order() -> None:
    with link() as valve:
        source, sink = outlet(valve.pairs.source_end), inlet(valve.pairs.sink_end)
        received = Received(300)
        pump = asyncio.create_task(sink.pump(received))
        for number in range(0, 300, 3):
            await source.send(end(number), part(number + 1), end(number + 2))
        await asyncio.wait_for(received.enough.wait(), 10)
        assert [getattr(item, "offset", item) for item in received.records] == [
            number if number % 3 == 1 else end(number) for number in range(300)
        ]
        valve.pairs.source_end.close()
        assert valve.process.wait(10) == 0
        valve.pairs.valve_out.close()
        await asyncio.wait_for(pump, 10)


async def test_a_full_link_makes_the_source_wait_and_says_so(pairs: Pairs) -> None:
    source = outlet(pairs.source_end)
    assert not source.congested
    sending = asyncio.create_task(_send_many(source, 100))
    await _until_blocked(source)
    assert source.congested
    assert source.waits > 0
    assert 2 <= source.fragments <= SOCKET_BUFFER // 100_000, "one socket's buffer"
    sink = inlet(pairs.valve_in)
    received = Received(100)
    pump = asyncio.create_task(sink.pump(received))
    await asyncio.wait_for(sending, 10)
    await asyncio.wait_for(received.enough.wait(), 10)
    assert not source.congested
    pump.cancel()


async def _send_many(source: ValveOutlet, count: int) -> None:
    for number in range(count):
        await source.send(part(number, size=100_000))


async def _until_blocked(source: ValveOutlet) -> None:
    fragments = -1
    while source.fragments != fragments or not source.waits:
        fragments = source.fragments
        await asyncio.sleep(0.02)


async def test_a_cancelled_send_leaves_no_hole_in_the_numbering(pairs: Pairs) -> None:
    source = outlet(pairs.source_end)
    sending = asyncio.create_task(source.send(*(picture(1280, 720, seq=number) for number in range(9))))
    await _until_blocked(source)
    sending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sending
    sink = inlet(pairs.valve_in)
    received = Received(10**9)
    pump = asyncio.create_task(sink.pump(received))
    await source.send(end(1))
    pairs.source_end.close()
    await asyncio.wait_for(pump, 10)
    assert received.records[-1] == end(1)
    assert sink.decoder.counters.gaps == 0
    assert not sink.decoder.counters.refused


def seqs(received: Received) -> list[int]:
    """The pictures' numbers; what is on them was looked at as they came."""
    return [record.seq for record in received.records if isinstance(record, VideoFrame)]


class Pictures(Received):
    """Looks at each picture while it may, and keeps its number."""

    def __call__(self, arrival: Arrival) -> None:
        record = arrival.record
        if isinstance(record, VideoFrame):
            made = picture(record.width, record.height, record.seq)
            planes = zip(record.planes, made.planes, strict=True)
            assert all(bytes(plane) == bytes(wanted) for plane, wanted in planes)
        super().__call__(arrival)


async def test_pictures_cross_the_real_valve_by_tray() -> None:
    with link(trays=True) as valve:
        a, b = mapped(valve)
        source = outlet(valve.pairs.source_end, tray=a)
        sink = inlet(valve.pairs.sink_end, tray=b)
        received = Pictures(200)
        pump = asyncio.create_task(sink.pump(received))
        for number in range(100):
            await source.send(end(number), picture(640, 480, seq=number))
        await asyncio.wait_for(received.enough.wait(), 10)
        assert seqs(received) == list(range(100))
        assert (source.fragments, sink.decoder.counters.fragments) == (200, 200)
        assert source.bytes > 100 * 640 * 480 * 3 // 2
        assert sink.decoder.counters.refused == {}
        pump.cancel()
        await asyncio.wait([pump])


async def test_a_picture_waits_until_the_tray_is_taken_and_small_records_do_not() -> None:
    with link(trays=True) as valve:
        a, b = mapped(valve)
        source = outlet(valve.pairs.source_end, tray=a)
        valve.process.send_signal(signal.SIGSTOP)
        await source.send(picture(640, 480, seq=0))
        await source.send(end(1))
        assert not source.congested
        sending = asyncio.create_task(source.send(picture(640, 480, seq=1)))
        await _until_waiting(source)
        assert (source.congested, source.fragments) == (True, 2)
        valve.process.send_signal(signal.SIGCONT)
        sink = inlet(valve.pairs.sink_end, tray=b)
        received = Pictures(3)
        pump = asyncio.create_task(sink.pump(received))
        await asyncio.wait_for(sending, 10)
        await asyncio.wait_for(received.enough.wait(), 10)
        assert seqs(received) == [0, 1]
        pump.cancel()
        await asyncio.wait([pump])


async def _until_waiting(source: ValveOutlet) -> None:
    async with asyncio.timeout(10):
        while not source.waits:
            await asyncio.sleep(0.01)


async def test_a_picture_that_is_cancelled_before_the_tray_is_free_leaves_no_hole() -> None:
    with link(trays=True) as valve:
        a, b = mapped(valve)
        source = outlet(valve.pairs.source_end, tray=a)
        valve.process.send_signal(signal.SIGSTOP)
        await source.send(picture(640, 480, seq=0))
        sending = asyncio.create_task(source.send(picture(640, 480, seq=1)))
        await _until_waiting(source)
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
        valve.process.send_signal(signal.SIGCONT)
        sink = inlet(valve.pairs.sink_end, tray=b)
        received = Pictures(2)
        pump = asyncio.create_task(sink.pump(received))
        await asyncio.wait_for(source.send(picture(640, 480, seq=2)), 10)
        await asyncio.wait_for(received.enough.wait(), 10)
        assert seqs(received) == [0, 2]
        assert (sink.decoder.counters.gaps, sink.decoder.counters.refused) == (0, {})
        pump.cancel()
        await asyncio.wait([pump])


async def test_a_sink_that_dies_with_a_picture_in_its_hands_sees_it_again_whole() -> None:
    with link(trays=True) as valve:
        a, b = mapped(valve)
        source = outlet(valve.pairs.source_end, tray=a)

        async def deliver(_: Arrival) -> None:
            raise ConnectionError("the sink dies here")

        await source.send(picture(640, 480, seq=0))
        with pytest.raises(ConnectionError):
            await inlet(valve.pairs.sink_end, tray=b).pump(deliver)
        received = Pictures(2)
        await asyncio.wait_for(source.send(picture(640, 480, seq=1)), 10)
        pump = asyncio.create_task(inlet(valve.pairs.sink_end, tray=b).pump(received))
        await asyncio.wait_for(received.enough.wait(), 10)
        assert seqs(received) == [0, 1]
        pump.cancel()
        await asyncio.wait([pump])


async def test_a_link_that_is_shut_ends_the_wait_for_its_tray(pairs: Pairs) -> None:
    source = outlet(pairs.source_end, tray=memoryview(bytearray(TRAY_BYTES)))
    await source.send(picture(640, 480))
    sending = asyncio.create_task(source.send(picture(640, 480)))
    await _until_waiting(source)
    pairs.valve_in.shutdown(socket.SHUT_RD)
    with pytest.raises(BrokenPipeError):
        await asyncio.wait_for(sending, 10)


async def test_two_senders_do_not_mix_their_fragments() -> None:
    with link() as valve:
        source, sink = outlet(valve.pairs.source_end), inlet(valve.pairs.sink_end)
        received = Received(20)
        pump = asyncio.create_task(sink.pump(received))
        async with asyncio.TaskGroup() as tasks:
            for number in range(10):
                tasks.create_task(source.send(picture(640, 480, seq=number)))
                tasks.create_task(source.send(end(number)))
        await asyncio.wait_for(received.enough.wait(), 10)
        assert sink.decoder.counters.refused == {}
        pump.cancel()


async def test_a_fragment_is_taken_only_when_all_its_records_are_dealt_with(pairs: Pairs) -> None:
    """A sink that dies in the middle of a fragment sees it again."""
    await outlet(pairs.source_end).send(end(1), end(2))
    seen: list[Record] = []

    async def deliver(arrival: Arrival) -> None:
        seen.append(arrival.record)
        if arrival.record == end(2):
            raise ConnectionError("the sink dies here")

    with pytest.raises(ConnectionError):
        await inlet(pairs.valve_in).pump(deliver)
    received = Received(2)
    again = asyncio.create_task(inlet(pairs.valve_in).pump(received))
    await asyncio.wait_for(received.enough.wait(), 10)
    assert (seen, received.records) == ([end(1), end(2)], [end(1), end(2)])
    again.cancel()


async def test_while_delivery_waits_the_link_fills(pairs: Pairs) -> None:
    source, sink = outlet(pairs.source_end), inlet(pairs.valve_in)
    gate = asyncio.Event()

    async def wait(_: Arrival) -> None:
        await gate.wait()

    pump = asyncio.create_task(sink.pump(wait))
    sending = asyncio.create_task(_send_many(source, 100))
    await _until_blocked(source)
    assert not sending.done()
    gate.set()
    await asyncio.wait_for(sending, 10)
    pump.cancel()


async def test_refusals_are_counted_and_told_once_a_second(
    pairs: Pairs, caplog: pytest.LogCaptureFixture
) -> None:
    sink = inlet(pairs.valve_in)
    received = Received(1)
    pump = asyncio.create_task(sink.pump(received))
    for _ in range(500):
        pairs.source_end.send(os.urandom(80))
    await outlet(pairs.source_end).send(end(1))
    await asyncio.wait_for(received.enough.wait(), 10)
    assert sink.decoder.counters.refused == {"malformed": 500}
    assert 1 <= len(caplog.records) < 5
    pump.cancel()


async def test_silence_is_noticed_and_ends_with_the_next_fragment(
    pairs: Pairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1000.0]
    monkeypatch.setattr("relay.valve_link.time.monotonic", lambda: clock[0])
    monkeypatch.setattr("relay.valve_link.time.monotonic_ns", lambda: int(clock[0] * 1e9))
    sink = inlet(pairs.valve_in)
    clock[0] += SILENCE_SECONDS
    assert not sink.silent
    clock[0] += 0.1
    assert sink.silent
    assert "silent=True" in repr(sink)
    received = Received(1)
    pump = asyncio.create_task(sink.pump(received))
    await outlet(pairs.source_end).send(end(1))
    await received.enough.wait()
    assert not sink.silent
    pump.cancel()


async def test_a_sink_that_has_no_room_is_not_a_silent_link(
    pairs: Pairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a delivery waits nothing is read, so nothing is known of what comes."""
    clock = [1000.0]
    monkeypatch.setattr("relay.valve_link.time.monotonic", lambda: clock[0])
    monkeypatch.setattr("relay.valve_link.time.monotonic_ns", lambda: int(clock[0] * 1e9))
    sink = inlet(pairs.valve_in)
    begun, gate, over = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def full() -> None:
        begun.set()
        await gate.wait()

    def deliver(arrival: Arrival) -> Awaitable[None] | None:
        if arrival.record == end(1):
            return full()
        over.set()
        return None

    pump = asyncio.create_task(sink.pump(deliver))
    await outlet(pairs.source_end).send(end(1), end(2))
    await begun.wait()
    clock[0] += 10 * SILENCE_SECONDS
    assert not sink.silent
    gate.set()
    await over.wait()
    await asyncio.sleep(0)
    assert not sink.silent, "it is heard anew from here on"
    clock[0] += SILENCE_SECONDS + 0.1
    assert sink.silent
    pump.cancel()


async def test_repr_tells_how_far_an_outlet_is(pairs: Pairs) -> None:
    source = outlet(pairs.source_end)
    await source.send(end(1))
    assert repr(source) == "<ValveOutlet <Encoder lane=7 epoch=1 seq=1> fragments=1 congested=False>"
    assert KEY.hex() not in repr(source)


def test_the_other_end_can_be_waited_for_by_poll(pairs: Pairs) -> None:
    """`ended` rests on POLLRDHUP of a half-shut socket: set by the end of A alone."""
    poll = select.poll()
    poll.register(pairs.valve_in, select.POLLRDHUP)
    assert poll.poll(0) == []
    pairs.source_end.close()
    assert poll.poll(0)
