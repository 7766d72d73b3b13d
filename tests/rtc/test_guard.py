"""The datagram guard, row by row."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rtc import guard
from rtc.guard import Guard, Kind, Refusal, classify


def stun(attributes: bytes = b"", *, cookie: int = guard.STUN_COOKIE, length: int | None = None) -> bytes:
    size = len(attributes) if length is None else length
    return struct.pack("!HHI", 1, size, cookie) + bytes(12) + attributes


USERNAME = struct.pack("!HH", 6, 3) + b"a:b\0"

ROWS = {
    "nothing": (b"", Refusal.LENGTH),
    "shortest RTP": (b"\x80" + bytes(11), Kind.SRTP),
    "one byte less": (b"\x80" + bytes(10), Refusal.LENGTH),
    "longest": (b"\xbf" + bytes(1499), Kind.SRTP),
    "one byte more": (b"\x80" + bytes(1500), Refusal.LENGTH),
    "the longest datagram": (b"\x80" + bytes(64_999), Refusal.LENGTH),
    "first RTCP": (b"\x80\xc0" + bytes(10), Kind.SRTCP),
    "last RTCP": (b"\x80\xdf" + bytes(10), Kind.SRTCP),
    "RTP with a marker": (b"\x80\xe0" + bytes(10), Kind.SRTP),
    "STUN": (stun(), Kind.STUN),
    "STUN with an attribute": (stun(USERNAME), Kind.STUN),
    "STUN without its cookie": (stun(cookie=0), Refusal.SHAPE),
    "STUN that says it is longer": (stun(length=4), Refusal.SHAPE),
    "STUN of uneven length": (stun(b"abc", length=3), Refusal.SHAPE),
    "STUN attribute that is too long": (stun(struct.pack("!HH", 6, 200) + bytes(4)), Refusal.SHAPE),
    "STUN cut short": (stun()[:16], Refusal.SHAPE),
    "DTLS": (bytes([22, 254, 253]) + bytes(11), Kind.DTLS),
    "DTLS header alone": (bytes([22, 254, 253]) + bytes(10), Refusal.SHAPE),
    "ZRTP": (b"\x10" + bytes(20), Refusal.KIND),
    "TURN channel": (b"\x40" + bytes(20), Refusal.KIND),
    "QUIC": (b"\xc0" + bytes(20), Refusal.KIND),
}


@pytest.mark.parametrize("name", ROWS)
def test_kinds(name: str) -> None:
    datagram, expected = ROWS[name]
    assert classify(datagram) is expected


@given(st.binary(max_size=1600))
def test_any_datagram_has_a_verdict(datagram: bytes) -> None:
    verdict = classify(datagram)
    if isinstance(verdict, Kind):
        assert guard.MIN_DATAGRAM <= len(datagram) <= guard.MAX_DATAGRAM


def test_only_stun_comes_from_strangers() -> None:
    watch = Guard()
    assert watch.admit(stun(), member=False, now_ns=0) is Kind.STUN
    for datagram in (b"\x80" + bytes(20), b"\x80\xc8" + bytes(20), bytes([22, 254, 253]) + bytes(20)):
        assert watch.admit(datagram, member=False, now_ns=0) is None
        assert watch.admit(datagram, member=True, now_ns=0) is not None
    assert watch.refused[Refusal.SOURCE] == 3


def test_a_flood_of_strangers_does_not_touch_members() -> None:
    watch = Guard()
    passed = sum(watch.admit(stun(), member=False, now_ns=i) is not None for i in range(10_000))
    assert passed == guard.STRANGER_RATE * guard.STRANGER_SECONDS == 100
    assert watch.refused[Refusal.RATE] == 10_000 - passed
    assert watch.admit(b"\x80" + bytes(20), member=True, now_ns=10_000) is Kind.SRTP
