"""Datagrams that mean harm, sent to a WebRTC session's port: it lives, or ends in time and clearly."""

from __future__ import annotations

import asyncio
import socket
import struct
import time
from collections.abc import AsyncIterator

import pytest
from aioice import stun
from aiortc import RTCConfiguration, RTCPeerConnection, RTCSessionDescription
from aiortc.mediastreams import VideoStreamTrack

from rtc.ice import IceSettings
from rtc.offer import AnswerMedia, read_offer
from rtc.peer import MAX_SSRCS, Peer, PeerEnd, PeerState
from tests.rtc.fakes import bound, until

REQUEST = stun.Class.REQUEST

FOREIGN = 0xF0F0F0F0
"""An SSRC that the peer's own media do not have."""


class Handler:
    """Counts what a peer hands over."""

    def __init__(self) -> None:
        self.rtp = 0
        self.ssrcs: set[int] = set()
        self.states: list[PeerState] = []

    def rtp_received(self, packet: bytes, arrival_ns: int) -> None:
        self.rtp += 1
        self.ssrcs.add(int.from_bytes(packet[8:12], "big"))

    def rtcp_received(self, packet: bytes, arrival_ns: int) -> None:
        pass

    def peer_changed(self, state: PeerState) -> None:
        self.states.append(state)


class Session:
    """A connected peer of ours, aiortc on the other side, and a stranger's socket."""

    def __init__(self) -> None:
        self.handler = Handler()
        self.peer = Peer(IceSettings(addresses=("127.0.0.1",)), self.handler)
        self.remote = RTCPeerConnection(RTCConfiguration(iceServers=[]))
        self.stranger = bound(socket.SOCK_DGRAM)

    async def connect(self) -> None:
        self.remote.addTrack(VideoStreamTrack())
        await self.remote.setLocalDescription(await self.remote.createOffer())
        offer = read_offer(self.remote.localDescription.sdp)
        codec = offer.media[0].codecs[0]
        answer = await self.peer.answer(offer, [AnswerMedia(codecs=(codec,), direction="recvonly")])
        await self.remote.setRemoteDescription(RTCSessionDescription(sdp=answer, type="answer"))
        await until(lambda: self.handler.rtp > 2)
        line = next(line for line in answer.split("\r\n") if line.startswith("a=candidate"))
        self.target = ("127.0.0.1", int(line.split()[5]))

    def media(self, seq: int, ssrc: int = FOREIGN) -> bytes:
        """A packet that the peer itself has encrypted."""
        packet = struct.pack("!BBHII", 0x80, 96, seq, 0, ssrc) + bytes(20)
        transport = self.remote.getTransceivers()[0].sender.transport
        protected: bytes = transport._tx_srtp.protect(packet)
        return protected

    def attack(self, *datagrams: bytes) -> None:
        for datagram in datagrams:
            self.stranger.sendto(datagram, self.target)

    async def lives(self) -> bool:
        """Whether media still flow."""
        count = self.handler.rtp
        await until(lambda: self.handler.rtp > count + 3)
        return self.peer.state is PeerState.CONNECTED

    async def close(self) -> None:
        self.stranger.close()
        await self.remote.close()
        await self.peer.close()


@pytest.fixture
async def session() -> AsyncIterator[Session]:
    made = Session()
    await made.connect()
    yield made
    await made.close()


async def test_every_length_from_a_stranger(session: Session) -> None:
    for size in (0, 1, 2, 11, 12, 13, 19, 20, 1499, 1500, 1501, 4_096, 65_000, 65_507):
        session.attack(
            *(bytes([first]) * size for first in (0, 3, 20, 22, 63, 64, 0x7F, 0x80, 0xBF, 0xC0, 0xFF))
        )
        await asyncio.sleep(0.002)
    assert await session.lives()
    assert session.peer.refused["length"] > 0


async def test_malformed_stun_from_a_stranger(session: Session) -> None:
    header = struct.pack("!HHI12s", 1, 8, 0x2112A442, b"x" * 12)
    attributes = (
        struct.pack("!HHI", kind, 4, 0) for kind in (6, 8, 9, 0x20, 0x24, 0x25, 0x8028, 0x8029, 0x802A)
    )
    session.attack(*(header + attribute for attribute in attributes))
    short = struct.pack("!HHI12sHH", 1, 4, 0x2112A442, b"x" * 12, 0x24, 0)
    session.attack(short, *(struct.pack("!H", kind) + short[2:] for kind in range(0, 0x400, 17)))
    assert await session.lives()


async def test_a_stranger_cannot_become_the_peer(session: Session) -> None:
    request = stun.Message(message_method=stun.Method.BINDING, message_class=stun.Class.REQUEST)
    request.attributes["USERNAME"] = f"{session.peer.local_ufrag}:{session.peer.remote_ufrag}"
    request.attributes["PRIORITY"] = 1
    request.attributes["USE-CANDIDATE"] = None
    request.add_message_integrity(b"not the password of this session")
    session.attack(bytes(request))
    session.attack(*[b"\x80\x60" + bytes(40)] * 20)
    assert await session.lives()
    assert session.peer.refused["source"] >= 20


