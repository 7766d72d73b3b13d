"""Plain RTP out: one stream to one address, with sender reports and the SDP that its receiver reads.

    Hub ─▶ RtpOut ─▶ SendingEnd ─▶ UDP  address (RTP), address + 1 (RTCP)

A receiver whose name cannot be resolved is looked for again, and no stream is taken before it is found.

The SDP (RFC 8866) is what FFmpeg (``-protocol_whitelist file,rtp,udp -i FILE``) and GStreamer (``sdpsrc``)
take. It is written anew when the stream's parameter sets are known or change.
"""

from __future__ import annotations

import asyncio
import base64
import ipaddress
import os
import secrets
import socket
import time
from dataclasses import dataclass

from relay.config import split_address
from relay.errors import MedferryError, os_reason
from relay.worker import SinkSide, Status
from rtc.encode import VideoProfile
from rtc.encode_thread import CodedPicture
from rtc.fanout import Hub, Stream
from rtc.feedback import ViewerRate
from rtc.outlet import SendingEnd
from rtc.sender import RtpStream
from rtc.settings import AUDIO_CLOCK, VIDEO_CLOCK, RtpOutSettings
from rtc.sound_thread import CodedSound

RTP_HEADER = 12

SEND_BUFFER = 1 << 20
"""Bytes asked of the kernel: several keyframes, so that a burst is not cut."""

BURST = 64_000
"""Bytes that leave at once: a keyframe of 4 Mb/s whole. Nothing is known of a receiver of plain RTP but its
address; with Linux' default socket buffer it holds 90 packets of this size, and here are 50."""

FIND_SECONDS = 5.0
"""Between two attempts to find the receiver's addresses."""

MAX_RTCP = 1500
"""Bytes read of one RTCP datagram."""

DSCP_AF41 = 34 << 2
"""Interactive video (RFC 8837 §5)."""


class _Path:
    """A connected UDP socket that never blocks. A receiver that is not there costs a counter."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self.host = str(sock.getpeername()[0])

    @classmethod
    async def find(cls, host: str, port: int) -> _Path:
        """The path to an address.

        Raises:
            MedferryError: There is no such address, or no way to it.
        """
        sock: socket.socket | None = None
        try:
            found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_DGRAM)
            family, kind, protocol, _, address = found[0]
            sock = socket.socket(family, kind, protocol)
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
            if family == socket.AF_INET:
                sock.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, DSCP_AF41)
            else:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_TCLASS, DSCP_AF41)
            sock.connect(address)
        except OSError as error:
            if sock is not None:
                sock.close()
            reason = os_reason(error)
            raise MedferryError(f"cannot send RTP to {host}:{port}: {reason}: check the address") from None
        return cls(sock)

    def send(self, packet: bytes) -> bool:
        """Whether the kernel took it. A refusal tells of an earlier packet; this one is tried once more."""
        for _ in range(2):
            try:
                self.socket.send(packet)
            except ConnectionRefusedError:
                continue
            except OSError:
                return False
            return True
        return False


@dataclass(frozen=True, slots=True)
class _Paths:
    """The ways to a receiver's ports. Sound has none where none is sent."""

    video: _Path
    video_rtcp: _Path
    sound: _Path | None = None
    sound_rtcp: _Path | None = None

    @property
    def all(self) -> list[_Path]:
        every = (self.video, self.video_rtcp, self.sound, self.sound_rtcp)
        return [path for path in every if path is not None]

    @classmethod
    async def find(cls, settings: RtpOutSettings) -> _Paths:
        """All of them, or none.

        Raises:
            MedferryError: As `_Path.find`.
        """
        host, port = split_address(settings.address)
        rtcp = split_address(settings.rtcp) if settings.rtcp else (host, port + 1)
        addresses = [(host, port), rtcp]
        if settings.audio is not None:
            host, port = split_address(settings.audio.address)
            addresses += [(host, port), (host, port + 1)]
        found: list[_Path] = []
        try:
            for address in addresses:
                found.append(await _Path.find(*address))
        except BaseException:
            for path in found:
                path.socket.close()
            raise
        return cls(*found)


