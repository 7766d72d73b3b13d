"""The stamp survives what codecs and scalers do, and nothing else reads as one."""

from __future__ import annotations

from fractions import Fraction

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rtc.stamp import MIN_HEIGHT, MIN_WIDTH, Stamp, paint, read

stamps = st.builds(Stamp, time_us=st.integers(0, 2**48 - 1), counter=st.integers(0, 2**32 - 1))


def picture(width: int, height: int, phase: int = 0) -> list[np.ndarray]:
    """A moving, coloured picture as yuv420p planes."""
    y, x = np.mgrid[0:height, 0:width]
    luma = ((x + 3 * y + 7 * phase) % 256).astype(np.uint8)
    chroma = ((height + 1) // 2, (width + 1) // 2)
    return [luma, np.full(chroma, 90, np.uint8), np.full(chroma, 170, np.uint8)]


@pytest.mark.parametrize(
    ("width", "height"), [(1920, 1080), (1280, 720), (640, 480), (641, 361), (MIN_WIDTH, MIN_HEIGHT)]
)
@given(stamp=stamps)
@settings(max_examples=20, deadline=None)
def test_what_is_painted_is_read(width: int, height: int, stamp: Stamp) -> None:
    luma, *chroma = picture(width, height)
    paint(luma, tuple(chroma), stamp)
    assert read(luma) == stamp


def test_numbers_wrap() -> None:
    luma, *chroma = picture(1280, 720)
    paint(luma, tuple(chroma), Stamp(time_us=2**48 + 5, counter=2**32 + 7))
    assert read(luma) == Stamp(time_us=5, counter=7)


def test_the_stamp_stays_in_its_corner() -> None:
    luma, *chroma = picture(1280, 720)
    before = luma.copy()
    paint(luma, tuple(chroma), Stamp(time_us=1, counter=1))
    rows, columns = np.nonzero(luma != before)
    assert (rows.min(), columns.min()) >= (16, 16)
    assert (rows.max(), columns.max()) <= (16 + 8 * 16 - 1, 16 + 16 * 16 - 1)


def test_too_small_a_picture() -> None:
    luma, *chroma = picture(MIN_WIDTH - 2, MIN_HEIGHT)
    with pytest.raises(ValueError, match="too small"):
        paint(luma, tuple(chroma), Stamp(time_us=1, counter=1))
    assert read(luma) is None


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=100, deadline=None)
def test_noise_is_never_a_stamp(seed: int) -> None:
    noise = np.random.default_rng(seed)
    assert read(noise.integers(0, 256, (180, 320), np.uint8)) is None
    cells = np.kron(noise.integers(0, 2, (45, 80), np.uint8) * 255, np.ones((4, 4), np.uint8))
    assert read(cells.astype(np.uint8)) is None


@given(stamp=stamps, row=st.integers(0, 7), column=st.integers(0, 15))
@settings(max_examples=100, deadline=None)
def test_one_wrong_cell_is_refused(stamp: Stamp, row: int, column: int) -> None:
    luma, *chroma = picture(1280, 720)
    paint(luma, tuple(chroma), stamp)
    cell = luma[16 + 16 * row : 32 + 16 * row, 16 + 16 * column : 32 + 16 * column]
    cell[:] = 255 - cell
    assert read(luma) is None


CODECS = {
    "libx264": {"preset": "ultrafast", "tune": "zerolatency"},
    "libvpx": {"deadline": "realtime", "cpu-used": "-8", "lag-in-frames": "0"},
}


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("scale", [1, 2])
def test_survives_500_kilobits_and_scaling(codec: str, scale: int) -> None:
    width, height, count = 1280, 720, 24
    encoder = av.VideoCodecContext.create(codec, "w")
    assert isinstance(encoder, av.VideoCodecContext)
    encoder.width, encoder.height, encoder.pix_fmt = width, height, "yuv420p"
    encoder.bit_rate, encoder.time_base, encoder.framerate = 500_000, Fraction(1, 30), Fraction(30)
    encoder.options = CODECS[codec]
    decoder = av.VideoCodecContext.create("h264" if codec == "libx264" else "vp8", "r")
    assert isinstance(decoder, av.VideoCodecContext)
    sent, got = [], []
    packets = []
    for number in range(count):
        planes = picture(width, height, number // 8)
        stamp = Stamp(time_us=0x5A5A_1234_0000 + 33_333 * number, counter=number)
        paint(planes[0], (planes[1], planes[2]), stamp)
        sent.append(stamp)
        flat = np.concatenate([plane.reshape(-1, width) for plane in planes])
        frame = av.VideoFrame.from_ndarray(flat, format="yuv420p")
        frame.pts = number
        packets += encoder.encode(frame)
    packets += encoder.encode(None)
    for packet in [*packets, None]:
        for decoded in decoder.decode(packet):
            smaller = decoded.reformat(width // scale, height // scale)
            got.append(read(smaller.to_ndarray()[: smaller.height]))
    assert got == sent
