"""The two ends of a measurement: a sender of stamped pictures and a receiver that reads them, outside of any
relay, over plain RTP or over WebRTC.

    Camera ─▶ encoder ─▶ RTP │ WHIP ─▶ … what is measured … ─▶ RTP │ WHEP ─▶ decoder ─▶ Sighting

Both are made for delay: encode in one thread, release on the marker, decode in one thread. WebRTC is
aiortc's, but its encoder, which takes 18 ms a picture, and its jitter buffer, which waits for the next
picture, are stepped around: they would hide what is measured.
"""

from __future__ import annotations

import asyncio
import socket
import time
import urllib.parse
from collections.abc import Callable, Iterable
from typing import Any

import aiohttp
import numpy as np
from aiortc import (
    RTCConfiguration,
    RTCPeerConnection,
    RTCRtpSender,
    RTCRtpTransceiver,
    RTCSessionDescription,
    VideoStreamTrack,
)
from aiortc.rtcrtpreceiver import RTCRtpReceiver
from aiortc.rtcrtpsender import RTCEncodedFrame
from aiortc.rtp import RtpPacket as AiortcPacket

from relay.config import split_address
from relay.errors import MedferryError
from relay.link import Arrival
from relay.records import VideoFrame
from rtc.bench_report import Sighting
from rtc.decode_thread import DecodedPicture, VideoOutcome, VideoThread
from rtc.depayload import PAYLOADS
from rtc.encode import VideoProfile
from rtc.encode_thread import CodedPicture, EncodeThread
from rtc.feedback import ViewerRate
from rtc.jitter import KeyframeRequest, Nack, Picture, VideoJitter, VideoOutput
from rtc.outlet import SendingEnd
from rtc.packets import RtpPacket, is_rtcp, nack, parse_rtp, picture_loss
from rtc.sender import RtpStream
from rtc.settings import VIDEO_CLOCK, VideoCodec
from rtc.stamp import read
from rtc.timeline import Timeline

SOCKET_BYTES = 4 << 20
"""Kernel buffer asked for: half a second of pictures, so that this process's own pauses lose nothing."""

PAYLOAD_TYPE = 96

CONNECT_SECONDS = 10.0

NO_LEVEL: Any = None
"""Pictures have no audio level; aiortc takes None for it."""

OWN_SSRC = 0x6D656466
"""Of the RTP receiver's feedback."""


class Sightings:
    """Decodes a stream's packets and keeps what it saw. `feedback` sends NACKs and keyframe requests."""

    def __init__(self, codec: VideoCodec, feedback: Callable[[VideoOutput, int], None]) -> None:
        self.seen: list[Sighting] = []
        self.unreadable = 0
        """Pictures without a stamp that could be believed."""
        self.received_bytes = 0
        self.size = (0, 0)
        """Pixels of the last picture."""
        self._feedback = feedback
        payload = PAYLOADS[codec]
        self._jitter = VideoJitter(starts=payload.starts, is_keyframe=payload.is_keyframe, trusting=True)
        self._thread = VideoThread(codec, self._decoded)
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._ssrc = 0

    def receive(self, packet: RtpPacket) -> None:
        """Take one packet."""
        self._ssrc = packet.ssrc
        self.received_bytes += len(packet.payload)
        self._act(self._jitter.receive(packet, packet.arrival_ns))

    def _due(self) -> None:
        self._act(self._jitter.due(time.monotonic_ns()))

    def _act(self, outputs: Iterable[VideoOutput]) -> None:
        for output in outputs:
            if not isinstance(output, Picture):
                self._feedback(output, self._ssrc)
            elif not self._thread.submit(output):
                self._act(self._jitter.decoder_failed(output.serial, time.monotonic_ns()))
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        deadline = self._jitter.deadline
        if deadline is not None:
            self._timer = self._loop.call_later(max(deadline - time.monotonic_ns(), 0) / 1e9, self._due)

    def _decoded(self, outcomes: list[VideoOutcome]) -> None:
        for outcome in outcomes:
            if not isinstance(outcome, DecodedPicture):
                self._act(self._jitter.decoder_failed(outcome.serial, time.monotonic_ns()))
                continue
            self.size = (outcome.width, outcome.height)
            luma = np.frombuffer(outcome.planes[0], np.uint8).reshape(outcome.height, outcome.width)
            stamp = read(luma)
            if stamp is None:
                self.unreadable += 1
                continue
            self.seen.append(
                Sighting(
                    counter=stamp.counter,
                    painted_us=stamp.time_us,
                    seen_us=outcome.decoded_ns // 1000,
                    timestamp=outcome.timestamp,
                )
            )

    def close(self) -> None:
        """Take and decode nothing more."""
        if self._timer is not None:
            self._timer.cancel()
        self._thread.close()


