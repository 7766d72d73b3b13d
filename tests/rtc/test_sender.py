"""RTP headers, retransmission, reports."""

from __future__ import annotations

from aiortc import rtp

from rtc.packets import parse_rtcp, parse_rtp
from rtc.sender import (
    ABS_SEND_TIME,
    MAX_HISTORY,
    MID,
    PLAYOUT_DELAY,
    RESEND_BURST,
    RESEND_GAP_NS,
    Extensions,
    RtpStream,
)
from rtc.timeline import Timeline

MS = 1_000_000


def stream(**keys: object) -> RtpStream:
    return RtpStream(payload_type=96, rate=90_000, cname="abcd", **keys)  # type: ignore[arg-type]


def test_a_picture_has_one_timestamp_and_one_marker() -> None:
    out = stream()
    first = out.sequence
    data = [out.number(item, 0) for item in out.outgoing([b"a", b"b", b"c"], 10**9, mark_last=True)]
    packets = [packet for item in data if (packet := parse_rtp(item, 0)) is not None]
    assert [packet.seq for packet in packets] == [first, first + 1, first + 2]
    assert len({packet.timestamp for packet in packets}) == 1
    assert [packet.marker for packet in packets] == [False, False, True]
    assert [packet.payload for packet in packets] == [b"a", b"b", b"c"]
    assert {packet.ssrc for packet in packets} == {out.ssrc}


def test_extensions_are_read_by_another_implementation() -> None:
    ids = {ABS_SEND_TIME: 3, PLAYOUT_DELAY: 6, MID: 1}
    block = Extensions(ids, "video0", 200).at(1_500_000_000)
    values = dict(rtp.unpack_header_extensions(int.from_bytes(block[:2], "big"), block[4:]))
    assert len(block) % 4 == 0
    assert values[1] == b"video0"
    assert values[6] == (20).to_bytes(3, "big"), "least 0, most 20 steps of 10 ms"
    assert int.from_bytes(values[3], "big") == int(1.5 * (1 << 18)) & 0xFFFFFF


def test_nothing_negotiated_nothing_sent() -> None:
    assert Extensions({}).at(1) == b""
    assert Extensions({ABS_SEND_TIME: 15, MID: 200}, "0").at(1) == b""
    out = stream()
    [packet] = out.outgoing([b"x"], 0, mark_last=True)
    assert len(out.number(packet, 0)) == 13


def test_a_lost_packet_is_sent_again_the_same() -> None:
    out = stream()
    [packet] = out.outgoing([b"payload"], 0, mark_last=True)
    sequence = out.sequence
    data = out.number(packet, 0)
    assert out.resend(sequence, RESEND_GAP_NS, 0) == data
    assert out.resend(sequence, RESEND_GAP_NS + 1, 0) is None, "asked again too soon"
    assert out.resend(sequence, 3 * RESEND_GAP_NS, 0) == data
    assert out.resend(sequence + 1, 3 * RESEND_GAP_NS, 0) is None, "never sent"


def test_retransmission_stream() -> None:
    out = stream(rtx_payload_type=97)
    [packet] = out.outgoing([b"payload"], 0, mark_last=True)
    sequence = out.sequence
    out.number(packet, 0)
    data = out.resend(sequence, RESEND_GAP_NS, 0)
    assert data is not None
    again = parse_rtp(data, 0)
    assert again is not None
    assert (again.ssrc, again.payload_type, again.marker) == (out.rtx_ssrc, 97, True)
    assert again.payload == sequence.to_bytes(2, "big") + b"payload"


def test_history_and_retransmissions_are_bounded() -> None:
    out = stream()
    first = out.sequence
    for packet in out.outgoing([b"x"] * (MAX_HISTORY + 10), 0, mark_last=True):
        out.number(packet, 0)
    now = RESEND_GAP_NS
    assert out.resend(first, now, 0) is None, "forgotten"
    kept = range(first + 10, first + 10 + MAX_HISTORY)
    answered = sum(out.resend(sequence & 0xFFFF, now, 0) is not None for sequence in kept)
    assert answered == RESEND_BURST
    assert out.resends_refused == MAX_HISTORY - RESEND_BURST + 1


def test_sequence_numbers_wrap() -> None:
    out = stream()
    out.sequence = 0xFFFF
    for packet in out.outgoing([b"x", b"y"], 0, mark_last=True):
        out.number(packet, 0)
    assert out.sequence == 1
    assert out.resend(0xFFFF, RESEND_GAP_NS, 0) is not None


def test_reports_say_what_is_captured_now() -> None:
    out = stream()
    timeline = Timeline()
    now = 50 * 10**9
    timestamp = out.clock.timestamp(timeline.at(1, 123, now))
    [report] = parse_rtcp(out.report(timeline, now, 10**18), 0) or []
    assert report.rtp_timestamp == timestamp  # type: ignore[union-attr]
    assert report.ntp >> 32 == 2_208_988_800 + 10**9  # type: ignore[union-attr]
    assert parse_rtcp(out.goodbye(), 0)


def test_streams_share_nothing() -> None:
    streams = [stream() for _ in range(20)]
    assert len({item.ssrc for item in streams}) == 20
    assert len({item.clock.start for item in streams}) == 20
    assert all(item.sequence < 1 << 15 for item in streams)
