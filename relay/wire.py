"""The fragment codec: records to fragments and back, without I/O.

A *fragment* is one message on the link (one SEQPACKET message, one datagram). Small records travel several
to a fragment; a large one is cut into many. Every fragment is numbered and authenticated:

     0       2   3   4       6       8              12              16
    +-------+---+---+-------+-------+---------------+---------------+
    | "MF"  | v | s | lane  |   0   |     epoch     | record bytes  |
    +-------+---+---+-------+-------+---------------+---------------+
    |              seq              |          entered_ns           |
    +---------------+---------------+-------------------------------+
    | payload bytes |       0       |  payload …                    |
    +---------------+---------------+-------------------------------+
    |  GMAC (16)                                                    |
    +---------------------------------------------------------------+

Where the link has a tray (`trays.py`), a record too large for one message is one fragment all the same: it
lies in the tray, and a *ticket*, four octets with its length, is the message.

All numbers are big endian. `v` is the version, `s` the shape: WHOLE (payload is one or more whole records),
or FIRST, MIDDLE, LAST of one record of *record bytes* in all. A record is a type octet, a length of four
octets, and a body laid out by the tables below.

The MAC is AES-256-GMAC (AES-GCM over no plaintext, the fragment as associated data; NIST SP 800-38D) under a
key derived from the lane's key and the epoch, with epoch and seq as the nonce. The nonce never repeats under
a key, since an epoch is never used twice and seq only rises. GMAC, because it is the fastest that there is on
processors with AES instructions: 6 µs for 128 KiB, against 12 for Poly1305 and 74 for HMAC-SHA-256. It takes
its data in one piece, and a fragment is therefore put together by a copy of 3 µs: fed piece by piece it costs
5 µs more.

The decoder trusts nothing: what is not exactly a fragment of this lane, authentic, in order, and made of
records that their own classes accept, is refused with a `WireError` and counted.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from relay.errors import RecordError, WireError
from relay.link import Arrival
from relay.memory import Memories
from relay.records import (
    MAX_DIMENSION,
    AudioFrame,
    Buffer,
    Heartbeat,
    Manifest,
    ManifestEntry,
    ObjectEnd,
    ObjectPart,
    ObjectStart,
    Record,
    StopReason,
    StreamKind,
    StreamStarted,
    StreamStopped,
    VideoFrame,
    plane_sizes,
)

MAGIC = b"MF"
VERSION = 1

WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4

HEADER = struct.Struct(">2sBBHHIIQQII")
TAG_BYTES = 16

MAX_PAYLOAD = 130 * 1024
"""Bytes of payload in one fragment. The kernel refuses SEQPACKET messages beyond the send buffer, and from
some 131 KiB on needs 128 KiB in one piece for each; at this size a raw 720p picture is eleven fragments, the
commonest CT (512 × 512 words and up to 6 KiB of header) four, and the cost per byte has levelled off."""

MAX_FRAGMENT = HEADER.size + MAX_PAYLOAD + TAG_BYTES

MAX_RECORD = 3 * MAX_DIMENSION * MAX_DIMENSION // 2 + 4096
"""Bytes of one encoded record: the largest picture and its fields."""

MAX_LARGE_FRAGMENT = HEADER.size + MAX_RECORD + TAG_BYTES
"""Bytes of a fragment that lies in a tray. It is larger than `MAX_FRAGMENT`, WHOLE, and holds one record."""

TICKET = struct.Struct(">I")

KEY_BYTES = 32

_PREFIX = struct.Struct(">BI")
_VIDEO = struct.Struct(">32sIQQQQHHB")
_AUDIO = struct.Struct(">32sIQQQQIB")
_START = struct.Struct(">16s64s64s64sQQQB")
_PART = struct.Struct(">16sQ")
_END = struct.Struct(">16s32s")
_STARTED = struct.Struct(">32sBII")
_STOPPED = struct.Struct(">32sBIBQ")
_HEARTBEAT = struct.Struct(">Q")
_ENTRY = struct.Struct(">16sQ32s")

_TYPES: dict[type[Record], int] = {
    VideoFrame: 1,
    AudioFrame: 2,
    ObjectStart: 3,
    ObjectPart: 4,
    ObjectEnd: 5,
    StreamStarted: 6,
    StreamStopped: 7,
    Heartbeat: 8,
    Manifest: 9,
}


def epoch_key(lane_key: bytes, epoch: int) -> AESGCM:
    """The key of one epoch, derived from the lane's key (HMAC-SHA-256 as a KDF, NIST SP 800-108)."""
    if len(lane_key) != KEY_BYTES:
        raise ValueError(f"a lane key has {KEY_BYTES} bytes")
    return AESGCM(hmac.digest(lane_key, b"medferry fragment key" + epoch.to_bytes(4, "big"), hashlib.sha256))


