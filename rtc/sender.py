"""One outgoing RTP stream: headers, history for retransmission, sender reports. Pure: bytes out, times in.

    | V=2 X | M PT | sequence | timestamp | SSRC | BEDE | abs-send-time, playout-delay, mid | payload |

SSRC, first sequence number and first timestamp are random; nothing of side A's streams shows in them. Sender
reports say when what is sent was captured, not when it was sent, so sound and pictures meet at the receiver.
"""

from __future__ import annotations

import secrets
import struct
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from aiortc import rtp

from rtc.bucket import Bucket
from rtc.timeline import RtpClock, Timeline, ntp

MAX_HISTORY = 1024
"""Packets kept for retransmission, by reference: two seconds of 5 Mb/s, far beyond a useful one's age."""

RESEND_GAP_NS = 10_000_000
"""A packet that was sent again is not sent again within this time, however often it is asked for."""

RESEND_RATE = 1_000
"""Retransmissions a second, on average: 10 % of 10,000 packets. A NACK of 40 bytes may ask for hundreds."""

RESEND_BURST = 300
"""Retransmissions at once: a lost keyframe with its follow-ups."""

ABS_SEND_TIME = "http://www.webrtc.org/experiments/rtp-hdrext/abs-send-time"
PLAYOUT_DELAY = "http://www.webrtc.org/experiments/rtp-hdrext/playout-delay"
MID = "urn:ietf:params:rtp-hdrext:sdes:mid"

_header = struct.Struct("!BBHII")


class Outgoing(NamedTuple):
    """A payload on its way: numbered only when it is sent, so that a dropped one leaves no gap."""

    payload: bytes
    timestamp: int
    marker: bool


@dataclass(slots=True)
class _Sent:
    packet: Outgoing
    resent_ns: int = 0


class Extensions:
    """The header extension block of one stream (RFC 8285 §4.2), made once; only the send time changes."""

    def __init__(self, ids: Mapping[str, int], mid: str = "", max_delay_ms: int = 0) -> None:
        """
        Args:
            ids: Negotiated extensions; those beyond ours and ids above 14 are left aside.
            mid: The media section's identifier.
            max_delay_ms: The most a receiver may hold a picture back, in steps of 10; the least is 0.
        """
        values = {ABS_SEND_TIME: bytes(3), PLAYOUT_DELAY: (max_delay_ms // 10).to_bytes(3, "big")}
        if mid and len(mid) <= 16:
            values[MID] = mid.encode()
        body = b"".join(
            bytes((ids[uri] << 4 | len(value) - 1,)) + value
            for uri, value in values.items()
            if 0 < ids.get(uri, 0) < 15
        )
        body += bytes(-len(body) % 4)
        self._block = struct.pack("!HH", 0xBEDE, len(body) // 4) + body if body else b""
        self._timed = 0 < ids.get(ABS_SEND_TIME, 0) < 15

    def at(self, wall_ns: int) -> bytes:
        """The block of a packet that is sent at `wall_ns`."""
        if not self._timed:
            return self._block
        time24 = (wall_ns << 18) // 1_000_000_000 & 0xFFFFFF
        return self._block[:5] + time24.to_bytes(3, "big") + self._block[8:]


class RtpStream:
    """State of one outgoing stream."""

    def __init__(
        self,
        *,
        payload_type: int,
        rate: int,
        cname: str,
        extensions: Extensions | None = None,
        rtx_payload_type: int | None = None,
    ) -> None:
        self.payload_type = payload_type
        self.rtx_payload_type = rtx_payload_type
        self.ssrc = secrets.randbits(32) or 1
        self.rtx_ssrc = self.ssrc ^ 1 if rtx_payload_type is not None else None
        self.clock = RtpClock(rate=rate)
        self.cname = cname
        self.packets = 0
        self.octets = 0
        self.resent = 0
        self.resends_refused = 0
        self._extensions = extensions or Extensions({})
        # In the lower half, so that it does not wrap while a receiver still guesses SRTP's roll-over counter.
        self.sequence = secrets.randbits(15)
        self._rtx_sequence = secrets.randbits(15)
        self._history: OrderedDict[int, _Sent] = OrderedDict()
        self._resends = Bucket(RESEND_RATE, RESEND_BURST / RESEND_RATE)

    def outgoing(self, payloads: list[bytes], timeline_ns: int, *, mark_last: bool) -> list[Outgoing]:
        """The payloads of one picture or sound packet: one timestamp, the marker on the last."""
        timestamp = self.clock.timestamp(timeline_ns)
        found = [Outgoing(payload, timestamp, False) for payload in payloads]
        if mark_last and found:
            found[-1] = found[-1]._replace(marker=True)
        return found

    def number(self, packet: Outgoing, wall_ns: int) -> bytes:
        """The RTP packet, with the next sequence number; remembered for retransmission."""
        sequence = self.sequence
        self.sequence = (sequence + 1) & 0xFFFF
        self.packets += 1
        self.octets += len(packet.payload)
        self._history[sequence] = _Sent(packet)
        if len(self._history) > MAX_HISTORY:
            self._history.popitem(last=False)
        return self._write(packet, self.payload_type, sequence, self.ssrc, packet.payload, wall_ns)

    def resend(self, sequence: int, now_ns: int, wall_ns: int) -> bytes | None:
        """A lost packet again, as RFC 4588 has it where that was negotiated; None where it cannot be."""
        sent = self._history.get(sequence)
        if sent is None or now_ns - sent.resent_ns < RESEND_GAP_NS or not self._resends.take_whole(now_ns):
            self.resends_refused += 1
            return None
        sent.resent_ns = now_ns
        self.resent += 1
        packet = sent.packet
        if self.rtx_payload_type is None or self.rtx_ssrc is None:
            return self._write(packet, self.payload_type, sequence, self.ssrc, packet.payload, wall_ns)
        number, self._rtx_sequence = self._rtx_sequence, (self._rtx_sequence + 1) & 0xFFFF
        payload = sequence.to_bytes(2, "big") + packet.payload
        return self._write(packet, self.rtx_payload_type, number, self.rtx_ssrc, payload, wall_ns)

    def _write(
        self, packet: Outgoing, payload_type: int, sequence: int, ssrc: int, payload: bytes, wall_ns: int
    ) -> bytes:
        block = self._extensions.at(wall_ns)
        first = 0x90 if block else 0x80
        second = 0x80 * packet.marker | payload_type
        return _header.pack(first, second, sequence, packet.timestamp, ssrc) + block + payload

    def report(self, timeline: Timeline, now_ns: int, wall_ns: int) -> bytes:
        """A sender report with its SDES (RFC 3550 §6.4.1): what is captured now has this timestamp."""
        info = rtp.RtcpSenderInfo(
            ntp_timestamp=ntp(wall_ns),
            rtp_timestamp=self.clock.report(timeline, now_ns),
            packet_count=self.packets & 0xFFFFFFFF,
            octet_count=self.octets & 0xFFFFFFFF,
        )
        description = rtp.RtcpSourceInfo(ssrc=self.ssrc, items=[(1, self.cname.encode())])
        sender_report = rtp.RtcpSrPacket(ssrc=self.ssrc, sender_info=info)
        return bytes(sender_report) + bytes(rtp.RtcpSdesPacket(chunks=[description]))

    def goodbye(self) -> bytes:
        """A compound packet that ends the stream (RFC 3550 §6.6)."""
        report = rtp.RtcpRrPacket(ssrc=self.ssrc)
        return bytes(report) + bytes(rtp.RtcpByePacket(sources=[self.ssrc]))
