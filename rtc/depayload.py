"""RTP payloads of one picture joined to what a decoder takes: H.264 (RFC 6184) and VP8 (RFC 7741).

    H.264   single NAL │ STAP-A │ FU-A   ─▶ Annex B, parameter sets and slices only
    VP8     descriptor + partition bytes ─▶ one frame

Only well-formed units pass, and the picture's size is read before any decoder sees it: `read_sps` from a
sequence parameter set (H.264 §7.3.2.1), `read_vp8_header` from a keyframe (RFC 6386 §9.1). SEI, delimiters
and units of unknown types are dropped.

Pure. A picture that cannot be joined raises PeerError, which costs that picture.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from relay.errors import PeerError

START_CODE = b"\x00\x00\x00\x01"

NAL_SLICE = 1
NAL_IDR = 5
NAL_SPS = 7
NAL_PPS = 8
STAP_A = 24
FU_A = 28

_PASSED = frozenset({NAL_SLICE, NAL_IDR, NAL_SPS, NAL_PPS})

MAX_UNITS = 512
"""NAL units of one picture: a slice per macroblock row of the largest picture, and parameter sets."""

MAX_PICTURE_BYTES = 8 << 20
"""Of one coded picture: an intra picture of 4096×4096 at more than three bits a pixel."""

PROFILES = {
    66: "baseline",
    77: "main",
    88: "extended",
    100: "high",
    110: "high 10",
    122: "high 4:2:2",
    244: "high 4:4:4",
}
"""profile_idc that may be met."""

DECODED_PROFILES = frozenset({66, 77, 100})
"""8 bits, 4:2:0: what the lane carries."""

_CHROMA_PROFILES = frozenset({100, 110, 122, 244, 44, 83, 86, 118, 128, 138, 139, 134, 135})


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Of a coded picture, in pixels, as declared before decoding."""

    width: int
    height: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Coded:
    """One picture for a decoder. `size` is known where the picture declares it (keyframes)."""

    data: bytes
    keyframe: bool
    size: Size | None


class _Bits:
    """Reads an RBSP bit by bit (H.264 §7.2); past the end is a fault of the peer's."""

    def __init__(self, data: bytes) -> None:
        self._value = int.from_bytes(data, "big")
        self._left = len(data) * 8

    def read(self, count: int) -> int:
        if count > self._left:
            raise PeerError("sps", "H.264 parameter set ends too early")
        self._left -= count
        return (self._value >> self._left) & ((1 << count) - 1)

    def unsigned(self) -> int:
        """ue(v), §9.1. More than 32 leading zeros are no number of this standard."""
        zeros = 0
        while self.read(1) == 0:
            zeros += 1
            if zeros > 32:
                raise PeerError("sps", "H.264 parameter set has an impossible number")
        return (1 << zeros) - 1 + self.read(zeros)

    def signed(self) -> int:
        """se(v), §9.1.1."""
        value = self.unsigned()
        return (value + 1) // 2 if value & 1 else -(value // 2)


def _skip_scaling_list(bits: _Bits, size: int) -> None:
    last = following = 8
    for _ in range(size):
        if following:
            following = (last + bits.signed() + 256) % 256
        last = following or last


def _skip_scaling_matrix(bits: _Bits, chroma: int) -> None:
    for index in range(12 if chroma == 3 else 8):
        if bits.read(1):
            _skip_scaling_list(bits, 16 if index < 6 else 64)


def read_sps(unit: bytes) -> Size:
    """The picture size that a sequence parameter set declares, cropping applied.

    Raises:
        PeerError: It is malformed, or of a profile that the lane does not carry.
    """
    bits = _Bits(unit[1:].replace(b"\x00\x00\x03", b"\x00\x00")[:256])
    profile = bits.read(8)
    if profile not in DECODED_PROFILES:
        name = PROFILES.get(profile, str(profile))
        raise PeerError("profile", f"H.264 profile {name} is not carried: send baseline, main or high")
    bits.read(16)
    bits.unsigned()
    chroma = 1
    if profile in _CHROMA_PROFILES:
        chroma = bits.unsigned()
        depth = (bits.unsigned(), bits.unsigned())
        if chroma != 1 or depth != (0, 0):
            raise PeerError("profile", "H.264 is not 8 bits 4:2:0: send yuv420p")
        bits.read(1)
        if bits.read(1):
            _skip_scaling_matrix(bits, chroma)
    bits.unsigned()
    _skip_order_count(bits)
    bits.unsigned()
    bits.read(1)
    width = (bits.unsigned() + 1) * 16
    map_units = bits.unsigned() + 1
    frames_only = bits.read(1)
    if not frames_only:
        bits.read(1)
    bits.read(1)
    height = map_units * 16 * (2 - frames_only)
    if bits.read(1):
        left, right, top, bottom = (bits.unsigned() for _ in range(4))
        width -= 2 * (left + right)
        height -= 2 * (2 - frames_only) * (top + bottom)
    return Size(width=width, height=height)


