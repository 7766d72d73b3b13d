"""Cuts encoded pictures into RTP payloads: H.264 (RFC 6184) and VP8 (RFC 7741). Pure.

    H.264   | STAP-A: SPS, PPS | NAL unit | FU-A | FU-A | ... | FU-A |
    VP8     | descriptor S=1   | descriptor S=0 | ...

An Opus packet is its own payload (RFC 7587 §4.2) and needs nothing from here. All payloads of one picture
share one RTP timestamp and the last one carries the marker bit: whoever adds the RTP headers sees to it.

Never here: RTP headers, sockets, clocks.
"""

from __future__ import annotations

from collections.abc import Iterable

from rtc.depayload import FU_A, NAL_PPS, NAL_SPS, STAP_A

MAX_PAYLOAD = 1160
"""Bytes of one payload. With 12 of RTP, 24 of header extensions, 16 of SRTP tag and 48 of IPv6 and UDP the
packet stays below 1280, the smallest MTU an IPv6 path may have (RFC 8200 §5)."""

MAX_PICTURE_ID = 0x7FFF
"""VP8's picture id has 15 bits (RFC 7741 §4.2)."""

NAL_SEI = 6
NAL_DELIMITER = 9
NAL_FILLER = 12

_UNWANTED = frozenset({NAL_SEI, NAL_DELIMITER, NAL_FILLER})
"""SEI may say which encoder made the stream and with what settings; the others carry nothing."""


def sendable(units: Iterable[bytes]) -> list[bytes]:
    """Those NAL units that are sent: parameter sets and slices, never SEI, delimiters or filler."""
    return [unit for unit in units if unit[0] & 0x1F not in _UNWANTED]


def h264_payloads(units: list[bytes], limit: int = MAX_PAYLOAD) -> list[bytes]:
    """RTP payloads of one access unit, packetization mode 1 (RFC 6184 §6.3).

    Args:
        units: NAL units in decoding order, without start codes.
        limit: Most bytes of one payload; at least 3.
    """
    payloads: list[bytes] = []
    sets: list[bytes] = []
    for unit in units:
        if unit[0] & 0x1F in (NAL_SPS, NAL_PPS):
            sets.append(unit)
            continue
        payloads += _aggregate(sets, limit)
        sets = []
        payloads += _fragment(unit, limit)
    return payloads + _aggregate(sets, limit)


def _aggregate(units: list[bytes], limit: int) -> list[bytes]:
    """STAP-A (RFC 6184 §5.7.1) of small units that belong together."""
    if len(units) < 2 or 1 + sum(2 + len(unit) for unit in units) > limit:
        return [payload for unit in units for payload in _fragment(unit, limit)]
    importance = max(unit[0] & 0x60 for unit in units)
    body = b"".join(len(unit).to_bytes(2, "big") + unit for unit in units)
    return [bytes((importance | STAP_A,)) + body]


def _fragment(unit: bytes, limit: int) -> list[bytes]:
    """A single NAL unit packet, or fragments of nearly equal size (FU-A, RFC 6184 §5.8)."""
    if len(unit) <= limit:
        return [unit]
    indicator = unit[0] & 0x60 | FU_A
    kind = unit[0] & 0x1F
    size = len(unit) - 1
    count = -(-size // (limit - 2))
    cuts = [1 + size * index // count for index in range(count + 1)]
    fragments = []
    for index in range(count):
        flags = (0x80 if index == 0 else 0) | (0x40 if index == count - 1 else 0)
        fragments.append(bytes((indicator, flags | kind)) + unit[cuts[index] : cuts[index + 1]])
    return fragments


def vp8_payloads(frame: bytes, picture_id: int, limit: int = MAX_PAYLOAD) -> list[bytes]:
    """RTP payloads of one VP8 frame, each with a descriptor of four bytes (RFC 7741 §4.2).

    Args:
        frame: One frame as libvpx writes it.
        picture_id: 0 to `MAX_PICTURE_ID`, one more for each frame.
        limit: Most bytes of one payload; at least 5.
    """
    tail = bytes((0x80, 0x80 | picture_id >> 8, picture_id & 0xFF))
    count = max(1, -(-len(frame) // (limit - 4)))
    cuts = [len(frame) * index // count for index in range(count + 1)]
    return [
        (b"\x90" if index == 0 else b"\x80") + tail + frame[cuts[index] : cuts[index + 1]]
        for index in range(count)
    ]