class _Encoder:
    """Pictures of a camera to coded ones, on a thread."""

    def __init__(self, profile: VideoProfile, rate: int, publish: Callable[[CodedPicture], None]) -> None:
        self.timeline = Timeline()
        self._failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.thread = EncodeThread("camera", profile, rate, publish, self._failure.set_exception)

    def offer(self, frame: VideoFrame) -> None:
        if self._failure.done():
            self._failure.result()
        arrival = Arrival(record=frame, entered_ns=frame.captured_ns, left_ns=frame.captured_ns)
        timeline_ns = self.timeline.at(frame.epoch, frame.media_ns, frame.captured_ns)
        self.thread.offer(arrival, frame, timeline_ns)

    async def close(self) -> None:
        self._failure.cancel()
        await self.thread.close()


def _udp(address: str, *, bind: bool) -> socket.socket:
    host, port = split_address(address)
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
    sock.setblocking(False)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BYTES)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BYTES)
    try:
        sock.bind((host, port)) if bind else sock.connect((host, port))
    except OSError as error:
        sock.close()
        act = "listen on" if bind else "send to"
        raise MedferryError(f"cannot {act} {address}: {error.strerror}: choose another address") from None
    return sock


class RtpSender:
    """Sends a camera's pictures as plain RTP, and answers NACKs and keyframe requests.

    Sender reports go to the next port up, or to the same one with `mux` (RFC 5761).
    """

    def __init__(
        self,
        address: str,
        codec: VideoCodec,
        bitrate: int,
        rate: int,
        keyframe_seconds: float,
        *,
        mux: bool = False,
    ) -> None:
        profile = VideoProfile(codec=codec, bitrate=bitrate, keyframe_seconds=keyframe_seconds)
        self._socket = _udp(address, bind=False)
        self._encoder = _Encoder(profile, rate, lambda picture: self._end.picture(picture))
        self.offer = self._encoder.offer
        host, port = split_address(address)
        above = f"[{host}]:{port + 1}" if ":" in host else f"{host}:{port + 1}"
        self._reports = self._socket if mux else _udp(above, bind=False)
        self._end = SendingEnd(
            timeline=self._encoder.timeline,
            video=RtpStream(payload_type=PAYLOAD_TYPE, rate=VIDEO_CLOCK, cname="bench"),
            sound=None,
            rate=ViewerRate(bitrate, bitrate),
            send_rtp=lambda packet: self._send(self._socket, packet),
            send_rtcp=lambda packet: self._send(self._reports, packet),
            want_keyframe=self._encoder.thread.request_keyframe,
            sent=lambda picture, now_ns: None,
        )
        for sock in {self._socket, self._reports}:
            asyncio.get_running_loop().add_reader(sock.fileno(), self._readable, sock)

    @staticmethod
    def _send(sock: socket.socket, packet: bytes) -> bool:
        try:
            return sock.send(packet) > 0
        except OSError:
            # Nobody listens there yet, or the buffer is full: a lost packet, as on any network.
            return False

    def _readable(self, sock: socket.socket) -> None:
        try:
            data = sock.recv(2048)
        except OSError:
            return
        self._end.rtcp_received(data, time.monotonic_ns())

    async def close(self) -> None:
        """Say goodbye; returns when the encoder has ended."""
        self._end.close()
        for sock in {self._socket, self._reports}:
            asyncio.get_running_loop().remove_reader(sock.fileno())
            sock.close()
        await self._encoder.close()


class RtpReceiver:
    """Receives plain RTP and reads the stamps. Feedback goes back to where the packets come from."""

    def __init__(self, address: str, codec: VideoCodec) -> None:
        self.sightings = Sightings(codec, self._feedback)
        self._socket = _udp(address, bind=True)
        host, port = self._socket.getsockname()[:2]
        self.address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._sender: Any = None
        asyncio.get_running_loop().add_reader(self._socket.fileno(), self._readable)

    def _readable(self) -> None:
        while True:
            try:
                data, sender = self._socket.recvfrom(2048)
            except OSError:
                # Nothing more there, or an earlier feedback packet was refused.
                return
            if is_rtcp(data):
                continue
            packet = parse_rtp(data, time.monotonic_ns())
            if packet is not None:
                self._sender = sender
                self.sightings.receive(packet)

    def _feedback(self, output: VideoOutput, ssrc: int) -> None:
        data = nack(OWN_SSRC, ssrc, output.lost) if isinstance(output, Nack) else picture_loss(OWN_SSRC, ssrc)
        try:
            self._socket.sendto(data, self._sender)
        except OSError:
            # A sender that takes no feedback is measured as it is.
            return

    async def close(self) -> None:
        """Take nothing more."""
        asyncio.get_running_loop().remove_reader(self._socket.fileno())
        self._socket.close()
        self.sightings.close()


