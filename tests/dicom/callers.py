"""A storage SCP under test, and callers that say to it whatever a test wants, byte by byte."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from dicom import dimse, scp
from dicom.dimse import Command
from dicom.scp import AcceptRule, Peer, Policy, Rejection, Server, StoreRequest
from tests.dicom.associations import CT, MR, RELEASE_RQ, request, store_message

ANYONE = (AcceptRule("*", ("127.0.0.0/8", "::1/128")),)
SECONDS = 5.0
"""What no answer in these tests takes."""


class Acceptable:
    """CT and MR, in any transfer syntax of the standard."""

    def abstract_syntax(self, uid: str) -> bool:
        return uid in (CT, MR)

    def transfer_syntax(self, uid: str) -> bool:
        return uid.startswith("1.2.840.10008.1.2")


@dataclass
class Kept:
    """One object as the handler got it."""

    request: StoreRequest
    archive: Archive
    data: bytearray = field(default_factory=bytearray)
    abandoned: bool = False
    finished: bool = False

    def write(self, parts: Sequence[memoryview]) -> None:
        self.archive.writes += 1
        for part in parts:
            self.data += part
        if len(self.data) > self.archive.room:
            raise scp.StoreFailed(0xA700)

    async def finish(self) -> int:
        self.archive.finishing.set()
        await self.archive.may_finish.wait()
        self.finished = True
        if self.archive.broken:
            raise ZeroDivisionError
        return self.archive.status

    def abandon(self) -> None:
        self.abandoned = True
        self.archive.abandoned.set()


class Archive:
    """A handler that keeps objects in memory and does what a test tells it to."""

    def __init__(self) -> None:
        self.objects: list[Kept] = []
        self.peers: list[Peer] = []
        self.refusal: Rejection | None = None
        self.refuse_with = 0
        self.status = 0
        self.room = 1 << 30
        self.broken = False
        self.writes = 0
        self.may_finish = asyncio.Event()
        self.may_finish.set()
        self.finishing = asyncio.Event()
        self.abandoned = asyncio.Event()

    def admit(self, peer: Peer) -> Rejection | None:
        self.peers.append(peer)
        return self.refusal

    def begin(self, request: StoreRequest) -> Kept | int:
        if self.refuse_with:
            return self.refuse_with
        kept = Kept(request, self)
        self.objects.append(kept)
        return kept

    def stored(self) -> list[bytes]:
        return [bytes(each.data) for each in self.objects if each.finished]


@dataclass
class Station:
    """A running server, its handler and its port."""

    server: Server
    archive: Archive
    port: int
    host: str = "127.0.0.1"

    callers: list[Caller] = field(default_factory=list)

    async def call(self, receive_bytes: int = 0) -> Caller:
        """A connection, closed with the server at the latest; `receive_bytes` is its socket's buffer."""
        sock = socket.socket(socket.AF_INET6 if ":" in self.host else socket.AF_INET)
        sock.setblocking(False)
        if receive_bytes:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        try:
            await asyncio.get_running_loop().sock_connect(sock, (self.host, self.port))
        except OSError:
            sock.close()
            raise
        reader, writer = await asyncio.open_connection(sock=sock)
        self.callers.append(Caller(reader, writer))
        return self.callers[-1]

    async def associate(self, *args: Any, receive_bytes: int = 0, **options: Any) -> Caller:
        """A caller with an association; the rest is for `associations.request`."""
        caller = await self.call(receive_bytes)
        caller.send(request(*args, **options))
        kind, _ = await caller.pdu()
        assert kind == 2, f"PDU type {kind} instead of an A-ASSOCIATE-AC"
        return caller


class Caller:
    """A peer of the server."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def pdu(self) -> tuple[int, bytes]:
        """The next PDU's type and body."""
        async with asyncio.timeout(SECONDS):
            head = await self.reader.readexactly(6)
            return head[0], await self.reader.readexactly(int.from_bytes(head[2:], "big"))

    async def whole(self) -> bytes:
        """The next PDU with its header."""
        kind, body = await self.pdu()
        return bytes((kind, 0)) + len(body).to_bytes(4, "big") + body

    async def command(self) -> Command:
        """The next response."""
        data = b""
        while True:
            kind, body = await self.pdu()
            assert kind == 4, f"PDU type {kind} instead of a P-DATA-TF"
            data += body[6:]
            if body[5] & 2:
                return dimse.parse(data)

    async def store(self, data: bytes, **options: Any) -> int:
        """The status of a C-STORE."""
        self.send(store_message(data, **options))
        return (await self.command()).status

    async def release(self) -> None:
        self.send(RELEASE_RQ)
        kind, _ = await self.pdu()
        assert kind == 6
        await self.close()

    async def closed(self) -> bytes:
        """What else comes until the other side closes."""
        async with asyncio.timeout(SECONDS):
            try:
                return await self.reader.read()
            except ConnectionError:
                return b""

    async def close(self) -> None:
        self.writer.close()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()

    def reset(self) -> None:
        """Close as a crash does."""
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.writer.transport.abort()


def listening(host: str = "127.0.0.1") -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.create_server((host, 0), family=family)
    sock.setblocking(False)
    return sock


@contextlib.asynccontextmanager
async def serving(host: str = "127.0.0.1", **options: Any) -> AsyncIterator[Station]:
    """A server with `options` in its policy, gone when the block ends."""
    archive = Archive()
    policy = Policy(**{"ae_title": "MEDFERRY", "accept": ANYONE, **options})
    sock = listening(host)
    port = sock.getsockname()[1]
    server = await scp.serve([sock], archive, policy, Acceptable())
    station = Station(server, archive, port, host)
    try:
        yield station
    finally:
        archive.may_finish.set()
        for caller in station.callers:
            await caller.close()
        await server.drain(0.5)


async def until(condition: Any) -> None:
    """Let the loop run until `condition()` holds."""
    async with asyncio.timeout(SECONDS):
        while not condition():
            await asyncio.sleep(0.001)