def _nonce(epoch: int, seq: int) -> bytes:
    return epoch.to_bytes(4, "big") + seq.to_bytes(8, "big")


def _text(value: str) -> bytes:
    return value.encode("ascii")


def _encode_body(record: Record) -> tuple[Buffer, ...]:
    """The body of `record` as a few buffers, large ones by reference."""
    match record:
        case ObjectPart():
            return _PART.pack(bytes.fromhex(record.id), record.offset), record.data
        case VideoFrame():
            fields = _VIDEO.pack(
                _text(record.stream),
                record.epoch,
                record.seq,
                record.captured_ns,
                record.decoded_ns,
                record.media_ns,
                record.width,
                record.height,
                record.refreshed,
            )
            return fields, *record.planes
        case AudioFrame():
            fields = _AUDIO.pack(
                _text(record.stream),
                record.epoch,
                record.seq,
                record.captured_ns,
                record.decoded_ns,
                record.media_ns,
                record.rate,
                record.channels,
            )
            return fields, record.samples
        case ObjectStart():
            return (
                _START.pack(
                    bytes.fromhex(record.id),
                    _text(record.sop_class),
                    _text(record.sop_instance),
                    _text(record.transfer_syntax),
                    record.size,
                    record.received_ns,
                    record.parsed_ns,
                    record.grade,
                ),
            )
        case ObjectEnd():
            return (_END.pack(bytes.fromhex(record.id), bytes.fromhex(record.sha256)),)
        case StreamStarted():
            rate = record.frame_rate_milli
            return (_STARTED.pack(_text(record.stream), record.kind, record.epoch, rate),)
        case StreamStopped():
            stream = _text(record.stream)
            return (_STOPPED.pack(stream, record.kind, record.epoch, record.reason, record.frames),)
        case Heartbeat():
            return (_HEARTBEAT.pack(record.sent_ns),)
        case Manifest():
            rows = record.entries
            return tuple(
                _ENTRY.pack(bytes.fromhex(row.id), row.size, bytes.fromhex(row.sha256)) for row in rows
            )


def _word(raw: bytes) -> str:
    """A fixed-width field back to text: zero padding at the end only, ASCII only."""
    return raw.rstrip(b"\0").decode("ascii")


def _video(body: memoryview) -> VideoFrame:
    stream, epoch, seq, captured, decoded, media, width, height, refreshed = _VIDEO.unpack_from(body)
    if refreshed > 1:
        raise RecordError(f"refreshed is {refreshed}, not 0 or 1")
    if width > MAX_DIMENSION or height > MAX_DIMENSION:
        raise RecordError(f"picture is {width}x{height}")
    sizes = plane_sizes(width, height)
    planes = body[_VIDEO.size :]
    if len(planes) != sum(sizes):
        raise RecordError(f"picture of {width}x{height} has {len(planes)} bytes, not {sum(sizes)}")
    y, u = sizes[0], sizes[0] + sizes[1]
    return VideoFrame(
        stream=_word(stream),
        epoch=epoch,
        seq=seq,
        captured_ns=captured,
        decoded_ns=decoded,
        media_ns=media,
        width=width,
        height=height,
        planes=(planes[:y], planes[y:u], planes[u:]),
        refreshed=bool(refreshed),
    )


def _audio(body: memoryview) -> AudioFrame:
    stream, epoch, seq, captured, decoded, media, rate, channels = _AUDIO.unpack_from(body)
    return AudioFrame(
        stream=_word(stream),
        epoch=epoch,
        seq=seq,
        captured_ns=captured,
        decoded_ns=decoded,
        media_ns=media,
        rate=rate,
        channels=channels,
        samples=body[_AUDIO.size :],
    )


def _start(body: memoryview) -> ObjectStart:
    id_, sop_class, sop_instance, syntax, size, received, parsed, grade = _START.unpack(body)
    return ObjectStart(
        id=id_.hex(),
        sop_class=_word(sop_class),
        sop_instance=_word(sop_instance),
        transfer_syntax=_word(syntax),
        size=size,
        received_ns=received,
        parsed_ns=parsed,
        grade=grade,
    )


def _part(body: memoryview) -> ObjectPart:
    id_, offset = _PART.unpack_from(body)
    return ObjectPart(id=id_.hex(), offset=offset, data=body[_PART.size :])


def _end(body: memoryview) -> ObjectEnd:
    id_, sha256 = _END.unpack(body)
    return ObjectEnd(id=id_.hex(), sha256=sha256.hex())


