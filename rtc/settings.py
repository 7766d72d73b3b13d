"""The ``[[lane]]`` table of a media lane: what side A listens for, what side B offers, with which limits.

A stream has one name on both sides. WHIP publishers name theirs in the URL; plain RTP, SDP files and RTSP
pulls are named here. Outside of a lab every publisher and viewer needs a token over TLS, and plain RTP has to
be allowed by name (``plaintext = true``) and by address (``from``): RTP itself protects nothing.

Never here: I/O. The worker reads the files that `files()` names.
"""

from __future__ import annotations

import ipaddress
import re
import urllib.parse
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, ConfigDict, Field, StrictBool, model_validator

from relay.config import Address, LaneSettings, Listener, Name, Settings, SideSettings, split_address

MAX_STREAMS = 64
"""Streams of one side, at most, whatever the configuration says."""

MIN_TOKEN_CHARS = 16
"""Characters of a bearer token: below this it can be guessed."""

ANY_STREAM = "*"
"""As a key of `tokens`: the token that opens every stream."""

VideoCodec = Literal["h264", "vp8"]

VIDEO_CLOCK = 90_000
"""Hertz of RTP timestamps of H.264 (RFC 6184 §8.2.1) and VP8 (RFC 7741 §6.1)."""

AUDIO_CLOCK = 48_000
"""Hertz of RTP timestamps of Opus, whatever rate it carries (RFC 7587 §4.1)."""


def _network(text: str) -> str:
    try:
        ipaddress.ip_network(text, strict=False)
    except ValueError:
        raise ValueError(f"{text!r} is no network: write 192.0.2.7 or 192.0.2.0/24") from None
    return text


def _ip(text: str) -> str:
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        raise ValueError(f"{text!r} is no IP address: write one, as in 192.0.2.7") from None


def _media_address(text: str) -> str:
    _, port = split_address(text)
    if port > 65535:
        raise ValueError(f"port {port} is outside 0 to 65535: choose another")
    if port == 65535:
        raise ValueError("port 65535 leaves none for RTCP above it: choose a lower, even port")
    return text


def _port_range(text: str) -> str:
    low, high = split_ports(text)
    if not 1024 <= low <= high <= 65535:
        raise ValueError(f"{text!r}: write low-high within 1024 to 65535, as in 50000-50099")
    return text


def split_ports(text: str) -> tuple[int, int]:
    """``low-high`` as two numbers.

    Raises:
        ValueError: `text` is not two numbers with a hyphen between.
    """
    low, hyphen, high = text.partition("-")
    if not (hyphen and low.isdigit() and high.isdigit()):
        raise ValueError(f"{text!r}: write low-high, as in 50000-50099")
    return int(low), int(high)


def _rtsp_url(text: str) -> str:
    try:
        parts = urllib.parse.urlsplit(text)
        host = parts.hostname
    except ValueError:
        host = None
    if not host or parts.scheme not in ("rtsp", "rtsps"):
        raise ValueError("not an RTSP address: write rtsp://host/path or rtsps://host/path")
    return text


class IceUrl(NamedTuple):
    """A STUN or TURN URI in its parts (RFC 7064, RFC 7065)."""

    scheme: str
    host: str
    port: int
    transport: str
    """``udp`` or ``tcp``."""


def split_ice_url(text: str) -> IceUrl:
    """``stun:host:port``, ``turn:host:port?transport=udp`` or ``turns:host:port``; the port may be left out.

    Raises:
        ValueError: `text` is none of them.
    """
    scheme, _, rest = text.partition(":")
    address, mark, query = rest.partition("?")
    transport = query.removeprefix("transport=") if mark else "tcp" if scheme == "turns" else "udp"
    if scheme not in ("stun", "turn", "turns") or transport not in ("udp", "tcp"):
        raise ValueError(f"{text!r}: write stun:host:port, turn:host:port or turns:host:port")
    if not re.search(r":[0-9]+$", address) or address.endswith("]"):
        address += ":5349" if scheme == "turns" else ":3478"
    host, port = split_address(address)
    if not 0 < port <= 65535:
        raise ValueError(f"{text!r}: port {port} is outside 1 to 65535: choose another")
    return IceUrl(scheme, host, port, transport)


def _ice_url(text: str) -> str:
    split_ice_url(text)
    return text


_SDP_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,59}\.sdp")
"""Names that are none of the worker's own files."""

Network = Annotated[str, AfterValidator(_network)]
"""An address or a network in CIDR form, IPv4 or IPv6."""

PortRange = Annotated[str, AfterValidator(_port_range)]
"""``low-high``, both inclusive."""

