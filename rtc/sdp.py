"""SDP files for plain RTP, as FFmpeg and GStreamer write them (RFC 8866, 6184 §8, 7587 §7, 7741 §6).

    v=0 …  m=video 5004 RTP/AVP 96  a=rtpmap:96 H264/90000  ─▶ Flow(kind, codec, payload type, where)

One video section and, if it is there, one section of Opus make a stream. Other codecs are refused by name:
a stream that silently lacks its sound would be worse.

Pure: text in, values out.
"""

from __future__ import annotations

import base64
import binascii
import ipaddress
from dataclasses import dataclass

from relay.errors import ConfigError, PeerError
from rtc.depayload import NAL_PPS, NAL_SPS, START_CODE
from rtc.offer import Codec, attributes, read_codecs, sections

SUPPORTED = {"video": ("h264", "vp8"), "audio": ("opus",)}

MAX_PARAMETER_SETS = 4_096
"""Bytes of all parameter sets that an SDP file carries."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Flow:
    """One RTP stream to be received. `payload_type` None: whatever comes first."""

    kind: str
    codec: str
    host: str = ""
    port: int = 0
    rtcp_port: int | None = None
    """None where RTCP is multiplexed on the RTP port."""
    payload_type: int | None = None
    parameter_sets: bytes = b""
    """H.264's, in Annex B; empty where they come in the stream."""


def read_parameter_sets(text: str) -> bytes:
    """``sprop-parameter-sets`` (RFC 6184 §8.1) as Annex B.

    Raises:
        PeerError: It is not base64 of parameter sets.
    """
    found = b""
    for item in filter(None, text.split(",")):
        try:
            unit = base64.b64decode(item, validate=True)
        except binascii.Error:
            raise PeerError("sdp", "sprop-parameter-sets is not base64") from None
        if not unit or unit[0] & 0x1F not in (NAL_SPS, NAL_PPS):
            raise PeerError("sdp", "sprop-parameter-sets holds something else")
        found += START_CODE + unit
    if len(found) > MAX_PARAMETER_SETS:
        raise PeerError("sdp", "sprop-parameter-sets is too long")
    return found


def _host(lines: list[tuple[str, str]], default: str) -> str:
    for kind, value in lines:
        parts = value.split()
        if kind == "c" and len(parts) == 3:
            # A multicast address carries its time to live (RFC 8866 §5.7).
            host = parts[2].partition("/")[0]
            try:
                return str(ipaddress.ip_address(host))
            except ValueError:
                raise PeerError("sdp", "the c= line has no IP address") from None
    return default


def _flow(lines: list[tuple[str, str]], default_host: str) -> Flow | None:
    kind, port, protocol, *formats = lines[0][1].split()
    if kind not in SUPPORTED or not port.isdigit() or int(port) == 0:
        return None
    if protocol not in ("RTP/AVP", "RTP/AVPF"):
        raise PeerError("sdp", f"{kind} is not RTP/AVP or RTP/AVPF")
    if not 0 < int(port) < 65535:
        raise PeerError("sdp", f"{kind} has no usable port")
    given = attributes(lines)
    codecs = [codec for codec in read_codecs(formats, given) if codec.name in SUPPORTED[kind]]
    if not codecs:
        names = " or ".join(SUPPORTED[kind])
        raise PeerError("sdp", f"{kind} is of another codec than {names}")
    codec: Codec = codecs[0]
    if codec.name == "h264" and codec.fmtp.get("packetization-mode", "0") not in ("0", "1"):
        raise PeerError("sdp", "H.264 packetization mode 2 is not understood: use mode 1")
    rtcp = given.get("rtcp", [""])[0].split(" ")[0]
    return Flow(
        kind=kind,
        codec=codec.name,
        host=_host(lines, default_host),
        port=int(port),
        rtcp_port=None if "rtcp-mux" in given else int(rtcp) if rtcp.isdigit() else int(port) + 1,
        payload_type=codec.payload_type,
        parameter_sets=read_parameter_sets(codec.fmtp.get("sprop-parameter-sets", "")),
    )


def read_sdp(text: str, where: str) -> list[Flow]:
    """The flows of an SDP file: one of video, at most one of audio.

    Args:
        text: The file's text. What stands before ``v=0`` is skipped: FFmpeg prints a heading.
        where: The file's name, for the message.

    Raises:
        ConfigError: It cannot be used; the message says why.
    """
    start = text.find("v=0")
    try:
        session, media = sections(text[max(start, 0) :])
        flows = [flow for lines in media if (flow := _flow(lines, _host(session, ""))) is not None]
    except (PeerError, ValueError) as error:
        raise ConfigError([f"{where}: {error}: write the file anew with the sender's tool"]) from None
    kinds = [flow.kind for flow in flows]
    if kinds.count("video") != 1 or kinds.count("audio") > 1:
        raise ConfigError([f"{where}: {len(kinds)} media: describe one video and at most one audio"])
    return flows
