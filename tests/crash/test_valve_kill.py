"""`kill -9` of the valve and of the sink, under load: nothing is lost, and B drops what comes twice."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import multiprocessing
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from relay import wire
from relay.link import Arrival
from relay.records import ObjectPart, VideoFrame
from relay.valve import takes, untaken
from relay.valve_link import ValveInlet
from tests.oneway.kit import link, mapped
from tests.relay.samples import KEY, LANE, end, part, picture
from tests.relay.test_wire import encode, encoder


def _send(sock: socket.socket, size: int, enough: Callable[[int], bool], sent: list[int]) -> None:
    """Send numbered records until it is enough; then leave their number in `sent`."""
    source, number = encoder(), 0
    while not enough(number):
        for fragment in encode(part(number, size=size), by=source):
            sock.send(fragment)
        number += 1
    sent.append(number)


@contextlib.contextmanager
def _sending(sock: socket.socket, size: int, enough: Callable[[int], bool]) -> Iterator[list[int]]:
    sent: list[int] = []
    sender = threading.Thread(target=_send, args=(sock, size, enough, sent))
    sender.start()
    try:
        yield sent
    finally:
        if not sent:
            sock.shutdown(socket.SHUT_WR)
        sender.join()


def _through_a_valve_that_is_killed(kills: int, seed: int) -> wire.DecoderCounters:
    """Send records for as long as kills go on; every one must come out, once, in order."""
    chance, over = random.Random(seed), threading.Event()
    sink = wire.Decoder(lane=LANE, key=KEY)
    with link() as valve:

        def kill() -> None:
            for _ in range(kills):
                time.sleep(chance.uniform(0.002, 0.02))
                valve.restart()
            over.set()

        killer = threading.Thread(target=kill)
        with _sending(valve.pairs.source_end, 64 * 1024, lambda _: over.is_set()) as sent:
            killer.start()
            try:
                expected = 0
                valve.pairs.sink_end.settimeout(20)
                while not sent or expected < sent[0]:
                    fragment = valve.pairs.sink_end.recv(wire.MAX_FRAGMENT)
                    for arrival in sink.decode(memoryview(fragment), 0):
                        assert isinstance(arrival.record, ObjectPart)
                        assert arrival.record.offset == expected
                        expected += 1
                    # Slower than the sender: every kill finds the valve with work at hand.
                    time.sleep(0.0005)
            finally:
                killer.join()
    return sink.counters


def test_a_valve_that_is_killed_loses_nothing() -> None:
    counters = _through_a_valve_that_is_killed(12, seed=1)
    assert (counters.gaps, counters.missing, counters.refused) == (0, 0, {})
    assert counters.fragments > 100
    assert counters.duplicates <= 12


@pytest.mark.slow
def test_a_valve_that_is_killed_sixty_times_loses_nothing() -> None:
    counters = _through_a_valve_that_is_killed(60, seed=2)
    assert (counters.gaps, counters.missing, counters.refused) == (0, 0, {})
    assert counters.fragments > 500
    assert counters.duplicates <= 60


SIZE = (1920, 1080)
"""Of a picture whose copy is a good part of what the valve does with it: some kills fall into it."""


def _pictures_through_a_valve_that_is_killed(kills: int, seed: int) -> wire.DecoderCounters:
    """The same with pictures, which lie in trays: each must come out whole, whenever the copy broke off."""
    chance, over = random.Random(seed), threading.Event()
    sink = wire.Decoder(lane=LANE, key=KEY)
    with link(trays=True) as valve:
        a, b = mapped(valve)

        def send() -> None:
            source, memory, number = encoder(), memoryview(bytearray(wire.MAX_FRAGMENT)), 0
            while not over.is_set():
                with takes(valve.pairs.source_end) as events:
                    while untaken(valve.pairs.source_end):
                        events.poll()
                (fragment,) = source.encode_into(memory, (picture(*SIZE, seq=number),), lambda: 5, a)
                valve.pairs.source_end.send(wire.TICKET.pack(len(fragment)))
                number += 1
            valve.pairs.source_end.send(encode(end(number), by=source)[0])

        def kill() -> None:
            for _ in range(kills):
                time.sleep(chance.uniform(0.002, 0.02))
                valve.restart()
            over.set()

        threads = [threading.Thread(target=job, daemon=True) for job in (send, kill)]
        for thread in threads:
            thread.start()
        expected, ended = 0, False
        message = memoryview(bytearray(wire.MAX_FRAGMENT))
        valve.pairs.sink_end.settimeout(20)
        while not ended:
            size = valve.pairs.sink_end.recv_into(message, 0, socket.MSG_PEEK)
            own = size == wire.TICKET.size
            fragment = sink.taken_out(b, message[:size]) if own else message[:size]
            for arrival in sink.decode(fragment, 0, own=own):
                ended = arrival.record == end(expected)
                if isinstance(arrival.record, VideoFrame):
                    assert arrival.record.seq == expected
                    assert bytes(arrival.record.planes[0]) == bytes([expected % 256]) * (SIZE[0] * SIZE[1])
                    expected += 1
            valve.pairs.sink_end.recv_into(message)
        for thread in threads:
            thread.join()
    return sink.counters


def test_a_valve_that_is_killed_in_mid_copy_tears_no_picture() -> None:
    counters = _pictures_through_a_valve_that_is_killed(12, seed=3)
    assert (counters.gaps, counters.missing, counters.refused) == (0, 0, {})
    assert counters.fragments > 24
    assert counters.duplicates <= 12


@pytest.mark.slow
def test_a_valve_that_is_killed_sixty_times_in_mid_copy_tears_no_picture() -> None:
    counters = _pictures_through_a_valve_that_is_killed(60, seed=4)
    assert (counters.gaps, counters.missing, counters.refused) == (0, 0, {})
    assert counters.fragments > 120
    assert counters.duplicates <= 60


def _sink(sock: socket.socket, path: str) -> None:
    """A sink that writes down each number before the fragment is taken. Runs until it is killed."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    log = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def deliver(arrival: Arrival) -> None:
        assert isinstance(arrival.record, ObjectPart)
        os.write(log, arrival.record.offset.to_bytes(4, "big"))

    asyncio.run(ValveInlet(sock, wire.Decoder(lane=LANE, key=KEY)).pump(deliver))