class _HttpPeer:
    """A WHIP or WHEP session that aiortc offers (RFC 9725 §4.2)."""

    def __init__(self, url: str, token: str | None) -> None:
        self._url = url
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._location: str | None = None
        self.connection = RTCPeerConnection(RTCConfiguration(iceServers=[]))

    async def negotiate(self) -> None:
        """Offer, post, take the answer, wait for the connection.

        Raises:
            MedferryError: The server refused, or no connection came about.
        """
        await self.connection.setLocalDescription(await self.connection.createOffer())
        headers = {**self._headers, "Content-Type": "application/sdp"}
        sdp = self.connection.localDescription.sdp
        try:
            async with (
                aiohttp.ClientSession() as http,
                http.post(self._url, data=sdp, headers=headers) as answer,
            ):
                text = await answer.text()
                if answer.status != 201:
                    raise MedferryError(f"{self._url}: {answer.status} {text.strip()[:200]}")
                self._location = urllib.parse.urljoin(self._url, answer.headers["Location"])
        except aiohttp.ClientError as error:
            raise MedferryError(f"{self._url}: {error}: is the relay running?") from None
        await self.connection.setRemoteDescription(RTCSessionDescription(text, "answer"))
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                await self._connected()
        except TimeoutError:
            raise MedferryError(f"{self._url}: no connection within {CONNECT_SECONDS:.0f} s") from None

    async def _connected(self) -> None:
        changed = asyncio.Event()
        self.connection.on("connectionstatechange", lambda: changed.set())
        while self.connection.connectionState != "connected":
            if self.connection.connectionState in ("failed", "closed"):
                raise MedferryError(f"{self._url}: the connection failed")
            await changed.wait()
            changed.clear()

    async def end(self) -> None:
        """DELETE the session and close the connection."""
        if self._location is not None:
            async with aiohttp.ClientSession() as http, http.delete(self._location, headers=self._headers):
                self._location = None
        await self.connection.close()


def _prefer(transceiver: RTCRtpTransceiver, codec: VideoCodec) -> None:
    """Offer this codec alone: without RTX, lost packets are repeated as they were."""
    known = RTCRtpSender.getCapabilities("video").codecs
    transceiver.setCodecPreferences([item for item in known if item.mimeType.lower() == f"video/{codec}"])


class WhipSender:
    """Publishes a camera's pictures by WHIP."""

    def __init__(
        self, url: str, codec: VideoCodec, bitrate: int, rate: int, token: str | None = None
    ) -> None:
        self._peer = _HttpPeer(url, token)
        self._ready: asyncio.Queue[CodedPicture] = asyncio.Queue(maxsize=4)
        self._encoder = _Encoder(VideoProfile(codec=codec, bitrate=bitrate), rate, self._publish)
        self.offer = self._encoder.offer
        transceiver = self._peer.connection.addTransceiver(VideoStreamTrack(), direction="sendonly")
        _prefer(transceiver, codec)
        sender: Any = transceiver.sender
        sender._next_encoded_frame = self._next
        sender._send_keyframe = self._encoder.thread.request_keyframe

    def _publish(self, picture: CodedPicture) -> None:
        if self._ready.full():
            # Not connected yet, or sending is slow: what follows must be decodable without it.
            self._ready.get_nowait()
            self._encoder.thread.request_keyframe()
        self._ready.put_nowait(picture)

    async def _next(self, codec: object) -> RTCEncodedFrame:
        picture = await self._ready.get()
        timestamp = picture.timeline_ns * VIDEO_CLOCK // 1_000_000_000 & 0xFFFFFFFF
        return RTCEncodedFrame(picture.coded.payloads, timestamp, NO_LEVEL)

    @property
    def connection(self) -> RTCPeerConnection:
        """aiortc's connection, to add sound to before it is opened."""
        return self._peer.connection

    async def connect(self) -> None:
        """See `_HttpPeer.negotiate`."""
        await self._peer.negotiate()

    async def close(self) -> None:
        """End the session and the encoder."""
        await self._peer.end()
        await self._encoder.close()


class WhepReceiver:
    """Watches a stream by WHEP and reads the stamps."""

    def __init__(self, url: str, codec: VideoCodec, token: str | None = None) -> None:
        self._peer = _HttpPeer(url, token)
        self.sightings = Sightings(codec, self._feedback)
        self._tasks: set[asyncio.Task[None]] = set()
        transceiver = self._peer.connection.addTransceiver("video", direction="recvonly")
        _prefer(transceiver, codec)
        self._receiver: RTCRtpReceiver = transceiver.receiver
        tapped: Any = self._receiver
        tapped._handle_rtp_packet = self._received

    @property
    def connection(self) -> RTCPeerConnection:
        """aiortc's connection, to receive sound with before it is opened."""
        return self._peer.connection

    async def _received(self, packet: AiortcPacket, arrival_time_ms: int) -> None:
        plain = RtpPacket(
            packet.ssrc,
            packet.payload_type,
            packet.sequence_number,
            packet.timestamp,
            bool(packet.marker),
            packet.payload,
            time.monotonic_ns(),
        )
        self.sightings.receive(plain)

    def _feedback(self, output: VideoOutput, ssrc: int) -> None:
        if isinstance(output, Nack):
            send = self._receiver._send_rtcp_nack(ssrc, list(output.lost))
        else:
            assert isinstance(output, KeyframeRequest)
            send = self._receiver._send_rtcp_pli(ssrc)
        task = asyncio.get_running_loop().create_task(send)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def connect(self) -> None:
        """See `_HttpPeer.negotiate`."""
        await self._peer.negotiate()

    async def close(self) -> None:
        """End the session."""
        await self._peer.end()
        self.sightings.close()