def _started(body: memoryview) -> StreamStarted:
    stream, kind, epoch, rate = _STARTED.unpack(body)
    return StreamStarted(stream=_word(stream), kind=StreamKind(kind), epoch=epoch, frame_rate_milli=rate)


def _stopped(body: memoryview) -> StreamStopped:
    stream, kind, epoch, reason, frames = _STOPPED.unpack(body)
    return StreamStopped(
        stream=_word(stream), kind=StreamKind(kind), epoch=epoch, reason=StopReason(reason), frames=frames
    )


def _heartbeat(body: memoryview) -> Heartbeat:
    return Heartbeat(sent_ns=_HEARTBEAT.unpack(body)[0])


def _manifest(body: memoryview) -> Manifest:
    rows = _ENTRY.iter_unpack(body)
    return Manifest(
        entries=tuple(ManifestEntry(id=i.hex(), size=size, sha256=sha.hex()) for i, size, sha in rows)
    )


_DECODERS: dict[int, Callable[[memoryview], Record]] = {
    1: _video,
    2: _audio,
    3: _start,
    4: _part,
    5: _end,
    6: _started,
    7: _stopped,
    8: _heartbeat,
    9: _manifest,
}


def _decode_record(kind: int, body: memoryview) -> Record:
    decoder = _DECODERS.get(kind)
    if decoder is None:
        raise WireError("malformed", f"record type {kind}")
    try:
        return decoder(body)
    except (RecordError, struct.error, ValueError) as error:
        raise WireError("record", f"type {kind}: {error}") from None


class Encoder:
    """Side A's half. One epoch's numbering; must never be made twice for the same epoch."""

    def __init__(self, *, lane: int, key: bytes, epoch: int) -> None:
        self._lane = lane
        self._epoch = epoch
        self._gmac = epoch_key(key, epoch)
        self._seq = 0

    def __repr__(self) -> str:
        return f"<Encoder lane={self._lane} epoch={self._epoch} seq={self._seq}>"

    def encode_into(
        self,
        memory: memoryview,
        records: tuple[Record, ...],
        now_ns: Callable[[], int],
        tray: memoryview | None = None,
    ) -> Iterator[memoryview]:
        """Fragments that carry `records` in order; small neighbours share a fragment.

        `now_ns` stamps each fragment as it is made. Fragments must be sent in the order they are made, all of
        them, and before the next call. Each is made in `memory` of `MAX_FRAGMENT` bytes, in the place of the
        one before it: the same pages again and again are warm; fresh ones for each fragment cost more than
        what is written to them. The first record that is too large for that is made in `tray`, if there is
        one: a fragment of more than `MAX_FRAGMENT` bytes, to be sent by ticket.
        """
        batch: list[Buffer] = []
        batched = 0
        for record in records:
            body = _encode_body(record)
            size = sum(len(buffer) for buffer in body)
            prefix = _PREFIX.pack(_TYPES[type(record)], size)
            size += _PREFIX.size
            if batched + size <= MAX_PAYLOAD:
                batch += (prefix, *body)
                batched += size
                continue
            if batch:
                yield self._fragment(memory, WHOLE, 0, batch, batched, now_ns())
            batch, batched = [], 0
            if size <= MAX_PAYLOAD:
                batch, batched = [prefix, *body], size
            elif tray is not None:
                yield self._fragment(tray, WHOLE, 0, [prefix, *body], size, now_ns())
                tray = None
            else:
                yield from self._split(memory, prefix, body, size, now_ns)
        if batch:
            yield self._fragment(memory, WHOLE, 0, batch, batched, now_ns())

    def _split(
        self,
        memory: memoryview,
        prefix: bytes,
        body: tuple[Buffer, ...],
        total: int,
        now_ns: Callable[[], int],
    ) -> Iterator[memoryview]:
        left = total
        pieces: list[Buffer] = []
        gathered = 0
        shape = FIRST
        for buffer in (prefix, *body):
            rest = memoryview(buffer)
            while rest:
                piece = rest[: MAX_PAYLOAD - gathered]
                pieces.append(piece)
                gathered += len(piece)
                rest = rest[len(piece) :]
                left -= len(piece)
                if gathered == MAX_PAYLOAD or left == 0:
                    last = LAST if left == 0 else shape
                    yield self._fragment(memory, last, total, pieces, gathered, now_ns())
                    pieces, gathered, shape = [], 0, MIDDLE

    def _fragment(
        self, memory: memoryview, shape: int, total: int, parts: list[Buffer], size: int, now_ns: int
    ) -> memoryview:
        seq = self._seq
        self._seq += 1
        head = HEADER.pack(MAGIC, VERSION, shape, self._lane, 0, self._epoch, total, seq, now_ns, size, 0)
        fragment = memory[: HEADER.size + size + TAG_BYTES]
        at = 0
        for part in (head, *parts):
            fragment[at : at + len(part)] = part
            at += len(part)
        fragment[at:] = self._gmac.encrypt(_nonce(self._epoch, seq), b"", fragment[:at])
        return fragment