class RtpOut:
    """The ``[lane.sink.rtp]`` table at work. Implements `fanout.Subscriber`."""

    def __init__(self, settings: RtpOutSettings, hub: Hub, side: SinkSide) -> None:
        self.settings = settings
        self.stream: Stream | None = None
        self.sdp = ""
        """Empty until the receiver is found."""
        self.trouble = ""
        """Why the receiver is not found, in words; empty where nothing is wrong."""
        self._hub = hub
        self._state = side.state
        self._log = side.log
        self._session = secrets.randbits(62)
        self._version = 0
        self._sets: tuple[bytes, ...] = ()
        self._paths: _Paths | None = None
        cname = secrets.token_hex(8)
        self._video = RtpStream(payload_type=settings.payload_type, rate=VIDEO_CLOCK, cname=cname)
        self._sound: RtpStream | None = None
        if settings.audio is not None:
            self._sound = RtpStream(payload_type=settings.audio.payload_type, rate=AUDIO_CLOCK, cname=cname)
        self._end: SendingEnd | None = None
        self.refused_rtcp = 0

    def __repr__(self) -> str:
        return f"<RtpOut {self.settings.codec} stream={self.stream.name if self.stream else None}>"

    async def open(self) -> None:
        """Find the receiver, however long that takes, and take a stream that is there already."""
        while self._paths is None:
            try:
                self._paths = await _Paths.find(self.settings)
            except MedferryError as error:
                if self.trouble != str(error):
                    self.trouble = str(error)
                    self._log.warning("%s; tried again every %.0f s", self.trouble, FIND_SECONDS)
                await asyncio.sleep(FIND_SECONDS)
        self.trouble = ""
        for path in self._paths.all:
            asyncio.get_running_loop().add_reader(path.socket.fileno(), self._readable, path.socket)
        self._describe()
        for stream in list(self._hub.streams.values()):
            if stream.live:
                self.appeared(stream)

    def appeared(self, stream: Stream) -> None:
        """A stream has a publisher: take it, where it is the one named, or the first."""
        if self._paths is None:
            return
        if self.stream is not None:
            if self.stream.live or stream is self.stream:
                return
            if self.settings.stream is None:
                self._leave()
        if self.stream is None and self.settings.stream in (None, stream.name):
            self._take(stream)

    def _take(self, stream: Stream) -> None:
        settings = self.settings
        self.stream = stream
        profile = VideoProfile(
            codec=settings.codec,
            bitrate=settings.bitrate,
            keyframe_seconds=settings.keyframe_seconds,
            payload_bytes=settings.mtu - RTP_HEADER,
        )
        self._end = SendingEnd(
            timeline=stream.timeline,
            video=self._video,
            sound=self._sound,
            rate=ViewerRate(settings.bitrate, settings.bitrate),
            send_rtp=self._send_rtp,
            send_rtcp=self._send_rtcp,
            want_keyframe=lambda: thread.request_keyframe(),
            sent=lambda picture, now_ns: self._hub.sent(stream, picture, now_ns),
            burst=BURST,
        )
        thread = self._hub.subscribe(stream, profile, self)
        if settings.audio is not None:
            self._hub.subscribe_sound(stream, settings.audio.bitrate, self)
        self._log.info("RTP out: stream %s", stream.name)

    def _leave(self) -> None:
        if self._end is not None and self.stream is not None:
            self._end.close()
            self._hub.unsubscribe(self.stream, self)
        self._end = self.stream = None

    def picture(self, picture: CodedPicture) -> None:
        """See `fanout.Subscriber`."""
        if picture.coded.sets and picture.coded.sets != self._sets:
            self._sets = picture.coded.sets
            self._describe()
        if self._end is not None:
            self._end.picture(picture)

    def sound(self, sound: CodedSound) -> None:
        """See `fanout.Subscriber`."""
        if self._end is not None:
            self._end.sound(sound)

    def vote(self, now_ns: int) -> int | None:
        """The configured bitrate: plain RTP has no feedback to follow."""
        return self.settings.bitrate

    def _send_rtp(self, packet: bytes) -> bool:
        # Sound and video have ports of their own; the payload type tells them apart.
        assert self._paths is not None
        sound, path = self._sound, self._paths.sound
        is_sound = sound is not None and packet[1] & 0x7F == sound.payload_type
        return path.send(packet) if is_sound and path is not None else self._paths.video.send(packet)

    def _send_rtcp(self, packet: bytes) -> bool:
        assert self._paths is not None
        sound, path = self._sound, self._paths.sound_rtcp
        is_sound = sound is not None and int.from_bytes(packet[4:8], "big") == sound.ssrc
        return path.send(packet) if is_sound and path is not None else self._paths.video_rtcp.send(packet)

    def _readable(self, sock: socket.socket) -> None:
        try:
            data = sock.recv(MAX_RTCP)
        except OSError:
            # A refused port or nothing there any more: sending goes on, and counts for itself.
            return
        if self._end is not None and len(data) >= 8 and data[0] >> 6 == 2 and 192 <= data[1] <= 223:
            self._end.rtcp_received(data, time.monotonic_ns())
        else:
            self.refused_rtcp += 1

    def _describe(self) -> None:
        """Make the SDP, and write it where the settings say."""
        paths = self._paths
        assert paths is not None
        self._version += 1
        self.sdp = describe(
            self.settings,
            host=paths.video.host,
            rtcp_host=paths.video_rtcp.host,
            sound_host=paths.sound.host if paths.sound else "",
            session=(self._session, self._version),
            sets=self._sets,
        )
        if self.settings.sdp_file is None:
            return
        path = os.path.join(self._state, self.settings.sdp_file)
        with open(path + ".new", "w", encoding="ascii", newline="") as file:
            file.write(self.sdp)
        os.replace(path + ".new", path)

    def figures(self) -> Status:
        """For status."""
        return {
            "stream": self.stream.name if self.stream else None,
            "packets": self._video.packets,
            "bytes": self._video.octets,
            "unsent": self._end.unsent if self._end else 0,
        }

    def close(self) -> None:
        """Say goodbye and close the sockets."""
        self._leave()
        for path in self._paths.all if self._paths else ():
            asyncio.get_running_loop().remove_reader(path.socket.fileno())
            path.socket.close()


