"""The valve alone: what it lets pass, what it counts, how it ends."""

from __future__ import annotations

import ast
import json
import mmap
import os
import socket
import time
from typing import Any

import pytest

from relay import valve, wire
from relay.valve_link import SOCKET_BUFFER
from tests.oneway.kit import link, receive, until
from tests.relay.samples import LANE, end, part, picture
from tests.relay.test_wire import authentic, decode, encode, encoder


def order(newest: int = 9) -> valve.Order:
    return valve.Order(LANE, newest)


def refusal(fragment: bytes | bytearray, by: valve.Order | None = None) -> str | None:
    return (by or order()).refusal(memoryview(fragment), len(fragment))


def test_its_numbers_are_those_of_the_codec() -> None:
    assert valve.HEADER.format == wire.HEADER.format
    assert (valve.TAG_BYTES, valve.MAX_PAYLOAD, valve.MAX_FRAGMENT) == (
        wire.TAG_BYTES,
        wire.MAX_PAYLOAD,
        wire.MAX_FRAGMENT,
    )
    assert valve.TICKET.format == wire.TICKET.format
    assert wire.MAX_LARGE_FRAGMENT <= valve.TRAY_BYTES < wire.MAX_LARGE_FRAGMENT + mmap.PAGESIZE
    assert valve.TRAY_BYTES % mmap.PAGESIZE == 0
    assert wire.MAGIC == b"MF" and wire.VERSION == 1
    assert (wire.WHOLE, wire.LAST) == (1, 4)


def test_it_imports_the_standard_library_alone_and_stays_short() -> None:
    with open(valve.__file__) as file:
        text = file.read()
    modules = {
        name.name.split(".")[0]
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Import)
        for name in node.names
    }
    assert not any(isinstance(node, ast.ImportFrom) for node in ast.walk(ast.parse(text)))
    allowed = {"array", "fcntl", "json", "mmap", "os", "select", "socket", "struct", "sys", "termios", "time"}
    assert modules <= allowed
    assert len(text.splitlines()) <= 170, "to be read in seven minutes"


def test_everything_that_an_encoder_makes_passes() -> None:
    check = order()
    for fragment in encode(end(1), part(2), picture(640, 480), end(3)):
        assert refusal(fragment, check) is None


