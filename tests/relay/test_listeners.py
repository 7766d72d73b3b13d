"""Listening sockets: opened where they belong, or with advice."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import time
from collections.abc import Iterator

import pytest
from aiohttp import web

from dicom.scp import Policy, serve
from relay.config import Listener
from relay.errors import MedferryError
from relay.listeners import BACKLOG, in_netns, open_listener
from relay.metrics import Metrics
from relay.web import METRICS_LIMITS, WebServer
from tests.dicom.callers import ANYONE, Acceptable, Archive
from tests.fake_lane.kit import root
from tests.peers import require


def listener(address: str, kind: str = "tcp") -> Listener:
    return Listener.model_validate({"name": "x", "address": address, "kind": kind})


@pytest.fixture
def opened() -> Iterator[list[socket.socket]]:
    sockets: list[socket.socket] = []
    yield sockets
    for sock in sockets:
        sock.close()


def backlog(sock: socket.socket) -> int:
    """Connections that may wait at a listening socket: tcp_info's ``sacked`` (net/ipv4/tcp.c)."""
    found: int = struct.unpack_from("I", sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 64), 28)[0]
    return found


async def test_as_many_may_wait_for_whoever_serves(opened: list[socket.socket]) -> None:
    """The event loop listens again on what it is given: that must not make the queue shorter."""
    with open("/proc/sys/net/core/somaxconn") as limit:
        most = min(BACKLOG, int(limit.read()))
    for _ in range(2):
        opened += open_listener(listener("127.0.0.1:0"), None)
    assert [backlog(sock) for sock in opened] == [most] * 2
    for sock in opened:
        sock.setblocking(False)
    scp = await serve([opened[0]], Archive(), Policy(ae_title="X", accept=ANYONE), Acceptable())
    web_server = WebServer("metrics", web.Application(), METRICS_LIMITS, Metrics("studies", "source"))
    await web_server.start([opened[1]])
    assert [backlog(sock) for sock in opened] == [most] * 2
    scp.close()
    await web_server.stop()


@pytest.mark.parametrize("address", ["127.0.0.1:0", "[::1]:0", "localhost:0"])
def test_tcp_listens(opened: list[socket.socket], address: str) -> None:
    opened += open_listener(listener(address), None)
    assert opened
    for sock in opened:
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) == 1
        socket.create_connection(sock.getsockname()[:2], 5).close()
        assert not os.get_inheritable(sock.fileno())


def test_udp_is_bound_with_room_for_a_burst(opened: list[socket.socket]) -> None:
    opened += open_listener(listener("127.0.0.1:0", "udp"), None)
    (sock,) = opened
    assert sock.type == socket.SOCK_DGRAM
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as fresh:
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) > fresh.getsockopt(
            socket.SOL_SOCKET, socket.SO_RCVBUF
        )


def test_an_address_that_is_taken(opened: list[socket.socket]) -> None:
    opened += open_listener(listener("127.0.0.1:0"), None)
    port = opened[0].getsockname()[1]
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(
        MedferryError, match=rf"cannot listen on 127\.0\.0\.1:{port}: Address already in use: check"
    ):
        open_listener(listener(f"127.0.0.1:{port}"), None)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("address", ["192.0.2.1:0", "no-such-host.invalid:1"])
def test_an_address_that_is_not_ours(address: str) -> None:
    with pytest.raises(MedferryError, match="cannot listen on"):
        open_listener(listener(address), None)


def test_a_namespace_that_is_not_there() -> None:
    with pytest.raises(MedferryError, match="create the namespace first: ip netns add no-such-one"):
        open_listener(listener("127.0.0.1:0"), "no-such-one")


def test_our_own_faults_come_out_of_a_namespace_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relay.listeners.enter_netns", lambda _: None)

    def fault() -> None:
        raise KeyError("ours")

    with pytest.raises(KeyError):
        in_netns("x", fault)


@pytest.mark.root
@pytest.mark.peer
@pytest.mark.skipif(not root(), reason="needs root: run the tests as root")
def test_a_socket_of_a_namespace_is_reached_there_and_only_there(opened: list[socket.socket]) -> None:
    ip = require("ip")
    name = f"medferry-test-{os.getpid()}-{time.monotonic_ns() % 10**6}"
    subprocess.run([ip, "netns", "add", name], check=True)
    try:
        subprocess.run([ip, "-n", name, "link", "set", "lo", "up"], check=True)
        opened += open_listener(listener("127.0.0.1:0"), name)
        address = opened[0].getsockname()
        in_netns(name, lambda: socket.create_connection(address, 5).close())
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address, 5)
    finally:
        subprocess.run([ip, "netns", "delete", name], check=True)