def _through_a_sink_that_is_killed(kills: int, path: Path, seed: int) -> list[int]:
    count, chance = kills * 400, random.Random(seed)
    context = multiprocessing.get_context("spawn")

    def written() -> int:
        return path.stat().st_size // 4 if path.exists() else 0

    with link() as valve, _sending(valve.pairs.source_end, 200, lambda number: number == count):
        for kill in range(kills + 1):
            worker = context.Process(target=_sink, args=(valve.pairs.sink_end, str(path)))
            worker.start()
            goal = count if kill == kills else min(written() + chance.randrange(50, 300), count)
            deadline = time.monotonic() + 30
            while written() < goal:
                assert time.monotonic() < deadline, f"{written()} of {goal} arrived"
                time.sleep(0.001)
            worker.kill()
            worker.join()
            worker.close()
    raw = path.read_bytes()
    return [int.from_bytes(raw[at : at + 4], "big") for at in range(0, len(raw), 4)]


def _check(numbers: list[int], kills: int) -> None:
    """Every number is there, in order; only the one fragment under way at a kill may be there twice."""
    assert sorted(set(numbers)) == list(range(max(numbers) + 1))
    repeated = [here for before, here in itertools.pairwise(numbers) if here != before + 1]
    assert len(repeated) <= kills
    assert all(here == before for before, here in itertools.pairwise(numbers) if here <= before)


def test_a_sink_that_is_killed_sees_again_what_it_had_not_finished(tmp_path: Path) -> None:
    _check(_through_a_sink_that_is_killed(3, tmp_path / "log", seed=1), kills=3)


@pytest.mark.slow
def test_a_sink_that_is_killed_thirty_times_loses_nothing(tmp_path: Path) -> None:
    _check(_through_a_sink_that_is_killed(30, tmp_path / "log", seed=2), kills=30)