MediaAddress = Annotated[str, AfterValidator(_media_address)]
"""``host:port`` of RTP. RTCP is on the next port up, or on the same one where the peer multiplexes."""

PayloadType = Annotated[int, Field(ge=96, le=127)]
"""Dynamic payload type (RFC 3551 §3)."""

Bitrate = Annotated[int, Field(ge=50_000, le=50_000_000)]
"""Bits per second of a video stream."""

FrameRate = Annotated[float, Field(ge=1, le=240)]
"""Pictures a second."""

AudioBitrate = Annotated[int, Field(ge=6_000, le=510_000)]
"""Bits per second of Opus (RFC 6716 §2.1.1)."""


class IceServer(Settings):
    """A STUN or TURN server: used here, and offered to clients in Link headers (RFC 9725 §4.6)."""

    urls: Annotated[tuple[Annotated[str, AfterValidator(_ice_url)], ...], Field(min_length=1, max_length=4)]
    username: str | None = None
    credential: Annotated[str | None, Field(repr=False)] = None

    @model_validator(mode="after")
    def _turn_has_credentials(self) -> IceServer:
        if any(url.startswith("turn") for url in self.urls) and not (self.username and self.credential):
            raise ValueError("a TURN server needs a username and a credential: add both keys")
        return self


class WebRtcSettings(Settings):
    """What WHIP and WHEP share: where HTTP listens, who may come, and where ICE works."""

    listen: Address
    tls_certificate: str | None = None
    """PEM file with the certificate and its chain. With `tls_key` the listener speaks HTTPS."""
    tls_key: str | None = None
    tokens: Annotated[dict[str, str], Field(repr=False, max_length=MAX_STREAMS, default_factory=dict)]
    """Bearer token by stream name; ``"*"`` opens every stream. Empty: open to everyone (lab only)."""
    origins: Annotated[tuple[str, ...], Field(max_length=32)] = ("*",)
    """Web origins whose pages may call (CORS); ``*`` for all. A token is needed either way."""
    udp_ports: PortRange | None = None
    """UDP ports of ICE, for the firewall; one per session and address. None: any free port."""
    addresses: Annotated[tuple[Annotated[str, AfterValidator(_ip)], ...], Field(max_length=16)] = ()
    """This machine's IP addresses that ICE offers. Empty: all of its interfaces (and in a lab, loopback)."""
    ice_servers: Annotated[tuple[IceServer, ...], Field(max_length=4)] = ()
    max_sessions: Annotated[int, Field(ge=1, le=1000)] = 16
    """Sessions at once; more are answered 503 with Retry-After."""

    @model_validator(mode="after")
    def _consistent(self) -> WebRtcSettings:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("TLS needs a certificate and a key: set both tls_certificate and tls_key")
        for stream, token in self.tokens.items():
            if len(token) < MIN_TOKEN_CHARS or not token.isascii() or not token.isprintable() or " " in token:
                raise ValueError(
                    f"token of {stream!r}: write at least {MIN_TOKEN_CHARS} visible ASCII characters"
                )
        return self

    @property
    def tls(self) -> bool:
        return self.tls_certificate is not None

    def files(self) -> list[str]:
        """The key material that the supervisor opens for the worker."""
        return [path for path in (self.tls_certificate, self.tls_key) if path is not None]

    def not_for_patients(self) -> list[str]:
        """What keeps this table from being used outside of a lab."""
        problems = []
        if not self.tls:
            problems.append("HTTP without TLS: set tls_certificate and tls_key, or lab = true")
        if not self.tokens:
            problems.append("open to everyone: add a tokens table, or lab = true")
        return problems


class WhipSettings(WebRtcSettings):
    """``[lane.source.whip]``: WebRTC publishers. POST /whip/{stream} (RFC 9725)."""

    codecs: Annotated[tuple[VideoCodec, ...], Field(min_length=1)] = ("h264", "vp8")
    """Video codecs accepted, in order of preference."""
    max_bitrate: Bitrate = 8_000_000
    """Most that a publisher is asked to send (REMB)."""


class _From(Settings):
    """Who may send: the key is ``from``, which Python keeps for itself."""

    model_config = ConfigDict(serialize_by_alias=True)

    allow: Annotated[tuple[Network, ...], Field(alias="from", max_length=32)] = ()
    """Where the sender may be. Empty: the first who sends is the sender until silent (lab only)."""
    plaintext: StrictBool = False
    """Pictures may be unencrypted on this network. Needed outside of a lab."""

    def not_for_patients(self) -> list[str]:
        """What keeps this table from being used outside of a lab."""
        problems = []
        if not self.plaintext:
            problems.append("plain RTP is not encrypted: allow it with plaintext = true")
        if not self.allow:
            problems.append('anyone may send: name the sender, as in from = ["192.0.2.10"]')
        return problems


