"""Data sets that mean harm: bombs, abysses, lies about length, and bytes at random.

Each attack is held to a bound of work or memory, not of time, so that a slow machine proves the same.
"""

from __future__ import annotations

import functools
import itertools
import mmap
import os
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from dicom.faults import Reason, Refused
from dicom.inflate import BURST, InflateLimits, examine, inflate
from dicom.walk import Outline, rebuilt, walk
from tests.dicom.datasets import (
    BIG,
    DEFLATED,
    EXPLICIT,
    IMPLICIT,
    JPEG,
    UNDEFINED,
    deflate,
    element,
    fragments,
    head,
    item,
    measured,
    names,
    nested,
    open_item,
    open_sequence,
    readable_files,
    scratch_file,
    sequence,
    split_file,
)

SYNTAXES = (IMPLICIT, EXPLICIT, BIG, JPEG, "1.2.3.4")
SLOW_START = [HealthCheck.too_slow, HealthCheck.data_too_large]

RICH = (
    names()
    + open_sequence(0x00400555, open_item(element(0x00100020, "LO", b"odd")))
    + sequence(0x0040A730, item(element(0x00100020, "LO", b"odd") + sequence(0x0040A730, item())))
    + open_sequence(0x00991001, item(element(0x00100020, "", b"id", IMPLICIT), IMPLICIT), vr="UN")
    + fragments(b"\1\2", table=bytes(4))
)


def outline_of(data: bytes, syntax: str) -> Outline | None:
    """The outline, or None where the data set is refused. Anything else that is raised fails the test."""
    try:
        with memoryview(data) as view:
            return walk(view, syntax)
    except Refused as refused:
        assert 0 < refused.status <= 0xFFFF and refused.reason in list(Reason)
        return None


def check(data: bytes, syntax: str) -> None:
    """Whatever the bytes are: refused, or sound and, after its edits, sound without edits."""
    outline = outline_of(data, syntax)
    if outline is None:
        return
    spans = [(offset, offset + removed) for offset, removed, _ in outline.edits]
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    with memoryview(data) as view:
        remade = b"".join(rebuilt(view, outline.edits))
    again = outline_of(remade, syntax)
    assert again is not None and again.edits == ()
    assert again.sop_instance == outline.sop_instance
    assert measured(remade, syntax) == measured(data, syntax)


# ---- one attack each ------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [300, 100_000])
@pytest.mark.parametrize("syntax", [IMPLICIT, EXPLICIT, BIG])
def test_an_abyss_of_sequences(syntax: str, depth: int) -> None:
    with pytest.raises(Refused) as caught, memoryview(names(syntax) + nested(depth, syntax)) as view:
        walk(view, syntax)
    assert caught.value.reason == Reason.DEPTH


def test_an_abyss_of_defined_length() -> None:
    content = b""
    for _ in range(300):
        content = sequence(0x0040A730, item(content))
    with pytest.raises(Refused) as caught, memoryview(names() + content) as view:
        walk(view, EXPLICIT)
    assert caught.value.reason == Reason.DEPTH


@pytest.mark.parametrize("length", [0x7FFFFFFF, 0x80000000, 0xFFFFFFFE])
@pytest.mark.parametrize("syntax", [IMPLICIT, EXPLICIT, BIG])
def test_lengths_that_are_lies(syntax: str, length: int) -> None:
    for tag, vr in ((0x00091001, "OB"), (0x7FE00010, "OW"), (0x0040A730, "SQ")):
        data = names(syntax) + head(tag, vr, length, syntax) + bytes(64)
        with pytest.raises(Refused) as caught, memoryview(data) as view:
            walk(view, syntax)
        assert caught.value.reason == Reason.LENGTH


@pytest.mark.parametrize(
    ("data", "syntax"),
    [
        (RICH, JPEG),
        (names(IMPLICIT) + nested(2, IMPLICIT), IMPLICIT),
        (names(BIG) + sequence(0x0040A730, item(names(BIG), BIG), BIG), BIG),
    ],
    ids=["rich", "implicit", "big"],
)
def test_cut_at_every_byte(data: bytes, syntax: str) -> None:
    """A cut passes only where a whole element ends at top level, and then it is a smaller, sound object."""
    _, whole = measured(data, syntax)
    passed = [size for size in range(len(data)) if outline_of(data[:size], syntax)]
    assert passed[0] == len(names(syntax))
    for size in passed:
        assert measured(data[:size], syntax)[1] < whole
        for tail in (b"\0", b"\xff" * 7):
            assert outline_of(data[:size] + tail, syntax) is None


