"""Our storage SCU against peers that are not ours: DCMTK, pynetdicom, and bare sockets that misbehave."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import socket
import struct
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from dicom.negotiation import VERIFICATION
from dicom.scu import Requestor, associate
from relay.errors import PeerError
from tests.archive import Archive, Made, made
from tests.dicom.datasets import CT, EXPLICIT, IMPLICIT, element, names
from tests.interop.dicom_peers import storescp
from tests.peers import free_port, require

SECONDS = 1.0
"""What a peer is given here before it counts as silent."""


@contextlib.contextmanager
def file_of(obj: Made) -> Iterator[tuple[int, int, int]]:
    """Descriptor, offset and size of the data set in a file that has a head before it."""
    with tempfile.TemporaryFile() as file:
        file.write(b"some head" + obj.data + b"and a tail")
        file.flush()
        yield file.fileno(), 9, len(obj.data)


async def store(requestor: Requestor, obj: Made) -> int:
    with file_of(obj) as (fd, offset, size):
        return await requestor.store(
            sop_class=obj.sop_class,
            sop_instance=obj.uid,
            transfer_syntax=obj.syntax,
            fd=fd,
            offset=offset,
            size=size,
        )


@contextlib.asynccontextmanager
async def to(port: int, *contexts: tuple[str, str], seconds: float = SECONDS) -> AsyncIterator[Requestor]:
    requestor = await associate(
        "127.0.0.1",
        port,
        calling_ae_title="MEDFERRY",
        called_ae_title="PACS",
        contexts=contexts or [(CT, EXPLICIT)],
        association_seconds=5 if seconds == SECONDS else seconds,
        progress_seconds=seconds,
    )
    try:
        yield requestor
    finally:
        requestor.abort()


async def failure(port: int, seconds: float = SECONDS, obj: Made | None = None) -> str:
    """The reason of the PeerError that ends an attempt to store."""
    with pytest.raises(PeerError) as raised:
        async with to(port, seconds=seconds) as requestor:
            await store(requestor, obj or made(1, 500_000))
    return raised.value.reason


# ---- peers that behave ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 2, 16_374, 16_376, 16_378, 524_288, 1_500_000])
async def test_a_data_set_arrives_byte_for_byte(size: int) -> None:
    obj = made(1, size)
    with Archive() as pacs:
        async with to(pacs.port) as requestor:
            assert await store(requestor, obj) == 0x0000
            await requestor.release()
            assert requestor.ended
        assert pacs.received == {obj.uid: [obj.sha256]}
        assert [each.calling for each in pacs.arrivals] == ["MEDFERRY"]


@pytest.mark.peer
@pytest.mark.parametrize("max_pdu", ["4096", "16384", "131072"])
async def test_dcmtk_gets_what_it_asked_for(tmp_path: Path, max_pdu: str) -> None:
    require("storescp")
    objects = [made(number, 100_000) for number in range(3)]
    options = ("--max-pdu", max_pdu, "--bit-preserving")
    with storescp(tmp_path, options=options) as pacs:
        async with to(pacs.port, (CT, EXPLICIT), (VERIFICATION, IMPLICIT)) as requestor:
            assert await requestor.echo() == 0x0000
            for obj in objects:
                assert await store(requestor, obj) == 0x0000
            await requestor.release()
        kept = {path.name.split(".", 1)[1]: path.read_bytes() for path in pacs.directory.iterdir()}
    assert kept.keys() == {obj.uid for obj in objects}
    assert all(kept[obj.uid].endswith(obj.data) for obj in objects)


async def test_statuses_come_through_and_the_association_goes_on() -> None:
    statuses = iter((0xA700, 0xC123, 0xB000, 0x0000))
    with Archive(answer=lambda uid: next(statuses)) as pacs:
        async with to(pacs.port) as requestor:
            assert [await store(requestor, made(n)) for n in range(4)] == [0xA700, 0xC123, 0xB000, 0x0000]
        assert pacs.associations == 1


async def test_which_contexts_were_accepted_is_known_with_the_reason() -> None:
    mr = "1.2.840.10008.5.1.4.1.1.4"
    private = "1.2.3.4"
    with Archive(syntaxes=[IMPLICIT]) as pacs:
        async with to(pacs.port, (CT, IMPLICIT), (CT, EXPLICIT), (mr, IMPLICIT), (private, IMPLICIT)) as r:
            assert r.accepts((CT, IMPLICIT)) and r.accepts((mr, IMPLICIT))
            assert not r.accepts((CT, EXPLICIT)) and not r.accepts((private, IMPLICIT))
            assert r.proposed((CT, EXPLICIT)) and not r.proposed((mr, EXPLICIT))
            assert r.refusal((CT, EXPLICIT)) == "transfer-syntax-not-accepted"
            assert r.refusal((private, IMPLICIT)) == "sop-class-not-accepted"


async def test_as_many_contexts_as_there_can_be() -> None:
    contexts = [(CT, EXPLICIT), *((f"1.2.3.{number}", EXPLICIT) for number in range(127))]
    with Archive() as pacs:
        async with to(pacs.port, *contexts) as requestor:
            assert requestor.accepts((CT, EXPLICIT))
            assert await store(requestor, made(1)) == 0x0000


# ---- peers that do not ----------------------------------------------------------------------------------


async def test_nobody_listens() -> None:
    port = free_port()
    with pytest.raises(PeerError) as raised:
        async with to(port):
            pass
    assert raised.value.reason == "unreachable"
    assert str(raised.value) == f"PACS at 127.0.0.1:{port} cannot be reached: Connection refused"


@pytest.mark.peer
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--refuse",), "rejected"),
        (("--abort-during",), "aborted"),
        (("--abort-after",), "aborted"),
        (("--sleep-during", "4"), "timeout"),
    ],
)
async def test_dcmtk_as_a_bad_peer(tmp_path: Path, options: tuple[str, ...], reason: str) -> None:
    require("storescp")
    with storescp(tmp_path, options=options) as pacs:
        assert await failure(pacs.port) == reason


class Bare:
    """A listener that does with one connection what a function says, on a thread."""

    def __init__(self, act: Any) -> None:
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._server.getsockname()[1]
        self._act = act
        self.done = threading.Event()
        self._thread = threading.Thread(target=self._serve)

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            peer, _ = self._server.accept()
            with peer:
                self._act(peer, self.done)

    def __enter__(self) -> Bare:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self._server.close()
        self._thread.join()


def _acceptance(max_length: int = 16384) -> bytes:
    """An A-ASSOCIATE-AC that accepts context 1 in explicit VR little endian."""

    def item(kind: int, value: bytes) -> bytes:
        return struct.pack(">BxH", kind, len(value)) + value

    context = item(0x21, b"\x01\0\0\0" + item(0x40, EXPLICIT.encode()))
    user = item(0x50, item(0x51, struct.pack(">I", max_length)) + item(0x52, b"1.2.3"))
    body = struct.pack(">Hxx", 1) + b"PACS".ljust(16) + b"MEDFERRY".ljust(16) + bytes(32)
    body += item(0x10, b"1.2.840.10008.3.1.1.1") + context + user
    return struct.pack(">BxI", 2, len(body)) + body


def _silent(peer: socket.socket, done: threading.Event) -> None:
    done.wait()


def _closes(peer: socket.socket, done: threading.Event) -> None:
    peer.recv(100_000)


def _rubbish(peer: socket.socket, done: threading.Event) -> None:
    peer.recv(100_000)
    peer.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    done.wait()


def _endless(peer: socket.socket, done: threading.Event) -> None:
    peer.recv(100_000)
    peer.sendall(b"\x02\0\xff\xff\xff\xff")
    done.wait()


def _takes_nothing(peer: socket.socket, done: threading.Event) -> None:
    peer.recv(100_000)
    peer.sendall(_acceptance())
    done.wait()


def _closes_in_the_middle(peer: socket.socket, done: threading.Event) -> None:
    peer.recv(100_000)
    peer.sendall(_acceptance())
    peer.recv(50_000)


def _releases_in_the_middle(peer: socket.socket, done: threading.Event) -> None:
    peer.recv(100_000)
    peer.sendall(_acceptance())
    peer.sendall(b"\x05\0\0\0\0\x04\0\0\0\0")
    while not done.is_set() and peer.recv(100_000):
        pass


def _answers_another(peer: socket.socket, done: threading.Event) -> None:
    peer.recv(100_000)
    peer.sendall(_acceptance())

    def value(tag: int, content: bytes) -> bytes:
        return struct.pack("<HHI", 0, tag, len(content)) + content

    body = value(2, CT.encode() + b"\0") + value(0x100, b"\x01\x80") + value(0x120, b"\x63\x00")
    body += value(0x800, b"\x01\x01") + value(0x900, b"\0\0")
    body = value(0, struct.pack("<I", len(body))) + body
    peer.recv(100_000)
    peer.sendall(struct.pack(">BxIIBB", 4, len(body) + 6, len(body) + 2, 1, 3) + body)
    while not done.is_set() and peer.recv(100_000):
        pass


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        (_silent, "timeout"),
        (_closes, "aborted"),
        (_rubbish, "aborted"),
        (_endless, "aborted"),
        (_takes_nothing, "timeout"),
        (_closes_in_the_middle, "aborted"),
        (_releases_in_the_middle, "released"),
        (_answers_another, "protocol"),
    ],
)
async def test_a_bare_peer_that_misbehaves(act: Any, reason: str) -> None:
    """The object is larger than what the sockets' buffers hold."""
    with Bare(act) as peer:
        assert await failure(peer.port, 0.4, made(1, 8_000_000)) == reason