class AudioRtpIn(Settings):
    """Opus that belongs to a plain RTP video stream."""

    listen: MediaAddress
    payload_type: PayloadType | None = None
    """None: whatever the first packet says."""


class RtpInSettings(_From):
    """``[lane.source.rtp]``: one video stream over plain RTP, described here."""

    listen: MediaAddress
    codec: VideoCodec = "h264"
    stream: Name | None = None
    """None: the lane's name."""
    payload_type: PayloadType | None = None
    """None: whatever the first packet says."""
    audio: AudioRtpIn | None = None


class SdpFileSettings(_From):
    """``[[lane.source.sdp]]``: streams over plain RTP, described by an SDP file (RFC 8866)."""

    file: str
    stream: Name


class RtspSettings(Settings):
    """``[[lane.source.rtsp]]``: a camera that is asked for its stream (RTSP over TCP or UDP)."""

    url: Annotated[str, AfterValidator(_rtsp_url), Field(repr=False)]
    stream: Name
    transport: Literal["tcp", "udp"] = "tcp"
    audio: StrictBool = True
    plaintext: StrictBool = False

    def not_for_patients(self) -> list[str]:
        """What keeps this table from being used outside of a lab."""
        if self.plaintext or self.url.startswith("rtsps:"):
            return []
        return ["RTSP without TLS: use rtsps://, or allow it with plaintext = true"]


class MediaSource(SideSettings):
    """``[lane.source]`` of a media lane."""

    rtp: RtpInSettings | None = None
    sdp: Annotated[tuple[SdpFileSettings, ...], Field(max_length=MAX_STREAMS)] = ()
    rtsp: Annotated[tuple[RtspSettings, ...], Field(max_length=MAX_STREAMS)] = ()
    whip: WhipSettings | None = None
    max_streams: Annotated[int, Field(ge=1, le=MAX_STREAMS)] = 16
    """Publishers at once."""
    max_pixels_per_second: Annotated[int, Field(ge=1_000_000, le=10_000_000_000)] = 500_000_000
    """Decoded pixels a second of all streams together: eight streams of 1080p30."""
    max_frame_rate: FrameRate = 60.0
    """Pictures a second of one stream; what comes faster is left out."""

    @model_validator(mode="after")
    def _has_a_source(self) -> MediaSource:
        if not (self.rtp or self.sdp or self.rtsp or self.whip):
            raise ValueError("nothing to receive: add one of rtp, sdp, rtsp, whip")
        return self

    def listeners(self) -> list[Listener]:
        """Metrics, WHIP's HTTP, and RTP with RTCP above it. SDP files' ports are bound by the worker."""
        found = super().listeners()
        if self.whip is not None:
            found.append(Listener(name="whip", address=self.whip.listen, kind="tcp"))
        if self.rtp is not None:
            found += _rtp_listeners("rtp", self.rtp.listen)
            if self.rtp.audio is not None:
                found += _rtp_listeners("rtp-audio", self.rtp.audio.listen)
        return found

    def files(self) -> list[str]:
        """WHIP's key material and the SDP files."""
        return [*(self.whip.files() if self.whip else []), *(item.file for item in self.sdp)]

    def not_for_patients(self) -> list[str]:
        """What keeps this side from being used outside of a lab."""
        parts: list[tuple[str, Any]] = [("rtp", self.rtp), ("whip", self.whip)]
        parts += [("sdp", item) for item in self.sdp] + [("rtsp", item) for item in self.rtsp]
        return [f"{key}: {text}" for key, part in parts if part for text in part.not_for_patients()]


class AudioRtpOut(Settings):
    """Opus beside a plain RTP video stream."""

    address: MediaAddress
    bitrate: AudioBitrate = 64_000
    payload_type: PayloadType = 111


