"""An HTTP server that strangers may connect to: how many, how long, and what is logged of their mistakes."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import pytest
import trustme
from aiohttp import web

from relay.metrics import Metrics
from relay.web import MEDIA_LIMITS, METRICS_LIMITS, WebLimits, WebServer

FEW = WebLimits(connections=4, idle_seconds=0.3, shutdown_seconds=0.2)

GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


async def hello(_: web.Request) -> web.Response:
    return web.Response(text="hello")


async def fault(_: web.Request) -> web.Response:
    raise KeyError("ours")


class Place:
    def __init__(self, server: WebServer, port: int, metrics: Metrics) -> None:
        self.server, self.port, self.metrics = server, port, metrics

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def ask(self, request: bytes) -> bytes:
        """All that comes until the server closes."""
        reader, writer = await self.connect()
        writer.write(request)
        async with asyncio.timeout(5):
            answer = await reader.read()
        writer.close()
        return answer


@asynccontextmanager
async def place(limits: WebLimits = FEW, tls: ssl.SSLContext | None = None) -> AsyncIterator[Place]:
    listener = socket.create_server(("127.0.0.1", 0), backlog=64)
    listener.setblocking(False)
    application = web.Application()
    application.add_routes([web.get("/", hello), web.get("/fault", fault)])
    metrics = Metrics("studies", "source")
    server = WebServer("metrics", application, limits, metrics)
    await server.start([listener], tls)
    try:
        yield Place(server, listener.getsockname()[1], metrics)
    finally:
        async with asyncio.timeout(5):
            await server.stop()
        assert server.connections == 0
        assert listener.fileno() == -1


async def test_only_so_many_connections_are_kept() -> None:
    async with place(WebLimits(connections=4, idle_seconds=60)) as here:
        held = [await here.connect() for _ in range(10)]
        ends = [asyncio.create_task(reader.read()) for reader, _ in held]
        async with asyncio.timeout(5):
            while sum(end.done() for end in ends) < 6:
                await asyncio.wait(
                    [end for end in ends if not end.done()], return_when=asyncio.FIRST_COMPLETED
                )
        assert repr(here.server) == "<WebServer metrics connections=4 refused=6>"
        figures = here.metrics.exposition().decode()
        assert 'medferry_http_connections{lane="studies",server="metrics",side="source"} 4.0' in figures
        assert "medferry_http_connections_refused_total{" in figures
        for _, writer in held:
            writer.close()
        async with asyncio.timeout(5):
            await asyncio.gather(*ends)
            while here.server.connections:
                await asyncio.sleep(0)
        assert (await here.ask(GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))).endswith(b"hello")


@pytest.mark.parametrize(
    "sent",
    [b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: x\r\nX-Slow: ", GET, GET + GET[:-2]],
    ids=["nothing", "half a line", "half the headers", "a request", "a request and a half"],
)
async def test_who_sends_no_whole_request_in_time_is_closed(sent: bytes) -> None:
    async with place() as here:
        loop = asyncio.get_running_loop()
        began = loop.time()
        answer = await here.ask(sent)
        assert loop.time() - began < 2.0
        assert answer.count(b"hello") == sent.count(GET)


async def test_bytes_that_drip_buy_no_time() -> None:
    async with place() as here:
        reader, writer = await here.connect()
        ended = asyncio.create_task(reader.read())
        writer.write(b"GET / HTTP/1.1\r\n")
        loop = asyncio.get_running_loop()
        began = loop.time()
        while not ended.done():
            assert loop.time() - began < 2.0
            writer.write(b"X-Slow: y\r\n")
            await asyncio.wait([ended], timeout=0.05)
        writer.close()


async def test_tls_that_is_not_begun_holds_a_place_only_for_a_while() -> None:
    authority = trustme.CA()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(context)
    async with place(tls=context) as here:
        assert await here.ask(b"") == b""
        # Plain HTTP gets at most an alert.
        assert b"HTTP" not in await here.ask(GET)
        trusting = ssl.create_default_context()
        authority.configure_trust(trusting)
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"https://localhost:{here.port}/", ssl=trusting) as response,
        ):
            assert await response.text() == "hello"


BAD = {
    "no such version": b"GET / HTTP/9.9\r\nHost: x\r\n\r\n",
    "a long line": b"GET /" + b"x" * 20_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    "a long header": b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 20_000 + b"\r\n\r\n",
    "two lengths": b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100),
    "bad after good": GET + b"nonsense\r\n\r\n",
}


@pytest.mark.parametrize("sent", BAD.values(), ids=BAD)
async def test_what_is_no_http_is_answered_and_counted_and_not_traced(
    sent: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with place() as here:
        assert b"HTTP/1.0 400 " in await here.ask(sent)
        assert 'medferry_http_malformed_total{lane="studies"' in here.metrics.exposition().decode()
    assert not [record for record in caplog.records if record.levelno >= logging.INFO]


async def test_our_own_fault_is_still_told_with_its_trace(caplog: pytest.LogCaptureFixture) -> None:
    async with place() as here:
        assert b" 500 " in await here.ask(GET.replace(b"GET / ", b"GET /fault "))
    assert any(record.exc_info and record.exc_info[0] is KeyError for record in caplog.records)


async def test_no_descriptor_left_is_said_and_passes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("relay.web.PAUSE_SECONDS", 0.05)
    async with place() as here:
        real, failures = socket.socket.accept, [OSError(24, "Too many open files")]

        def accept(self: socket.socket) -> tuple[socket.socket, object]:
            if failures:
                raise failures.pop()
            return real(self)

        monkeypatch.setattr(socket.socket, "accept", accept)
        assert (await here.ask(GET)).endswith(b"hello")
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == [
        "metrics: no connection can be accepted: Too many open files"
    ]


async def test_a_request_under_way_is_answered_before_the_end() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)
    begun, go = asyncio.Event(), asyncio.Event()

    async def slow(_: web.Request) -> web.Response:
        begun.set()
        await go.wait()
        return web.Response(text="late")

    application = web.Application()
    application.add_routes([web.get("/", slow)])
    server = WebServer(
        "metrics", application, WebLimits(connections=4, idle_seconds=5), Metrics("a", "source")
    )
    await server.start([listener])
    reader, writer = await asyncio.open_connection(*listener.getsockname())
    writer.write(GET)
    await begun.wait()
    stopping = asyncio.create_task(server.stop())
    go.set()
    async with asyncio.timeout(5):
        await stopping
        assert (await reader.read()).endswith(b"late")
    writer.close()


def test_the_limits_leave_the_worker_most_of_its_descriptors() -> None:
    assert METRICS_LIMITS.connections + MEDIA_LIMITS.connections < 4096 // 8
    assert METRICS_LIMITS.idle_seconds <= MEDIA_LIMITS.idle_seconds <= 10
