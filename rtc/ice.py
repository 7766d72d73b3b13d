"""ICE on aioice: with the guard in front, a port range, chosen addresses, and consent lost within 3 s.

What differs from aioice's own connection:

- Every datagram passes the `Guard`; SRTP goes straight to the session instead of through a queue.
- Sockets are bound within a range of ports, on configured addresses; loopback where a lab wants it.
- Consent (RFC 7675) is checked twice a second, and more often while there is no answer; whoever is not heard
  for two seconds is gone.
- Remote candidates must be IP addresses: an mDNS name is met as a peer-reflexive candidate anyway, when its
  owner's check arrives, and nobody makes this side resolve names.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import itertools
import logging
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from aioice import Candidate, Connection, stun
from aioice.candidate import candidate_foundation, candidate_priority
from aioice.ice import (
    CandidatePair,
    StunProtocol,
    get_host_addresses,
    relayed_candidate,
    server_reflexive_candidate,
)

from relay.errors import MedferryError, PeerError, os_reason
from relay.listeners import UDP_BUFFER
from rtc.guard import Guard, Kind

CONSENT_SECONDS = 0.4
"""Between a consent check that was answered and the next."""

CONSENT_RETRY_SECONDS = 0.1
"""Between one that was not, within two round trips, and the next: a few datagrams that are lost in a row must
not look like a peer that is gone."""

CONSENT_EXPIRY_NS = 2_000_000_000
"""Unheard for so long, the peer is gone; with the checks' rhythm, noticed within 3 s."""

GATHER_SECONDS = 3.0
"""For STUN and TURN servers to answer; host candidates do not wait."""

MAX_REMOTE_CANDIDATES = 32
"""Of one session. Browsers with several interfaces send about a dozen."""

MAX_HANDSHAKE_DATAGRAMS = 32
"""DTLS datagrams that may wait to be read: several flights with long certificates."""

MAX_UNSENT_BYTES = 1 << 20
"""Bytes that the kernel has not taken yet; beyond, media is dropped as a full link would."""

TELL_SECONDS = 60.0
"""Between two log lines about the same STUN or TURN server."""

Address = tuple[str, int]

log = logging.getLogger("medferry.rtc")


def _server_name(kind: str, server: Address) -> str:
    return f"{kind} server {server[0]}:{server[1]}"


def _may_be_reflexive(host: str) -> bool:
    """Whether a STUN server could see another address than `host`."""
    address = ipaddress.ip_address(host)
    return address.version == 4 and not address.is_loopback


def _reason(error: BaseException) -> str:
    """Why a server failed, in words of ours: its own may repeat what it was sent."""
    if isinstance(error, stun.TransactionFailed):
        code = error.response.attributes.get("ERROR-CODE", ("unknown",))[0]
        return f"refused with code {code}"
    if isinstance(error, stun.TransactionTimeout):
        return "no answer"
    if isinstance(error, OSError):
        return os_reason(error)
    return type(error).__name__


@dataclass(frozen=True, slots=True, kw_only=True)
class IceSettings:
    """Where a side's ICE works."""

    addresses: tuple[str, ...] = ()
    """Own IP addresses to offer; empty: those of all interfaces."""
    ports: tuple[int, int] | None = None
    """First and last UDP port; None: any."""
    loopback: bool = False
    """With `addresses` empty: offer loopback as well."""
    stun: Address | None = None
    turn: Address | None = None
    turn_tls: bool = False
    turn_transport: str = "udp"
    turn_username: str | None = None
    turn_password: str | None = None


class GuardedProtocol(StunProtocol):
    """One socket of an `IceSession`."""

    receiver: IceSession

    def datagram_received(self, data: bytes | str, addr: tuple[Any, ...]) -> None:
        """Drop, or hand to whom it belongs: STUN to aioice, DTLS to its queue, SRTP to the session."""
        assert isinstance(data, bytes)
        source = (addr[0], addr[1])
        now_ns = time.monotonic_ns()
        kind = self.receiver.guard.admit(data, member=self.receiver.is_member(self, source), now_ns=now_ns)
        if kind is None:
            return
        if kind is Kind.STUN:
            # An attribute of a wrong size or a missing one shows as these; it is the peer's fault.
            with contextlib.suppress(struct.error, KeyError, IndexError, ValueError):
                super().datagram_received(data, source)
        elif kind is Kind.DTLS:
            self.receiver.data_received(data, self.local_candidate.component)
        else:
            self.receiver.on_media(kind, data, now_ns)


