"""The jitter buffers as tables: what arrives, in which order and when, and what goes out."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rtc import gaps, jitter
from rtc.jitter import (
    MS,
    AudioJitter,
    KeyframeRequest,
    Nack,
    Picture,
    Silence,
    Sound,
    VideoJitter,
    VideoOutput,
)
from rtc.packets import RtpPacket


def starts(payload: bytes) -> bool:
    """A test's payload: ``K`` or ``P`` begins a key or other picture, ``.`` goes on."""
    return payload[:1] in (b"K", b"P")


def is_keyframe(payloads: Sequence[bytes]) -> bool:
    return payloads[0][:1] == b"K"


def make(*, trusting: bool = True, rtt_ns: int | None = 10 * MS) -> VideoJitter:
    return VideoJitter(starts=starts, is_keyframe=is_keyframe, trusting=trusting, rtt_ns=rtt_ns)


def stream(pictures: str, first: int = 100, timestamp: int = 0) -> list[RtpPacket]:
    """Packets of pictures written as ``K.. P. P``: one character a packet, a space between pictures."""
    found = []
    for picture in pictures.split():
        for at, kind in enumerate(picture):
            marker = at == len(picture) - 1
            payload = kind.encode() + b"%d" % first
            found.append(RtpPacket(1, 96, first & 0xFFFF, timestamp & 0xFFFFFFFF, marker, payload, 0))
            first += 1
        timestamp += 3000
    return found


def feed(buffer: VideoJitter, packets: Sequence[RtpPacket], now_ns: int = 0) -> list[VideoOutput]:
    return [output for packet in packets for output in buffer.receive(packet, now_ns)]


