"""Inflation in a stream, and the examination of deflated data sets."""

from __future__ import annotations

import mmap
import tempfile
import zlib
from typing import BinaryIO

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicom.faults import Reason, Refused
from dicom.inflate import BURST, InflateLimits, examine, inflate
from dicom.walk import rebuilt
from tests.dicom.datasets import CT, DEFLATED, EXPLICIT, INSTANCE, deflate, element, names, scratch_file

DATA = names() + element(0x00100010, "PN", b"A^B ") + element(0x7FE00010, "OW", bytes(range(256)) * 64)


class Scratch:
    """Hands out unlinked files, and remembers them."""

    def __init__(self) -> None:
        self.files: list[BinaryIO] = []

    def __call__(self) -> BinaryIO:
        self.files.append(scratch_file())
        return self.files[-1]


def inflated(*chunks: bytes, limits: InflateLimits | None = None) -> bytes:
    out: list[bytes] = []
    size = inflate(chunks, out.append, limits or InflateLimits()).size
    whole = b"".join(out)
    assert size == len(whole) and all(len(piece) <= BURST for piece in out)
    return whole


def in_pieces(data: bytes, size: int) -> list[bytes]:
    return [data[start : start + size] for start in range(0, len(data), size)]


@pytest.mark.parametrize("size", [1, 2, 3, 1000, 1 << 20])
@pytest.mark.parametrize("data", [b"", b"x", DATA, bytes(3 * BURST)], ids=["none", "one", "set", "zeros"])
def test_any_cut_gives_the_same(data: bytes, size: int) -> None:
    assert inflated(*in_pieces(deflate(data), size)) == data


@given(st.binary(max_size=2000), st.integers(1, 50))
def test_what_is_deflated_is_inflated(data: bytes, size: int) -> None:
    assert inflated(*in_pieces(deflate(data), size)) == data


@pytest.mark.parametrize("size", [1, 2, 1 << 20])
@pytest.mark.parametrize("tail", [b"\1", b"\0\0", b"\0\1", b"MZ" * 100, deflate(b"again")])
def test_what_follows_the_stream_is_refused(tail: bytes, size: int) -> None:
    stream = zlib.compressobj(9, wbits=-15)
    raw = stream.compress(DATA) + stream.flush()
    assert inflated(*in_pieces(raw + b"\0", size)) == DATA
    with pytest.raises(Refused) as caught:
        inflated(*in_pieces(raw + tail, size))
    assert caught.value.reason == Reason.DEFLATE


def test_a_true_gzip_trailer_is_dropped_and_a_false_one_refused() -> None:
    raw = zlib.compress(DATA, wbits=31)[10:]  # gzip without its header, as some writers leave it
    outline = examine(memoryview(raw), DEFLATED, scratch=scratch_file)
    stream = len(raw) - 8
    assert outline.edits == ((stream, 8, b"\0" * (stream % 2)),)
    put_right = b"".join(rebuilt(memoryview(raw), outline.edits))
    assert len(put_right) % 2 == 0
    assert examine(memoryview(put_right), DEFLATED, scratch=scratch_file).edits == ()
    for at in range(stream, len(raw)):
        false = bytearray(raw)
        false[at] ^= 1
        with pytest.raises(Refused) as caught:
            examine(memoryview(false), DEFLATED, scratch=scratch_file)
        assert caught.value.reason == Reason.DEFLATE


@pytest.mark.parametrize("tail", [b"", b"\0"])
@pytest.mark.parametrize("parity", [0, 1])
def test_an_odd_length_is_made_even(parity: int, tail: bytes) -> None:
    """Whatever the writer padded: an odd data set is sent in odd fragments, which peers abort on."""
    stream = next(
        raw
        for length in range(0, 200, 2)
        for raw in [_raw(names() + element(0x00100010, "PN", bytes(range(length))))]
        if len(raw) % 2 == parity
    )
    data = stream + tail
    edits = examine(memoryview(data), DEFLATED, scratch=scratch_file).edits
    assert bool(edits) == (len(data) % 2 == 1)
    put_right = b"".join(rebuilt(memoryview(data), edits))
    assert put_right == stream + b"\0" * parity
    assert examine(memoryview(put_right), DEFLATED, scratch=scratch_file).edits == ()


def _raw(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packer.compress(data) + packer.flush()


def test_cut_at_every_byte() -> None:
    raw = deflate(names())
    stream_end = len(raw.rstrip(b"\0"))
    for size in range(stream_end):
        with pytest.raises(Refused) as caught:
            inflated(raw[:size])
        assert caught.value.reason == Reason.TRUNCATED


@pytest.mark.parametrize("data", [zlib.compress(DATA), b"\xff" * 100, DATA], ids=["zlib", "ones", "plain"])
def test_what_is_no_raw_deflate_stream(data: bytes) -> None:
    with pytest.raises(Refused) as caught:
        inflated(data)
    assert caught.value.reason in (Reason.DEFLATE, Reason.TRUNCATED)


def test_size_limit_to_the_byte() -> None:
    raw = deflate(DATA)
    assert inflated(raw, limits=InflateLimits(max_bytes=len(DATA))) == DATA
    with pytest.raises(Refused) as caught:
        inflated(raw, limits=InflateLimits(max_bytes=len(DATA) - 1))
    assert caught.value.reason == Reason.INFLATED


def test_time_limit() -> None:
    now = iter(range(10))
    with pytest.raises(Refused) as caught:
        inflated(deflate(DATA), limits=InflateLimits(seconds=0.5, clock=lambda: float(next(now))))
    assert caught.value.reason == Reason.TIME


def test_examine_walks_what_it_inflated_and_closes_the_scratch_file() -> None:
    scratch = Scratch()
    raw = deflate(DATA)
    with memoryview(raw) as view:
        outline = examine(view, DEFLATED, scratch=scratch)
    assert (outline.sop_class, outline.sop_instance, outline.transfer_syntax) == (CT, INSTANCE, DEFLATED)
    assert [file.closed for file in scratch.files] == [True]


def test_examine_needs_no_scratch_file_for_other_syntaxes() -> None:
    scratch = Scratch()
    with memoryview(DATA) as view:
        assert examine(view, EXPLICIT, scratch=scratch).edits == ()
    assert scratch.files == []


REFUSED = [
    ("nothing", deflate(b""), Reason.TRUNCATED),
    ("damaged", b"\xff" * 100_000, Reason.DEFLATE),
    ("tail", deflate(DATA) + b"MZ", Reason.DEFLATE),
    ("malformed", deflate(DATA[:-1]), Reason.LENGTH),
    ("to be edited", deflate(names() + element(0x00100010, "PN", b"A^B")), Reason.DEFLATE),
]


@pytest.mark.parametrize(("raw", "reason"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_a_mapped_file_can_be_closed_while_the_refusal_is_still_held(raw: bytes, reason: Reason) -> None:
    scratch = Scratch()
    with tempfile.TemporaryFile() as file:
        file.write(raw)
        file.flush()
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        with pytest.raises(Refused) as caught, memoryview(mapped) as view:
            examine(view, DEFLATED, scratch=scratch)
        mapped.close()
    assert caught.value.reason == reason
    assert [file.closed for file in scratch.files] == [True]