def _skip_order_count(bits: _Bits) -> None:
    """Picture order count fields (H.264 §7.3.2.1.1)."""
    kind = bits.unsigned()
    if kind == 0:
        bits.unsigned()
    elif kind == 1:
        bits.read(1)
        bits.signed()
        bits.signed()
        cycle = bits.unsigned()
        if cycle > 255:
            raise PeerError("sps", "H.264 parameter set has an impossible number")
        for _ in range(cycle):
            bits.signed()


def _split_stap(payload: bytes) -> list[bytes]:
    units = []
    at = 1
    while at < len(payload):
        if at + 2 > len(payload):
            raise PeerError("stap", "H.264 aggregation packet is cut short")
        (size,) = struct.unpack_from("!H", payload, at)
        at += 2
        if size == 0 or at + size > len(payload):
            raise PeerError("stap", "H.264 aggregation packet is cut short")
        units.append(payload[at : at + size])
        at += size
    return units


def h264_units(payloads: Sequence[bytes]) -> list[bytes]:
    """The NAL units of the payloads of one picture, in order, of all types.

    Raises:
        PeerError: A payload is malformed, or fragments do not follow each other (RFC 6184 §5.8).
    """
    units: list[bytes] = []
    fragments: list[bytes] | None = None
    for payload in payloads:
        if not payload:
            continue
        kind = payload[0] & 0x1F
        if kind != FU_A and fragments is not None:
            raise PeerError("fragment", "H.264 fragment has no end")
        if kind == FU_A:
            if len(payload) < 3:
                raise PeerError("fragment", "H.264 fragment is empty")
            starts, ends = payload[1] & 0x80, payload[1] & 0x40
            if bool(starts) == (fragments is not None) or (starts and ends):
                raise PeerError("fragment", "H.264 fragments do not follow each other")
            if fragments is None:
                fragments = [bytes([payload[0] & 0xE0 | payload[1] & 0x1F])]
            fragments.append(payload[2:])
            if ends:
                units.append(b"".join(fragments))
                fragments = None
        elif kind == STAP_A:
            units += _split_stap(payload)
        elif 1 <= kind <= 23:
            units.append(payload)
        else:
            raise PeerError("packetization", f"H.264 packet type {kind} is not of packetization mode 1")
        if len(units) > MAX_UNITS:
            raise PeerError("units", f"H.264 picture has more than {MAX_UNITS} units")
    if fragments is not None:
        raise PeerError("fragment", "H.264 fragment has no end")
    return units


def h264_picture(payloads: Sequence[bytes]) -> Coded | None:
    """One H.264 picture in Annex B; None where nothing in it is for the decoder.

    Raises:
        PeerError: It is malformed, too large, or of a profile that the lane does not carry.
    """
    size: Size | None = None
    keyframe = False
    kept: list[bytes] = []
    for unit in h264_units(payloads):
        kind = unit[0] & 0x1F
        if kind not in _PASSED or unit[0] & 0x80 or len(unit) < 2:
            continue
        if kind == NAL_SPS:
            size = read_sps(unit)
        keyframe = keyframe or kind == NAL_IDR
        kept.append(START_CODE)
        kept.append(unit)
    return _coded(b"".join(kept), keyframe, size)


def h264_starts(payload: bytes) -> bool:
    """Whether a payload may be the first of a picture.

    A slice is, if it holds macroblock 0: its first bit is then the number 0 in ue(v) (H.264 §7.3.3).
    Parameter sets, SEI and delimiters precede the first slice.
    """
    kind = payload[0] & 0x1F if payload else 0
    if kind == FU_A:
        return len(payload) > 2 and payload[1] >= 0x80 and _first_slice(payload[1] & 0x1F, payload[2])
    if kind == STAP_A:
        return len(payload) > 4 and _first_slice(payload[3] & 0x1F, payload[4])
    return 1 <= kind <= 23 and len(payload) > 1 and _first_slice(kind, payload[1])


