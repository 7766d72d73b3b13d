"""Payloads joined to pictures, and sizes read before decoding; whatever comes, only PeerError goes out."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.errors import PeerError
from rtc import depayload
from rtc.depayload import START_CODE, Size, h264_picture, h264_starts, read_sps, read_vp8_header, vp8_picture
from tests.rtc.coded import coded_pictures, nal_units, payloads


def single(kind: int, body: bytes = b"\x80rest") -> bytes:
    return bytes([0x60 | kind]) + body


def fragment(kind: int, body: bytes, *, start: bool = False, end: bool = False) -> bytes:
    return bytes([0x60 | depayload.FU_A, start << 7 | end << 6 | kind]) + body


def aggregate(*units: bytes) -> bytes:
    return bytes([0x60 | depayload.STAP_A]) + b"".join(struct.pack("!H", len(u)) + u for u in units)


JOINED = {
    "single slice": ([single(1)], [single(1)], False),
    "slice in fragments": (
        [fragment(5, b"\x80a", start=True), fragment(5, b"b"), fragment(5, b"c", end=True)],
        [single(5, b"\x80abc")],
        True,
    ),
    "aggregate": ([aggregate(single(8, b"p"), single(1))], [single(8, b"p"), single(1)], False),
    "SEI, delimiter and unknown are dropped": (
        [single(6), single(9), single(14), single(23), single(1)],
        [single(1)],
        False,
    ),
    "forbidden bit": ([bytes([0x80 | 1]) + b"x", single(1)], [single(1)], False),
    "empty payloads": ([b"", single(1), b""], [single(1)], False),
}


@pytest.mark.parametrize("name", JOINED)
def test_h264_is_joined(name: str) -> None:
    given_payloads, units, keyframe = JOINED[name]
    coded = h264_picture(given_payloads)
    assert coded is not None
    assert coded.data == b"".join(START_CODE + unit for unit in units)
    assert coded.keyframe is keyframe


REFUSED = {
    "fragment without start": [fragment(1, b"x", end=True)],
    "fragment without end": [fragment(1, b"x", start=True)],
    "fragment that starts twice": [fragment(1, b"x", start=True), fragment(1, b"x", start=True)],
    "fragment that starts and ends": [fragment(1, b"x", start=True, end=True)],
    "fragment interrupted": [fragment(1, b"x", start=True), single(1), fragment(1, b"x", end=True)],
    "empty fragment": [fragment(1, b"", start=True)],
    "aggregate cut short": [aggregate(single(1))[:-1]],
    "aggregate with an empty unit": [aggregate(b"")],
    "type of another packetization mode": [single(25)],
    "type 0": [single(0)],
    "too many units": [aggregate(*[b"\x61x"] * 300), aggregate(*[b"\x61x"] * 300)],
}


@pytest.mark.parametrize("name", REFUSED)
def test_malformed_h264_is_refused(name: str) -> None:
    with pytest.raises(PeerError):
        h264_picture(REFUSED[name])


@pytest.mark.parametrize(
    ("payload", "begins"),
    [
        (single(1, b"\x80"), True),
        (single(1, b"\x40"), False),
        (single(7, b"\x00"), True),
        (fragment(5, b"\x80", start=True), True),
        (fragment(5, b"\x40", start=True), False),
        (fragment(5, b"\x80"), False),
        (aggregate(single(7)), True),
        (b"", False),
    ],
)
def test_where_a_picture_begins(payload: bytes, begins: bool) -> None:
    assert h264_starts(payload) is begins


SIZES = [(16, 16), (320, 240), (1280, 720), (1920, 1080), (642, 482), (1366, 768)]


@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("profile", ["baseline", "main", "high"])
def test_size_of_a_parameter_set(width: int, height: int, profile: str) -> None:
    picture = coded_pictures("h264", 1, width, height, (("profile", profile),))[0]
    sets = [unit for unit in nal_units(picture) if unit[0] & 0x1F == depayload.NAL_SPS]
    assert read_sps(sets[0]) == Size(width=width, height=height)
    coded = h264_picture(payloads("h264", picture))
    assert coded is not None
    assert (coded.keyframe, coded.size) == (True, Size(width=width, height=height))


def test_profiles_that_are_not_carried_are_named() -> None:
    with pytest.raises(PeerError, match="high 4:4:4") as caught:
        read_sps(bytes([0x67, 244, 0, 31, 0xFF, 0xFF]))
    assert caught.value.reason == "profile"


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_vp8_is_joined_and_measured(width: int, height: int) -> None:
    pictures = coded_pictures("vp8", 2, width, height)
    first = vp8_picture(payloads("vp8", pictures[0]))
    second = vp8_picture(payloads("vp8", pictures[1]))
    assert first is not None and second is not None
    assert (first.data, first.keyframe) == (pictures[0], True)
    assert first.size == Size(width=width, height=height)
    assert (second.data, second.keyframe, second.size) == (pictures[1], False, None)


VP8_DESCRIPTORS = {
    "plain": (b"\x10", 1, True),
    "second partition": (b"\x11", 1, False),
    "going on": (b"\x00", 1, False),
    "short picture id": (b"\x90\x80\x11", 3, True),
    "long picture id": (b"\x90\x80\x81\x11", 4, True),
    "everything": (b"\x90\xf0\x81\x11\x05\x20", 6, True),
}


@pytest.mark.parametrize("name", VP8_DESCRIPTORS)
def test_vp8_descriptors(name: str) -> None:
    descriptor, length, begins = VP8_DESCRIPTORS[name]
    assert depayload.vp8_descriptor(descriptor + b"\x01") == (length, begins)
    for cut in range(len(descriptor)):
        with pytest.raises(PeerError):
            depayload.vp8_descriptor(descriptor[:cut] if cut else b"")


def test_vp8_keyframe_without_start_code_is_refused() -> None:
    with pytest.raises(PeerError):
        read_vp8_header(b"\x00" * 10)


@given(st.lists(st.binary(max_size=40), min_size=1, max_size=6))
@settings(max_examples=300, deadline=None)
def test_any_payloads(given_payloads: list[bytes]) -> None:
    for payload in depayload.PAYLOADS.values():
        payload.starts(given_payloads[0])
        payload.is_keyframe(given_payloads)
        try:
            payload.picture(given_payloads)
        except PeerError:
            continue


@given(st.binary(max_size=80))
@settings(max_examples=300, deadline=None)
def test_any_parameter_set(body: bytes) -> None:
    for head in (b"\x67\x42\x00\x1f", b"\x67\x64\x00\x1f", b""):
        try:
            read_sps(head + body)
        except PeerError:
            continue