@pytest.mark.parametrize("max_length", [0, 7, 17, 64, 16385, 2**32 - 1])
async def test_a_pdu_limit_at_its_ends(max_length: int) -> None:
    """PDUs keep what the peer announced, and are even; without room for data it ends."""
    lengths: list[int] = []

    def act(peer: socket.socket, done: threading.Event) -> None:
        peer.recv(100_000)
        peer.sendall(_acceptance(max_length))
        peer.settimeout(0.3)
        received = b""
        with contextlib.suppress(TimeoutError):
            while piece := peer.recv(1 << 20):
                received += piece
        at = 0
        while at + 6 <= len(received):
            kind, length = struct.unpack_from(">BxI", received, at)
            if kind == 4:
                lengths.append(length)
            at += 6 + length

    with Bare(act) as peer, contextlib.suppress(PeerError):
        async with to(peer.port, seconds=0.6) as requestor:
            await store(requestor, made(1, 3000))
    assert lengths or max_length == 7
    assert all(length % 2 == 0 for length in lengths)
    if max_length > 7:
        assert max(lengths) <= max_length


async def test_a_file_that_is_shorter_than_said_aborts_the_association() -> None:
    with Archive() as pacs:
        async with to(pacs.port) as requestor:
            with tempfile.TemporaryFile() as file, pytest.raises(OSError, match="early"):
                await requestor.store(
                    sop_class=CT,
                    sop_instance="1.2.3",
                    transfer_syntax=EXPLICIT,
                    fd=file.fileno(),
                    offset=0,
                    size=1000,
                )
            assert requestor.ended
        assert pacs.received == {}


