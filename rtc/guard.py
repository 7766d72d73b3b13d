"""The datagram guard: decides, before any protocol code runs, whether a datagram may come in.

    datagram ─▶ length ─▶ kind (RFC 7983) ─▶ shape ─▶ rate ─▶ source ─▶ STUN │ DTLS │ SRTP │ SRTCP

ICE listens on an open UDP port, so anyone can send to it. Code behind the guard may assume 12 to 1500 bytes,
one of four kinds, a STUN message whose attributes fit into it, and, but for STUN, a source that has proved by
a STUN message with the session's password that it belongs to the session.

Pure: bytes, addresses and the time go in, a verdict comes out.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass, field

from rtc.bucket import Bucket

MIN_DATAGRAM = 12
"""Bytes. An RTP header (RFC 3550 §5.1); no STUN, DTLS or SRTCP message is shorter."""

MAX_DATAGRAM = 1500
"""Bytes. An Ethernet frame's payload; WebRTC peers send 1200 to 1400. OpenSSL's reads assume it, too."""

STUN_HEADER = 20
STUN_COOKIE = 0x2112A442

STRANGER_RATE = 50
"""STUN messages a second, of all sources together that have proved nothing. Each costs an HMAC."""

STRANGER_SECONDS = 2.0
"""Of that rate at once: a browser with a dozen candidates sends about 100 checks."""

MEMBER_RATE = 20_000
"""Datagrams a second of one session's proven sources: 200 Mbit/s of full packets."""

MEMBER_SECONDS = 0.2
"""Of that rate at once: a 4 MB keyframe in one go."""


class Kind(enum.Enum):
    """What a datagram on a multiplexed port is (RFC 7983 §7, RFC 5761 §4)."""

    STUN = "stun"
    DTLS = "dtls"
    SRTP = "srtp"
    SRTCP = "srtcp"


class Refusal(enum.Enum):
    """Why a datagram was dropped; the names are those of the counters."""

    LENGTH = "length"
    KIND = "kind"
    SHAPE = "shape"
    RATE = "rate"
    SOURCE = "source"


def classify(data: bytes) -> Kind | Refusal:
    """The kind of a datagram by its length and first bytes.

    Returns:
        A `Kind`, or `Refusal.LENGTH`, `KIND` or `SHAPE`.
    """
    if not MIN_DATAGRAM <= len(data) <= MAX_DATAGRAM:
        return Refusal.LENGTH
    first = data[0]
    if 128 <= first <= 191:
        return Kind.SRTCP if 192 <= data[1] <= 223 else Kind.SRTP
    if first <= 3:
        return Kind.STUN if _is_stun(data) else Refusal.SHAPE
    if 20 <= first <= 63:
        # A record header (RFC 6347 §4.1); its version is 0xfe.. in DTLS 1.0 to 1.2.
        return Kind.DTLS if len(data) > 13 else Refusal.SHAPE
    return Refusal.KIND


def _is_stun(data: bytes) -> bool:
    """Whether header and attributes fit the datagram exactly (RFC 8489 §5, §14)."""
    if len(data) < STUN_HEADER:
        return False
    length, cookie = struct.unpack_from("!HI", data, 2)
    if cookie != STUN_COOKIE or length % 4 or length + STUN_HEADER != len(data):
        return False
    at = STUN_HEADER
    while at < len(data):
        if at + 4 > len(data):
            return False
        (size,) = struct.unpack_from("!H", data, at + 2)
        at += 4 + (size + 3) // 4 * 4
    return at == len(data)


@dataclass(slots=True)
class Guard:
    """The guard of one ICE session, over all of its sockets."""

    refused: dict[Refusal, int] = field(default_factory=lambda: dict.fromkeys(Refusal, 0))
    _strangers: Bucket = field(default_factory=lambda: Bucket(STRANGER_RATE, STRANGER_SECONDS))
    _members: Bucket = field(default_factory=lambda: Bucket(MEMBER_RATE, MEMBER_SECONDS))

    def admit(self, data: bytes, *, member: bool, now_ns: int) -> Kind | None:
        """The datagram's kind, or None where it must be dropped (and has been counted).

        Args:
            data: The datagram.
            member: Whether its source belongs to the session: it has proved that it knows its passwords.
            now_ns: A monotonic time.
        """
        kind = classify(data)
        if isinstance(kind, Refusal):
            self.refused[kind] += 1
            return None
        if kind is not Kind.STUN and not member:
            self.refused[Refusal.SOURCE] += 1
            return None
        bucket = self._members if member else self._strangers
        if not bucket.take_whole(now_ns):
            self.refused[Refusal.RATE] += 1
            return None
        return kind
