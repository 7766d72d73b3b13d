"""RTP and RTCP packets read (RFC 3550, 4585, 4588), and the RTCP that a receiver sends.

    RTP   | V P X CC | M PT | sequence | timestamp | SSRC | CSRC… | extension… | payload | padding |

Pure: bytes and values. A packet that cannot be read gives None, and the caller counts it.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from aiortc import rtp

RTP_HEADER = 12

MAX_RTCP_BLOCKS = 32
"""Packets in one compound RTCP packet; peers send two to five."""

RTX_HEADER = 2
"""Bytes before the original payload in a retransmission (RFC 4588 §4)."""

_header = struct.Struct("!BBHII")
_u16 = struct.Struct("!H")


class RtpPacket(NamedTuple):
    """One RTP packet without its header extensions and padding. `arrival_ns` is when it was received."""

    ssrc: int
    payload_type: int
    seq: int
    timestamp: int
    marker: bool
    payload: bytes
    arrival_ns: int


def parse_rtp(data: bytes, arrival_ns: int) -> RtpPacket | None:
    """The packet in `data`, or None where header, extension or padding do not fit (RFC 3550 §5.1)."""
    if len(data) < RTP_HEADER:
        return None
    first, second, seq, timestamp, ssrc = _header.unpack_from(data)
    if first >> 6 != 2:
        return None
    start = RTP_HEADER + 4 * (first & 0x0F)
    end = len(data)
    if first & 0x10:
        if start + 4 > end:
            return None
        start += 4 + 4 * _u16.unpack_from(data, start + 2)[0]
    if first & 0x20:
        end -= data[-1]
        if data[-1] == 0:
            return None
    if start > end:
        return None
    return RtpPacket(ssrc, second & 0x7F, seq, timestamp, second >= 0x80, data[start:end], arrival_ns)


def unwrap_rtx(packet: RtpPacket, ssrc: int, payload_type: int) -> RtpPacket | None:
    """The packet that a retransmission repeats; None for padding sent on the retransmission stream."""
    if len(packet.payload) <= RTX_HEADER:
        return None
    seq = _u16.unpack_from(packet.payload)[0]
    return packet._replace(ssrc=ssrc, payload_type=payload_type, seq=seq, payload=packet.payload[RTX_HEADER:])


@dataclass(frozen=True, slots=True, kw_only=True)
class SenderReport:
    """What an SR says about a stream's clock: `rtp_timestamp` was at `ntp` (32.32 seconds, RFC 3550 §4)."""

    ssrc: int
    ntp: int
    rtp_timestamp: int
    arrival_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Goodbye:
    """A BYE: these sources have ended."""

    ssrcs: tuple[int, ...]


def is_rtcp(data: bytes) -> bool:
    """Whether a datagram on a multiplexed port is RTCP (RFC 5761 §4)."""
    return len(data) >= 8 and data[0] >> 6 == 2 and 192 <= data[1] <= 223


def parse_rtcp(data: bytes, arrival_ns: int) -> list[SenderReport | Goodbye] | None:
    """The sender reports and goodbyes of a compound packet; None where it is malformed."""
    if not is_rtcp(data):
        return None
    try:
        packets = rtp.RtcpPacket.parse(data)
    except (ValueError, struct.error, IndexError):
        return None
    found: list[SenderReport | Goodbye] = []
    for packet in packets[:MAX_RTCP_BLOCKS]:
        if isinstance(packet, rtp.RtcpSrPacket):
            info = packet.sender_info
            found.append(
                SenderReport(
                    ssrc=packet.ssrc,
                    ntp=info.ntp_timestamp,
                    rtp_timestamp=info.rtp_timestamp,
                    arrival_ns=arrival_ns,
                )
            )
        elif isinstance(packet, rtp.RtcpByePacket):
            found.append(Goodbye(ssrcs=tuple(packet.sources)))
    return found


def nack(ssrc: int, media_ssrc: int, lost: Sequence[int]) -> bytes:
    """A generic NACK for the sequence numbers `lost`, in order (RFC 4585 §6.2.1)."""
    # Written here, since aiortc's own cannot pass 65535, where sequence numbers begin anew.
    groups: list[tuple[int, int]] = []
    for number in lost:
        first, mask = groups[-1] if groups else (number, 0)
        behind = (number - first - 1) & 0xFFFF
        if behind < 16:
            groups[-1] = (first, mask | 1 << behind)
        else:
            groups.append((number, 0))
    words = 2 + len(groups)
    header = _header.pack(0x80 | rtp.RTCP_RTPFB_NACK, rtp.RTCP_RTPFB, words, ssrc, media_ssrc)
    return header + b"".join(struct.pack("!HH", *group) for group in groups)


def picture_loss(ssrc: int, media_ssrc: int) -> bytes:
    """A picture loss indication: please send a keyframe (RFC 4585 §6.3.1)."""
    return bytes(rtp.RtcpPsfbPacket(fmt=rtp.RTCP_PSFB_PLI, ssrc=ssrc, media_ssrc=media_ssrc))


def max_bitrate(ssrc: int, media_ssrc: int, bits_per_second: int) -> bytes:
    """A REMB: send at most so much (draft-alvestrand-rmcat-remb-03 §2)."""
    fci = rtp.pack_remb_fci(bits_per_second, [media_ssrc])
    return bytes(rtp.RtcpPsfbPacket(fmt=rtp.RTCP_PSFB_APP, ssrc=ssrc, media_ssrc=0, fci=fci))


def receiver_report(ssrc: int, cname: str, reports: Sequence[rtp.RtcpReceiverInfo]) -> bytes:
    """A receiver report with the SDES that every compound packet has (RFC 3550 §6.1)."""
    description = rtp.RtcpSourceInfo(ssrc=ssrc, items=[(1, cname.encode())])
    report = rtp.RtcpRrPacket(ssrc=ssrc, reports=list(reports))
    return bytes(report) + bytes(rtp.RtcpSdesPacket(chunks=[description]))
