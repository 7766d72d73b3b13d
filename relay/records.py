"""Records: the only things that cross from side A to side B.

A record is a frozen value that validates itself when it is made. The same classes check what the source
sends and what the sink receives, so a source that lies is caught by the sink's own constructor. Fields are
numbers, enums, UIDs, or strings of a bounded alphabet. There is no field for an address, a host name, an AE
title, SDP or free text, and there must never be one.

Times are CLOCK_MONOTONIC nanoseconds of the machine that stamped them. Sizes are bytes.

Never here: I/O, clocks, encodings (see `wire.py`).
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

from relay.errors import RecordError

Buffer: TypeAlias = bytes | bytearray | memoryview

MAX_UID_CHARS = 64
"""PS3.5 §9.1: a UID has at most 64 characters."""

MAX_DIMENSION = 4096
"""Pixels, width or height of a picture. Above it no camera in use and no hardware decoder."""

MIN_DIMENSION = 16
"""Pixels. One macroblock; anything smaller is a malformed parameter set."""

MAX_AUDIO_SAMPLES = 5760
"""Samples per channel in one audio frame: 120 ms at 48 kHz, the longest Opus packet (RFC 6716 §2.1.4)."""

MAX_OBJECT_BYTES = 16 * 2**30
"""Bytes of one object's data set. Larger than any SOP instance in use; lanes set their own lower limit."""

MAX_PART_BYTES = 130 * 1024 - 512
"""Bytes of one object part, so that it fits one fragment (`wire.MAX_PAYLOAD`) together with its object's
start and end."""

MAX_MANIFEST_ENTRIES = 512
"""Entries of one manifest notice: what fits one fragment, and more than a lane sends in one interval."""

MAX_NS = 2**63 - 1

UIDS_REMEMBERED = 1024
"""Judged UIDs that are not looked at again: each is met several times on each side, most in all objects."""

