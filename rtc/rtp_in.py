"""Plain RTP in (RFC 3550): one stream of video and, beside it, sound, on UDP ports of this side.

    UDP port ─▶ length, kind, source ─▶ RTP ─▶ Track            sender ◀─ RR, NACK, PLI ─┐
    port + 1 ─▶ length, kind, source ─▶ RTCP ─▶ clock, BYE ──────────────────────────────┘

RTP has no session: the first allowed sender of a right packet is the sender, until it was silent. Everyone
else's datagrams, of whatever length, are counted and forgotten. The stream stops when the sender says goodbye
or is silent, and starts anew, with a new epoch, when someone sends again.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import logging
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, cast

from relay.errors import MedferryError, PeerError
from relay.listeners import UDP_BUFFER
from relay.records import StopReason
from rtc.clock import SECOND_NS, SenderClock
from rtc.guard import Kind, classify
from rtc.packets import Goodbye, parse_rtcp, parse_rtp, receiver_report
from rtc.publication import Publication, Stage
from rtc.sdp import Flow
from rtc.track import AudioTrack, Track, VideoTrack

SOURCE_SILENCE_NS = SECOND_NS
"""A sender that was silent for so long may be replaced by another."""

STREAM_SILENCE_NS = 3 * SECOND_NS
"""Without any packet for so long, the stream has stopped."""

REPORT_SECONDS = 1.0
"""Between two receiver reports; RFC 3550 §6.2 asks 5 s only of sessions with many members."""

CNAME = "receiver"
"""In our reports. Not a name of this machine: it is nobody's business."""

log = logging.getLogger("medferry.rtc")

Address = tuple[Any, ...]


class _Port(asyncio.DatagramProtocol):
    """A UDP port of a flow."""

    def __init__(self, receive: Callable[[bytes, Address, _Port], None]) -> None:
        self._receive = receive
        self.transport: asyncio.DatagramTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports do not derive from asyncio's, so there is no class to ask for.
        self.transport = cast("asyncio.DatagramTransport", transport)

    def datagram_received(self, data: bytes, addr: Address) -> None:
        self._receive(data, addr, self)

    def error_received(self, exc: Exception) -> None:
        """A report of ours was refused by the sender's host: it does not listen for reports."""

    def send(self, data: bytes, addr: Address) -> None:
        if self.transport is not None and not self.transport.is_closing():
            self.transport.sendto(data, addr)


class _Receiver:
    """One flow: its ports, its sender, its track while the stream is live."""

    def __init__(self, owner: RtpIn, flow: Flow, sockets: Sequence[socket.socket]) -> None:
        self.flow = flow
        self.track: Track | None = None
        self._owner = owner
        self._sockets = sockets
        self._ports: list[_Port] = []
        self._source: Address | None = None
        self._feedback: tuple[_Port, Address] | None = None
        self._payload_type = flow.payload_type
        self.heard_ns = 0
        self.dropped: Counter[str] = Counter()

    async def open(self) -> None:
        """Begin to receive."""
        loop = asyncio.get_running_loop()
        for sock in self._sockets:
            _, port = await loop.create_datagram_endpoint(lambda: _Port(self._received), sock=sock)
            self._ports.append(port)

    def close(self) -> None:
        """Stop receiving."""
        self.forget()
        for port in self._ports:
            if port.transport is not None:
                port.transport.close()

    def forget(self) -> None:
        """The stream has stopped: whoever comes next is a new sender."""
        if self.track is not None:
            self.track.close()
        self.track = self._source = self._feedback = None
        self._payload_type = self.flow.payload_type

    def send(self, data: bytes) -> None:
        """Send RTCP to the sender, if it has shown where it takes it."""
        if self._feedback is not None:
            port, address = self._feedback
            port.send(data, address)

    def _received(self, data: bytes, addr: Address, port: _Port) -> None:
        now_ns = time.monotonic_ns()
        kind = classify(data)
        if kind is Kind.SRTP:
            self._rtp(data, addr, now_ns)
        elif kind is Kind.SRTCP:
            self._rtcp(data, addr, port, now_ns)
        else:
            self.dropped[kind.value] += 1

    def _rtp(self, data: bytes, addr: Address, now_ns: int) -> None:
        if addr != self._source and not self._may_replace(addr, now_ns):
            self.dropped["source"] += 1
            return
        packet = parse_rtp(data, now_ns)
        if packet is None:
            self.dropped["shape"] += 1
            return
        if self._payload_type is None:
            self._payload_type = packet.payload_type
        if packet.payload_type != self._payload_type:
            self.dropped["payload type"] += 1
            return
        if self.track is None:
            self.track = self._owner.begin(self)
            if self.track is None:
                self.dropped["not admitted"] += 1
                return
        if addr != self._source:
            self._source, self._feedback = addr, None
        self.heard_ns = now_ns
        self.track.receive(packet)

    def _may_replace(self, addr: Address, now_ns: int) -> bool:
        if not self._owner.allows(addr[0]):
            return False
        return self._source is None or now_ns - self.heard_ns > SOURCE_SILENCE_NS

    def _rtcp(self, data: bytes, addr: Address, port: _Port, now_ns: int) -> None:
        # A sender's RTCP comes from a port of its own, but from the same host.
        if self._source is None or addr[0] != self._source[0] or self.track is None:
            self.dropped["source"] += 1
            return
        reports = parse_rtcp(data, now_ns)
        if reports is None:
            self.dropped["shape"] += 1
            return
        for report in reports:
            if isinstance(report, Goodbye):
                if self.track is not None and self.track.ssrc in report.ssrcs:
                    self._owner.end(StopReason.ENDED)
            elif self.track is not None and report.ssrc == self.track.ssrc:
                self.track.report(report)
                self._feedback = (port, addr)


