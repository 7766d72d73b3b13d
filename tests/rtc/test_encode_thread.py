"""Newest wins, stale pictures wait, keyframes come even of a still picture."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import time
from collections.abc import AsyncIterator
from typing import Any

import av
import pytest

from relay.link import Arrival
from rtc.depayload import FU_A, NAL_IDR
from rtc.encode import Canvas, Coded, VideoEncoder, VideoProfile, Wrapped
from rtc.encode_thread import MAX_UNPUBLISHED, REPEAT_NS, STALE_NS, CodedPicture, EncodeThread
from rtc.slicing import CROWDED_LOOKS, LOOK_PICTURES, Slicing
from rtc.sound_thread import MAX_WAITING, PACKET_NS, CodedSound, SoundThread
from tests.rtc.sink_fakes import picture, tone

PROFILE = VideoProfile(codec="h264", bitrate=1_000_000)
MS = 1_000_000


class Bench:
    """An encoder thread and what it publishes."""

    def __init__(self, profile: VideoProfile = PROFILE) -> None:
        self.published: list[CodedPicture] = []
        self.failures: list[BaseException] = []
        self.thread = EncodeThread("room", profile, 30.0, self.published.append, self.failures.append)

    def offer(self, number: int, *, late_ns: int = 0, width: int = 320, refreshed: bool = False) -> None:
        now_ns = time.monotonic_ns()
        frame = picture(number, width=width, refreshed=refreshed)
        self.thread.offer(Arrival(frame, now_ns - late_ns, now_ns), frame, frame.captured_ns)

    async def until(self, count: int) -> None:
        async with asyncio.timeout(5):
            while len(self.published) < count:
                await asyncio.sleep(0.002)


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    made = Bench()
    yield made
    await asyncio.wait_for(made.thread.close(), 5)


async def test_pictures_go_through_in_order(bench: Bench) -> None:
    for number in range(5):
        bench.offer(number)
        await bench.until(number + 1)
    times = [item.timeline_ns for item in bench.published]
    assert times == sorted(set(times))
    assert [item.coded.keyframe for item in bench.published] == [True] + [False] * 4
    assert bench.thread.replaced == 0


async def test_a_publishers_keyframe_is_told_to_the_encoder() -> None:
    bench = Bench(dataclasses.replace(PROFILE, keyframe_seconds=0.2))
    for number in range(6):
        bench.offer(number, refreshed=number == 4)
        await bench.until(number + 1)
    assert [item.coded.keyframe for item in bench.published] == [number in (0, 4) for number in range(6)]
    await bench.thread.close()


async def test_a_stalled_loop_finds_no_backlog(bench: Bench) -> None:
    bench.offer(0)
    await bench.until(1)
    for number in range(1, 40):
        bench.offer(number)
        time.sleep(0.005)  # the loop stands still, as under SIGSTOP
    await asyncio.sleep(0.1)
    assert len(bench.published) <= 1 + MAX_UNPUBLISHED + 1
    newest = bench.published[-1]
    assert newest.times is not None
    assert bench.thread.replaced >= 39 - MAX_UNPUBLISHED - 1


async def test_held_up_pictures_give_way_to_the_newest(bench: Bench) -> None:
    bench.offer(0)
    await bench.until(1)
    for number in range(1, 9):
        bench.offer(number, late_ns=STALE_NS * 50)
    bench.offer(9)
    await bench.until(2)
    await asyncio.sleep(0.05)
    assert len(bench.published) == 2
    assert bench.thread.replaced == 8


async def test_a_slow_link_still_shows_its_pictures(bench: Bench) -> None:
    for number in range(3):
        bench.offer(number, late_ns=STALE_NS * 5)
        await bench.until(number + 1)


async def test_a_still_picture_is_sent_again_to_whom_needs_it(bench: Bench) -> None:
    bench.offer(0)
    await bench.until(1)
    begin = time.monotonic_ns()
    for _ in range(10):
        bench.thread.request_keyframe()
    await bench.until(2)
    assert time.monotonic_ns() - begin < REPEAT_NS + 350 * MS
    await asyncio.sleep(0.4)
    assert len(bench.published) == 2
    again = bench.published[1]
    assert again.coded.keyframe
    assert again.times is None
    assert again.timeline_ns > bench.published[0].timeline_ns
    bench.offer(1)
    await bench.until(3)
    assert bench.published[2].timeline_ns > again.timeline_ns


async def test_another_size_begins_with_a_keyframe(bench: Bench) -> None:
    for number, width in enumerate((320, 320, 640, 640, 321)):
        bench.offer(number, width=width)
        await bench.until(number + 1)
    assert [item.width for item in bench.published] == [320, 320, 640, 640, 322]
    assert [item.coded.keyframe for item in bench.published] == [True, False, True, False, True]


async def test_a_codec_fault_costs_a_keyframe(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.offer(0)
    await bench.until(1)
    encode = VideoEncoder.encode
    faults = iter([av.error.ExternalError(1, "broken")])

    def faulty(self: VideoEncoder, *arguments: Any, **keys: Any) -> Any:
        for fault in faults:
            raise fault
        return encode(self, *arguments, **keys)

    monkeypatch.setattr(VideoEncoder, "encode", faulty)
    bench.offer(1)
    await bench.until(2)
    assert bench.published[1].coded.keyframe
    assert bench.thread.faults == 1
    assert bench.failures == []


async def test_a_codec_that_stays_broken_is_told(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: VideoEncoder, *arguments: Any, **keys: Any) -> Any:
        raise av.error.ExternalError(1, "broken")

    monkeypatch.setattr(VideoEncoder, "encode", broken)
    bench.offer(0)
    async with asyncio.timeout(5):
        while not bench.failures:
            await asyncio.sleep(0.002)


def slices_of(coded: Coded) -> int:
    """Slices of an H.264 keyframe, counted in its packets."""
    begun = 0
    for payload in coded.payloads:
        kind = payload[0] & 0x1F
        begun += kind == NAL_IDR or (kind == FU_A and payload[1] & 0x9F == 0x80 | NAL_IDR)
    return begun


WIDE = 2688
"""With 240 lines, as many pixels as two slices need."""


def crowd(monkeypatch: pytest.MonkeyPatch, step_ns: int) -> None:
    """Two processors, for which threads wait as long as they run: a step from one look at one to the next."""
    clock = itertools.count(0, step_ns)
    monkeypatch.setattr("rtc.slicing.processors", lambda: [0, 1])
    monkeypatch.setattr("rtc.encode_thread.Slicing", lambda: Slicing(lambda _: (next(clock), next(clock))))


@pytest.mark.parametrize("interval", [None, 60.0])
async def test_where_threads_wait_the_next_keyframe_has_one_slice(
    monkeypatch: pytest.MonkeyPatch, interval: float | None
) -> None:
    crowd(monkeypatch, 1_000_000)
    bench = Bench(dataclasses.replace(PROFILE, bitrate=4_000_000, keyframe_seconds=interval))
    pictures = LOOK_PICTURES * CROWDED_LOOKS
    for number in range(pictures):
        bench.offer(number, width=WIDE)
        await bench.until(number + 1)
    first = bench.published[0].coded
    assert first.keyframe
    assert slices_of(first) == bench.thread.slices == 2
    assert not any(item.coded.keyframe for item in bench.published[1:pictures])
    if interval is not None:
        # Somebody asks before the next one would have come by itself.
        bench.offer(pictures, width=WIDE)
        await bench.until(pictures + 1)
        assert not bench.published[-1].coded.keyframe
        bench.thread.request_keyframe()
    async with asyncio.timeout(5):
        while not bench.published[-1].coded.keyframe or len(bench.published) <= pictures:
            bench.offer(len(bench.published), width=WIDE)
            await bench.until(len(bench.published) + 1)
    assert slices_of(bench.published[-1].coded) == bench.thread.slices == 1
    await bench.thread.close()
    assert bench.failures == []


async def test_pictures_that_need_all_slices_keep_them_without_a_keyframe(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    crowd(monkeypatch, 10**12)
    bench = Bench(dataclasses.replace(PROFILE, bitrate=4_000_000))
    for number in range(LOOK_PICTURES * (CROWDED_LOOKS + 1)):
        bench.offer(number, width=WIDE)
        await bench.until(number + 1)
    assert [item.coded.keyframe for item in bench.published].count(True) == 1
    assert bench.thread.gate.requests == 0
    assert bench.thread.slices == 2
    await bench.thread.close()


@pytest.mark.parametrize("codec", ["h264", "vp8"])
def test_a_picture_encoded_from_where_it_lies_is_the_same_as_a_copy(codec: Any) -> None:
    frame = picture(3)
    pixels = memoryview(b"".join(map(bytes, frame.planes)))
    canvas = Canvas(frame.width, frame.height)
    canvas.draw(frame)
    profile = VideoProfile(codec=codec, bitrate=1_000_000)
    coded = [
        VideoEncoder(profile, frame.width, frame.height).encode(item, 10**9, keyframe=True).payloads
        for item in (canvas, Wrapped(pixels, frame.width, frame.height))
    ]
    assert coded[0] == coded[1]


async def test_pictures_with_memory_of_their_own_are_not_copied_and_live_until_encoded(bench: Bench) -> None:
    for number in range(6):
        now_ns = time.monotonic_ns()
        frame = picture(number)
        # Every other one is only lent: drawing it must not touch the memory of those that are kept.
        pixels = None if number % 2 else memoryview(b"".join(map(bytes, frame.planes)))
        bench.thread.offer(Arrival(frame, now_ns, now_ns, pixels=pixels), frame, frame.captured_ns)
        if number == 3:
            bench.thread.request_keyframe()
        await bench.until(number + 1)
    assert bench.failures == []
    assert all(item.coded.payloads for item in bench.published)


async def test_sound_comes_out_evenly_and_the_oldest_is_dropped() -> None:
    heard: list[CodedSound] = []
    failures: list[BaseException] = []
    thread = SoundThread("room", 64_000, heard.append, failures.append)
    for number in range(20):
        thread.offer(tone(number), 10**9 + number * PACKET_NS + number % 2 * MS)
        await asyncio.sleep(0.005)
    async with asyncio.timeout(5):
        while len(heard) + thread.dropped < 20:
            await asyncio.sleep(0.002)
    steps = {b.timeline_ns - a.timeline_ns for a, b in itertools.pairwise(heard)}
    assert all(abs(step - PACKET_NS) < MS for step in steps) or thread.dropped
    await thread.close()
    for number in range(MAX_WAITING + 4):
        thread.offer(tone(number), number * PACKET_NS)
    assert thread.dropped >= 4
    assert failures == []
