"""A bad network for UDP, in user space: drops, bursts, delay, jitter, reordering, duplicates, a rate limit.

    async with UdpProxy(target=("127.0.0.1", 5004), forward=Impairment(drop=0.01), seed=7) as proxy:
        ...send to proxy.address...

`Impairer` decides (pure, seeded, the clock passed in); `UdpProxy` carries the datagrams. What comes back from
the target returns to the client it belongs to, so that ICE, DTLS and RTCP work through it. It runs in a
process of its own as ``python -m tests.netproxy --target HOST:PORT --drop 0.01``, which prints its address.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import socket
from dataclasses import dataclass, fields
from types import TracebackType
from typing import Self

MAX_CLIENTS = 64
"""Client addresses of one proxy; datagrams of more are dropped and counted as `strangers`."""

QUEUE_SECONDS = 0.25
"""What the rate limit's queue holds; beyond it the tail is dropped, as a router does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Impairment:
    """One direction of a bad network. Probabilities are per datagram, 0 to 1; times are seconds."""

    drop: float = 0.0
    burst: float = 0.0
    """Probability that a run of losses begins here."""
    burst_length: int = 8
    """Datagrams lost in one run."""
    delay: float = 0.0
    jitter: float = 0.0
    """Added delay is uniform from 0 to this; order is kept unless `reorder` says otherwise."""
    reorder: float = 0.0
    """Probability that a datagram is held `reorder_hold` longer, so that later ones pass it."""
    reorder_hold: float = 0.01
    duplicate: float = 0.0
    rate: float = 0.0
    """Bits a second, 0 for no limit."""


@dataclass(slots=True)
class Counters:
    """What happened to the datagrams of one direction."""

    received: int = 0
    forwarded: int = 0
    dropped: int = 0
    overflowed: int = 0
    reordered: int = 0
    duplicated: int = 0
    strangers: int = 0


class Impairer:
    """Decides when each datagram of one direction leaves, if at all. Same seed, same fate."""

    def __init__(self, impairment: Impairment, seed: int = 0) -> None:
        self.impairment = impairment
        self.counters = Counters()
        self._random = random.Random(seed)
        self._in_burst = 0
        self._link_free = 0.0
        self._last_departure = 0.0

    def departures(self, now: float, size: int) -> list[float]:
        """When copies of a datagram of `size` bytes leave that arrived at `now`; empty where it is lost."""
        rule, counters = self.impairment, self.counters
        counters.received += 1
        # Every datagram draws the same numbers whatever the rule, so one knob does not move another's luck.
        drop, burst, jitter, reorder, duplicate = (self._random.random() for _ in range(5))
        if self._in_burst:
            self._in_burst -= 1
            counters.dropped += 1
            return []
        if burst < rule.burst:
            self._in_burst = rule.burst_length - 1
            counters.dropped += 1
            return []
        if drop < rule.drop:
            counters.dropped += 1
            return []
        leaves = now
        if rule.rate:
            start = max(now, self._link_free)
            if start - now > QUEUE_SECONDS:
                counters.overflowed += 1
                return []
            leaves = self._link_free = start + size * 8 / rule.rate
        leaves = max(leaves + rule.delay + jitter * rule.jitter, self._last_departure)
        if reorder < rule.reorder:
            counters.reordered += 1
            leaves += rule.reorder_hold
        else:
            self._last_departure = leaves
        copies = 2 if duplicate < rule.duplicate else 1
        counters.duplicated += copies - 1
        counters.forwarded += 1
        return [leaves] * copies


class _Return(asyncio.DatagramProtocol):
    """The proxy's socket towards the target for one client."""

    def __init__(self, proxy: UdpProxy, client: tuple[str, int]) -> None:
        self._proxy = proxy
        self._client = client

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        del addr
        self._proxy.returned(data, self._client)

    def error_received(self, exc: Exception) -> None:
        """A target that is not there yet: the datagram is lost, as on any network."""


