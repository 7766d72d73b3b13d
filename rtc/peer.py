"""One WebRTC session as its answering side: ICE, DTLS and SRTP, without aiortc's media machinery.

    datagrams ─▶ guard ─▶ ICE (rtc.ice) ─▶ DTLS (aiortc) ─▶ keys
                              └──────────── SRTP ─▶ unprotect ─▶ handler.rtp_received / rtcp_received
    send_rtp / send_rtcp ─▶ protect ─▶ nominated pair

WHIP and WHEP both answer offers, so there is no offering here; codecs, jitter, RTCP and pacing belong to the
one who holds the peer. Packets are handed over in the very call that received them: no queue, no task.

A peer ends once, for one reason (`Peer.ended`), and never raises into its holder.
"""

from __future__ import annotations

import asyncio
import enum
import secrets
import struct
from collections.abc import Sequence
from typing import Protocol, cast

import pylibsrtp
from aioice.ice import ConnectionClosed
from aiortc.rtcdtlstransport import (
    RTCCertificate,
    RTCDtlsFingerprint,
    RTCDtlsParameters,
    RTCDtlsTransport,
)
from aiortc.rtcicetransport import RTCIceTransport

from relay.errors import MedferryError
from rtc.guard import Kind
from rtc.ice import IceSession, IceSettings
from rtc.offer import SETUP_ANSWERS, AnswerMedia, Offer, Transport, write_answer

CONNECT_SECONDS = 15.0
"""From answer to the end of the DTLS handshake; a person who has to allow something is slower elsewhere."""

MAX_SSRCS = 64
"""SSRCs of one peer, for its whole session. A publisher has four at a time, and rarely new ones; SRTP keeps
keys and a replay window for each one, without a limit of its own."""

SSRC_OFFSETS = {Kind.SRTP: 8, Kind.SRTCP: 4}
"""Where a packet names its sender (RFC 3550 §5.1, §6.4.1); the guard has seen that it is long enough."""


class PeerState(enum.Enum):
    """Of a `Peer`, in this order."""

    NEW = "new"
    CONNECTING = "connecting"
    CONNECTED = "connected"
    ENDED = "ended"


class PeerEnd(enum.Enum):
    """Why a peer ended."""

    CLOSED = "closed"
    """By us."""
    LEFT = "left"
    """By the other side, which closed DTLS."""
    LOST = "lost"
    """Nothing was heard of it (consent expired)."""
    FAILED = "failed"
    """It never got connected: ICE found no way, DTLS failed or the certificate was another's."""


class PeerHandler(Protocol):
    """Whoever holds a `Peer`. All calls come on the event loop and must return fast."""

    def rtp_received(self, packet: bytes, arrival_ns: int) -> None:
        """A decrypted RTP packet."""

    def rtcp_received(self, packet: bytes, arrival_ns: int) -> None:
        """A decrypted compound RTCP packet."""

    def peer_changed(self, state: PeerState) -> None:
        """The peer is connected now, or has ended."""


class _DtlsPath:
    """What aiortc's DTLS transport needs of an ICE transport."""

    def __init__(self, session: IceSession) -> None:
        self._recv = session.recv
        self._send = session.send
        self.role = "controlled"
        self.state = "completed"


class _Dtls(RTCDtlsTransport):
    """aiortc's DTLS transport, with SRTP offered as plain functions."""

    def unprotect(self, kind: Kind, data: bytes) -> bytes | None:
        """The packet inside; None where it is not authentic or a replay."""
        if self._rx_srtp is None:
            return None
        try:
            packet = (
                self._rx_srtp.unprotect(data) if kind is Kind.SRTP else self._rx_srtp.unprotect_rtcp(data)
            )
        except pylibsrtp.Error:
            return None
        return packet

    def protect(self, kind: Kind, packet: bytes) -> bytes | None:
        """The packet encrypted; None before the handshake is done."""
        if self._tx_srtp is None:
            return None
        try:
            data = self._tx_srtp.protect(packet) if kind is Kind.SRTP else self._tx_srtp.protect_rtcp(packet)
        except pylibsrtp.Error:
            return None
        return data


