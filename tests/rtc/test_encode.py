"""What the encoders make, as an independent decoder sees it."""

from __future__ import annotations

import itertools
from typing import Literal

import av
import numpy as np
import pytest

from rtc.encode import TRIES, Canvas, Coded, OpusEncoder, VideoEncoder, VideoProfile, even
from rtc.packetize import NAL_SEI
from rtc.rate_control import MOST_PICTURES
from tests.rtc.sink_fakes import number_in, picture, tone
from tests.rtc.test_packetize import assemble

STEP = 33_333_333
Codec = Literal["h264", "vp8"]
BOTH: list[Codec] = ["h264", "vp8"]


def encoder(codec: Codec, width: int = 320, height: int = 240, bitrate: int = 1_000_000) -> VideoEncoder:
    return VideoEncoder(VideoProfile(codec=codec, bitrate=bitrate), even(width), even(height), 30.0)


def bitstream(coded: Coded, codec: Codec) -> bytes:
    if codec == "vp8":
        return b"".join(payload[4:] for payload in coded.payloads)
    return b"".join(b"\0\0\0\1" + unit for unit in assemble(coded.payloads))


def decoder(codec: Codec) -> av.VideoCodecContext:
    context = av.CodecContext.create(codec, "r")
    assert isinstance(context, av.VideoCodecContext)
    context.flags |= int(av.codec.context.Flags.low_delay)
    return context