def _connection(host: str) -> str:
    version = ipaddress.ip_address(host.partition("%")[0]).version
    return f"c=IN IP{version} {host.partition('%')[0]}"


def describe(
    settings: RtpOutSettings,
    *,
    host: str,
    rtcp_host: str,
    sound_host: str,
    session: tuple[int, int],
    sets: tuple[bytes, ...],
) -> str:
    """The SDP of the stream (RFC 8866, RFC 6184 §8.2.1, RFC 7741 §6.2, RFC 7587 §7).

    Args:
        settings: What is sent.
        host: IP address of the video's receiver.
        rtcp_host: The sender reports', used where the settings name an address for them.
        sound_host: The sound's, where there is sound.
        session: Identifier and version of this description.
        sets: SPS and PPS, once known.
    """
    _, port = split_address(settings.address)
    kind = settings.payload_type
    origin = _connection(host).removeprefix("c=")
    lines = ["v=0", f"o=- {session[0]} {session[1]} {origin}", "s=medferry", "t=0 0"]
    lines += [f"m=video {port} RTP/AVP {kind}", _connection(host)]
    if settings.rtcp is not None:
        _, rtcp_port = split_address(settings.rtcp)
        lines.append(f"a=rtcp:{rtcp_port} {_connection(rtcp_host).removeprefix('c=')}")
    if settings.codec == "vp8":
        lines.append(f"a=rtpmap:{kind} VP8/{VIDEO_CLOCK}")
    else:
        lines.append(f"a=rtpmap:{kind} H264/{VIDEO_CLOCK}")
        form = f"a=fmtp:{kind} packetization-mode=1"
        if sets:
            encoded = ",".join(base64.b64encode(unit).decode() for unit in sets)
            form += f";profile-level-id={sets[0][1:4].hex()};sprop-parameter-sets={encoded}"
        lines.append(form)
    lines.append("a=recvonly")
    if settings.audio is not None:
        _, sound_port = split_address(settings.audio.address)
        sound_kind = settings.audio.payload_type
        lines += [
            f"m=audio {sound_port} RTP/AVP {sound_kind}",
            _connection(sound_host),
            f"a=rtpmap:{sound_kind} opus/{AUDIO_CLOCK}/2",
            f"a=fmtp:{sound_kind} sprop-stereo=1",
            "a=recvonly",
        ]
    return "\r\n".join(lines) + "\r\n"
