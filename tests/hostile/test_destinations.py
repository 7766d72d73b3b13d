"""Destinations that misbehave: whatever they do, the requestor names it in time and is not kept waiting."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dicom import dimse, scu
from relay.errors import PeerError
from tests.dicom.associations import (
    CT,
    EXPLICIT,
    IMPLICIT,
    INSTANCE,
    JPEG,
    RELEASE_RP,
    RELEASE_RQ,
    VERIFICATION,
    abort,
    accept,
    command_set,
    data_pdu,
    pdv,
    rejection,
    u16,
    uid,
)
from tests.dicom.callers import Caller, serving, until
from tests.peers import free_port

CONTEXTS = [(VERIFICATION, IMPLICIT), (CT, EXPLICIT), (CT, JPEG)]
ACCEPT = accept([(1, 0, IMPLICIT), (3, 0, EXPLICIT), (5, 4, JPEG)])
Script = Callable[[Caller], Awaitable[None]]


async def associate(port: int, **options: Any) -> scu.Requestor:
    given = {"association_seconds": 2.0, "progress_seconds": 2.0, "contexts": CONTEXTS, **options}
    return await scu.associate("127.0.0.1", port, calling_ae_title="US", called_ae_title="MEDFERRY", **given)


@contextlib.asynccontextmanager
async def acceptor(script: Script) -> AsyncIterator[int]:
    """A port at which `script` answers each connection."""
    scripts: list[asyncio.Task[None]] = []

    async def run(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        caller = Caller(reader, writer)
        try:
            await script(caller)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the requestor went, as it may
        finally:
            await caller.close()

    def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        scripts.append(asyncio.create_task(run(reader, writer)))

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for each in scripts:
            each.cancel()
        await asyncio.gather(*scripts, return_exceptions=True)


async def accepting(caller: Caller, answer: bytes = ACCEPT) -> None:
    kind, _ = await caller.pdu()
    assert kind == 1
    caller.send(answer)


async def message(caller: Caller) -> tuple[dimse.Command, bytes]:
    """A command and its data set."""
    data = {True: bytearray(), False: bytearray()}
    is_command = True
    while True:
        kind, body = await caller.pdu()
        assert kind == 4
        is_command = bool(body[5] & 1)
        assert struct.unpack(">L", body[:4])[0] == len(body) - 4
        data[is_command] += body[6:]
        if body[5] & 2 and (not is_command or not dimse.parse(bytes(data[True])).has_data_set):
            return dimse.parse(bytes(data[True])), bytes(data[False])


def response(request: dimse.Command, status: int = 0, **changes: int) -> bytes:
    elements = {
        0x0002: uid(request.sop_class),
        0x0100: u16(changes.get("field", request.field | 0x8000)),
        0x0120: u16(changes.get("message_id", request.message_id)),
        0x0800: u16(0x0101),
        0x0900: u16(status),
    }
    return data_pdu(pdv(changes.get("context_id", 3), 3, command_set(*elements.items())))


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Callable[[int], int]]:
    """A descriptor of a file: ten bytes that are not data set, then so many that are."""
    opened: list[int] = []

    def make(size: int) -> int:
        path = tmp_path / f"{len(opened)}"
        path.write_bytes(b"not these!" + contents(size))
        opened.append(os.open(path, os.O_RDONLY))
        return opened[-1]

    yield make
    for fd in opened:
        os.close(fd)


def contents(size: int) -> bytes:
    return (b"0123456789abcdef" * (size // 16 + 1))[:size]


async def store(requestor: scu.Requestor, fd: int, size: int, **changes: Any) -> int:
    given = {"sop_class": CT, "sop_instance": INSTANCE, "transfer_syntax": EXPLICIT, **changes}
    return await requestor.store(fd=fd, offset=10, size=size, **given)


@pytest.mark.parametrize("size", [1, 16378, 16379, 2 * 16378, 500_000, 3_000_000])
@pytest.mark.parametrize("max_pdu", [4096, 16384, 131072])
async def test_an_object_arrives_whole(size: int, max_pdu: int, file: Callable[[int], int]) -> None:
    async with serving(max_pdu=max_pdu) as station:
        requestor = await associate(station.port)
        assert await store(requestor, file(size), size) == 0
        assert await store(requestor, file(7), 7) == 0
        assert station.archive.stored() == [contents(size), contents(7)]
        request = station.archive.objects[0].request
        assert (request.sop_class, request.sop_instance, request.transfer_syntax) == (CT, INSTANCE, EXPLICIT)
        assert request.peer.calling_ae_title == "US"
        await requestor.release()
        await until(lambda: station.server.stats()["released"] == 1)


@pytest.mark.parametrize("max_length", [0, 16, 17, 100, 16384, 2**32 - 1])
async def test_no_pdu_is_longer_than_the_peer_takes(max_length: int, file: Callable[[int], int]) -> None:
    longest = 0

    async def script(caller: Caller) -> None:
        nonlocal longest
        await accepting(caller, accept([(3, 0, EXPLICIT)], max_length=max_length))
        data = b""
        while True:
            _, body = await caller.pdu()
            longest = max(longest, len(body))
            data += body[6:] if not body[5] & 1 else b""
            if body[5] & 3 == 2:
                break
        assert data == contents(5000)
        caller.send(response(dimse.Command(1, 1, True, CT), 0))
        await caller.closed()

    async with acceptor(script) as port:
        requestor = await associate(port)
        assert await store(requestor, file(5000), 5000) == 0
        requestor.abort()
    assert longest <= (max_length or 2**32)
    # Fragments are even (PS3.8 §E.1), so an odd limit is not reached.
    assert longest == (max_length & ~1 if 16 <= max_length <= 5000 else 5006)


async def test_statuses_come_back_and_the_association_serves_on(file: Callable[[int], int]) -> None:
    async with serving() as station:
        requestor = await associate(station.port)
        for status in (0, 0xA700, 0xC001, 0xB000):
            station.archive.status = status
            assert await store(requestor, file(100), 100) == status
        assert await requestor.echo() == 0
        assert not requestor.ended
        await requestor.release()
        assert requestor.ended


async def test_contexts_are_accepted_or_refused_by_name() -> None:
    async with acceptor(accepting) as port:
        requestor = await associate(port)
        assert [requestor.accepts(each) for each in CONTEXTS] == [True, True, False]
        assert requestor.refusal(CONTEXTS[2]) == "transfer-syntax-not-accepted"
        assert requestor.proposed(CONTEXTS[2]) and not requestor.proposed((CT, IMPLICIT))
        requestor.abort()


# ---- there is no association -------------------------------------------------------------------------------


def answering(answer: bytes) -> Script:
    async def script(caller: Caller) -> None:
        await accepting(caller, answer)

    return script


async def silent(caller: Caller) -> None:
    await caller.closed()


REFUSALS: dict[str, tuple[Script, str]] = {
    "rejected for good": (answering(rejection(1, 1, 7)), "rejected"),
    "rejected for now": (answering(rejection(2, 3, 2)), "rejected-transient"),
    "aborted": (answering(abort(2, 0)), "aborted"),
    "closed": (answering(b""), "aborted"),
    "silent": (silent, "timeout"),
    "half an answer": (lambda caller: half(caller), "timeout"),
    "HTTP": (answering(b"HTTP/1.1 400 Bad Request\r\n\r\n"), "aborted"),
    "4 GiB": (answering(b"\x02\0\xff\xff\xff\xff"), "aborted"),
    "a release": (answering(RELEASE_RQ), "aborted"),
    "another transfer syntax": (answering(accept([(3, 0, IMPLICIT)])), "aborted"),
}


async def half(caller: Caller) -> None:
    await accepting(caller, ACCEPT[:50])
    await caller.closed()


@pytest.mark.parametrize("name", REFUSALS)
async def test_an_association_that_does_not_come_about_says_why(name: str) -> None:
    script, reason = REFUSALS[name]
    async with acceptor(script) as port:
        with pytest.raises(PeerError) as caught:
            await associate(port, association_seconds=0.3)
        assert caught.value.reason == reason
        assert "MEDFERRY at 127.0.0.1" in str(caught.value)


async def test_nobody_there() -> None:
    with pytest.raises(PeerError) as caught:
        await associate(free_port())
    assert caught.value.reason == "unreachable"


async def test_nobody_answers_the_connection() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        port = full.getsockname()[1]
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.1", port))
        with pytest.raises(PeerError) as caught:
            await associate(port, association_seconds=0.2)
        assert caught.value.reason == "timeout"
        for filler in fillers:
            filler.close()


async def test_a_name_that_nobody_has() -> None:
    with pytest.raises(PeerError) as caught:
        await scu.associate(
            "no-such-host.invalid", 104, calling_ae_title="US", called_ae_title="X", contexts=CONTEXTS
        )
    assert caught.value.reason == "unreachable"


# ---- peers that fail in the middle -------------------------------------------------------------------------

BIG = 12_000_000


async def after_command(caller: Caller) -> None:
    await accepting(caller)
    await caller.pdu()


async def abort_at_once(caller: Caller) -> None:
    await after_command(caller)
    caller.send(abort(0, 0))


async def close_at_once(caller: Caller) -> None:
    await after_command(caller)


async def crash_at_once(caller: Caller) -> None:
    await after_command(caller)
    caller.reset()


async def stop_reading(caller: Caller) -> None:
    await after_command(caller)
    caller.writer.transport.pause_reading()  # type: ignore[attr-defined]
    await asyncio.sleep(5)


async def read_and_say_nothing(caller: Caller) -> None:
    await accepting(caller)
    await caller.closed()


async def half_a_response(caller: Caller) -> None:
    await accepting(caller)
    command, _ = await message(caller)
    caller.send(response(command)[:20])
    await caller.closed()


async def noise(caller: Caller) -> None:
    await after_command(caller)
    caller.send(b"\xff" * 100)


async def other_message(caller: Caller) -> None:
    await accepting(caller)
    command, _ = await message(caller)
    caller.send(response(command, message_id=999))
    await caller.closed()


async def other_operation(caller: Caller) -> None:
    await accepting(caller)
    command, _ = await message(caller)
    caller.send(response(command, field=0x8030))
    await caller.closed()


async def release_instead(caller: Caller) -> None:
    await accepting(caller)
    await message(caller)
    caller.send(RELEASE_RQ)
    await caller.closed()


MIDDLES: dict[str, tuple[Script, set[str]]] = {
    "aborts": (abort_at_once, {"aborted"}),
    "closes": (close_at_once, {"aborted"}),
    "crashes": (crash_at_once, {"aborted"}),
    "takes no bytes": (stop_reading, {"timeout"}),
    "says nothing": (read_and_say_nothing, {"timeout"}),
    "says half": (half_a_response, {"timeout"}),
    "makes noise": (noise, {"aborted"}),
    "answers another message": (other_message, {"protocol"}),
    "answers another operation": (other_operation, {"protocol"}),
    "releases": (release_instead, {"released"}),
}


@pytest.mark.parametrize("name", MIDDLES)
async def test_a_peer_that_fails_in_the_middle_is_left(name: str, file: Callable[[int], int]) -> None:
    script, reasons = MIDDLES[name]
    async with acceptor(script) as port:
        requestor = await associate(port, progress_seconds=0.3)
        fd = file(BIG)
        async with asyncio.timeout(3):
            with pytest.raises(PeerError) as caught:
                await store(requestor, fd, BIG)
        assert caught.value.reason in reasons
        assert requestor.ended
        with pytest.raises(PeerError):
            await store(requestor, fd, BIG)
        async with asyncio.timeout(1):
            await requestor.release()
        requestor.abort()


async def test_a_peer_that_answers_early_and_reads_on_is_believed(file: Callable[[int], int]) -> None:
    async def script(caller: Caller) -> None:
        await accepting(caller)
        _, body = await caller.pdu()
        caller.send(response(dimse.parse(body[6:]), 0xA700))
        await caller.closed()

    async with acceptor(script) as port:
        requestor = await associate(port)
        assert await store(requestor, file(BIG), BIG) == 0xA700
        requestor.abort()


async def test_a_file_that_is_too_short_aborts_and_says_so(file: Callable[[int], int]) -> None:
    async with serving() as station:
        requestor = await associate(station.port)
        with pytest.raises(OSError, match="ends"):
            await store(requestor, file(100), 200)
        assert requestor.ended
        assert station.archive.stored() == []


async def test_a_cancelled_store_aborts(file: Callable[[int], int]) -> None:
    async with acceptor(read_and_say_nothing) as port:
        requestor = await associate(port)
        task = asyncio.create_task(store(requestor, file(100), 100))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert requestor.ended


async def test_memory_does_not_grow_with_the_object() -> None:
    size = 64 << 20
    fd = os.memfd_create("big")
    try:
        os.ftruncate(fd, size + 10)
        async with serving() as station:
            station.archive.refuse_with = 0xA700
            requestor = await associate(station.port)
            assert await store(requestor, fd, 4 << 20) == 0xA700
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            assert await store(requestor, fd, size) == 0xA700
            assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 8_000
            await requestor.release()
    finally:
        os.close(fd)


# ---- ends --------------------------------------------------------------------------------------------------


async def test_a_release_that_is_not_answered_ends_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scu, "RELEASE_SECONDS", 0.1)
    async with acceptor(read_and_say_nothing) as port:
        requestor = await associate(port)
        async with asyncio.timeout(1):
            await requestor.release()
        assert requestor.ended


async def test_a_release_that_meets_the_peers_own_ends_in_order() -> None:
    async def script(caller: Caller) -> None:
        await accepting(caller)
        assert await caller.whole() == RELEASE_RQ
        caller.send(RELEASE_RQ)
        assert await caller.whole() == RELEASE_RP
        caller.send(RELEASE_RP)
        await caller.closed()

    async with acceptor(script) as port:
        requestor = await associate(port)
        await requestor.release()
        assert requestor.ended


async def test_an_abort_is_said() -> None:
    heard: list[bytes] = []

    async def script(caller: Caller) -> None:
        await accepting(caller)
        heard.append(await caller.whole())

    async with acceptor(script) as port:
        requestor = await associate(port)
        requestor.abort()
        await until(lambda: heard)
    assert heard == [abort(0, 0)]


async def test_what_makes_no_sense_is_answered_with_an_abort() -> None:
    heard: list[bytes] = []

    async def script(caller: Caller) -> None:
        await accepting(caller)
        caller.send(b"\xff" * 100)
        heard.append(await caller.whole())

    async with acceptor(script) as port:
        requestor = await associate(port)
        await until(lambda: heard)
        assert requestor.ended
    assert heard == [abort(2, 1)]


async def test_repr_tells_the_state() -> None:
    async with acceptor(accepting) as port:
        requestor = await associate(port)
        requestor.abort()
        assert repr(requestor) == f"<Requestor MEDFERRY at 127.0.0.1:{port} closed>"
