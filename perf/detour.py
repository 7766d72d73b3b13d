"""Leads a WebRTC viewer's media through a bad network, by taking its and the relay's candidates from the SDP.

    viewer ── offer without candidates ──▶ WHEP          viewer ◀─▶ UdpProxy ◀─▶ the relay's ICE port
    viewer ◀── answer with the proxy's candidate ──┘

Each side knows only the proxy, so ICE can find no way around it: the viewer checks the proxy's address, and
the relay meets the viewer as a peer-reflexive candidate (RFC 8445 §7.3.1.3).
"""

from __future__ import annotations

import re
from contextlib import AsyncExitStack

from rtc.bench_peer import Exchange
from tests.netproxy import Impairment, UdpProxy

NOWHERE = "a=candidate:1 1 udp 1 127.0.0.1 9 typ host\r\n"
"""Instead of the viewer's candidates: an offer with none at all is refused by some."""

_candidates = re.compile(r"(?:a=candidate:[^\r\n]*\r?\n)+")
_host = re.compile(r"a=candidate:\S+ 1 udp \d+ (\d+\.\d+\.\d+\.\d+) (\d+) typ host", re.IGNORECASE)


def without_candidates(offer: str) -> str:
    """The offer with one candidate where nobody is, instead of its own."""
    return _candidates.sub(NOWHERE, offer)


def candidate(answer: str) -> tuple[str, int]:
    """The first IPv4 host candidate of an answer.

    Raises:
        RuntimeError: There is none: the relay offers no address that the proxy could reach.
    """
    found = _host.search(answer)
    if found is None:
        raise RuntimeError("the answer has no IPv4 host candidate")
    return found[1], int(found[2])


def with_candidate(answer: str, address: tuple[str, int]) -> str:
    """The answer with one candidate instead of all of its own."""
    return _candidates.sub(f"a=candidate:1 1 udp 2130706431 {address[0]} {address[1]} typ host\r\n", answer)


class Detour:
    """An `Exchange` that posts the offer and opens the proxy; `stack` closes it.

    `forward` is what the viewer sends, `back` what is sent to it.
    """

    def __init__(
        self, post: Exchange, stack: AsyncExitStack, *, forward: Impairment, back: Impairment, seed: int
    ) -> None:
        self.proxy: UdpProxy | None = None
        self._post, self._stack = post, stack
        self._forward, self._back, self._seed = forward, back, seed

    async def __call__(self, offer: str) -> str:
        answer = await self._post(without_candidates(offer))
        target = candidate(answer)
        proxy = UdpProxy(
            target=target, listen=(target[0], 0), forward=self._forward, back=self._back, seed=self._seed
        )
        self.proxy = await self._stack.enter_async_context(proxy)
        return with_candidate(answer, self.proxy.address)