def timestamps(outputs: Sequence[VideoOutput]) -> list[int]:
    return [output.timestamp // 3000 for output in outputs if isinstance(output, Picture)]


def nacks(outputs: Sequence[VideoOutput]) -> list[tuple[int, ...]]:
    return [output.lost for output in outputs if isinstance(output, Nack)]


def requests(outputs: Sequence[VideoOutput]) -> int:
    return sum(isinstance(output, KeyframeRequest) for output in outputs)


def test_a_picture_is_released_on_its_marker() -> None:
    buffer = make()
    packets = stream("K.. P. P")
    released = [timestamps(buffer.receive(packet, 0)) for packet in packets]
    assert released == [[], [], [0], [], [1], [2]]
    assert buffer.held == 0


def test_without_markers_the_next_picture_releases() -> None:
    buffer = make()
    packets = [packet._replace(marker=False) for packet in stream("K. P. P")]
    assert [timestamps(buffer.receive(packet, 0)) for packet in packets] == [[], [], [0], [], [1]]


ORDERS = {
    "in order": ([0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3]),
    "neighbours swapped": ([0, 2, 1, 3, 5, 4, 6], [0, 1, 2, 3]),
    "one very late": ([0, 2, 3, 4, 5, 6, 1], [0, 1, 2, 3]),
    "each twice": ([0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6], [0, 1, 2, 3]),
    "backwards after the first": ([0, 6, 5, 4, 3, 2, 1], [0, 1, 2, 3]),
}


@pytest.mark.parametrize("first", [100, 65_533], ids=["plain", "wrapping"])
@pytest.mark.parametrize("name", ORDERS)
def test_order_is_restored(name: str, first: int) -> None:
    order, expected = ORDERS[name]
    buffer = make()
    packets = stream("K. P. P. P", first)
    assert timestamps(feed(buffer, [packets[i] for i in order])) == expected
    assert (buffer.held, buffer.deadline) == (0, None)


def test_timestamps_may_wrap() -> None:
    buffer = make()
    outputs = feed(buffer, stream("K. P. P.", timestamp=2**32 - 3000))
    assert [output.timestamp for output in outputs if isinstance(output, Picture)] == [2**32 - 3000, 0, 3000]


def test_a_gap_is_asked_for_again_and_again_and_then_given_up() -> None:
    buffer = make()
    packets = stream("K P. P P")
    feed(buffer, packets[:1])
    asked = [(0, nacks(feed(buffer, [packets[2]], 0)))]
    given_up_at = None
    while (deadline := buffer.deadline) is not None and given_up_at is None:
        outputs = buffer.due(deadline)
        asked.append((deadline // MS, nacks(outputs)))
        if requests(outputs):
            given_up_at = deadline
    assert asked[:3] == [(0, [(101,)]), (15, [(101,)]), (30, [(101,)])]
    assert given_up_at == buffer.hold_ns == jitter.MIN_HOLD_NS
    assert len([1 for _, lost in asked if lost]) <= gaps.TRIES
    assert buffer.tally.lost == 1


def test_a_new_gap_is_asked_for_at_once_whatever_was_asked_before() -> None:
    buffer = make()
    packets = stream("K P. P P. P P. P")
    feed(buffer, packets[:1])
    assert nacks(buffer.receive(packets[2], 0)) == [(101,)]
    assert nacks(buffer.receive(packets[4], 5 * MS)) == [(103,)]
    # Both are missing still, and are asked for again in their order, beside the newest one.
    assert nacks(buffer.due(15 * MS)) == [(101,)]
    assert nacks(buffer.receive(packets[7], 20 * MS)) == [(103, 105, 106)]
    buffer.receive(packets[1], 21 * MS)
    assert nacks(buffer.due(40 * MS)) == [(103, 105, 106)]


def test_a_repair_releases_everything_at_once() -> None:
    buffer = make()
    packets = stream("K P. P P. P")
    outputs = feed(buffer, [packet for i, packet in enumerate(packets) if i != 1])
    assert timestamps(outputs) == [0]
    assert timestamps(buffer.receive(packets[1], 20 * MS)) == [1, 2, 3, 4]
    assert (buffer.tally.repaired, buffer.tally.lost, buffer.deadline) == (1, 0, None)


def test_after_a_loss_pictures_flow_from_the_next_keyframe() -> None:
    buffer = make()
    packets = stream("K P. P P K. P")
    feed(buffer, packets[:1])
    outputs = feed(buffer, packets[2:5])
    assert timestamps(outputs) == []
    outputs = buffer.due(buffer.hold_ns)
    assert (timestamps(outputs), requests(outputs)) == ([], 1)
    outputs = feed(buffer, packets[5:], buffer.hold_ns + MS)
    assert [(o.timestamp // 3000, o.damaged) for o in outputs if isinstance(o, Picture)] == [
        (4, False),
        (5, False),
    ]
    assert buffer.deadline is None


def test_a_whole_keyframe_behind_a_gap_is_not_kept_waiting() -> None:
    buffer = make()
    packets = stream("K P. P K. P")
    outputs = feed(buffer, [packet for i, packet in enumerate(packets) if i != 1], 0)
    assert timestamps(outputs) == [0, 3, 4]
    assert buffer.tally.lost == 1


def test_a_keyframe_without_its_beginning_is_waited_for() -> None:
    buffer = make()
    packets = stream("K P K.. P")
    outputs = feed(buffer, [packet for i, packet in enumerate(packets) if i != 2])
    assert timestamps(outputs) == [0, 1]
    assert timestamps(buffer.receive(packets[2], MS)) == [2, 3]


def test_a_sender_without_keyframes_is_shown_damaged_after_a_while() -> None:
    buffer = make()
    packets = stream("K P. " + "P " * 60)
    feed(buffer, packets[:1])
    shown = []
    for index, packet in enumerate(packets[2:]):
        now_ns = index * 33 * MS
        outputs = buffer.due(now_ns) + buffer.receive(packet, now_ns)
        shown += [(now_ns, o.damaged) for o in outputs if isinstance(o, Picture)]
    assert all(damaged for _, damaged in shown)
    assert shown[0][0] <= buffer.hold_ns + jitter.CONCEAL_NS + 2 * 33 * MS


def test_a_sender_that_never_answered_is_not_waited_for() -> None:
    buffer = make(trusting=False)
    packets = stream("K P. P P")
    feed(buffer, packets[:1])
    outputs = feed(buffer, packets[2:])
    assert nacks(outputs) == [(101,)]
    assert buffer.hold_ns == jitter.REORDER_HOLD_NS
    assert timestamps(buffer.due(jitter.REORDER_HOLD_NS)) == [2, 3]


def test_trust_is_lost_by_silence_and_won_by_answers() -> None:
    buffer = make()
    number, now_ns = 200, 0
    feed(buffer, stream("K", number), now_ns)
    for _ in range(6):
        number += 2
        now_ns += 1000 * MS
        feed(buffer, stream("P", number, timestamp=number * 3000), now_ns)
        buffer.due(now_ns + buffer.hold_ns)
    assert buffer.hold_ns == jitter.REORDER_HOLD_NS
    for _ in range(4):
        lost = stream("P", number + 1, timestamp=(number + 1) * 3000)
        number += 2
        now_ns += 1000 * MS
        feed(buffer, stream("P", number, timestamp=number * 3000), now_ns)
        buffer.receive(lost[0], now_ns + 10 * MS)
    assert buffer.hold_ns > jitter.REORDER_HOLD_NS


HOLDS = [
    (None, 4 * jitter.DEFAULT_RTT_NS),
    (0, jitter.MIN_HOLD_NS),
    (50 * MS, 200 * MS),
    (10_000 * MS, jitter.MAX_HOLD_NS),
]


@pytest.mark.parametrize(("rtt_ns", "hold_ns"), HOLDS)
def test_the_hold_follows_the_round_trip(rtt_ns: int | None, hold_ns: int) -> None:
    assert make(rtt_ns=rtt_ns).hold_ns == hold_ns


def test_a_burst_beyond_repair_is_skipped_at_once() -> None:
    buffer = make()
    feed(buffer, stream("K"))
    outputs = feed(buffer, stream("P K. P", 101 + jitter.MAX_MISSING + 1, timestamp=3000))
    assert requests(outputs) == 1
    assert nacks(outputs) == []
    assert timestamps(outputs) == [2, 3]


def test_a_jump_is_a_restart_only_when_two_packets_agree() -> None:
    buffer = make()
    feed(buffer, stream("K P"))
    stray = stream("P", 40_000, timestamp=9)[0]
    assert buffer.receive(stray, 0) == []
    assert timestamps(feed(buffer, stream("P", 102, timestamp=6000))) == [2]
    outputs = feed(buffer, stream("K. P", 50_000, timestamp=30_000))
    assert timestamps(outputs) == [10, 11]
    assert buffer.tally.restarts == 1


def test_a_joined_stream_begins_with_a_keyframe() -> None:
    buffer = make()
    outputs = feed(buffer, stream(".. P. K. P"))
    assert timestamps(outputs) == [2, 3]
    assert requests(outputs) == 1


def test_keyframe_requests_are_repeated_slowly() -> None:
    buffer = make()
    feed(buffer, stream("P"))
    times = []
    for _ in range(3):
        deadline = buffer.deadline
        assert deadline is not None
        assert requests(buffer.due(deadline)) == 1
        times.append(deadline)
    assert times == [jitter.KEYFRAME_REPEAT_NS * i for i in (1, 2, 3)]


def test_a_decoder_fault_before_a_keyframe_does_not_break_what_follows_it() -> None:
    buffer = make()
    first, second = (o.serial for o in feed(buffer, stream("K K")) if isinstance(o, Picture))
    assert buffer.decoder_failed(first, 0) == []
    assert timestamps(feed(buffer, stream("P", 102, timestamp=6000))) == [2]
    assert buffer.decoder_failed(second, 0) == [KeyframeRequest()]
    assert timestamps(feed(buffer, stream("P", 103, timestamp=9000))) == []


def test_what_is_kept_is_bounded() -> None:
    buffer = make(rtt_ns=1000 * MS)
    feed(buffer, stream("K"))
    number = 102
    for _ in range(jitter.MAX_PACKETS + 100):
        buffer.receive(stream("P", number, timestamp=number)[0], 0)
        number += 1
        assert buffer.held <= jitter.MAX_PACKETS
    assert buffer.tally.lost >= 1


def test_what_is_missing_is_bounded() -> None:
    buffer = make(rtt_ns=1000 * MS)
    feed(buffer, stream("K"))
    asked: list[tuple[int, ...]] = []
    for index in range(1, 400):
        packet = stream("P", 100 + 100 * index, timestamp=3000 * index)[0]
        asked += nacks(buffer.receive(packet, index))
        assert buffer.missing <= jitter.MAX_MISSING
    assert buffer.tally.overflows == 399 // 11
    assert buffer.tally.keyframe_requests >= 1
    assert max(len(lost) for lost in asked) <= gaps.BATCH
    # What follows the overflow is decoded from the next keyframe.
    assert timestamps(feed(buffer, stream("K. P", 101 + 100 * 399, timestamp=9_000_000))) == [3000, 3001]


def lines_run(work: Callable[[], object]) -> int:
    """Lines of the jitter buffer that `work` runs: its cost, whatever else this machine does."""
    files = {jitter.__file__, gaps.__file__}
    count = 0

    def local(_frame: FrameType, event: str, _arg: object) -> Any:
        nonlocal count
        count += event == "line"
        return local

    before = sys.gettrace()
    sys.settrace(lambda frame, _event, _arg: local if frame.f_code.co_filename in files else None)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


def far_apart(count: int) -> list[RtpPacket]:
    return [stream("P", 1000 * index, timestamp=3000 * index)[0] for index in range(count)]


def every_second(count: int) -> list[RtpPacket]:
    return [stream("P", 2 * index, timestamp=3000 * index)[0] for index in range(count)]


def all_marked_behind_a_gap(count: int) -> list[RtpPacket]:
    return [packet for index in range(2, count) for packet in stream("P", index + (index > 2), timestamp=0)]


def keyframes_far_apart(count: int) -> list[RtpPacket]:
    return [stream("K", 1000 * index, timestamp=3000 * index)[0] for index in range(count)]


def late_ones(count: int) -> list[RtpPacket]:
    return [*far_apart(60), *(stream("P", 59_000 - index % 900)[0] for index in range(count))]


FLOODS: list[Callable[[int], list[RtpPacket]]] = [
    far_apart,
    every_second,
    all_marked_behind_a_gap,
    keyframes_far_apart,
    late_ones,
]

LINES_OF_A_PACKET = 200
LINES_OF_A_NUMBER = 10
"""Of one number that a request names; `gaps.BATCH` are the most that one packet can cause."""


@pytest.mark.parametrize("flood", FLOODS, ids=lambda flood: flood.__name__)
@pytest.mark.parametrize("trusting", [True, False])
def test_no_flood_of_gaps_makes_packets_expensive(
    flood: Callable[[int], list[RtpPacket]], trusting: bool
) -> None:
    buffer = make(trusting=trusting)
    feed(buffer, stream("K", 0))
    costs = []
    now_ns = 0
    for packet in flood(1_500):
        now_ns += MS // 20

        def take(packet: RtpPacket = packet, now_ns: int = now_ns) -> None:
            buffer.receive(packet, now_ns)
            if (deadline := buffer.deadline) is not None and deadline <= now_ns:
                buffer.due(now_ns)

        costs.append(lines_run(take))
    costs.append(lines_run(lambda: buffer.due(now_ns + jitter.MAX_HOLD_NS)))
    assert sum(costs) < len(costs) * (LINES_OF_A_PACKET + LINES_OF_A_NUMBER * gaps.BATCH)


@given(
    st.lists(st.integers(0, 39), max_size=120),
    st.integers(0, 65_535),
    st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_whatever_arrives_pictures_are_whole_ordered_and_come_once(
    order: list[int], first: int, trusting: bool
) -> None:
    packets = stream("K.. P. P P... " * 4, first)
    whole = {packet.timestamp: [] for packet in packets}  # type: dict[int, list[bytes]]
    for packet in packets:
        whole[packet.timestamp].append(packet.payload)
    buffer = make(trusting=trusting)
    outputs: list[VideoOutput] = []
    for step, index in enumerate([0, *order]):
        now_ns = step * 10 * MS
        outputs += buffer.due(now_ns) + buffer.receive(packets[index % len(packets)], now_ns)
    outputs += buffer.due(10_000 * MS)
    shown = [output for output in outputs if isinstance(output, Picture)]
    times = [picture.timestamp for picture in shown]
    assert times == sorted(set(times))
    for picture in shown:
        if not picture.damaged:
            assert list(picture.payloads) == whole[picture.timestamp]
    assert buffer.missing == 0


def sound(seq: int) -> RtpPacket:
    return RtpPacket(1, 111, seq & 0xFFFF, seq * 960, False, b"%d" % seq, 0)


AUDIO = {
    "in order": ([(0, 1), (20, 2), (40, 3)], ["1", "2", "3"]),
    "swapped": ([(0, 1), (20, 3), (25, 2), (40, 4)], ["1", "2", "3", "4"]),
    "one lost": ([(0, 1), (20, 3), (40, 4), (60, 5), (80, 6)], ["1", "-1", "3", "4", "5", "6"]),
    "late after it was given up": ([(0, 1), (20, 3), (90, 2), (95, 4)], ["1", "-1", "3", "4"]),
    "twice": ([(0, 1), (0, 1), (20, 2), (21, 2)], ["1", "2"]),
    "burst": ([(0, 1), (20, 20), (60, 21), (80, 22)], ["1", "-10", "20", "21", "22"]),
    "a jump": ([(0, 1), (20, 30_000), (40, 30_001), (60, 30_002)], ["1", "30000", "30001", "30002"]),
}


@pytest.mark.parametrize("name", AUDIO)
def test_sound(name: str) -> None:
    arrivals, expected = AUDIO[name]
    buffer = AudioJitter()
    found: list[str] = []
    for at, seq in arrivals:
        for output in buffer.due(at * MS) + buffer.receive(sound(seq), at * MS):
            found.append(output.payload.decode() if isinstance(output, Sound) else f"-{output.packets}")
    assert found == expected
    assert (buffer.held, buffer.deadline) == (0, None)


def test_a_gap_in_sound_leaves_no_delay() -> None:
    buffer = AudioJitter()
    delays = []
    for seq in range(200):
        now_ns = seq * 20 * MS
        outputs = buffer.due(now_ns)
        if seq % 10:
            outputs += buffer.receive(sound(seq), now_ns)
        delays += [seq - int(o.payload) for o in outputs if isinstance(o, Sound)]
        assert all(not isinstance(o, Silence) or o.packets == 1 for o in outputs)
    assert max(delays) <= jitter.AUDIO_HOLD_NS // (20 * MS)
    assert delays[-1] == 0


@pytest.mark.parametrize("packets", [7, 12, 19])
def test_pictures_that_are_gone_leave_no_memory_taken(packets: int) -> None:
    """CPython keeps up to 2000 freed tuples of each length for the next of that length: they must be used."""
    buffer = make()

    def receive(pictures: int, first: int) -> None:
        for number in range(first, first + pictures):
            for packet in stream("P" + "." * (packets - 1), number * packets, number * 3000):
                buffer.receive(packet, 0)

    feed(buffer, stream("K" + "." * (packets - 1), 0))
    receive(50, 1)
    before = sys.getallocatedblocks()
    receive(1000, 51)
    assert sys.getallocatedblocks() - before < 200
