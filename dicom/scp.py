"""The storage SCP: who may associate, how many at once, and an end in good order.

    listening sockets ─▶ acceptor.py, one per connection ─▶ handler (storage.py)
                              └──── Server: limits, figures, drain ────┘

An unassociated connection is a stranger: strangers have slots of their own, short deadlines, and make room
for each other (the oldest of the address that has most goes first), so however many misbehave, the next
peer that asks properly is heard. Associations are limited in all and per address.

Never here: PDUs, files.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import Counter
from collections.abc import Sequence
from typing import Any

from dicom.acceptor import Acceptor
from dicom.associate import AssociateRequest
from dicom.association import Limits
from dicom.negotiation import Rejection
from dicom.policy import Acceptable, AcceptRule, Doorkeeper, Policy
from dicom.storage import Peer, Store, StoreFailed, StoreHandler, StoreRequest
from relay.listeners import BACKLOG

__all__ = [
    "AcceptRule",
    "Acceptable",
    "Peer",
    "Policy",
    "Rejection",
    "Server",
    "Store",
    "StoreFailed",
    "StoreHandler",
    "StoreRequest",
    "serve",
]

MAX_UNASSOCIATED = 64
"""Connections without an association yet, and as many again that are about to close."""

RECEIVE_BYTES = 256 * 1024
"""The one buffer that all associations of a server are read into, one after the other."""

log = logging.getLogger(__name__)


class Server:
    """A running storage SCP; made by `serve`."""

    def __init__(self, handler: StoreHandler, policy: Policy, acceptable: Acceptable) -> None:
        self.handler = handler
        self.policy = policy
        self.acceptable = acceptable
        self.limits = Limits(
            max_pdu=policy.max_pdu,
            request_seconds=policy.request_seconds,
            pdu_seconds=policy.pdu_seconds,
            idle_seconds=policy.idle_seconds,
        )
        self.buffer = memoryview(bytearray(RECEIVE_BYTES))
        self.draining = False
        self._ended = False
        self._doorkeeper = Doorkeeper(policy)
        self._listeners: list[asyncio.Server] = []
        self._connected: set[Acceptor] = set()
        self._unassociated: dict[Acceptor, None] = {}
        self._established: dict[Acceptor, None] = {}
        self._closing: dict[Acceptor, None] = {}
        self._per_address: Counter[str] = Counter()
        self._gone = asyncio.Event()
        self._failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.accepted = 0
        self.released = 0
        self.aborted = 0
        self.evicted = 0
        self.rejected: Counter[str] = Counter()

    def __repr__(self) -> str:
        state = "draining" if self.draining else "serving"
        return f"<Server {self.policy.ae_title} {state} associations={len(self._established)}>"

    def stats(self) -> dict[str, Any]:
        """Figures for status: what is open now, and what became of all there were."""
        return {
            "open": len(self._established),
            "unassociated": len(self._unassociated),
            "accepted": self.accepted,
            "released": self.released,
            "aborted": self.aborted,
            "evicted": self.evicted,
            "rejected": dict(self.rejected),
        }

    async def failed(self) -> None:
        """Wait until the handler raises what it should not, and raise that; forever while it does not."""
        await asyncio.shield(self._failure)

    async def drain(self, timeout: float) -> None:
        """End in good order: refuse new associations as transient, let each C-STORE under way be answered,
        then abort its association. After `timeout` seconds whatever is left is aborted."""
        self.draining = True
        try:
            async with asyncio.timeout(timeout):
                for each in list(self._established):
                    each.drain()
                while self._established:
                    self._gone.clear()
                    await self._gone.wait()
        except TimeoutError:
            log.warning(
                "%d associations did not end in %.0f s and are aborted", len(self._established), timeout
            )
        self.close()

    def close(self) -> None:
        """Stop listening and abort what is open, and what was about to be."""
        self._ended = True
        for listener in self._listeners:
            listener.close()
        for each in [*self._established, *self._unassociated, *self._closing]:
            each.end("the server stops")

    async def closed(self) -> None:
        """Wait, after `close`, until every connection is closed: by its peer, which has an A-ABORT and
        `Limits.closing_seconds` to act on it, or by us."""
        while self._connected:
            self._gone.clear()
            await self._gone.wait()

    # ---- for acceptors -----------------------------------------------------------------------------------

    def arrived(self, acceptor: Acceptor) -> None:
        """A stranger connected. Over the limit, another has to go."""
        self._connected.add(acceptor)
        if self._ended:
            acceptor.end("the server stops")
            return
        self._unassociated[acceptor] = None
        if len(self._unassociated) > MAX_UNASSOCIATED:
            crowd = Counter(each.address for each in self._unassociated)
            [(busiest, _)] = crowd.most_common(1)
            oldest = next(each for each in self._unassociated if each.address == busiest)
            self.evicted += 1
            oldest.end("others wait for the place of a connection without an association")

    def decide(self, address: str, request: AssociateRequest) -> Rejection | None:
        """Whether `request` may become an association, but for the handler's own word."""
        rejection = self._doorkeeper.decide(address, request)
        if rejection is None and self.draining:
            rejection = Rejection.BUSY
        if rejection is None and (
            len(self._established) >= self.policy.max_associations
            or self._per_address[address] >= self.policy.max_associations_per_address
        ):
            rejection = Rejection.FULL
        return rejection

    def established(self, acceptor: Acceptor) -> None:
        """An association was accepted."""
        self._unassociated.pop(acceptor, None)
        self._established[acceptor] = None
        self._per_address[acceptor.address] += 1
        self.accepted += 1

    def ended(self, acceptor: Acceptor) -> None:
        """No association any more; the connection may still have to close."""
        self._unassociated.pop(acceptor, None)
        if acceptor in self._established:
            del self._established[acceptor]
            self._per_address -= Counter((acceptor.address,))
            self._gone.set()
        if acceptor.over:
            self._closing.pop(acceptor, None)
            return
        self._closing[acceptor] = None
        if len(self._closing) > MAX_UNASSOCIATED:
            next(iter(self._closing)).end("others wait for the place of a closing connection")

    def lost(self, acceptor: Acceptor) -> None:
        """A connection is closed."""
        self._connected.discard(acceptor)
        self._gone.set()

    def fault(self, error: BaseException) -> None:
        """The handler raised what it should not: ours, and the server's end."""
        if not self._failure.done():
            self._failure.set_exception(error)


async def serve(
    sockets: Sequence[socket.socket], handler: StoreHandler, policy: Policy, acceptable: Acceptable
) -> Server:
    """Serve associations on listening (or bound) TCP sockets of the running loop.

    Args:
        sockets: They are closed with the server.
        handler: Decides about and takes objects.
        policy: Who may associate, and limits.
        acceptable: Which presentation contexts are accepted.
    """
    loop = asyncio.get_running_loop()
    server = Server(handler, policy, acceptable)
    for sock in sockets:
        listener = await loop.create_server(lambda: Acceptor(server), sock=sock, backlog=BACKLOG)
        server._listeners.append(listener)
    return server
