"""Reading objects in custody: every byte once, and pages given back behind the reader."""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from relay import spool_reading
from relay.spool_reading import BEHIND_BYTES, Reading

PAGE = mmap.PAGESIZE
OFFSET = 700
BEHIND = 4 << 20
"""Several of the largest pieces that a page cache is made of: it gives back whole ones only."""

libc = ctypes.CDLL(None, use_errno=True)


def resident(fd: int) -> list[bool]:
    """Which pages of the file are in the page cache (mincore(2))."""
    size = os.fstat(fd).st_size
    with mmap.mmap(fd, size, prot=mmap.PROT_READ | mmap.PROT_WRITE, flags=mmap.MAP_SHARED) as pages:
        found = (ctypes.c_ubyte * -(-size // PAGE))()
        first = ctypes.c_char.from_buffer(pages)
        assert libc.mincore(ctypes.byref(first), ctypes.c_size_t(size), found) == 0
        del first
    return [bool(page & 1) for page in found]


@pytest.fixture
def content() -> bytes:
    return os.urandom(OFFSET + 4 * BEHIND + 123)


@pytest.fixture
def fd(content: bytes) -> Iterator[int]:
    """A file on a disk: in memory there would be no page cache to give back."""
    with tempfile.TemporaryFile(dir=Path(__file__).parent) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        yield file.fileno()


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("step", [100_000, BEHIND - 1, BEHIND, 3 * BEHIND])
def test_every_byte_comes_once_and_in_order(
    fd: int, content: bytes, step: int, last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool_reading, "BEHIND_BYTES", BEHIND)
    reading = Reading(fd, OFFSET, last=last)
    whole = memoryview(bytearray(step))
    buffers = [whole[:1], whole[1:60_000], whole[60_000:]]
    found = bytearray()
    while count := reading.read_into(buffers):
        found += whole[:count]
    assert found == content[OFFSET:]


@pytest.mark.parametrize("last", [True, False])
def test_pages_behind_the_last_reader_are_given_back(
    fd: int, last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool_reading, "BEHIND_BYTES", BEHIND)
    assert all(resident(fd))
    reading = Reading(fd, OFFSET, last=last)
    buffer = memoryview(bytearray(BEHIND // 2))
    for _ in range(7):
        reading.read_into([buffer])
    pages = resident(fd)
    behind, ahead = pages[1 : 3 * BEHIND // PAGE], pages[-BEHIND // 2 // PAGE :]
    assert sum(behind) < len(behind) / 2 if last else all(behind)
    assert all(ahead)


def test_a_short_object_stays_in_the_cache(fd: int) -> None:
    os.ftruncate(fd, BEHIND_BYTES)
    reading = Reading(fd, OFFSET, last=True)
    buffer = memoryview(bytearray(128 << 10))
    while reading.read_into([buffer]):
        pass
    assert all(resident(fd))


def test_repr_tells_how_far_it_is(fd: int) -> None:
    reading = Reading(fd, OFFSET, last=True)
    reading.read_into([memoryview(bytearray(60)), memoryview(bytearray(40))])
    assert repr(reading) == "<Reading at=800 kept from=700>"