class RtpIn:
    """One stream over plain RTP."""

    def __init__(self, stage: Stage, name: str, allow: Sequence[str]) -> None:
        self._stage = stage
        self.name = name
        self._allow = [ipaddress.ip_network(text, strict=False) for text in allow]
        self._receivers: list[_Receiver] = []
        self._publication: Publication | None = None
        self._sender = SenderClock()
        self._refused_ns = -SECOND_NS

    def __repr__(self) -> str:
        return f"<RtpIn {self.name} {'live' if self._publication else 'waiting'}>"

    def add(self, flow: Flow, sockets: Sequence[socket.socket]) -> None:
        """Receive `flow` on these bound sockets, RTP and RTCP alike."""
        self._receivers.append(_Receiver(self, flow, sockets))

    def allows(self, host: str) -> bool:
        """Whether a sender may be at `host`."""
        if not self._allow:
            return True
        address: ipaddress.IPv4Address | ipaddress.IPv6Address = ipaddress.ip_address(host.partition("%")[0])
        if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
            address = address.ipv4_mapped
        return any(address in network for network in self._allow)

    def begin(self, receiver: _Receiver) -> Track | None:
        """A track for a flow that begins; None where the stage has no room, which is asked once a second."""
        if self._publication is None:
            now_ns = time.monotonic_ns()
            if now_ns - self._refused_ns < SECOND_NS:
                return None
            try:
                self._publication = self._stage.open(self.name)
            except PeerError as error:
                self._refused_ns = now_ns
                log.warning("stream %s: %s", self.name, error, extra={"event": "refused"})
                return None
            self._sender = SenderClock()
            log.info("stream %s: RTP arrives", self.name, extra={"event": "rtp_started"})
        flow = receiver.flow
        if flow.kind == "audio":
            return AudioTrack(self._publication, sender=self._sender, send=receiver.send)
        return VideoTrack(
            self._publication,
            codec=flow.codec,
            sender=self._sender,
            send=receiver.send,
            trusting=False,
            parameter_sets=flow.parameter_sets,
        )

    def end(self, reason: StopReason) -> None:
        """Stop the stream, if it is live."""
        for receiver in self._receivers:
            receiver.forget()
        if self._publication is not None:
            log.info("stream %s: RTP %s", self.name, reason.name.lower(), extra={"event": "rtp_stopped"})
            self._publication.stop(reason)
            self._publication = None

    async def run(self) -> None:
        """Receive until cancelled; report to the sender once a second."""
        try:
            for receiver in self._receivers:
                await receiver.open()
            while True:
                await asyncio.sleep(REPORT_SECONDS)
                self._look_after(time.monotonic_ns())
        finally:
            self.end(StopReason.DRAINED)
            for receiver in self._receivers:
                receiver.close()

    def _look_after(self, now_ns: int) -> None:
        heard_ns = max(receiver.heard_ns for receiver in self._receivers)
        if self._publication is not None and now_ns - heard_ns > STREAM_SILENCE_NS:
            self.end(StopReason.LOST)
        for receiver in self._receivers:
            if receiver.track is not None:
                block = receiver.track.report_block(now_ns)
                if block is not None:
                    receiver.send(receiver_report(receiver.track.own_ssrc, CNAME, [block]))

    def status(self) -> dict[str, Any]:
        """Figures, by kind of media."""
        return {
            receiver.flow.kind: {
                **(receiver.track.status() if receiver.track is not None else {}),
                "dropped": dict(receiver.dropped),
            }
            for receiver in self._receivers
        }


def open_ports(flow: Flow) -> list[socket.socket]:
    """Bind the ports of a flow that an SDP file describes, and join its group if it is multicast.

    The file's address is the sender's idea of where we are; where that is not an address of this machine,
    every address is listened on.

    Raises:
        MedferryError: A port is taken.
    """
    family = socket.AF_INET6 if ":" in flow.host else socket.AF_INET
    sockets = []
    try:
        for port in filter(None, (flow.port, flow.rtcp_port)):
            sock = socket.socket(family, socket.SOCK_DGRAM)
            sockets.append(sock)
            _bind(sock, flow.host, port)
    except OSError as error:
        for sock in sockets:
            sock.close()
        text = f"cannot listen on UDP port {flow.port} and the one above: {error.strerror}: choose others"
        raise MedferryError(text) from None
    return sockets


def _bind(sock: socket.socket, host: str, port: int) -> None:
    sock.setblocking(False)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, UDP_BUFFER)
    address = ipaddress.ip_address(host) if host else None
    everywhere = "::" if sock.family == socket.AF_INET6 else "0.0.0.0"
    if address is not None and address.is_multicast:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        if address.version == 4:
            membership = struct.pack("=4s4s", address.packed, bytes(4))
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, membership)
        else:
            membership = struct.pack("=16sI", address.packed, 0)
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, membership)
        return
    try:
        sock.bind((host or everywhere, port))
    except OSError as error:
        if error.errno != errno.EADDRNOTAVAIL:
            raise
        sock.bind((everywhere, port))