def _first_slice(kind: int, following: int) -> bool:
    return kind not in (NAL_SLICE, NAL_IDR) or following >= 0x80


def h264_is_keyframe(payloads: Sequence[bytes]) -> bool:
    """Whether a picture holds an IDR slice, by the first bytes of its payloads alone."""
    for payload in payloads:
        kind = payload[0] & 0x1F if payload else 0
        if kind == NAL_IDR or (kind == FU_A and len(payload) > 1 and payload[1] & 0x1F == NAL_IDR):
            return True
        if kind == STAP_A and _stap_has_idr(payload):
            return True
    return False


def _stap_has_idr(payload: bytes) -> bool:
    at = 1
    while at + 2 < len(payload):
        if payload[at + 2] & 0x1F == NAL_IDR:
            return True
        at += 2 + struct.unpack_from("!H", payload, at)[0]
    return False


def _coded(data: bytes, keyframe: bool, size: Size | None) -> Coded | None:
    if len(data) > MAX_PICTURE_BYTES:
        raise PeerError("picture", f"a coded picture has more than {MAX_PICTURE_BYTES} bytes")
    return Coded(data=data, keyframe=keyframe, size=size) if data else None


def vp8_descriptor(payload: bytes) -> tuple[int, bool]:
    """Where the VP8 bytes of a payload begin, and whether they begin a picture (RFC 7741 §4.2).

    Raises:
        PeerError: The descriptor is longer than the payload.
    """
    end = len(payload)
    if not end:
        raise PeerError("vp8", "VP8 payload is empty")
    first = payload[0]
    at = 1
    if first & 0x80:
        if at >= end:
            raise PeerError("vp8", "VP8 payload descriptor is cut short")
        extended = payload[at]
        at += 1
        if extended & 0x80:
            if at >= end:
                raise PeerError("vp8", "VP8 payload descriptor is cut short")
            at += 2 if payload[at] & 0x80 else 1
        if extended & 0x40:
            at += 1
        if extended & 0x30:
            at += 1
    if at >= end:
        raise PeerError("vp8", "VP8 payload descriptor is cut short")
    return at, first & 0x17 == 0x10


def read_vp8_header(frame: bytes) -> Size | None:
    """The size that a VP8 keyframe declares; None for other frames (RFC 6386 §9.1).

    Raises:
        PeerError: The header is malformed.
    """
    if len(frame) < 3:
        raise PeerError("vp8", "VP8 frame is cut short")
    if frame[0] & 1:
        return None
    if len(frame) < 10 or frame[3:6] != b"\x9d\x01\x2a":
        raise PeerError("vp8", "VP8 keyframe has no start code")
    width, height = struct.unpack_from("<HH", frame, 6)
    return Size(width=width & 0x3FFF, height=height & 0x3FFF)


def vp8_picture(payloads: Sequence[bytes]) -> Coded | None:
    """One VP8 frame.

    Raises:
        PeerError: A descriptor or the frame's header is malformed, or its beginning is not there.
    """
    parts = []
    for index, payload in enumerate(payloads):
        at, begins = vp8_descriptor(payload)
        if begins != (index == 0):
            raise PeerError("vp8", "VP8 packets do not follow each other")
        parts.append(payload[at:])
    frame = b"".join(parts)
    size = read_vp8_header(frame)
    return _coded(frame, size is not None, size)


def vp8_starts(payload: bytes) -> bool:
    """Whether a payload begins a picture."""
    try:
        return vp8_descriptor(payload)[1]
    except PeerError:
        return False


def vp8_is_keyframe(payloads: Sequence[bytes]) -> bool:
    """Whether a picture is a keyframe, by its first payload alone."""
    try:
        at, begins = vp8_descriptor(payloads[0])
    except PeerError:
        return False
    return begins and not payloads[0][at] & 1


@dataclass(frozen=True, slots=True)
class Payload:
    """How one codec's payloads are read."""

    starts: Callable[[bytes], bool]
    is_keyframe: Callable[[Sequence[bytes]], bool]
    picture: Callable[[Sequence[bytes]], Coded | None]


PAYLOADS = {
    "h264": Payload(h264_starts, h264_is_keyframe, h264_picture),
    "vp8": Payload(vp8_starts, vp8_is_keyframe, vp8_picture),
}