@pytest.mark.parametrize("data", [bytes(2**30 // 16), b"\xff\0" * 2**24], ids=["zeros", "pairs"])
def test_a_deflate_bomb_is_refused_after_few_bytes(data: bytes) -> None:
    bomb = deflate(data)
    written = 0

    def write(piece: bytes) -> None:
        nonlocal written
        written += len(piece)

    limits = InflateLimits()
    pieces = [bomb[start : start + 65536] for start in range(0, len(bomb), 65536)]
    with pytest.raises(Refused) as caught:
        inflate(pieces, write, limits)
    assert caught.value.reason == Reason.INFLATED
    assert written <= limits.ratio_floor + BURST


def test_a_bomb_behind_honest_bytes_is_refused_in_proportion_to_them() -> None:
    """Incompressible bytes before the zeros buy the bomb no more than the ratio allows."""
    honest = os.urandom(200_000)
    stream = zlib.compressobj(9, wbits=-15)
    bomb = (
        stream.compress(honest) + b"".join(stream.compress(bytes(2**20)) for _ in range(128)) + stream.flush()
    )
    written = 0

    def write(piece: bytes) -> None:
        nonlocal written
        written += len(piece)

    limits = InflateLimits(max_ratio=50, max_bytes=2**40)
    pieces = (bomb[start : start + 65536] for start in range(0, len(bomb), 65536))
    with pytest.raises(Refused):
        inflate(pieces, write, limits)
    assert written <= 50 * len(bomb) + BURST


def test_a_deflated_abyss() -> None:
    raw = deflate(names() + nested(300))
    with pytest.raises(Refused) as caught, memoryview(raw) as view:
        examine(view, DEFLATED, scratch=scratch_file)
    assert caught.value.reason == Reason.DEPTH


# ---- headers only ---------------------------------------------------------------------------------------

HUGE = 3 * 2**30


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * mmap.PAGESIZE


def _native(size: int) -> Iterator[tuple[int, bytes]]:
    yield 0, names() + head(0x7FE00010, "OW", size)


def _encapsulated(size: int) -> Iterator[tuple[int, bytes]]:
    start = names() + head(0x7FE00010, "OB", UNDEFINED) + item() + struct.pack("<HHL", 0xFFFE, 0xE000, size)
    yield 0, start
    yield len(start) + size, head(0xFFFEE0DD, "", 0)


@pytest.mark.parametrize(
    ("layout", "syntax"), [(_native, EXPLICIT), (_encapsulated, JPEG)], ids=["native", "encapsulated"]
)
def test_three_gigabytes_of_pixels_are_not_touched(
    layout: Callable[[int], Iterator[tuple[int, bytes]]], syntax: str
) -> None:
    """The file is sparse; reading the pixels would make their pages resident."""
    with tempfile.TemporaryFile() as file:
        end = 0
        for offset, data in layout(HUGE):
            file.seek(offset)
            file.write(data)
            end = offset + len(data)
        file.truncate(max(end, end + HUGE if syntax == EXPLICIT else end))
        file.flush()
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as view:
            before = resident_bytes()
            assert len(view) > HUGE
            assert walk(view, syntax).edits == ()
            grown = resident_bytes() - before
    assert grown < 16 * 2**20


# ---- bytes at random ------------------------------------------------------------------------------------


@given(st.binary(max_size=400), st.sampled_from(SYNTAXES))
@example(b"", EXPLICIT)
def test_random_bytes(data: bytes, syntax: str) -> None:
    check(data, syntax)
    check(names(syntax) + data, syntax)


LENGTHS = (b"\0\0\0\0", b"\1\0\0\0", b"\xff\xff\xff\xff", b"\xfe\xff\xff\xff")
DELIMITERS = (b"\xfe\xff\0\xe0", b"\xfe\xff\x0d\xe0", b"\xfe\xff\xdd\xe0")
KINDS = (b"SQ\0\0", b"UN\0\0", b"OB\0\0", b"\xe0\x7f\x10\0", b"\x08\0\x18\0", b"\x02\0\x10\0")
WORDS = st.sampled_from(LENGTHS + DELIMITERS + KINDS)


@st.composite
def mutated(draw: st.DrawFn, data: bytes) -> bytes:
    """`data` with a few bytes overwritten, put in or taken out."""
    raw = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(raw) - 1, 0)))
        word = draw(st.one_of(WORDS, st.binary(min_size=1, max_size=2)))
        kind = draw(st.sampled_from("oir"))
        raw[at : at + (0 if kind == "i" else len(word))] = b"" if kind == "r" else word
    return bytes(raw)


@given(mutated(RICH))
def test_a_mutated_object(data: bytes) -> None:
    for syntax in (JPEG, EXPLICIT, IMPLICIT):
        check(data, syntax)


@functools.cache
def _samples(limit: int) -> list[tuple[str, bytes]]:
    found = [split_file(path) for path in readable_files().values()]
    return [(syntax, data) for syntax, data in found if len(data) < limit]


def _mutate_files(draw: st.DataObject) -> None:
    syntax, data = draw.draw(st.sampled_from(_samples(4_000)))
    check(draw.draw(mutated(data)), syntax)


@settings(max_examples=60, suppress_health_check=SLOW_START, deadline=None)
@given(st.data())
def test_mutated_files(draw: st.DataObject) -> None:
    _mutate_files(draw)


@pytest.mark.slow
@settings(max_examples=20_000, suppress_health_check=SLOW_START, deadline=None)
@given(st.data())
def test_mutated_files_at_length(draw: st.DataObject) -> None:
    _mutate_files(draw)


@given(mutated(deflate(RICH)))
def test_mutated_deflated_bytes(data: bytes) -> None:
    total = 0

    def write(piece: bytes) -> None:
        nonlocal total
        total += len(piece)

    try:
        assert inflate([data], write, InflateLimits(max_bytes=4096)).size == total <= 4096
    except Refused as refused:
        assert refused.reason in (Reason.DEFLATE, Reason.TRUNCATED, Reason.INFLATED)