class Peer:
    """One WebRTC peer. Make it, `answer` its offer, `close` it."""

    def __init__(self, settings: IceSettings, handler: PeerHandler) -> None:
        self._handler = handler
        self._ice = IceSession(settings, self._media_received)
        self._certificate = RTCCertificate.generateCertificate()
        path = cast("RTCIceTransport", _DtlsPath(self._ice))
        self._dtls = _Dtls(path, [self._certificate])
        self._task: asyncio.Task[None] | None = None
        self._closing: PeerEnd | None = None
        self._cleaning = False
        self._dtls_ended = asyncio.Event()
        self._done = asyncio.Event()
        self.cname = secrets.token_hex(8)
        self.state = PeerState.NEW
        self.ended: PeerEnd | None = None
        self.unauthentic = 0
        """Media packets that were forged, damaged or replayed."""
        self.surplus = 0
        """Media packets of SSRCs beyond `MAX_SSRCS`."""
        self._ssrcs: set[int] = set()

    def __repr__(self) -> str:
        return f"<Peer {self.state.value}{f' ({self.ended.value})' if self.ended else ''}>"

    @property
    def rtt_ns(self) -> int | None:
        """Smoothed round trip in nanoseconds; None before the first measurement."""
        return self._ice.rtt_ns

    @property
    def refused(self) -> dict[str, int]:
        """What was left aside, by reason: datagrams, surplus candidates, packets of surplus SSRCs."""
        refused = {reason.value: count for reason, count in self._ice.guard.refused.items()}
        return {**refused, "candidates": self._ice.surplus_candidates, "ssrc": self.surplus}

    @property
    def dropped_sends(self) -> int:
        """Packets not sent because the socket's buffer was full."""
        return self._ice.dropped_sends

    @property
    def local_ufrag(self) -> str:
        """Of this ICE session, as in the answer: what a trickle PATCH must name."""
        return self._ice.local_username

    @property
    def remote_ufrag(self) -> str | None:
        """Of the peer's side of this ICE session."""
        return self._ice.remote_username

    async def answer(self, offer: Offer, media: Sequence[AnswerMedia]) -> str:
        """Gather candidates, write the answer, and begin to connect.

        Raises:
            MedferryError: No socket could be opened.
            PeerError: The offer has a malformed candidate.
        """
        assert self.state is PeerState.NEW
        self._ice.remote_username = offer.ufrag
        self._ice.remote_password = offer.password
        self._ice.remote_is_lite = offer.ice_lite
        self._ice.ice_controlling = offer.ice_lite
        try:
            for line in offer.candidates:
                await self._ice.add_remote(line)
            await self._ice.gather_candidates()
            if self.ended is not None:
                raise MedferryError("the session was closed before it was answered")
        except MedferryError:
            await self._ice.close()
            self._end(PeerEnd.FAILED)
            raise
        setup = SETUP_ANSWERS[offer.setup]
        self._dtls._set_role("client" if setup == "active" else "server")
        self.state = PeerState.CONNECTING
        text = write_answer(offer, media, self._transport(setup))
        self._task = asyncio.create_task(self._run(offer), name="webrtc peer")
        return text

    def _transport(self, setup: str) -> Transport:
        prints = {item.algorithm: item.value for item in self._certificate.getFingerprints()}
        return Transport(
            ufrag=self._ice.local_username,
            password=self._ice.local_password,
            fingerprint=prints["sha-256"],
            setup=setup,
            candidates=tuple(item.to_sdp() for item in self._ice.local_candidates),
            cname=self.cname,
        )

    async def add_candidate(self, line: str) -> None:
        """A trickled candidate, without its ``candidate:``.

        Raises:
            PeerError: It is malformed.
        """
        await self._ice.add_remote(line)

    async def _run(self, offer: Offer) -> None:
        """Connect, wait for the end, clean up. The only task of a peer beside ICE's and DTLS's own."""
        end = PeerEnd.FAILED
        try:
            if await self._connect(offer):
                self.state = PeerState.CONNECTED
                self._handler.peer_changed(self.state)
                end = await self._watch()
        finally:
            self._cleaning = True
            try:
                await self._dtls.stop()
                await self._ice.close()
            finally:
                self._end(self._closing or end)

    async def _connect(self, offer: Offer) -> bool:
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                await self._ice.connect()
                prints = [RTCDtlsFingerprint(algorithm=name, value=text) for name, text in offer.fingerprints]
                await self._dtls.start(RTCDtlsParameters(fingerprints=prints))
        except (TimeoutError, ConnectionError):
            return False
        return self._dtls.state == "connected"

    async def _watch(self) -> PeerEnd:
        """Until ICE or DTLS ends: which of the two says why."""

        def changed() -> None:
            if self._dtls.state in ("closed", "failed"):
                self._dtls_ended.set()

        self._dtls.on("statechange", changed)
        changed()
        left = asyncio.create_task(self._dtls_ended.wait())
        lost = asyncio.create_task(self._ice.get_event())
        try:
            done, _ = await asyncio.wait({left, lost}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            left.cancel()
            lost.cancel()
        if lost in done and (lost.result() is None or isinstance(lost.result(), ConnectionClosed)):
            return PeerEnd.LOST
        return PeerEnd.LEFT

    def _end(self, end: PeerEnd) -> None:
        if self.ended is None:
            self.state, self.ended = PeerState.ENDED, end
            self._done.set()
            self._handler.peer_changed(self.state)

    async def close(self) -> None:
        """End the session, telling the other side. Returns when its sockets are closed."""
        if self._task is None:
            await self._ice.close()
            self._end(PeerEnd.CLOSED)
            return
        # One that ends by itself just now is cleaning up, and must not be disturbed.
        if self._closing is None and not self._cleaning:
            self._closing = PeerEnd.CLOSED
            self._task.cancel()
        await self._done.wait()

    async def wait_ended(self) -> PeerEnd:
        """Until the peer has ended; why."""
        await self._done.wait()
        assert self.ended is not None
        return self.ended

    def _media_received(self, kind: Kind, data: bytes, arrival_ns: int) -> None:
        (ssrc,) = struct.unpack_from("!I", data, SSRC_OFFSETS[kind])
        if ssrc not in self._ssrcs and len(self._ssrcs) >= MAX_SSRCS:
            self.surplus += 1
            return
        packet = self._dtls.unprotect(kind, data)
        if packet is None:
            self.unauthentic += 1
            return
        self._ssrcs.add(ssrc)
        self._ice.heard_ns = arrival_ns
        if kind is Kind.SRTP:
            self._handler.rtp_received(packet, arrival_ns)
        else:
            self._handler.rtcp_received(packet, arrival_ns)

    def send_rtp(self, packet: bytes) -> bool:
        """Encrypt and send one RTP packet now. False where it was dropped: not connected, or socket full."""
        return self._send(Kind.SRTP, packet)

    def send_rtcp(self, packet: bytes) -> bool:
        """Encrypt and send one compound RTCP packet now."""
        return self._send(Kind.SRTCP, packet)

    def _send(self, kind: Kind, packet: bytes) -> bool:
        if self.state is not PeerState.CONNECTED:
            return False
        data = self._dtls.protect(kind, packet)
        return data is not None and self._ice.send_now(data)
