"""Pictures cut for RTP: what a depayloader puts together is what was cut."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rtc.packetize import h264_payloads, sendable, vp8_payloads

SPS, PPS, IDR, SLICE, SEI, AUD = (bytes((0x60 | kind, 1, 2, 3)) for kind in (7, 8, 5, 1, 6, 9))

bodies = st.binary(min_size=1, max_size=4000).map(lambda body: body.replace(b"\x00", b"\x01"))
units = st.builds(
    lambda kind, importance, body: bytes((importance << 5 | kind,)) + body,
    st.sampled_from([1, 5, 7, 8]),
    st.integers(1, 3),
    bodies,
)


def assemble(payloads: list[bytes]) -> list[bytes]:
    """The NAL units in RFC 6184 payloads; a plain reading of the RFC."""
    found: list[bytes] = []
    for payload in payloads:
        kind = payload[0] & 31
        if kind == 24:
            position = 1
            while position < len(payload):
                size = int.from_bytes(payload[position : position + 2], "big")
                found.append(payload[position + 2 : position + 2 + size])
                position += 2 + size
        elif kind == 28:
            assert payload[1] & 0xC0 != 0xC0, "start and end in one fragment (RFC 6184 §5.8)"
            if payload[1] & 0x80:
                found.append(bytes((payload[0] & 0xE0 | payload[1] & 31,)))
            found[-1] += payload[2:]
        else:
            found.append(payload)
    return found


@given(st.lists(units, min_size=1, max_size=6), st.integers(60, 1500))
def test_what_is_cut_comes_together_again(access_unit: list[bytes], limit: int) -> None:
    payloads = h264_payloads(access_unit, limit)
    assert assemble(payloads) == access_unit
    assert all(0 < len(payload) <= limit for payload in payloads)


def test_side_data_is_left_out() -> None:
    assert sendable([AUD, SPS, PPS, SEI, IDR]) == [SPS, PPS, IDR]


def test_parameter_sets_share_a_packet() -> None:
    first, second = h264_payloads([SPS, PPS, IDR])
    assert first[0] & 31 == 24
    assert second == IDR


@given(st.binary(min_size=1, max_size=20_000), st.integers(0, 0x7FFF), st.integers(20, 1500))
def test_vp8(frame: bytes, picture_id: int, limit: int) -> None:
    payloads = vp8_payloads(frame, picture_id, limit)
    assert b"".join(payload[4:] for payload in payloads) == frame
    assert all(4 < len(payload) <= limit for payload in payloads)
    assert [payload[0] & 0x10 for payload in payloads] == [0x10] + [0] * (len(payloads) - 1)
    for payload in payloads:
        assert payload[1] == 0x80
        assert int.from_bytes(payload[2:4], "big") == 0x8000 | picture_id
