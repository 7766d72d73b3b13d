"""PDUs as they are written: what a reader makes of them, whatever the sizes."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicom import pdata
from dicom.pdata import COMMAND, HEADER_BYTES, LAST, PDV_OVERHEAD, DataBatch


def cut(data: bytes, context_id: int, max_length: int, *, last: bool) -> bytes:
    """`data` in PDUs, one after the other, as the standard puts it (PS3.8 §9.3.5)."""
    room = max_length - PDV_OVERHEAD
    pieces = [data[start : start + room] for start in range(0, len(data), room)]
    controls = [0] * (len(pieces) - 1) + [LAST if last else 0]
    return b"".join(
        pdata.header(context_id, control, len(piece)) + piece
        for control, piece in zip(controls, pieces, strict=True)
    )


def fill(batch: DataBatch, data: bytes) -> None:
    """Put `data` into the gaps, as a read does."""
    gaps = batch.gaps(len(data))
    assert sum(map(len, gaps)) == len(data)
    at = 0
    for gap in gaps:
        gap[:] = data[at : at + len(gap)]
        at += len(gap)


@given(
    max_length=st.integers(8, 40).map(lambda half: 2 * half),
    max_pdus=st.integers(1, 6),
    data_sets=st.lists(st.tuples(st.sampled_from([1, 3, 255]), st.integers(1, 300)), min_size=1, max_size=6),
)
def test_data_sets_leave_as_they_would_piece_by_piece(
    max_length: int, max_pdus: int, data_sets: list[tuple[int, int]]
) -> None:
    batch = DataBatch(max_length, 150, max_pdus)
    for context_id, size in data_sets:
        data, sent = os.urandom(size), b""
        for start in range(0, size, batch.capacity):
            piece = data[start : start + batch.capacity]
            fill(batch, piece)
            sent += batch.pdus(context_id, len(piece), last=start + len(piece) == size)
        assert sent == cut(data, context_id, max_length, last=True)


@pytest.mark.parametrize(
    ("capacity", "max_pdus", "held"),
    [(0, 9, 94), (93, 9, 94), (190, 9, 188), (10_000, 9, 846), (10_000, 1, 94)],
)
def test_a_batch_holds_whole_pdus_within_both_limits(capacity: int, max_pdus: int, held: int) -> None:
    assert DataBatch(100, capacity, max_pdus).capacity == held


def test_a_long_command_has_as_many_pdus_as_the_peer_asks_for() -> None:
    assert pdata.command(5, b"ab" * 13, 16) == (
        pdata.header(5, COMMAND, 10)
        + b"ab" * 5
        + pdata.header(5, COMMAND, 10)
        + b"ab" * 5
        + pdata.header(5, COMMAND | LAST, 6)
        + b"ab" * 3
    )


def test_what_it_shows_holds_no_data() -> None:
    batch = DataBatch(100, 1000, 10)
    fill(batch, b"NAME^OF^PATIENT")
    assert repr(batch) == "<DataBatch of 940 bytes in PDUs of 100>"
    assert len(batch.pdus(1, 15, last=True)) == HEADER_BYTES + 15