class RtpOutSettings(Settings):
    """``[lane.sink.rtp]``: one stream sent on as plain RTP, as its receiver's SDP file describes it."""

    address: MediaAddress
    codec: VideoCodec = "h264"
    bitrate: Bitrate = 4_000_000
    stream: Name | None = None
    """Which stream; None: the first that appears, until it stops."""
    payload_type: PayloadType = 96
    mtu: Annotated[int, Field(ge=576, le=1500)] = 1200
    """Bytes of one RTP packet, header included."""
    keyframe_seconds: Annotated[float, Field(ge=0.5, le=60)] = 2.0
    """A receiver of plain RTP that joins late waits at most this long for a picture."""
    rtcp: Address | None = None
    """Where sender reports go; None: the port above `address`."""
    sdp_file: str | None = None
    """Where the worker writes the SDP that describes this stream: a name in the side's state directory."""
    audio: AudioRtpOut | None = None
    plaintext: StrictBool = False
    """Pictures may be unencrypted on this network. Needed outside of a lab."""

    @model_validator(mode="after")
    def _sdp_file_stays_home(self) -> RtpOutSettings:
        if self.sdp_file is not None and not _SDP_FILE.fullmatch(self.sdp_file):
            raise ValueError(
                "sdp_file is a file in the side's state directory: write a name, as in camera.sdp"
            )
        return self

    def not_for_patients(self) -> list[str]:
        """What keeps this table from being used outside of a lab."""
        return [] if self.plaintext else ["plain RTP is not encrypted: allow it with plaintext = true"]


class WhepSettings(WebRtcSettings):
    """``[lane.sink.whep]``: WebRTC viewers. POST /whep/{stream}; GET / is a viewer page."""

    codecs: Annotated[tuple[VideoCodec, ...], Field(min_length=1)] = ("h264", "vp8")
    """Video codecs offered, in order of preference. Each one in use costs an encoder per stream."""
    bitrate: Bitrate = 4_000_000
    """Bits per second of a video stream when nothing limits it."""
    min_bitrate: Bitrate = 300_000
    """What viewers' feedback may bring it down to."""
    audio_bitrate: AudioBitrate = 64_000

    @model_validator(mode="after")
    def _bitrates_ordered(self) -> WhepSettings:
        if self.min_bitrate > self.bitrate:
            raise ValueError("min_bitrate is above bitrate: lower it")
        return self


class MediaSink(SideSettings):
    """``[lane.sink]`` of a media lane."""

    rtp: RtpOutSettings | None = None
    whep: WhepSettings | None = None
    max_streams: Annotated[int, Field(ge=1, le=MAX_STREAMS)] = 16
    max_pixels_per_second: Annotated[int, Field(ge=1_000_000, le=10_000_000_000)] = 500_000_000
    """Encoded pixels a second of all encoders together: eight of 1080p30."""
    max_frame_rate: FrameRate = 60.0
    """Pictures a second of one stream, whatever the source says."""

    @model_validator(mode="after")
    def _has_a_sink(self) -> MediaSink:
        if not (self.rtp or self.whep):
            raise ValueError("nothing to send: add rtp or whep")
        return self

    def listeners(self) -> list[Listener]:
        """Metrics and WHEP's HTTP."""
        found = super().listeners()
        if self.whep is not None:
            found.append(Listener(name="whep", address=self.whep.listen, kind="tcp"))
        return found

    def files(self) -> list[str]:
        """WHEP's key material."""
        return self.whep.files() if self.whep else []

    def not_for_patients(self) -> list[str]:
        """What keeps this side from being used outside of a lab."""
        parts: list[tuple[str, Any]] = [("rtp", self.rtp), ("whep", self.whep)]
        return [f"{key}: {text}" for key, part in parts if part for text in part.not_for_patients()]


class MediaLane(LaneSettings):
    """A ``[[lane]]`` of kind ``media``."""

    kind: Literal["media"]
    source: MediaSource
    sink: MediaSink

    @model_validator(mode="after")
    def _consistent(self) -> MediaLane:
        named = [item.stream for item in self.source.sdp] + [item.stream for item in self.source.rtsp]
        if self.source.rtp is not None:
            named.append(self.rtp_stream)
        for name in named:
            if named.count(name) > 1:
                raise ValueError(f"stream {name!r} is named twice: give each stream its own name")
        if self.lab:
            return self
        problems = [f"source.{text}" for text in self.source.not_for_patients()]
        problems += [f"sink.{text}" for text in self.sink.not_for_patients()]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def rtp_stream(self) -> str:
        """The name of the stream that ``[lane.source.rtp]`` describes: its own, else the lane's."""
        rtp = self.source.rtp
        return rtp.stream if rtp is not None and rtp.stream is not None else self.name


def _rtp_listeners(name: str, address: str) -> list[Listener]:
    """RTP at `address` and RTCP on the port above (RFC 3550 §11). Port 0 leaves RTCP multiplexed only."""
    host, port = split_address(address)
    found = [Listener(name=name, address=address, kind="udp")]
    if port:
        above = f"[{host}]:{port + 1}" if ":" in host else f"{host}:{port + 1}"
        found.append(Listener(name=f"{name}-rtcp", address=above, kind="udp"))
    return found
