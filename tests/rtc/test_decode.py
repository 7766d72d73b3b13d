"""Decoding: sizes, damage, padding, concealment. Every fault costs its picture, never the decoder."""

from __future__ import annotations

import asyncio
import random

import numpy as np
import pytest

from relay.errors import PeerError
from rtc import decode_thread
from rtc.decode import OpusDecoder, VideoDecoder, check_size, visible_planes
from rtc.decode_thread import AudioThread, DecodedPicture, Fault, VideoThread
from rtc.depayload import PAYLOADS, Coded, Size
from rtc.jitter import Picture, Silence, Sound
from tests.rtc.coded import coded_pictures, coded_sound, payloads
from tests.rtc.fakes import until


def coded(codec: str, picture: bytes) -> Coded:
    found = PAYLOADS[codec].picture(payloads(codec, picture))
    assert found is not None
    return found


def as_picture(codec: str, data: bytes, number: int = 0) -> Picture:
    return Picture(tuple(payloads(codec, data, number)), 3000 * number, 1, number == 0, False)


@pytest.mark.parametrize("codec", ["h264", "vp8"])
@pytest.mark.parametrize(("width", "height"), [(320, 240), (642, 482), (1366, 768), (16, 16)])
def test_planes_have_no_padding(codec: str, width: int, height: int) -> None:
    decoder = VideoDecoder(codec)
    frames = [
        frame
        for number, data in enumerate(coded_pictures(codec, 2, width, height))
        for frame in decoder.decode(coded(codec, data), number)
    ]
    planes = visible_planes(frames[0])
    assert [len(plane) for plane in planes] == [width * height, width * height // 4, width * height // 4]
    levels = np.frombuffer(planes[0], np.uint8).reshape(height, width)
    # The test's picture is evenly noisy; padding would show as columns of another level.
    assert abs(float(levels[:, -8:].mean()) - float(levels.mean())) < 8


def test_one_picture_in_one_picture_out() -> None:
    decoder = VideoDecoder("h264")
    counts = [len(decoder.decode(coded("h264", data), n)) for n, data in enumerate(coded_pictures("h264", 5))]
    assert counts == [1] * 5


@pytest.mark.parametrize(
    "size",
    [(8, 8), (15, 240), (4097, 100), (100, 16_384), (4096, 4096)],
    ids=lambda size: f"{size[0]}x{size[1]}",
)
def test_sizes_are_refused_before_decoding(size: tuple[int, int]) -> None:
    with pytest.raises(PeerError) as caught:
        check_size(Size(width=size[0], height=size[1]))
    assert caught.value.reason == "size"


class Sink:
    """Collects what a thread delivers."""

    def __init__(self) -> None:
        self.outcomes: list[object] = []

    def take(self, outcomes: object) -> None:
        assert isinstance(outcomes, list)
        self.outcomes += outcomes

    @property
    def pictures(self) -> list[DecodedPicture]:
        return [item for item in self.outcomes if isinstance(item, DecodedPicture)]

    @property
    def faults(self) -> list[Fault]:
        return [item for item in self.outcomes if isinstance(item, Fault)]


async def test_a_refused_size_is_refused_until_another_is_declared() -> None:
    sink = Sink()
    refused = Size(width=640, height=480)

    def admit(size: Size) -> None:
        if size == refused:
            raise PeerError("budget", "no room")

    thread = VideoThread("h264", sink.take, admit)
    large = coded_pictures("h264", 3, 640, 480)
    small = coded_pictures("h264", 2)
    for number, data in enumerate((*large, *small)):
        thread.submit(as_picture("h264", data, number))
    await until(lambda: len(sink.outcomes) == 5)
    assert [fault.reason for fault in sink.faults] == ["budget"] * 3
    assert all(fault.refused for fault in sink.faults)
    assert [(item.width, item.height) for item in sink.pictures] == [(320, 240)] * 2
    thread.close()


async def test_the_size_may_change_in_mid_stream() -> None:
    sink = Sink()
    for codec in ("h264", "vp8"):
        sink.outcomes.clear()
        thread = VideoThread(codec, sink.take)
        parts = (
            *coded_pictures(codec, 2),
            *coded_pictures(codec, 2, 642, 482),
            *coded_pictures(codec, 2, 64, 64),
        )
        for number, data in enumerate(parts):
            thread.submit(as_picture(codec, data, number))
        await until(lambda: len(sink.outcomes) == 6)
        sizes = [(item.width, item.height) for item in sink.pictures]
        assert sizes == [(320, 240)] * 2 + [(642, 482)] * 2 + [(64, 64)] * 2
        thread.close()


async def test_b_frames_keep_their_own_timestamps() -> None:
    options = (("tune", "fastdecode"), ("bf", "2"), ("x264-params", "bframes=2:b-adapt=0:scenecut=0"))
    sink = Sink()
    thread = VideoThread("h264", sink.take)
    data = coded_pictures("h264", 12, 320, 240, options)
    for number, picture in enumerate(data):
        thread.submit(as_picture("h264", picture, number))
        await until(lambda: thread.pending == 0)
    await until(lambda: len(sink.outcomes) >= 8)
    assert sink.faults == []
    assert len({item.timestamp for item in sink.pictures}) == len(sink.pictures)
    thread.close()


@pytest.mark.parametrize("codec", ["h264", "vp8"])
async def test_damage_costs_pictures_not_the_decoder(codec: str) -> None:
    randomly = random.Random(codec)
    sink = Sink()
    thread = VideoThread(codec, sink.take)
    pictures = coded_pictures(codec, 6)
    for _ in range(60):
        damaged = bytearray(randomly.choice(pictures))
        for _ in range(randomly.randrange(1, 20)):
            damaged[randomly.randrange(4, len(damaged))] ^= 1 << randomly.randrange(8)
        data = bytes(damaged[: randomly.randrange(8, len(damaged) + 1)])
        parts = tuple(part for part in payloads(codec, data) if part)
        if parts:
            thread.submit(Picture(parts, 0, 1, True, True))
        await until(lambda: thread.pending == 0)
    sink.outcomes.clear()
    for number, data in enumerate(pictures):
        thread.submit(as_picture(codec, data, number))
    await until(lambda: any(item.timestamp == 15_000 for item in sink.pictures))
    thread.close()


async def test_the_inbox_is_bounded() -> None:
    thread = VideoThread("h264", Sink().take)
    data = coded_pictures("h264", 1, 1280, 720)[0]
    taken = [thread.submit(as_picture("h264", data)) for _ in range(200)]
    assert thread.pending <= decode_thread.MAX_PENDING
    assert thread.dropped == taken.count(False) > 0
    thread.close()


async def test_nothing_is_delivered_after_closing() -> None:
    sink = Sink()
    thread = VideoThread("h264", sink.take)
    thread.submit(as_picture("h264", coded_pictures("h264", 1)[0]))
    thread.close()
    await asyncio.sleep(0.05)
    assert sink.outcomes == []


def test_sound_is_made_up_and_fades() -> None:
    decoder = OpusDecoder()
    for packet in coded_sound(5):
        samples = np.frombuffer(decoder.decode(packet), np.int16).reshape(-1, 2)
    assert samples.shape == (960, 2)
    first = np.frombuffer(decoder.conceal(), np.int16).reshape(-1, 2)
    assert first.shape == (960, 2)
    assert np.abs(first[:100]).max() > 1000
    assert not first[480:].any()
    assert not np.frombuffer(decoder.conceal(), np.int16).any()


async def test_bad_opus_costs_its_packet() -> None:
    sink = Sink()
    thread = AudioThread(sink.take)
    packets = coded_sound(4)
    for item in (packets[0], b"\xff" * 3, packets[1]):
        thread.submit(Sound(item, 0, 1))
    thread.submit(Silence(2))
    await until(lambda: len(sink.outcomes) >= 4)
    assert len(sink.faults) <= 1
    thread.close()
