"""RTCP that we write, read by aiortc."""

from __future__ import annotations

import pytest
from aiortc.rtp import RtcpPacket, RtcpRtpfbPacket
from hypothesis import given
from hypothesis import strategies as st

from rtc import packets


@pytest.mark.parametrize(
    ("lost", "size"),
    [
        ([5], 16),
        ([5, 6, 21], 16),
        ([5, 22], 20),
        ([65_534, 65_535, 0, 1], 16),
        ([65_535, 16], 20),
    ],
)
def test_a_nack_names_each_packet_in_as_few_bytes_as_it_can(lost: list[int], size: int) -> None:
    data = packets.nack(1, 2, lost)
    assert len(data) == size
    [read] = RtcpPacket.parse(data)
    assert isinstance(read, RtcpRtpfbPacket)
    assert (read.ssrc, read.media_ssrc, sorted(n & 0xFFFF for n in read.lost)) == (1, 2, sorted(lost))


@given(st.sets(st.integers(0, 3_000), min_size=1, max_size=128), st.integers(0, 65_535))
def test_whatever_is_lost_is_named_across_the_wrap(lost: set[int], first: int) -> None:
    numbers = [(first + number) & 0xFFFF for number in sorted(lost)]
    [read] = RtcpPacket.parse(packets.nack(1, 2, numbers))
    assert isinstance(read, RtcpRtpfbPacket)
    assert {number & 0xFFFF for number in read.lost} == set(numbers)