class UdpProxy(asyncio.DatagramProtocol):
    """Carries datagrams between clients and one target, badly. An asynchronous context manager.

    `forward` and `back` may be replaced while it runs (`impair`). Counters are in `sent` (client to target)
    and `answered` (target to client).
    """

    def __init__(
        self,
        *,
        target: tuple[str, int],
        forward: Impairment | None = None,
        back: Impairment | None = None,
        listen: tuple[str, int] | None = None,
        seed: int = 0,
    ) -> None:
        self._target = target
        self._listen = listen or ("::1" if ":" in target[0] else "127.0.0.1", 0)
        self._seed = seed
        self._forward = Impairer(forward or Impairment(), seed)
        self._back = Impairer(back or Impairment(), seed + 1)
        self._clients: dict[tuple[str, int], asyncio.DatagramTransport | None] = {}
        self._waiting: dict[tuple[str, int], list[bytes]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._transport: asyncio.DatagramTransport | None = None
        self._loop = asyncio.get_running_loop()

    @property
    def address(self) -> tuple[str, int]:
        """Where clients send to."""
        assert self._transport is not None
        host, port = self._transport.get_extra_info("sockname")[:2]
        return host, port

    @property
    def sent(self) -> Counters:
        """Datagrams from clients."""
        return self._forward.counters

    @property
    def answered(self) -> Counters:
        """Datagrams from the target."""
        return self._back.counters

    @property
    def impairments(self) -> tuple[Impairment, Impairment]:
        """How datagrams are treated now: from clients, and from the target."""
        return self._forward.impairment, self._back.impairment

    def impair(self, forward: Impairment | None = None, back: Impairment | None = None) -> None:
        """From now on treat datagrams so; a direction that is not given stays as it is."""
        self._forward.impairment = forward or self._forward.impairment
        self._back.impairment = back or self._back.impairment

    async def __aenter__(self) -> Self:
        transport, _ = await self._loop.create_datagram_endpoint(lambda: self, local_addr=self._listen)
        _enlarge(transport)
        self._transport = transport
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._transport is not None
        self._transport.close()
        await asyncio.gather(*self._tasks)
        for transport in self._clients.values():
            if transport is not None:
                transport.close()

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        if addr not in self._clients:
            if len(self._clients) >= MAX_CLIENTS:
                self.sent.strangers += 1
                return
            self._clients[addr] = None
            self._waiting[addr] = []
            task = self._loop.create_task(self._open(addr))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        for when in self._forward.departures(self._loop.time(), len(data)):
            self._at(when, self._to_target, data, addr)

    def returned(self, data: bytes, client: tuple[str, int]) -> None:
        """A datagram came back from the target for `client`."""
        for when in self._back.departures(self._loop.time(), len(data)):
            self._at(when, self._to_client, data, client)

    def error_received(self, exc: Exception) -> None:
        """A client that is gone: its datagrams are lost, as on any network."""

    async def _open(self, client: tuple[str, int]) -> None:
        transport, _ = await self._loop.create_datagram_endpoint(
            lambda: _Return(self, client), remote_addr=self._target
        )
        _enlarge(transport)
        self._clients[client] = transport
        for data in self._waiting.pop(client):
            transport.sendto(data)

    def _at(self, when: float, act: object, data: bytes, client: tuple[str, int]) -> None:
        assert callable(act)
        if when <= self._loop.time():
            act(data, client)
        else:
            self._loop.call_at(when, act, data, client)

    def _to_target(self, data: bytes, client: tuple[str, int]) -> None:
        transport = self._clients[client]
        if transport is None:
            self._waiting[client].append(data)
        elif not transport.is_closing():
            transport.sendto(data)

    def _to_client(self, data: bytes, client: tuple[str, int]) -> None:
        assert self._transport is not None
        if not self._transport.is_closing():
            self._transport.sendto(data, client)


def _enlarge(transport: asyncio.DatagramTransport) -> None:
    """Room for a keyframe in one burst: the proxy must lose only what it was asked to lose."""
    sock = transport.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 22)


async def _serve(target: tuple[str, int], impairment: Impairment, seed: int) -> None:
    async with UdpProxy(target=target, forward=impairment, seed=seed) as proxy:
        print("{}:{}".format(*proxy.address), flush=True)
        await asyncio.Event().wait()


def main() -> None:
    """Entry of ``python -m tests.netproxy``; runs until it is killed."""
    parser = argparse.ArgumentParser(prog="python -m tests.netproxy")
    parser.add_argument("--target", required=True, help="HOST:PORT")
    parser.add_argument("--seed", type=int, default=0)
    for field in fields(Impairment):
        parser.add_argument(
            f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default
        )
    options = vars(parser.parse_args())
    host, _, port = options.pop("target").rpartition(":")
    seed = options.pop("seed")
    asyncio.run(_serve((host.strip("[]"), int(port)), Impairment(**options), seed))


if __name__ == "__main__":
    main()