def check(session: Session) -> bytes:
    """A connectivity check as the peer itself would send it: with the password of the session."""
    request = stun.Message(message_method=stun.Method.BINDING, message_class=stun.Class.REQUEST)
    request.attributes["USERNAME"] = f"{session.peer.local_ufrag}:{session.peer.remote_ufrag}"
    request.attributes["PRIORITY"] = 1
    request.attributes["ICE-CONTROLLING"] = 1
    request.add_message_integrity(session.peer._ice.local_password.encode())
    return bytes(request)


async def test_media_on_any_valid_pair_is_taken_and_on_no_other(session: Session) -> None:
    """RFC 8445 §12: a peer may send on another valid pair than the one that we send on."""
    loop = asyncio.get_running_loop()
    other = bound(socket.SOCK_DGRAM)
    before = session.peer.refused["source"]
    await loop.sock_sendto(other, session.media(1), session.target)
    await until(lambda: session.peer.refused["source"] == before + 1)
    # The peer's own check comes from there, and ours is answered: now the pair is valid.
    await loop.sock_sendto(other, check(session), session.target)
    while (message := stun.parse_message(await loop.sock_recv(other, 1500))).message_class is not REQUEST:
        pass
    answer = stun.Message(
        message_method=stun.Method.BINDING,
        message_class=stun.Class.RESPONSE,
        transaction_id=message.transaction_id,
    )
    answer.attributes["XOR-MAPPED-ADDRESS"] = session.target
    assert session.peer._ice.remote_password is not None
    answer.add_message_integrity(session.peer._ice.remote_password.encode())
    await loop.sock_sendto(other, bytes(answer), session.target)
    await loop.sock_sendto(other, session.media(2), session.target)
    await until(lambda: FOREIGN in session.handler.ssrcs)
    session.attack(session.media(3))
    await until(lambda: session.peer.refused["source"] == before + 2)
    other.close()
    assert await session.lives()


async def test_a_stun_flood_is_limited(session: Session) -> None:
    request = bytes(stun.Message(message_method=stun.Method.BINDING, message_class=stun.Class.REQUEST))
    for _ in range(20):
        session.attack(*[request] * 50)
        await asyncio.sleep(0.005)
    assert await session.lives()
    assert session.peer.refused["rate"] > 500


async def test_replayed_and_forged_media_are_dropped(session: Session) -> None:
    kept: list[bytes] = []
    ice = session.peer._ice
    hand_over = ice.on_media

    def tap(kind: object, data: bytes, arrival_ns: int) -> None:
        kept.append(data)
        hand_over(kind, data, arrival_ns)  # type: ignore[arg-type]

    ice.on_media = tap
    await until(lambda: len(kept) > 5)
    ice.on_media = hand_over
    pair = ice._nominated[1]
    count, before = session.handler.rtp, session.peer.unauthentic
    replayed = [data for data in kept if not 192 <= data[1] <= 223][:5]
    for data in replayed:
        pair.protocol.datagram_received(data, pair.remote_addr)
        pair.protocol.datagram_received(data[:-1] + bytes([data[-1] ^ 1]), pair.remote_addr)
    assert session.handler.rtp == count
    assert session.peer.unauthentic == before + 2 * len(replayed)
    assert await session.lives()


async def test_a_peer_that_floods_with_ssrcs_limits_only_itself(session: Session) -> None:
    """SRTP state is kept for each authentic SSRC, so their number has a limit before it is looked at."""
    other = Session()
    await other.connect()
    sender = session.remote.getTransceivers()[0].sender.transport.transport._connection
    flood = [session.media(1, ssrc) for ssrc in range(1, 2_001)]
    for packet in flood:
        await sender.sendto(packet, 1)
        await asyncio.sleep(0)
    await until(lambda: session.peer.refused["ssrc"] >= len(flood) - MAX_SSRCS)
    assert len(session.handler.ssrcs) <= MAX_SSRCS
    assert await session.lives()
    assert await other.lives()
    assert other.peer.refused["ssrc"] == 0
    await other.close()


async def test_a_dead_peer_is_noticed_within_three_seconds(session: Session) -> None:
    # As if its machine had lost its network: its socket neither sends nor receives any more.
    transport = session.remote.getTransceivers()[0].sender.transport.transport
    for protocol in transport._connection._protocols:
        protocol.transport.abort()
    started = time.monotonic()
    assert await session.peer.wait_ended() is PeerEnd.LOST
    assert time.monotonic() - started < 3.0


async def test_a_peer_that_never_connects_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rtc.peer.CONNECT_SECONDS", 0.2)
    made = Session()
    made.remote.addTrack(VideoStreamTrack())
    await made.remote.setLocalDescription(await made.remote.createOffer())
    offer = read_offer(made.remote.localDescription.sdp)
    answers = [AnswerMedia(codecs=offer.media[0].codecs[:1], direction="recvonly")]
    await made.peer.answer(offer, answers)
    assert await made.peer.wait_ended() is PeerEnd.FAILED
    assert made.handler.states == [PeerState.ENDED]
    await made.close()
