"""The one door to x264: what it takes, what it gives, and that the library is one that we know."""

from __future__ import annotations

import gc
import os
import threading
import time
import weakref
from typing import Any

import av
import numpy as np
import pytest

from relay.errors import MedferryError
from rtc import x264
from rtc.encode import Wrapped
from rtc.x264 import BUILDS, X264, X264Error, level
from tests.peers import require_library

WIDTH, HEIGHT = 320, 240


class Picture:
    """Moving bars over noise."""

    def __init__(self, number: int, width: int = WIDTH, height: int = HEIGHT) -> None:
        noise = np.random.default_rng(number).integers(0, 8, (height * 3 // 2, width), np.uint8)
        bars = (np.arange(width) // 16 + number) % 8 * 24
        self.rows = noise + bars.astype(np.uint8)
        self.planes = Wrapped(self.rows.data.cast("B"), width, height).planes


def opened(**changes: Any) -> X264:
    settings: dict[str, Any] = {
        "width": WIDTH,
        "height": HEIGHT,
        "rate": 30,
        "bitrate": 1_000_000,
        "preset": "ultrafast",
        "slices": 1,
        **changes,
    }
    return X264(**settings)


def decoder() -> av.VideoCodecContext:
    context = av.CodecContext.create("h264", "r")
    assert isinstance(context, av.VideoCodecContext)
    context.thread_count = 1
    context.flags |= int(av.codec.context.Flags.low_delay)
    return context


def decode(context: av.VideoCodecContext, units: list[bytes]) -> np.ndarray[Any, Any]:
    [frame] = context.decode(av.Packet(b"".join(b"\0\0\0\1" + unit for unit in units)))
    return frame.to_ndarray()


@pytest.mark.parametrize("qp", [12, 24, 40])
@pytest.mark.parametrize("slices", [1, 2])
def test_a_picture_is_as_fine_as_it_is_asked_to_be(qp: int, slices: int) -> None:
    encoder, reader = opened(slices=slices), decoder()
    for number in range(8):
        picture = Picture(number)
        units = encoder.encode(picture, qp, keyframe=number == 0)
        seen = decode(reader, units)
        error = np.abs(seen.astype(int) - picture.rows)[:HEIGHT].mean()
        # The quantiser's step, of which the error is a quarter where it is uniform.
        step = 0.625 * 2 ** (qp / 6)
        assert error <= 0.3 * step + 0.1
        assert qp < 24 or error > 0.3


def test_each_picture_may_have_another_quantiser() -> None:
    encoder = opened()
    sizes = {}
    for number, qp in enumerate([30, 12, 30, 51, 11, 51]):
        sizes[number, qp] = len(encoder.encode(Picture(number), qp, keyframe=True)[-1])
    assert sizes[0, 30] * 3 < sizes[1, 12] < sizes[4, 11]
    assert abs(sizes[0, 30] / sizes[2, 30] - 1) < 0.1
    assert sizes[3, 51] * 1.5 < sizes[2, 30]


@pytest.mark.parametrize("slices", [1, 2])
def test_nal_units_come_whole_and_in_order(slices: int) -> None:
    encoder = opened(slices=slices)
    first = encoder.encode(Picture(0), 20, keyframe=True)
    second = encoder.encode(Picture(1), 20, keyframe=False)
    third = encoder.encode(Picture(2), 20, keyframe=True)
    assert [unit[0] & 31 for unit in first if unit[0] & 31 != 6] == [7, 8] + [5] * slices
    assert [unit[0] & 31 for unit in second] == [1] * slices
    assert [unit[0] & 31 for unit in third] == [7, 8] + [5] * slices
    assert not any(b"\0\0\1" in unit or unit.endswith(b"\0") for unit in first + second + third)


def test_a_keyframe_that_is_thrown_away_is_not_missed() -> None:
    """What the rate control does: what came after must not refer to what nobody got."""
    encoder, reader = opened(), decoder()
    decode(reader, encoder.encode(Picture(0), 30, keyframe=True))
    encoder.encode(Picture(1), 12, keyframe=False)
    encoder.encode(Picture(1), 20, keyframe=True)
    for number in (1, 2, 3):
        picture = Picture(number)
        seen = decode(reader, encoder.encode(picture, 20, keyframe=number == 1))
        assert np.abs(seen.astype(int) - picture.rows)[:HEIGHT].mean() < 2.5


@pytest.mark.parametrize(("width", "height"), [(16, 16), (66, 18), (1280, 722)])
def test_any_even_size(width: int, height: int) -> None:
    picture = Picture(3, width, height)
    seen = decode(decoder(), opened(width=width, height=height).encode(picture, 12, keyframe=True))
    assert seen.shape == (height * 3 // 2, width)
    assert np.abs(seen.astype(int) - picture.rows)[:height].mean() < 2


def test_pictures_are_only_read() -> None:
    encoder = opened()
    picture = Picture(0)
    before = picture.rows.copy()
    picture.rows.flags.writeable = False
    encoder.encode(picture, 20, keyframe=True)
    encoder.encode(picture, 20, keyframe=False)
    assert (picture.rows == before).all()


@pytest.mark.parametrize("changes", [{"preset": "quickest"}, {"width": 0}, {"height": 1 << 20}])
def test_what_x264_refuses_is_said(changes: dict[str, Any]) -> None:
    with pytest.raises(X264Error, match=r"x264 cannot encode \d+x\d+ with preset \w+ in 1 slices"):
        opened(**changes)


def test_its_threads_end_with_it() -> None:
    before = set(os.listdir("/proc/self/task"))
    encoder = opened(slices=2)
    own = set(os.listdir("/proc/self/task")) - before
    assert own
    gone = weakref.ref(encoder)
    del encoder
    gc.collect()
    assert gone() is None
    assert not own & set(os.listdir("/proc/self/task"))


def test_the_interpreter_goes_on_while_it_encodes() -> None:
    encoder = opened(width=1920, height=1080, preset="veryfast")
    picture = Picture(0, 1920, 1080)
    times: list[int] = []

    def encode() -> None:
        times.append(time.monotonic_ns())
        encoder.encode(picture, 12, keyframe=True)
        times.append(time.monotonic_ns())

    encoding = threading.Thread(target=encode)
    encoding.start()
    turns = []
    while encoding.is_alive():
        turns.append(time.monotonic_ns())
    began, ended = times
    fifth = (ended - began) // 5
    # Were the lock held, this thread would get a turn before and after.
    assert sum(began + fifth < turn < ended - fifth for turn in turns) > 10


@pytest.mark.parametrize(
    ("width", "height", "rate", "bitrate", "expected"),
    [
        (176, 144, 15, 64_000, 10),
        (320, 240, 30, 500_000, 13),
        (1280, 720, 30, 4_000_000, 31),
        (1280, 720, 60, 4_000_000, 32),
        (1280, 720, 30, 15_000_000, 32),
        (1280, 720, 30, 50_000_000, 41),
        (1920, 1080, 30, 6_000_000, 40),
        (1920, 1080, 60, 6_000_000, 42),
        (3840, 2160, 30, 20_000_000, 51),
        (8192, 8192, 120, 50_000_000, 52),
    ],
)
def test_the_level(width: int, height: int, rate: int, bitrate: int, expected: int) -> None:
    assert level(width, height, rate, bitrate) == expected


def test_the_level_is_in_the_parameter_set() -> None:
    sequence, *_ = opened(width=1280, height=720, bitrate=15_000_000).encode(
        Picture(0, 1280, 720), 40, keyframe=True
    )
    assert sequence[1:4] == bytes([66, 0xC0, 32])


def test_pyav_brings_a_build_that_is_known() -> None:
    assert x264._library().build == BUILDS[-1]


def test_without_one_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(x264, "BUILDS", (99,))
    with pytest.raises(MedferryError, match=r"without x264 build 99.*install av from PyPI's wheels"):
        x264._Library()


@pytest.mark.peer
def test_the_older_build_has_the_same_structures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Debian's own, which its GStreamer brings."""
    name = require_library("libx264.so.164")
    monkeypatch.setattr(x264, "_library", lambda: x264._Library(name))
    encoder, reader = opened(slices=2), decoder()
    assert encoder._library.build == 164
    for number in range(4):
        picture = Picture(number)
        seen = decode(reader, encoder.encode(picture, 14, keyframe=number == 0))
        assert np.abs(seen.astype(int) - picture.rows)[:HEIGHT].mean() < 2