class _Header(NamedTuple):
    """Of a fragment that is authentic: what else is in its header was checked."""

    shape: int
    epoch: int
    total: int
    seq: int
    entered_ns: int
    gmac: AESGCM


@dataclass(slots=True)
class DecoderCounters:
    """What a decoder has seen, for status and metrics."""

    fragments: int = 0
    duplicates: int = 0
    gaps: int = 0
    """Holes in the numbering, each of any length."""
    missing: int = 0
    """Fragments that never came, over all gaps."""
    refused: dict[str, int] = field(default_factory=dict)


class Decoder:
    """Side B's half: fragments in any state of truth in, authentic records out.

    The very first fragment may have any seq, since the sink may have been restarted in the middle; every
    later epoch begins at 0. From then on a lower seq is a repetition (a valve was killed between sending and
    taking) and is dropped, a higher one is a gap: counted, and a record that was half there is given up.
    """

    def __init__(self, *, lane: int, key: bytes) -> None:
        self._lane = lane
        self._key = key
        self._epoch = -1
        self._next = 0
        self._gmac: AESGCM | None = None
        self._memories = Memories()
        self._memory = memoryview(b"")
        """Of the record that is being put together: room for a header, the record, room for a fragment."""
        self._partial: memoryview | None = None
        """The record in it; its first `_partial_size` bytes are there."""
        self._partial_size = 0
        self._partial_total = 0
        self._partial_entered = 0
        self._covered = b""
        self._other = memoryview(bytearray(MAX_FRAGMENT + 1))
        self.counters = DecoderCounters()

    def __repr__(self) -> str:
        return f"<Decoder lane={self._lane} epoch={self._epoch} next={self._next} {self.counters}>"

    @property
    def epoch(self) -> int:
        """The epoch of the last authentic fragment; -1 while there was none."""
        return self._epoch

    def room(self) -> memoryview:
        """Where to receive the next fragment: one byte more than the largest.

        In the middle of a record that is the record's own memory, so that the payload comes to lie behind
        what is there already and is not copied again. The header then covers the last bytes before it, which
        `decode` and `taken_out` put back: one must be called, with the part of this room that was filled,
        before the next fragment is received.
        """
        if self._partial is None:
            return self._other
        at = self._partial_size
        if not self._covered:
            self._covered = bytes(self._memory[at : at + HEADER.size])
        return self._memory[at : at + MAX_FRAGMENT + 1]

    def taken_out(self, tray: memoryview, ticket: memoryview) -> memoryview:
        """The fragment in `tray` that `ticket` names, in memory of its own, to be decoded as such.

        Nothing if it names none that could be ours, which `decode` then refuses.
        """
        (size,) = TICKET.unpack(ticket)
        self._put_back()
        if not MAX_FRAGMENT < size <= MAX_LARGE_FRAGMENT:
            return memoryview(b"")
        fragment = memoryview(self._memories.take(size))[:size]
        fragment[:] = tray[:size]
        return fragment

    def decode(self, fragment: memoryview, now_ns: int, *, own: bool = False) -> list[Arrival]:
        """The records that `fragment` completes. Their buffers are views into `fragment`, valid until the
        next call, or into a record's own memory (`Arrival.pixels`).

        Args:
            fragment: At most `MAX_FRAGMENT` bytes, or `MAX_LARGE_FRAGMENT` where it was `taken_out`.
            now_ns: When it left the link, CLOCK_MONOTONIC.
            own: It was `taken_out`.

        Raises:
            WireError: The fragment was refused and counted; the decoder goes on with the next.
        """
        self.counters.fragments += 1
        try:
            covered = bool(self._covered)
            try:
                header = self._authentic(fragment, MAX_LARGE_FRAGMENT if own else MAX_FRAGMENT)
            finally:
                self._put_back()
            payload = fragment[HEADER.size : -TAG_BYTES]
            if own and (
                header.shape != WHOLE or _PREFIX.unpack_from(payload)[1] != len(payload) - _PREFIX.size
            ):
                # Of small ones it could hold millions.
                raise WireError("malformed", "a large fragment that is not one record")
            return self._accept(header, payload, now_ns, in_place=covered, own=own)
        except WireError as error:
            refused = self.counters.refused
            refused[error.reason] = refused.get(error.reason, 0) + 1
            raise

    def _put_back(self) -> None:
        if self._covered:
            at = self._partial_size
            self._memory[at : at + HEADER.size] = self._covered
        self._covered = b""

    def _authentic(self, fragment: memoryview, most: int) -> _Header:
        """The header of a fragment of this lane, of up to `most` bytes, that is what side A made."""
        if not HEADER.size + TAG_BYTES < len(fragment) <= most:
            raise WireError("malformed", f"fragment of {len(fragment)} bytes")
        magic, version, shape, lane, zero, epoch, total, seq, entered, size, pad = HEADER.unpack_from(
            fragment
        )
        if magic != MAGIC or version != VERSION or zero or pad or not WHOLE <= shape <= LAST:
            raise WireError("malformed", "header is not one of ours")
        if HEADER.size + size + TAG_BYTES != len(fragment):
            raise WireError("malformed", f"payload of {size} bytes in a fragment of {len(fragment)}")
        if lane != self._lane:
            raise WireError("lane", f"fragment of lane {lane} on lane {self._lane}")
        if epoch < self._epoch:
            raise WireError("stale", f"fragment of epoch {epoch}, now {self._epoch}")
        gmac = self._gmac if epoch == self._epoch and self._gmac else epoch_key(self._key, epoch)
        try:
            gmac.decrypt(_nonce(epoch, seq), bytes(fragment[-TAG_BYTES:]), fragment[:-TAG_BYTES])
        except InvalidTag:
            raise WireError("mac", f"epoch {epoch} seq {seq} is not authentic") from None
        return _Header(shape, epoch, total, seq, entered, gmac)

    def _accept(
        self, header: _Header, payload: memoryview, now_ns: int, *, in_place: bool, own: bool
    ) -> list[Arrival]:
        seq = header.seq
        if self._gmac is None:
            self._epoch, self._gmac, self._next = header.epoch, header.gmac, seq
        elif header.epoch != self._epoch:
            self._epoch, self._gmac, self._next, self._partial = header.epoch, header.gmac, 0, None
        if seq < self._next:
            self.counters.duplicates += 1
            return []
        if seq > self._next:
            self.counters.gaps += 1
            self.counters.missing += seq - self._next
            self._partial = None
        self._next = seq + 1
        if header.shape == WHOLE:
            self._partial = None
            return self._records(payload, header.entered_ns, now_ns, own=own)
        return self._join(header, payload, now_ns, in_place=in_place)

    def _join(self, header: _Header, payload: memoryview, now_ns: int, *, in_place: bool) -> list[Arrival]:
        total = header.total
        if header.shape == FIRST:
            if not MAX_PAYLOAD < total <= MAX_RECORD:
                raise WireError("malformed", f"split record of {total} bytes")
            self._partial = None
            self._memory = memoryview(b"")
            self._memory = memoryview(self._memories.take(total + MAX_FRAGMENT + 1))
            self._partial = self._memory[HEADER.size : HEADER.size + total]
            self._partial_size, in_place = 0, False
            self._partial_total = total
            self._partial_entered = header.entered_ns
        elif self._partial is None:
            # The beginning was lost, or came before this process did: the gap is counted already.
            return []
        partial, at = self._partial, self._partial_size
        size = at + len(payload)
        if total != self._partial_total or size > total or (header.shape == LAST) != (size == total):
            self._partial = None
            raise WireError("malformed", "pieces of a record do not add up")
        if not in_place:
            partial[at:size] = payload
        self._partial_size = size
        if header.shape != LAST:
            return []
        self._partial = None
        return self._records(partial, self._partial_entered, now_ns, own=True)

    def _records(self, payload: memoryview, entered: int, now_ns: int, *, own: bool = False) -> list[Arrival]:
        """`own`: the memory is the records' and nobody else's."""
        arrivals = []
        at, end = 0, len(payload)
        while at < end:
            if end - at < _PREFIX.size:
                raise WireError("malformed", "record prefix cut short")
            kind, size = _PREFIX.unpack_from(payload, at)
            at += _PREFIX.size
            if size > end - at:
                raise WireError("malformed", f"record of {size} bytes in {end - at}")
            body = payload[at : at + size]
            record = _decode_record(kind, body)
            pixels = body[_VIDEO.size :] if own and isinstance(record, VideoFrame) else None
            at += size
            arrivals.append(Arrival(record, entered, now_ns, held=at < end, pixels=pixels))
        return arrivals