_UID = re.compile(r"(?:0|[1-9][0-9]*)(?:\.(?:0|[1-9][0-9]*))+")
_STREAM = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,30}[a-z0-9])?")
_OBJECT_ID = re.compile(r"[0-9a-f]{32}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def _check(condition: bool, what: str) -> None:
    if not condition:
        raise RecordError(what)


def _check_range(name: str, value: int, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        raise RecordError(f"{name} is {value!r}, outside {low} to {high}")


@lru_cache(maxsize=UIDS_REMEMBERED)
def is_uid(text: str) -> bool:
    """Whether `text` is a UID as PS3.5 §9.1 writes it (digits and dots, no leading zeros, 64 at most)."""
    return len(text) <= MAX_UID_CHARS and _UID.fullmatch(text) is not None


def is_stream_name(text: str) -> bool:
    """Whether `text` may name a stream: 1 to 32 of a-z, 0-9 and inner hyphens."""
    return _STREAM.fullmatch(text) is not None


def _check_uid(name: str, value: str) -> None:
    if not is_uid(value):
        raise RecordError(f"{name} is not a UID of at most {MAX_UID_CHARS} characters")


def _check_id(value: str) -> None:
    _check(_OBJECT_ID.fullmatch(value) is not None, "object id is not 32 lower-case hex digits")


def _check_sha256(value: str) -> None:
    _check(_SHA256.fullmatch(value) is not None, "sha256 is not 64 lower-case hex digits")


def _check_stream(value: str) -> None:
    _check(is_stream_name(value), "stream is not 1 to 32 of a-z, 0-9 and inner hyphens")


def plane_sizes(width: int, height: int) -> tuple[int, int, int]:
    """Bytes of the Y, U and V planes of a yuv420p picture without line padding. Chroma rounds up."""
    chroma = ((width + 1) // 2) * ((height + 1) // 2)
    return width * height, chroma, chroma


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoFrame:
    """One decoded picture: planes without padding, 8 bits, 4:2:0.

    `captured_ns` is when the first byte of the picture reached side A, `decoded_ns` when it was a picture.
    `media_ns` is its time on the stream's own clock, shared with the stream's audio, for lip sync; only
    differences of it mean anything. `epoch` rises when the publisher comes anew, `seq` with each picture.
    `refreshed` tells that it was coded without the pictures before it: all of it may differ from them.
    """

    stream: str
    epoch: int
    seq: int
    captured_ns: int
    decoded_ns: int
    media_ns: int
    width: int
    height: int
    planes: tuple[Buffer, Buffer, Buffer]
    refreshed: bool = False
    format: str = "yuv420p"

    def __post_init__(self) -> None:
        _check_stream(self.stream)
        _check_range("epoch", self.epoch, 0, 2**32 - 1)
        _check_range("seq", self.seq, 0, 2**63 - 1)
        _check_range("captured_ns", self.captured_ns, 0, MAX_NS)
        _check_range("decoded_ns", self.decoded_ns, 0, MAX_NS)
        _check_range("media_ns", self.media_ns, 0, MAX_NS)
        _check_range("width", self.width, MIN_DIMENSION, MAX_DIMENSION)
        _check_range("height", self.height, MIN_DIMENSION, MAX_DIMENSION)
        _check(type(self.refreshed) is bool, "refreshed is not a bool")
        _check(self.format == "yuv420p", "format is not yuv420p")
        sizes = [len(plane) for plane in self.planes]
        expected = [*plane_sizes(self.width, self.height)]
        _check(sizes == expected, f"planes are {sizes} bytes, {self.width}x{self.height} needs {expected}")

    def __repr__(self) -> str:
        return f"<VideoFrame {self.stream} epoch={self.epoch} seq={self.seq} {self.width}x{self.height}>"


@dataclass(frozen=True, slots=True, kw_only=True)
class AudioFrame:
    """Decoded sound: interleaved signed 16-bit little-endian PCM. Times as in `VideoFrame`."""

    stream: str
    epoch: int
    seq: int
    captured_ns: int
    decoded_ns: int
    media_ns: int
    rate: int
    channels: int
    samples: Buffer

    def __post_init__(self) -> None:
        _check_stream(self.stream)
        _check_range("epoch", self.epoch, 0, 2**32 - 1)
        _check_range("seq", self.seq, 0, 2**63 - 1)
        _check_range("captured_ns", self.captured_ns, 0, MAX_NS)
        _check_range("decoded_ns", self.decoded_ns, 0, MAX_NS)
        _check_range("media_ns", self.media_ns, 0, MAX_NS)
        _check(self.rate in (8000, 12000, 16000, 24000, 48000), f"rate is {self.rate!r}, not one of Opus's")
        _check(self.channels in (1, 2), f"channels is {self.channels!r}, not 1 or 2")
        count, rest = divmod(len(self.samples), 2 * self.channels)
        _check(rest == 0, "samples is not a whole number of sample frames")
        _check_range("samples per channel", count, 1, MAX_AUDIO_SAMPLES)

    def __repr__(self) -> str:
        return f"<AudioFrame {self.stream} epoch={self.epoch} seq={self.seq} {len(self.samples)} bytes>"


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectStart:
    """An object begins: what it is, how many bytes of data set follow in parts.

    `received_ns` is when its first byte reached side A, `parsed_ns` when it was checked and in custody.
    `grade` is 1 to 5 (GB/T 39725); 4 where nobody said.
    """

    id: str
    sop_class: str
    sop_instance: str
    transfer_syntax: str
    size: int
    received_ns: int
    parsed_ns: int
    grade: int = 4

    def __post_init__(self) -> None:
        _check_id(self.id)
        _check_uid("sop_class", self.sop_class)
        _check_uid("sop_instance", self.sop_instance)
        _check_uid("transfer_syntax", self.transfer_syntax)
        _check_range("size", self.size, 1, MAX_OBJECT_BYTES)
        _check_range("received_ns", self.received_ns, 0, MAX_NS)
        _check_range("parsed_ns", self.parsed_ns, 0, MAX_NS)
        _check_range("grade", self.grade, 1, 5)


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectPart:
    """Bytes of an object's data set, in order; `offset` is where they begin."""

    id: str
    offset: int
    data: Buffer

    def __post_init__(self) -> None:
        _check_id(self.id)
        _check_range("offset", self.offset, 0, MAX_OBJECT_BYTES)
        _check_range("part bytes", len(self.data), 1, MAX_PART_BYTES)

    def __repr__(self) -> str:
        return f"<ObjectPart {self.id} offset={self.offset} {len(self.data)} bytes>"


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectEnd:
    """An object is whole: the SHA-256 of its data set's bytes."""

    id: str
    sha256: str

    def __post_init__(self) -> None:
        _check_id(self.id)
        _check_sha256(self.sha256)


class StreamKind(enum.IntEnum):
    """What a stream carries."""

    VIDEO = 1
    AUDIO = 2


class StopReason(enum.IntEnum):
    """Why a stream stopped."""

    ENDED = 1
    LOST = 2
    DRAINED = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamStarted:
    """A stream is there. `frame_rate_milli` is thousandths of frames a second, 0 where not declared."""

    stream: str
    kind: StreamKind
    epoch: int
    frame_rate_milli: int = 0

    def __post_init__(self) -> None:
        _check_stream(self.stream)
        _check(isinstance(self.kind, StreamKind), "kind is not a StreamKind")
        _check_range("epoch", self.epoch, 0, 2**32 - 1)
        _check_range("frame_rate_milli", self.frame_rate_milli, 0, 240_000)


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamStopped:
    """A stream is gone. `frames` is how many of it entered the link: B says how many it missed."""

    stream: str
    kind: StreamKind
    epoch: int
    reason: StopReason
    frames: int

    def __post_init__(self) -> None:
        _check_stream(self.stream)
        _check(isinstance(self.kind, StreamKind), "kind is not a StreamKind")
        _check_range("epoch", self.epoch, 0, 2**32 - 1)
        _check(isinstance(self.reason, StopReason), "reason is not a StopReason")
        _check_range("frames", self.frames, 0, 2**63 - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat:
    """A is alive: sent every second; three missing in a row is silence (`link.SILENCE_SECONDS`)."""

    sent_ns: int

    def __post_init__(self) -> None:
        _check_range("sent_ns", self.sent_ns, 0, MAX_NS)


@dataclass(frozen=True, slots=True, kw_only=True)
class ManifestEntry:
    """One object that A finished sending lately."""

    id: str
    size: int
    sha256: str

    def __post_init__(self) -> None:
        _check_id(self.id)
        _check_range("size", self.size, 1, MAX_OBJECT_BYTES)
        _check_sha256(self.sha256)


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What A finished sending lately, repeated, so that B can name what it never saw."""

    entries: tuple[ManifestEntry, ...]

    def __post_init__(self) -> None:
        _check_range("manifest entries", len(self.entries), 0, MAX_MANIFEST_ENTRIES)


Notice: TypeAlias = StreamStarted | StreamStopped | Heartbeat | Manifest
Record: TypeAlias = VideoFrame | AudioFrame | ObjectStart | ObjectPart | ObjectEnd | Notice