async def test_cancelling_aborts_and_leaves_nothing_open() -> None:
    before = len(os.listdir("/proc/self/fd"))
    with Bare(_takes_nothing) as peer:
        async with to(peer.port, seconds=30) as requestor:
            task = asyncio.create_task(store(requestor, made(1, 8_000_000)))
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert requestor.ended
    assert len(os.listdir("/proc/self/fd")) <= before


async def test_an_ended_association_is_not_used_again() -> None:
    with Archive() as pacs:
        async with to(pacs.port) as requestor:
            await requestor.release()
            with pytest.raises(PeerError):
                await store(requestor, made(1))
            await requestor.release()
            requestor.abort()


@pytest.mark.slow
@pytest.mark.peer
@pytest.mark.timeout(300)
async def test_two_gigabytes_are_never_in_memory(tmp_path: Path) -> None:
    require("storescp")
    start = names(instance="2.25.1")
    size = 2_000_000_000
    pixels = element(0x7FE00010, "OW", b"")[:-4] + struct.pack("<I", size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with storescp(tmp_path, options=("--ignore",)) as pacs, tempfile.TemporaryFile() as file:
        file.write(start + pixels)
        file.truncate(len(start + pixels) + size)
        file.flush()
        async with to(pacs.port, seconds=60) as requestor:
            status = await requestor.store(
                sop_class=CT,
                sop_instance="2.25.1",
                transfer_syntax=EXPLICIT,
                fd=file.fileno(),
                offset=0,
                size=len(start + pixels) + size,
            )
            assert status == 0x0000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 16 * 1024
