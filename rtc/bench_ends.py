"""The two ends of a measurement: a sender of stamped pictures and a receiver that reads them, outside of any
relay, over plain RTP or over WebRTC.

    Camera ─▶ encoder ─▶ RTP │ WHIP ─▶ … what is measured … ─▶ RTP │ WHEP ─▶ decoder ─▶ Sighting

Both are made for delay: encode in one thread, release on the marker, decode in one thread. WebRTC is
aiortc's, but its encoder, which takes 18 ms a picture, and its jitter buffer, which waits for the next
picture, are stepped around: they would hide what is measured. `RtpOutlet` and `WhipOutlet` send pictures
that somebody else has encoded; `RtpSender` and `WhipSender` are these with a live encoder in front.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Coroutine
from typing import Any

from aiortc import RTCPeerConnection, RTCRtpSender, RTCRtpTransceiver, VideoStreamTrack
from aiortc.rate import RemoteBitrateEstimator
from aiortc.rtcrtpreceiver import RTCRtpReceiver, StreamStatistics
from aiortc.rtcrtpsender import RTCEncodedFrame
from aiortc.rtp import RTCP_PSFB_APP, RtcpPsfbPacket, pack_remb_fci
from aiortc.rtp import RtpPacket as AiortcPacket

from relay.config import split_address
from relay.errors import MedferryError
from relay.link import Arrival
from relay.listeners import UDP_BUFFER
from relay.records import VideoFrame
from rtc.bench_peer import BenchPeer, Exchange
from rtc.bench_stamps import Sightings
from rtc.clock import SECOND_NS
from rtc.encode import VideoProfile
from rtc.encode_thread import CodedPicture, EncodeThread
from rtc.feedback import ViewerRate
from rtc.jitter import KeyframeRequest, Nack, VideoOutput
from rtc.outlet import SendingEnd
from rtc.packets import RtpPacket, is_rtcp, nack, parse_rtp, picture_loss
from rtc.sender import RtpStream
from rtc.settings import VIDEO_CLOCK, VideoCodec
from rtc.timeline import Timeline

PAYLOAD_TYPE = 96

NO_LEVEL: Any = None
"""Pictures have no audio level; aiortc takes None for it."""

OWN_SSRC = 0x6D656466
"""Of the RTP receiver's feedback."""


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
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, UDP_BUFFER)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, UDP_BUFFER)
    try:
        sock.bind((host, port)) if bind else sock.connect((host, port))
    except OSError as error:
        sock.close()
        act = "listen on" if bind else "send to"
        raise MedferryError(f"cannot {act} {address}: {error.strerror}: choose another address") from None
    return sock


class RtpOutlet:
    """Sends coded pictures as plain RTP, answers NACKs, and passes keyframe requests on.

    Sender reports go to the next port up, or to the same one with `mux` (RFC 5761).
    """

    def __init__(
        self,
        address: str,
        timeline: Timeline,
        bitrate: int,
        want_keyframe: Callable[[], None],
        *,
        mux: bool = False,
    ) -> None:
        self._socket = _udp(address, bind=False)
        host, port = split_address(address)
        above = f"[{host}]:{port + 1}" if ":" in host else f"{host}:{port + 1}"
        self._reports = self._socket if mux else _udp(above, bind=False)
        self._end = SendingEnd(
            timeline=timeline,
            video=RtpStream(payload_type=PAYLOAD_TYPE, rate=VIDEO_CLOCK, cname="bench"),
            sound=None,
            rate=ViewerRate(bitrate, bitrate),
            send_rtp=lambda packet: self._send(self._socket, packet),
            send_rtcp=lambda packet: self._send(self._reports, packet),
            want_keyframe=want_keyframe,
            sent=lambda picture, now_ns: None,
        )
        self.picture = self._end.picture
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

    def close(self) -> None:
        """Say goodbye."""
        self._end.close()
        for sock in {self._socket, self._reports}:
            asyncio.get_running_loop().remove_reader(sock.fileno())
            sock.close()


class RtpSender:
    """Sends a camera's pictures as plain RTP: a live encoder and its outlet."""

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
        """See `RtpOutlet`; `bitrate` in bits and `rate` in pictures a second."""
        profile = VideoProfile(codec=codec, bitrate=bitrate, keyframe_seconds=keyframe_seconds)
        self._encoder = _Encoder(profile, rate, lambda picture: self._outlet.picture(picture))
        self.offer = self._encoder.offer
        want_keyframe = self._encoder.thread.request_keyframe
        self._outlet = RtpOutlet(address, self._encoder.timeline, bitrate, want_keyframe, mux=mux)

    async def close(self) -> None:
        """Say goodbye; returns when the encoder has ended."""
        self._outlet.close()
        await self._encoder.close()


class RtpReceiver:
    """Receives plain RTP and reads the stamps. Feedback goes back to where the packets come from."""

    def __init__(self, address: str, codec: VideoCodec, *, every: int = 1) -> None:
        """`every`: see `Sightings`."""
        self.sightings = Sightings(codec, self._feedback, every=every)
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


def _prefer(transceiver: RTCRtpTransceiver, codec: VideoCodec) -> None:
    """Offer this codec alone: without RTX, lost packets are repeated as they were."""
    known = RTCRtpSender.getCapabilities("video").codecs
    transceiver.setCodecPreferences([item for item in known if item.mimeType.lower() == f"video/{codec}"])