class IceSession(Connection):
    """An ICE session of one component (RTCP multiplexed, everything bundled), controlled by the peer."""

    _next_port = itertools.count()
    _told: ClassVar[dict[str, float]] = {}
    """When a server's failure was last told, on the monotonic clock; of the few servers in the settings."""

    def __init__(self, settings: IceSettings, on_media: Callable[[Kind, bytes, int], None]) -> None:
        super().__init__(
            ice_controlling=False,
            stun_server=settings.stun,
            turn_server=settings.turn,
            turn_username=settings.turn_username,
            turn_password=settings.turn_password,
            turn_ssl=settings.turn_tls,
            turn_transport=settings.turn_transport,
        )
        self._settings = settings
        self.guard = Guard()
        self.on_media = on_media
        self.heard_ns = time.monotonic_ns()
        """When something authentic came last."""
        self.rtt_ns: int | None = None
        """Round trip, from consent checks; None before the first."""
        self.dropped_sends = 0
        self.surplus_candidates = 0
        """Of the peer, beyond `MAX_REMOTE_CANDIDATES`."""
        self._valid: set[tuple[StunProtocol, Address]] = set()
        """Pairs on which a check of ours was answered."""
        self._checked: set[tuple[StunProtocol, Address]] = set()
        """Pairs on which a check of the peer came. Both are bounded by the candidates."""

    def is_member(self, protocol: StunProtocol, source: Address) -> bool:
        """Whether `source` has proved that it is the peer, by the passwords of this session.

        A peer may send on any valid pair, whichever one is nominated here (RFC 8445 §12). Before nomination
        its own check is enough: its handshake may overtake the answer to ours.
        """
        pair = (protocol, source)
        return pair in self._valid or (pair in self._checked and not self._nominated)

    async def gather_candidates(self) -> None:
        """Open a socket on each address and ask the STUN and TURN servers.

        Raises:
            MedferryError: No socket could be opened: no address, or no free port in the range.
        """
        if self._local_candidates_start:
            return
        self._local_candidates_start = True
        for address in self._addresses():
            await self._open(address)
        if not self._protocols:
            raise MedferryError("ICE: no UDP port could be opened: check addresses and udp_ports")
        await self._ask_servers()
        self._local_candidates_end = True

    def _addresses(self) -> list[str]:
        if self._settings.addresses:
            return list(self._settings.addresses)
        # IPv4 first: some publishers use only the first candidate they are given.
        found = sorted(get_host_addresses(use_ipv4=True, use_ipv6=True), key=lambda text: ":" in text)
        return [*found, "127.0.0.1", "::1"] if self._settings.loopback else found

    async def _open(self, address: str) -> None:
        sock = self._bind(address)
        if sock is None:
            return
        loop = asyncio.get_running_loop()
        _, protocol = await loop.create_datagram_endpoint(lambda: GuardedProtocol(self), sock=sock)
        host, port = sock.getsockname()[:2]
        protocol.local_candidate = Candidate(
            foundation=candidate_foundation("host", "udp", host),
            component=1,
            transport="udp",
            priority=candidate_priority(1, "host", 65535 - len(self._protocols)),
            host=host,
            port=port,
            type="host",
        )
        self._protocols.append(protocol)
        self._local_candidates.append(protocol.local_candidate)

    def _bind(self, address: str) -> socket.socket | None:
        """A socket on `address` and the next free port of the range, or None."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        low, high = self._settings.ports or (0, 0)
        size = high - low + 1
        for _ in range(size):
            sock = socket.socket(family, socket.SOCK_DGRAM)
            sock.setblocking(False)
            for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
                sock.setsockopt(socket.SOL_SOCKET, option, UDP_BUFFER)
            try:
                sock.bind((address, low + next(self._next_port) % size))
            except OSError as error:
                sock.close()
                if error.errno != errno.EADDRINUSE:
                    return None
            else:
                return sock
        return None

    async def _ask_servers(self) -> None:
        """Add the candidates that STUN and TURN servers give; say which server gave none."""
        asked = self._requests()
        if not asked:
            return
        _, pending = await asyncio.wait(asked, timeout=GATHER_SECONDS)
        failures: dict[str, str] = {}
        served: set[str] = set()
        for task, server in asked.items():
            if task in pending:
                task.cancel()
                failures[server] = f"no answer within {GATHER_SECONDS:.3g} s"
            elif (error := task.exception()) is not None:
                failures[server] = _reason(error)
            else:
                candidate, relay = task.result()
                served.add(server)
                self._local_candidates.append(candidate)
                if relay is not None:
                    self._protocols.append(relay)
        for server, reason in failures.items():
            if server not in served:
                self._tell(server, reason)

    def _requests(self) -> dict[asyncio.Task[tuple[Candidate, StunProtocol | None]], str]:
        """The questions to the servers, each with the server's name for people."""
        asked: dict[asyncio.Task[tuple[Candidate, StunProtocol | None]], str] = {}
        if self.stun_server is not None:
            for protocol in self._protocols:
                if _may_be_reflexive(protocol.local_candidate.host):
                    request = server_reflexive_candidate(protocol, self.stun_server)
                    asked[asyncio.create_task(request)] = _server_name("STUN", self.stun_server)
        if self.turn_server is not None:
            relayed = relayed_candidate(
                component=1,
                hide_related_address=False,
                protocol_factory=lambda: GuardedProtocol(self),
                turn_server=self.turn_server,
                turn_username=self.turn_username,
                turn_password=self.turn_password,
                turn_ssl=self.turn_ssl,
                turn_transport=self.turn_transport,
            )
            asked[asyncio.create_task(cast("Any", relayed))] = _server_name("TURN", self.turn_server)
        return asked

    def _tell(self, server: str, reason: str) -> None:
        """Sessions come often, and each would say the same of a server that is down."""
        now = time.monotonic()
        last = self._told.get(server)
        if last is None or now - last >= TELL_SECONDS:
            self._told[server] = now
            log.warning("%s: %s: sessions go without it", server, reason, extra={"event": "ice_server"})

    async def add_remote(self, line: str) -> None:
        """Take a candidate as SDP writes it, without the ``candidate:`` (RFC 8839 §5.1).

        TCP candidates, names, and those beyond the limit are left aside, as RFC 9725 §4.3.2 wants it: none is
        needed to meet the peer, whose own checks will come.

        Raises:
            PeerError: It is no candidate.
        """
        try:
            candidate = Candidate.from_sdp(line)
        except ValueError:
            raise PeerError("candidate", "an ICE candidate cannot be read") from None
        if candidate.transport.lower() != "udp" or candidate.component != 1:
            return
        if not (0 <= candidate.priority < 2**32 and 0 < candidate.port < 65536):
            raise PeerError("candidate", "an ICE candidate's port or priority is out of range")
        if len(self._remote_candidates) >= MAX_REMOTE_CANDIDATES:
            self.surplus_candidates += 1
            return
        try:
            ipaddress.ip_address(candidate.host)
        except ValueError:
            return
        await self.add_remote_candidate(candidate)

    def check_incoming(self, message: stun.Message, addr: Address, protocol: StunProtocol) -> None:
        """A check that carries the session's password: the peer is alive."""
        known = any((item._network_host, item.port) == addr for item in self._remote_candidates)
        if len(self._remote_candidates) >= 2 * MAX_REMOTE_CANDIDATES and not known:
            return
        self.heard_ns = time.monotonic_ns()
        self._checked.add((protocol, addr))
        super().check_incoming(message, addr, protocol)

    def check_complete(self, pair: CandidatePair) -> None:
        """A check of ours has ended; an answered one makes its pair valid (RFC 8445 §7.2.5.3.2)."""
        if pair.state is CandidatePair.State.SUCCEEDED:
            self._valid.add((pair.protocol, pair.remote_addr))
        super().check_complete(pair)

    def data_received(self, data: bytes, component: int) -> None:
        """Queue a DTLS datagram for the handshake, which has its own retransmission."""
        if self._queue.qsize() < MAX_HANDSHAKE_DATAGRAMS:
            super().data_received(data, component)

    async def query_consent(self) -> None:
        """Check that the peer still wants to receive, and measure the round trip (RFC 7675 §5.1)."""
        assert self.remote_password is not None
        self.heard_ns = time.monotonic_ns()
        key = self.remote_password.encode()
        checks: set[asyncio.Task[None]] = set()
        pause = CONSENT_SECONDS
        try:
            while True:
                await asyncio.sleep(pause)
                before_ns = self.heard_ns
                if time.monotonic_ns() - before_ns > CONSENT_EXPIRY_NS:
                    break
                pair = self._nominated.get(1)
                if pair is None:
                    continue
                check = asyncio.create_task(self._check_consent(pair, key))
                # A check ends by itself after 0.5 s, so there are never more than five.
                checks.add(check)
                check.add_done_callback(checks.discard)
                await asyncio.wait({check}, timeout=2 * (self.rtt_ns or 0) / 1e9 or CONSENT_RETRY_SECONDS)
                pause = CONSENT_SECONDS if self.heard_ns != before_ns else CONSENT_RETRY_SECONDS
        finally:
            for check in checks:
                check.cancel()
        self._query_consent_task = None
        await self.close()

    async def _check_consent(self, pair: CandidatePair, key: bytes) -> None:
        request = self.build_request(pair, nominate=False)
        sent_ns = time.monotonic_ns()
        try:
            await pair.protocol.request(request, pair.remote_addr, integrity_key=key, retransmissions=0)
        except stun.TransactionError:
            return
        self.heard_ns = time.monotonic_ns()
        sample = self.heard_ns - sent_ns
        # The weights of TCP's estimator (RFC 6298 §2).
        self.rtt_ns = sample if self.rtt_ns is None else (7 * self.rtt_ns + sample) // 8

    def send_now(self, data: bytes) -> bool:
        """Send on the nominated pair at once; False, and counted, where it cannot be."""
        pair = self._nominated.get(1)
        if pair is None:
            return False
        transport = pair.protocol.transport
        # Datagram transports know this, though their abstract class does not; a TURN relay's has no buffer.
        unsent = getattr(transport, "get_write_buffer_size", int)()
        if transport.is_closing() or unsent > MAX_UNSENT_BYTES:
            self.dropped_sends += 1
            return False
        transport.sendto(data, pair.remote_addr)
        return True
