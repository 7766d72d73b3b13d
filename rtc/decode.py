"""Decoders: coded pictures and sound in, bare planes and PCM out, through FFmpeg's libraries (PyAV).

A picture's declared size is checked before the decoder sees it. What comes out is visible pixels only: no
padding, no side data. A fault costs its picture; the decoder goes on.

An object here belongs to one thread (see `decode_thread.py`); FFmpeg works without the interpreter lock.
"""

from __future__ import annotations

import av
import numpy as np
import numpy.typing as npt
from av.codec.context import Flags
from av.video.reformatter import ColorRange

from relay.errors import PeerError
from relay.records import MAX_DIMENSION, MIN_DIMENSION, Buffer
from rtc.depayload import Coded, Size

MAX_PICTURE_PIXELS = 4096 * 2304
"""Pixels of one picture: 4096×2304 decodes in real time on one thread, larger ones do not."""

Pcm = npt.NDArray[np.int16]
"""Samples by channels."""

OPUS_RATE = 48_000
OPUS_CHANNELS = 2

FADE_SAMPLES = 480
"""Samples (10 ms) over which made-up sound falls silent or comes back, so that it does not click."""


def check_size(size: Size) -> None:
    """Refuse a picture by its declared size, before any decoder allocates for it.

    Raises:
        PeerError: It is smaller or larger than the lane carries.
    """
    within = all(MIN_DIMENSION <= side <= MAX_DIMENSION for side in (size.width, size.height))
    if not within or size.width * size.height > MAX_PICTURE_PIXELS:
        limit = f"{MIN_DIMENSION} to {MAX_DIMENSION} pixels a side and {MAX_PICTURE_PIXELS} in all"
        raise PeerError("size", f"a picture of {size.width}x{size.height} is outside {limit}")


def visible_planes(frame: av.VideoFrame) -> tuple[Buffer, Buffer, Buffer]:
    """The planes of a yuv420p frame, without the padding that decoders leave at line ends.

    Planes that have none are the decoder's own memory, which it does not write to while they exist.
    """
    widths = (frame.width, (frame.width + 1) // 2, (frame.width + 1) // 2)
    heights = (frame.height, (frame.height + 1) // 2, (frame.height + 1) // 2)
    planes: list[Buffer] = []
    for plane, width, height in zip(frame.planes, widths, heights, strict=True):
        whole = memoryview(plane)
        if plane.line_size == width:
            planes.append(whole[: width * height])
            continue
        lines = np.frombuffer(whole, np.uint8, plane.line_size * height)
        lines = lines.reshape(height, plane.line_size)
        planes.append(lines[:, :width].tobytes())
    return planes[0], planes[1], planes[2]


class VideoDecoder:
    """FFmpeg's decoder of one stream: ``h264`` or ``vp8``."""

    def __init__(self, codec: str, parameter_sets: bytes = b"") -> None:
        """`parameter_sets`: H.264's, in Annex B, from an SDP file; used until the stream sends its own."""
        self._codec = codec
        self._parameter_sets = parameter_sets
        context = av.CodecContext.create(codec, "r")
        assert isinstance(context, av.VideoCodecContext)
        context.thread_count = 1
        context.flags |= Flags.low_delay
        context.options = {"max_pixels": str(MAX_PICTURE_PIXELS + 2 * 16 * MAX_DIMENSION)}
        self._context = context

    def decode(self, coded: Coded, number: int) -> list[av.VideoFrame]:
        """The pictures that come of one coded picture; each has as its `pts` the `number` it came with.

        Raises:
            PeerError: The size is refused, or the decoder can make nothing of it.
        """
        if coded.size is not None:
            check_size(coded.size)
            self._parameter_sets = b""
        packet = av.Packet(self._parameter_sets + coded.data if coded.keyframe else coded.data)
        packet.pts = packet.dts = number
        try:
            return self._context.decode(packet)
        except av.FFmpegError as error:
            raise PeerError("decode", f"{self._codec} picture cannot be decoded: {error.strerror}") from None


def plain(frame: av.VideoFrame) -> av.VideoFrame:
    """The frame as yuv420p of limited range.

    Raises:
        PeerError: It is of a format that the lane does not carry.
    """
    name = frame.format.name
    if name == "yuv420p" and frame.color_range != ColorRange.JPEG:
        return frame
    if name in ("yuv420p", "yuvj420p"):
        return frame.reformat(
            format="yuv420p", src_color_range=ColorRange.JPEG, dst_color_range=ColorRange.MPEG
        )
    raise PeerError("format", f"pixel format {name} is not carried: send yuv420p")


class OpusDecoder:
    """FFmpeg's Opus decoder of one stream, with concealment. Belongs to one thread."""

    def __init__(self) -> None:
        context = av.CodecContext.create("libopus", "r")
        assert isinstance(context, av.AudioCodecContext)
        context.sample_rate = OPUS_RATE
        context.layout = "stereo"
        context.format = "s16"
        self._context = context
        self._last = np.zeros((0, OPUS_CHANNELS), np.int16)
        self._faded = False

    def decode(self, payload: bytes) -> bytes:
        """PCM of one packet.

        Raises:
            PeerError: It is no Opus packet.
        """
        try:
            frames = self._context.decode(av.Packet(payload))
        except av.FFmpegError as error:
            raise PeerError("decode", f"Opus packet cannot be decoded: {error.strerror}") from None
        parts = [frame.to_ndarray().reshape(-1, OPUS_CHANNELS) for frame in frames]
        if not parts:
            return b""
        samples = np.concatenate(parts).astype(np.int16, copy=False)
        self._last = samples
        if self._faded:
            samples = _ramp(samples, 0.0, 1.0)
            self._faded = False
        return samples.tobytes()

    def conceal(self) -> bytes:
        """PCM for one lost packet: the last one again, fading to silence."""
        if not len(self._last):
            return b""
        samples = np.zeros_like(self._last) if self._faded else _ramp(self._last[::-1], 1.0, 0.0)
        self._faded = True
        return bytes(samples.tobytes())


def _ramp(samples: Pcm, start: float, end: float) -> Pcm:
    """`samples` with their volume going from `start` to `end` within `FADE_SAMPLES`."""
    volume = np.full(len(samples), end)
    count = min(FADE_SAMPLES, len(samples))
    volume[:count] = np.linspace(start, end, count)
    return np.asarray(samples * volume[:, None], np.int16)