@pytest.mark.parametrize("codec", BOTH)
@pytest.mark.parametrize(("width", "height"), [(320, 240), (321, 241), (322, 18), (257, 16)])
def test_each_picture_comes_out_at_once_and_whole(codec: Codec, width: int, height: int) -> None:
    source, reader = encoder(codec, width, height), decoder(codec)
    canvas = Canvas(width, height)
    for number in range(4):
        canvas.draw(picture(number, width=width, height=height))
        coded = source.encode(canvas, number * STEP, keyframe=False)
        assert coded.keyframe == (number == 0)
        [frame] = reader.decode(av.Packet(bitstream(coded, codec))) or reader.decode(None)
        assert (frame.width, frame.height) == (even(width), even(height))
        assert number_in(frame) == number
        _, blue, red = (np.frombuffer(memoryview(plane), np.uint8) for plane in frame.planes)
        assert abs(int(np.median(blue[: frame.width // 2])) - 100) < 6
        assert abs(int(np.median(red[: frame.width // 2])) - 160) < 6


def test_odd_pictures_are_widened_by_their_own_edge() -> None:
    canvas = Canvas(17, 19)
    frame = picture(0, width=17, height=19)
    canvas.draw(frame)
    luma = canvas.frame.to_ndarray(format="yuv420p")[:20]
    original = np.frombuffer(frame.planes[0], np.uint8).reshape(19, 17)
    assert (luma[:19, :17] == original).all()
    assert (luma[:19, 17] == original[:, 16]).all()
    assert (luma[19, :17] == original[18]).all()


@pytest.mark.parametrize("codec", BOTH)
def test_a_keyframe_when_asked_and_only_then(codec: Codec) -> None:
    source, canvas = encoder(codec), Canvas(320, 240)
    keyframes = []
    for number in range(40):
        # A cut in the middle must not make a keyframe of its own.
        canvas.draw(picture(number if number < 20 else 12_345 + number))
        if source.encode(canvas, number * STEP, keyframe=number == 30).keyframe:
            keyframes.append(number)
    assert keyframes == [0, 30]


SECOND = 30
"""Pictures."""


@pytest.mark.parametrize("codec", BOTH)
@pytest.mark.parametrize(
    ("refreshed", "asked", "expected"),
    [
        (range(0, 150, 60), {}, [0, 60, 120]),
        # Asked for in between: the next of the publisher's is ours again.
        (range(0, 150, 60), {10}, [0, 10, 60, 120]),
        (range(0, 150, 60), {50}, [0, 50, 60, 120]),
        # Out of step from the beginning.
        (range(25, 150, 60), {}, [0, 60, 85, 145]),
        # More often than half our interval: every other one.
        (range(0, 150, 15), {}, [0, 30, 60, 90, 120]),
        # Less often: ours come at the interval, and with the publisher's.
        (range(0, 150, 100), {}, [0, 60, 100]),
    ],
)
def test_keyframes_that_come_by_themselves_are_those_of_the_publisher(
    codec: Codec, refreshed: range, asked: set[int], expected: list[int]
) -> None:
    source = VideoEncoder(VideoProfile(codec=codec, bitrate=500_000, keyframe_seconds=2), 64, 48, SECOND)
    canvas = Canvas(64, 48)
    keyframes = []
    for number in range(150):
        canvas.draw(picture(number, width=64, height=48))
        coded = source.encode(canvas, number * STEP, keyframe=number in asked, refreshed=number in refreshed)
        if coded.keyframe:
            keyframes.append(number)
    assert keyframes == expected


def test_who_makes_keyframes_on_request_makes_none_of_the_publishers() -> None:
    source, canvas = encoder("h264"), Canvas(320, 240)
    canvas.draw(picture(0))
    made = [source.encode(canvas, number * STEP, keyframe=False, refreshed=True) for number in range(5)]
    assert [coded.keyframe for coded in made] == [True] + [False] * 4


def test_a_keyframe_can_be_decoded_alone() -> None:
    source, canvas = encoder("h264"), Canvas(320, 240)
    for number in range(5):
        canvas.draw(picture(number))
        coded = source.encode(canvas, number * STEP, keyframe=number == 4)
    assert len(coded.sets) == 2
    reader = decoder("h264")
    [frame] = reader.decode(av.Packet(bitstream(coded, "h264"))) or reader.decode(None)
    assert number_in(frame) == 4


@pytest.mark.parametrize(
    ("width", "height", "bitrate", "level"),
    [(320, 240, 500_000, 13), (1280, 720, 4_000_000, 31), (1920, 1080, 6_000_000, 40)],
)
def test_constrained_baseline_at_the_size_s_level(width: int, height: int, bitrate: int, level: int) -> None:
    source = encoder("h264", width, height, bitrate)
    canvas = Canvas(width, height)
    canvas.draw(picture(0, width=width, height=height))
    coded = source.encode(canvas, 0, keyframe=True)
    profile, constraints, found = coded.sets[0][1:4]
    assert profile == 66
    assert constraints & 0x40, "constraint_set1: main profile decoders can read it"
    assert found == level
    assert all(unit[0] & 31 != NAL_SEI for unit in assemble(coded.payloads))


@pytest.mark.parametrize("codec", BOTH)
def test_the_bitrate_follows(codec: Codec) -> None:
    source, canvas = encoder(codec, bitrate=2_000_000), Canvas(320, 240)
    noise = np.random.default_rng(1).integers(100, 130, (8, 240, 320), dtype=np.uint8)
    sizes: list[int] = []
    keyframes = 0
    for number in range(120):
        if number == 40:
            source.set_bitrate(400_000)
        if number == 80:
            source.set_bitrate(2_000_000)
        frame = picture(0)
        canvas.draw(picture(0, planes=(noise[number % 8].tobytes(), *frame.planes[1:])))
        coded = source.encode(canvas, number * STEP, keyframe=False)
        sizes.append(coded.size)
        keyframes += coded.keyframe and (codec == "vp8" or number > 1)
    before, low, after = (sum(sizes[begin + 20 : begin + 40]) * 8 for begin in (0, 40, 80))
    assert low < before / 2
    assert after > low * 2
    assert source.bitrate == 2_000_000
    assert keyframes == (0 if codec == "h264" else 3), "x264 goes on; VP8 begins anew"


def test_a_cut_to_something_else_is_one_keyframe_of_the_usual_size() -> None:
    source, reader, canvas = encoder("h264"), decoder("h264"), Canvas(320, 240)
    share = 1_000_000 / 8 / 30
    noise = np.random.default_rng(1).integers(0, 256, (2, 240, 320), dtype=np.uint8)
    tries = []
    for number in range(120):
        planes = picture(0).planes if number < 60 else (noise[0].tobytes(), *picture(0).planes[1:])
        canvas.draw(picture(number, planes=planes))
        coded = source.encode(canvas, number * STEP, keyframe=False)
        [frame] = reader.decode(av.Packet(bitstream(coded, "h264"))) or reader.decode(None)
        assert coded.size <= MOST_PICTURES * share or number == 60
        tries.append(coded.tries)
        if number == 60:
            assert coded.keyframe
            assert coded.tries > 1
    assert sum(tries[60:]) - 60 <= TRIES, "noise at rest is no new noise"
    seen = frame.to_ndarray()[:240].astype(int)
    assert np.abs(seen - noise[0]).mean() < 40, "it came into view"


class Bits:
    """Reads a NAL unit's payload as its syntax does (ITU-T H.264 §7.2, §9.1)."""

    def __init__(self, unit: bytes) -> None:
        self._bits = "".join(f"{byte:08b}" for byte in unit.replace(b"\0\0\3", b"\0\0"))
        self._at = 8

    def fixed(self, count: int) -> int:
        self._at += count
        return int(self._bits[self._at - count : self._at], 2)

    def exp_golomb(self) -> int:
        zeros = self._bits.index("1", self._at) - self._at
        self._at += zeros
        return self.fixed(zeros + 1) - 1


def idr_pic_id(coded: Coded) -> int:
    sequence = Bits(coded.sets[0])
    sequence.fixed(24)
    sequence.exp_golomb()
    frame_num_bits = sequence.exp_golomb() + 4
    first_slice = Bits(next(unit for unit in assemble(coded.payloads) if unit[0] & 31 == 5))
    for _ in range(3):
        first_slice.exp_golomb()
    assert first_slice.fixed(frame_num_bits) == 0
    return first_slice.exp_golomb()


def test_two_keyframes_in_a_row_have_different_numbers() -> None:
    """Else a decoder may take them for one picture, also where one in between was thrown away."""
    source, canvas = encoder("h264"), Canvas(320, 240)
    noise = np.random.default_rng(1).integers(0, 256, (40, 240, 320), dtype=np.uint8)
    made = []
    for number in range(40):
        planes = picture(0).planes if number % 3 else (noise[number].tobytes(), *picture(0).planes[1:])
        canvas.draw(picture(number, planes=planes))
        made.append(source.encode(canvas, number * STEP, keyframe=number % 5 < 3))
    assert any(coded.tries > 1 for coded in made)
    numbers = [idr_pic_id(coded) if coded.keyframe else None for coded in made]
    pairs = [pair for pair in itertools.pairwise(numbers) if None not in pair]
    assert pairs
    assert all(first != second for first, second in pairs)


def test_small_changes_do_not_cost_a_vp8_keyframe() -> None:
    source = encoder("vp8")
    source.set_bitrate(900_000)
    assert source.bitrate == 1_000_000
    source.set_bitrate(5_000_000)
    assert source.bitrate == 1_000_000, "never above the profile's"


@pytest.mark.parametrize("rate", [8000, 16_000, 24_000, 48_000])
@pytest.mark.parametrize("channels", [1, 2])
def test_opus(rate: int, channels: int) -> None:
    source = OpusEncoder(rate=rate, channels=channels, bitrate=64_000)
    reader = av.CodecContext.create("libopus", "r")
    assert isinstance(reader, av.AudioCodecContext)
    reader.sample_rate = 48_000
    reader.layout = "stereo"
    packets = [
        packet
        for number in range(25)
        for packet in source.encode(tone(number, rate=rate, channels=channels).samples)
    ]
    assert 24 <= len(packets) <= 25
    frames = [frame for packet in packets for frame in reader.decode(av.Packet(packet))]
    assert {frame.samples for frame in frames} == {960}
    loud = np.abs(frames[10].to_ndarray().astype(float)).max()
    assert loud > 0.1 * (32768 if frames[10].format.name.startswith("s16") else 1)


def test_opus_collects_odd_lengths() -> None:
    source = OpusEncoder(rate=48_000, channels=1, bitrate=32_000)
    assert source.encode(bytes(2 * 500)) == []
    assert source.pending_ns == 500 * 10**9 // 48_000
    assert len(source.encode(bytes(2 * 500))) == 1
    assert source.pending_ns == 40 * 10**9 // 48_000