class WhipOutlet:
    """Publishes coded pictures by WHIP, through aiortc's sender without its encoder."""

    def __init__(
        self, url: str, codec: VideoCodec, want_keyframe: Callable[[], None], token: str | None = None
    ) -> None:
        self._peer = BenchPeer(url, token)
        self._ready: asyncio.Queue[CodedPicture] = asyncio.Queue(maxsize=4)
        self._want_keyframe = want_keyframe
        transceiver = self._peer.connection.addTransceiver(VideoStreamTrack(), direction="sendonly")
        _prefer(transceiver, codec)
        sender: Any = transceiver.sender
        sender._next_encoded_frame = self._next
        sender._send_keyframe = want_keyframe

    def picture(self, picture: CodedPicture) -> None:
        """Send a picture."""
        if self._ready.full():
            # Not connected yet, or sending is slow: what follows must be decodable without it.
            self._ready.get_nowait()
            self._want_keyframe()
        self._ready.put_nowait(picture)

    async def _next(self, codec: object) -> RTCEncodedFrame:
        picture = await self._ready.get()
        timestamp = picture.timeline_ns * VIDEO_CLOCK // SECOND_NS & 0xFFFFFFFF
        return RTCEncodedFrame(picture.coded.payloads, timestamp, NO_LEVEL)

    @property
    def connection(self) -> RTCPeerConnection:
        """aiortc's connection, to add sound to before it is opened."""
        return self._peer.connection

    async def connect(self, exchange: Exchange | None = None) -> None:
        """See `BenchPeer.negotiate`."""
        await self._peer.negotiate(exchange)

    async def close(self) -> None:
        """End the session."""
        await self._peer.end()


class WhipSender:
    """Publishes a camera's pictures by WHIP: a live encoder and its outlet."""

    def __init__(
        self, url: str, codec: VideoCodec, bitrate: int, rate: int, token: str | None = None
    ) -> None:
        profile = VideoProfile(codec=codec, bitrate=bitrate)
        self._encoder = _Encoder(profile, rate, lambda picture: self._outlet.picture(picture))
        self.offer = self._encoder.offer
        self._outlet = WhipOutlet(url, codec, self._encoder.thread.request_keyframe, token)

    @property
    def connection(self) -> RTCPeerConnection:
        """aiortc's connection, to add sound to before it is opened."""
        return self._outlet.connection

    async def connect(self) -> None:
        """See `BenchPeer.negotiate`."""
        await self._outlet.connect()

    async def close(self) -> None:
        """End the session and the encoder."""
        await self._outlet.close()
        await self._encoder.close()


class WhepReceiver:
    """Watches a stream by WHEP and reads the stamps."""

    def __init__(
        self,
        url: str,
        codec: VideoCodec,
        token: str | None = None,
        *,
        silent: bool = False,
        reporting: bool = False,
    ) -> None:
        """
        Args:
            url: Of the endpoint.
            codec: The one that is offered.
            token: Bearer token.
            silent: Count what comes and do nothing else: one more viewer, who costs next to nothing here.
            reporting: Tell the sender what arrives, as a browser does: estimated bitrate (REMB) and loss.
        """
        self._peer = BenchPeer(url, token)
        self.post, self.answer = self._peer.post, self._peer.answer
        self.sightings = Sightings(codec, self._feedback)
        self._tasks: set[asyncio.Task[None]] = set()
        transceiver = self._peer.connection.addTransceiver("video", direction="recvonly")
        _prefer(transceiver, codec)
        self._receiver: RTCRtpReceiver = transceiver.receiver
        self._silent, self._reporting = silent, reporting
        self._estimator = RemoteBitrateEstimator()
        tapped: Any = self._receiver
        tapped._handle_rtp_packet = self._received
        self._statistics: dict[int, StreamStatistics] = tapped._RTCRtpReceiver__remote_streams
        """What aiortc makes receiver reports of."""

    @property
    def connection(self) -> RTCPeerConnection:
        """aiortc's connection, to receive sound with before it is opened."""
        return self._peer.connection

    async def _received(self, packet: AiortcPacket, arrival_time_ms: int) -> None:
        if self._silent:
            self.sightings.received_bytes += len(packet.payload)
            return
        if self._reporting:
            self._report(packet, arrival_time_ms)
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

    def _report(self, packet: AiortcPacket, arrival_time_ms: int) -> None:
        """What aiortc does with each packet before its jitter buffer, which is stepped around."""
        self._statistics.setdefault(packet.ssrc, StreamStatistics(VIDEO_CLOCK)).add(packet)
        if packet.extensions.abs_send_time is None:
            return
        estimate = self._estimator.add(
            abs_send_time=packet.extensions.abs_send_time,
            arrival_time_ms=arrival_time_ms,
            payload_size=len(packet.payload) + packet.padding_size,
            ssrc=packet.ssrc,
        )
        if estimate is not None:
            fci = pack_remb_fci(*estimate)
            remb = RtcpPsfbPacket(fmt=RTCP_PSFB_APP, ssrc=OWN_SSRC, media_ssrc=0, fci=fci)
            self._send(self._receiver._send_rtcp(remb))

    def _feedback(self, output: VideoOutput, ssrc: int) -> None:
        if isinstance(output, Nack):
            self._send(self._receiver._send_rtcp_nack(ssrc, list(output.lost)))
        else:
            assert isinstance(output, KeyframeRequest)
            self._send(self._receiver._send_rtcp_pli(ssrc))

    def _send(self, sending: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(sending)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def connect(self, exchange: Exchange | None = None) -> None:
        """See `BenchPeer.negotiate`."""
        await self._peer.negotiate(exchange)

    async def close(self) -> None:
        """End the session."""
        await self._peer.end()
        self.sightings.close()
