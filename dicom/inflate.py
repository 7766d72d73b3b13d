"""Deflated data sets (PS3.5 §A.5): inflated in a stream, into the caller's file, under limits.

Memory stays flat whatever the object's size, and a bomb is refused by its ratio after a few megabytes.

Never here: where the scratch file is; the deflated bytes themselves, which cross as they are.
"""

from __future__ import annotations

import mmap
import zlib
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from dataclasses import dataclass, replace
from typing import BinaryIO, NamedTuple

from dicom.faults import Reason, Refused
from dicom.syntaxes import encoding_of
from dicom.walk import DEFAULT_LIMITS, Edit, Outline, WalkLimits, no_clock, walk
from relay.records import Buffer

CHUNK = 64 * 1024
"""Bytes read of the deflated stream at a time."""

BURST = 1024 * 1024
"""The most bytes that one step may yield: what is in memory at once."""


MAX_AFTER = 10
"""Bytes looked at behind the stream: gzip's trailer of eight, a pad byte, and one that is too many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InflateLimits:
    """What an inflated data set may come to. `clock` gives seconds; without one, time is not limited."""

    max_bytes: int = 4 * 2**30
    """More than any deflated object in use; a lane's own limit of object bytes is mostly lower."""
    max_ratio: int = 200
    """Inflated to deflated. Nothing but repetition exceeds it (deflate ends at 1032); photographs reach 4,
    label maps and mostly empty pictures 100."""
    ratio_floor: int = 8 * 2**20
    """Inflated bytes up to which the ratio does not count: a small, empty picture harms nobody."""
    seconds: float = 60.0
    """Time of one inflation."""
    clock: Callable[[], float] = no_clock


DEFAULT_INFLATE_LIMITS = InflateLimits()


class Inflated(NamedTuple):
    """What came of a deflated data set: bytes inflated, bytes of the stream itself, and bytes that follow it.

    One zero byte may follow, and the checksum and size that gzip puts there (RFC 1952 §2.3.1) and that some
    writers of DICOM have copied; where those are true they may be dropped.
    """

    size: int
    stream: int
    after: int

    @property
    def edits(self) -> tuple[Edit, ...]:
        """What makes its length even, with nothing but that behind the stream (PS3.5 §A.5)."""
        odd = self.stream % 2
        return () if self.after == odd else ((self.stream, self.after, b"\0" * odd),)


def inflate(
    chunks: Iterable[Buffer],
    write: Callable[[bytes], object],
    limits: InflateLimits = DEFAULT_INFLATE_LIMITS,
) -> Inflated:
    """Inflate a raw deflate stream (RFC 1951) in pieces to `write`.

    One zero byte may follow the stream, to make its length even (PS3.5 §A.5).

    Raises:
        Refused: The stream is damaged or cut short, is followed by anything but what `Inflated` knows, or
            passes a limit.
    """
    stream = zlib.decompressobj(-zlib.MAX_WBITS)
    began = limits.clock()
    fed = written = used = checksum = 0
    after = b""
    for chunk in chunks:
        if stream.eof:
            after += bytes(chunk[:MAX_AFTER])
            if len(after) >= MAX_AFTER:
                break
            continue
        fed += len(chunk)
        waiting: Buffer = chunk
        while True:
            try:
                piece = stream.decompress(waiting, BURST)
            except zlib.error:
                raise Refused(Reason.DEFLATE, f"the deflated data is damaged before byte {fed}") from None
            waiting = stream.unconsumed_tail
            written += len(piece)
            used = fed - len(waiting) - len(stream.unused_data)
            if written > limits.max_bytes:
                raise Refused(Reason.INFLATED, f"the data set inflates to over {limits.max_bytes} bytes")
            if written > limits.ratio_floor and written > used * limits.max_ratio:
                raise Refused(
                    Reason.INFLATED,
                    f"the data set inflates over {limits.max_ratio} times: {used} bytes gave {written}",
                )
            if limits.clock() - began > limits.seconds:
                raise Refused(Reason.TIME, f"inflating takes over {limits.seconds:g} s")
            if piece:
                checksum = zlib.crc32(piece, checksum)
                write(piece)
            if stream.eof or (not waiting and len(piece) < BURST):
                break
        after = stream.unused_data[:MAX_AFTER]
    if not stream.eof:
        raise Refused(Reason.TRUNCATED, f"the deflated data has no end after {fed} bytes")
    trailer = checksum.to_bytes(4, "little") + (written & 0xFFFFFFFF).to_bytes(4, "little")
    if after in (b"", b"\0", trailer, trailer + b"\0"):
        return Inflated(written, used, len(after))
    raise Refused(Reason.DEFLATE, "bytes follow the end of the deflated data")


def _chunks(data: memoryview) -> Generator[memoryview, None, None]:
    for start in range(0, len(data), CHUNK):
        with data[start : start + CHUNK] as piece:
            yield piece


def examine(
    data: memoryview,
    transfer_syntax: str,
    *,
    scratch: Callable[[], BinaryIO],
    limits: WalkLimits = DEFAULT_LIMITS,
    inflate_limits: InflateLimits = DEFAULT_INFLATE_LIMITS,
) -> Outline:
    """Walk a data set of any transfer syntax; a deflated one is inflated into a file from `scratch` first.

    `scratch` opens an empty, unlinked, buffered binary file that has a descriptor; it is closed here. Of a
    deflated object the outline's pixel ranges count in the inflated bytes. When this returns or raises, no
    view of `data` is left, so whatever it maps may be closed.

    Raises:
        Refused: As `walk` and `inflate` do, and where a deflated data set would need edits.
        OSError: The scratch file cannot be written: no room is left.
    """
    if not encoding_of(transfer_syntax).deflated:
        return walk(data, transfer_syntax, limits)
    with scratch() as file:
        with closing(_chunks(data)) as chunks:
            inflated = inflate(chunks, file.write, inflate_limits)
        file.flush()
        if not inflated.size:
            raise Refused(Reason.TRUNCATED, "the deflated data holds nothing")
        with (
            mmap.mmap(file.fileno(), inflated.size, access=mmap.ACCESS_READ) as mapped,
            memoryview(mapped) as view,
        ):
            outline = walk(view, transfer_syntax, limits)
    if outline.edits:
        offset = outline.edits[0][0]
        raise Refused(Reason.DEFLATE, f"the deflated data set would need an edit at inflated byte {offset}")
    return replace(outline, edits=inflated.edits)