REFUSED: dict[str, tuple[bytes | bytearray, str]] = {
    "nothing": (b"", "size"),
    "a header and a tag": (authentic(b""), "size"),
    "one byte too many": (authentic(bytes(wire.MAX_PAYLOAD + 1)), "size"),
    "a wrong payload size": (authentic(b"abc", size=4), "size"),
    "another magic": (authentic(b"x", magic=b"XX"), "shape"),
    "another version": (authentic(b"x", version=0), "shape"),
    "shape 0": (authentic(b"x", shape=0), "shape"),
    "shape 5": (authentic(b"x", shape=5), "shape"),
    "a hidden word": (authentic(b"x", zero=0xBEEF), "shape"),
    "a hidden long word": (authentic(b"x", pad=0xDEADBEEF), "shape"),
    "another lane": (authentic(b"x", lane=LANE + 1), "lane"),
    "an epoch that nobody was given": (authentic(b"x", epoch=10), "order"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_needs_no_key_is_checked(name: str) -> None:
    fragment, reason = REFUSED[name]
    assert refusal(fragment) == reason


def fragments(*numbers: tuple[int, int]) -> list[bytearray]:
    return [authentic(b"x", epoch=epoch, seq=seq) for epoch, seq in numbers]


@pytest.mark.parametrize(
    ("sent", "outcome"),
    [
        ([(1, 0), (1, 1), (1, 2)], [None, None, None]),
        ([(1, 0), (1, 0)], [None, "order"]),
        ([(1, 5), (1, 3), (1, 6)], [None, "order", None]),
        ([(2, 0), (1, 9), (2, 1)], [None, "order", None]),
        ([(1, 2**64 - 1), (1, 0), (2, 0)], [None, "order", None]),
        ([(10, 0), (9, 0)], ["order", None]),
    ],
)
def test_order(sent: list[tuple[int, int]], outcome: list[str | None]) -> None:
    check = order(newest=9)
    assert [refusal(fragment, check) for fragment in fragments(*sent)] == outcome


def figures(reports: int, seconds: float = 10.0) -> dict[str, Any]:
    """The next report of a valve."""
    line = os.read(reports, 4096).decode().splitlines()[-1]
    status: dict[str, Any] = json.loads(line)["status"]
    return status


def test_it_reports_what_it_passed_and_refused() -> None:
    with link() as running:
        running.pairs.source_end.send(b"noise")
        assert figures(running.reports) == {"fragments": 0, "bytes": 0, "size": 1}
        good = encode(end(1))[0]
        running.pairs.source_end.send(good)
        receive(running.pairs.sink_end)
        time.sleep(valve.REPORT_SECONDS)
        running.pairs.source_end.send(good)
        assert figures(running.reports) == {"fragments": 1, "bytes": len(good), "size": 1, "order": 1}


def test_it_ends_well_once_nobody_holds_as_end_and_all_is_sent() -> None:
    with link() as running:
        source = encoder()
        for number in range(50):
            running.pairs.source_end.send(encode(end(number), by=source)[0])
        running.pairs.source_end.close()
        arrived = [decode([bytearray(receive(running.pairs.sink_end)[0])])[0] for _ in range(50)]
        assert arrived == [end(number) for number in range(50)]
        assert running.process.wait(10) == 0


def test_an_empty_message_ends_nothing_and_loses_nothing() -> None:
    with link() as running:
        source = encoder()
        running.pairs.source_end.send(b"")
        running.pairs.source_end.send(encode(end(1), by=source)[0])
        assert receive(running.pairs.sink_end)[0] == encode(end(1))[0]
        running.process.send_signal(19)
        running.pairs.source_end.send(b"")
        running.pairs.source_end.send(encode(end(2), by=source)[0])
        running.pairs.source_end.close()
        running.process.send_signal(18)
        assert decode([bytearray(receive(running.pairs.sink_end)[0])]) == [end(2)]
        assert running.process.wait(10) == 0


def test_it_lets_pass_no_more_than_its_rate() -> None:
    rate, count = 2_000_000, 8
    with link(rate=rate) as running:
        source = encoder()
        running.pairs.sink_end.settimeout(10)
        began = time.monotonic()
        sent = 0
        for number in range(count):
            (fragment,) = encode(part(number, size=100_000), by=source)
            running.pairs.source_end.send(fragment)
            sent += len(fragment)
        for _ in range(count):
            running.pairs.sink_end.recv(wire.MAX_FRAGMENT)
        took = time.monotonic() - began
        assert took >= sent / rate - valve.BURST_SECONDS


def test_a_full_sink_makes_a_wait_and_loses_nothing() -> None:
    with link() as running:
        source, sent = encoder(), 0
        running.pairs.source_end.setblocking(False)
        deadline = time.monotonic() + 10
        (fragment,) = encode(part(sent, size=100_000), by=source)
        quiet = 0
        while quiet < 20 and time.monotonic() < deadline:
            try:
                running.pairs.source_end.send(fragment)
            except BlockingIOError:
                quiet += 1
                time.sleep(0.01)
                continue
            sent, quiet = sent + 1, 0
            (fragment,) = encode(part(sent, size=100_000), by=source)
        assert 4 <= sent <= 2 * SOCKET_BUFFER // 100_000 + 1, "bounded by the two sockets' buffers"
        got = [decode([bytearray(receive(running.pairs.sink_end)[0])])[0] for _ in range(sent)]
        assert [item.offset for item in got] == list(range(sent))  # type: ignore[union-attr]


def test_it_cannot_send_back_nor_read_the_other_side() -> None:
    """Its own two sockets, too, go one way only."""
    with link() as running:
        assert {"socket" in target for target in running.descriptors().values()} == {True, False}
        sockets = [target for target in running.descriptors().values() if target.startswith("socket")]
        assert len(sockets) == 2
        with pytest.raises(BrokenPipeError):
            running.pairs.valve_in.send(b"x")
        assert running.pairs.valve_out.recv(1) == b""


def test_a_hang_up_of_b_is_an_error_not_a_silence() -> None:
    with link() as running:
        running.pairs.sink_end.shutdown(socket.SHUT_RD)
        running.pairs.source_end.send(encode(end(1))[0])
        until(lambda: running.process.poll() is not None, "the valve ends")
        assert running.process.returncode == 1
