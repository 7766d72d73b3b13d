"""Encoders of side B: pictures to H.264 or VP8, sound to Opus, through FFmpeg's libraries (PyAV).

    VideoFrame ─copy─▶ Canvas ─┬─encode─▶ Coded(payloads, keyframe)      48 kHz PCM ─▶ OpusEncoder ─▶ packets
    Arrival.pixels ─▶ Wrapped ─┘

Everything is set for delay: no look-ahead, no B-frames, one picture in, one picture out. An object here
belongs to one thread at a time; the codecs release the interpreter lock while they work.

H.264 leaves as constrained baseline with parameter sets before each keyframe, its level taken from size and
rates, without SEI. `RateControl` says how fine each picture is, so a new bitrate holds from the next one on.
FFmpeg cannot tell libvpx about a new bitrate, so a VP8 encoder is replaced, and only when the change is worth
the keyframe that it costs.

Never here: threads, sockets, clocks, who watches.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Literal, Protocol

import av
import numpy as np
from av.video.frame import PictureType

from relay.link import Arrival
from relay.records import AudioFrame, Buffer, VideoFrame
from rtc.clock import SECOND_NS
from rtc.decode import OPUS_RATE
from rtc.depayload import NAL_PPS, NAL_SPS
from rtc.packetize import (
    MAX_PAYLOAD,
    MAX_PICTURE_ID,
    h264_payloads,
    sendable,
    vp8_payloads,
)
from rtc.placement import one_slice_each
from rtc.rate_control import KEYFRAME_PICTURES, RateControl
from rtc.slicing import Slicing, most_slices
from rtc.x264 import X264, Plane, X264Error

TICKS = 90_000
"""Ticks a second of the encoders' time base, the RTP clock of both video codecs."""

DEFAULT_RATE = 30
"""Pictures a second where the publisher declared none."""

MAX_RATE = 120

TRIES = 3
"""An H.264 picture that came out too large is encoded again, until it has been so many times."""

FAR_KEYFRAME = 1 << 20
"""Pictures between two keyframes that nobody asked for: hours. Viewers ask, and late ones are given one."""

VP8_STEP = 1.25
"""A VP8 encoder is replaced when the bitrate it should have is this many times off."""

VPX_OPTIONS = {
    "deadline": "realtime",
    "cpu-used": "-10",
    "lag-in-frames": "0",
    "auto-alt-ref": "0",
    "noise-sensitivity": "0",
    "static-thresh": "1",
    "max-intra-rate": str(round(100 * KEYFRAME_PICTURES)),
    "undershoot-pct": "100",
    "overshoot-pct": "15",
    "qmin": "4",
    "qmax": "56",
}

CODEC_ERRORS = (av.FFmpegError, X264Error)
"""What an encoder that fails raises."""

OPUS_SAMPLES = 960
"""Samples per channel of one packet: 20 ms."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoProfile:
    """What one encoder makes. `bitrate` is the most it is ever asked for, in bits per second."""

    codec: Literal["h264", "vp8"]
    bitrate: int
    preset: Literal["ultrafast", "superfast", "veryfast"] = "ultrafast"
    keyframe_seconds: float | None = None
    """At most so long between two keyframes, and at least half as long between those that nobody asked for.
    None: only on request."""
    payload_bytes: int = MAX_PAYLOAD


@dataclass(frozen=True, slots=True, kw_only=True)
class Coded:
    """One encoded picture, cut for RTP. `sets` are SPS and PPS where it is an H.264 keyframe; `tries` says
    how often it was encoded until its size was right."""

    payloads: list[bytes]
    keyframe: bool
    sets: tuple[bytes, ...] = ()
    tries: int = 1

    @property
    def size(self) -> int:
        """Bytes of all payloads."""
        return sum(map(len, self.payloads))


def even(pixels: int) -> int:
    """`pixels`, or one more: 4:2:0 needs whole chroma samples, and H.264 cannot crop half a one."""
    return pixels + (pixels & 1)


class Canvas:
    """A picture in an encoder's own memory, written over for each new one.

    A picture of odd width or height is widened to even by repeating its last column or row. Its chroma
    planes have that size already (they round up), so colours stay where they are.
    """

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = even(width), even(height)
        self.frame = av.VideoFrame(self.width, self.height, "yuv420p")
        self._planes = [
            np.frombuffer(memoryview(plane), np.uint8).reshape(-1, plane.line_size)[
                : plane.height, : plane.width
            ]
            for plane in self.frame.planes
        ]
        luma, blue, red = (Plane(plane.buffer_ptr, plane.line_size) for plane in self.frame.planes)
        self.planes = (luma, blue, red)

    def fits(self, frame: VideoFrame) -> bool:
        """Whether `frame` has this canvas' size."""
        return (even(frame.width), even(frame.height)) == (self.width, self.height)

    def draw(self, frame: VideoFrame) -> None:
        """Copy the planes of `frame`, which must fit."""
        sizes = ((frame.height, frame.width), *[((frame.height + 1) // 2, (frame.width + 1) // 2)] * 2)
        for target, plane, (rows, columns) in zip(self._planes, frame.planes, sizes, strict=True):
            target[:rows, :columns] = np.frombuffer(plane, np.uint8).reshape(rows, columns)
        luma = self._planes[0]
        luma[:, frame.width :] = luma[:, frame.width - 1 : frame.width]
        luma[frame.height :] = luma[frame.height - 1 : frame.height]

    def copy(self) -> Canvas:
        """Another canvas with the same picture."""
        twin = Canvas(self.width, self.height)
        for target, plane in zip(twin._planes, self._planes, strict=True):
            target[:] = plane
        return twin


class Wrapped:
    """A picture that is encoded from where it lies: planes in a row, of even width and height."""

    def __init__(self, pixels: memoryview, width: int, height: int) -> None:
        self.width, self.height = width, height
        self._pixels = pixels
        self._rows = np.frombuffer(pixels, np.uint8).reshape(height * 3 // 2, width)
        luma, half = self._rows.ctypes.data, width // 2
        blue = luma + width * height
        self.planes = (Plane(luma, width), Plane(blue, half), Plane(blue + half * (height // 2), half))

    @cached_property
    def frame(self) -> av.VideoFrame:
        """For an encoder of FFmpeg's."""
        return av.VideoFrame.from_numpy_buffer(self._rows, "yuv420p")

    def copy(self) -> Wrapped:
        """The same picture for another encoder: nobody writes to it, so its memory may be shared."""
        return Wrapped(self._pixels, self.width, self.height)


Picture = Canvas | Wrapped
"""What an encoder takes."""


def wrap(arrival: Arrival, frame: VideoFrame) -> Wrapped | None:
    """The picture of `arrival` where it lies, if it may be kept there and needs no widening."""
    if arrival.pixels is None or (frame.width | frame.height) & 1:
        return None
    return Wrapped(arrival.pixels, frame.width, frame.height)


class _Codec(Protocol):
    """What `VideoEncoder` has of a codec."""

    bitrate: int

    def set_bitrate(self, bitrate: int) -> None:
        """Aim at `bitrate` from the next picture on."""

    def encode(self, picture: Picture, timeline_ns: int, *, keyframe: bool, refreshed: bool) -> Coded:
        """As `VideoEncoder.encode`."""


class _H264:
    def __init__(self, profile: VideoProfile, width: int, height: int, rate: int, slices: int) -> None:
        self.bitrate = profile.bitrate
        self._payload_bytes = profile.payload_bytes
        self._control = RateControl(profile.bitrate, rate, width * height)
        self._x264 = X264(
            width=width,
            height=height,
            rate=rate,
            bitrate=profile.bitrate,
            preset=profile.preset,
            slices=slices,
        )
        self._timeline_ns: int | None = None
        self._after_keyframe = False

    def set_bitrate(self, bitrate: int) -> None:
        self.bitrate = bitrate
        self._control.set_bitrate(bitrate)

    def encode(self, picture: Picture, timeline_ns: int, *, keyframe: bool, refreshed: bool) -> Coded:
        before_ns, self._timeline_ns = self._timeline_ns, timeline_ns
        keyframe = keyframe or before_ns is None
        self._control.elapse(0.0 if before_ns is None else (timeline_ns - before_ns) / SECOND_NS)
        fits, tries = False, 0
        while not fits and tries < TRIES:
            keyframe = keyframe or tries > 0
            tries += 1
            qp = self._control.quantiser(keyframe=keyframe, refreshed=refreshed)
            units = sendable(self._x264.encode(picture, qp, keyframe=keyframe))
            size = sum(map(len, units))
            fits = self._control.fits(size, qp, keyframe=keyframe)
            # x264 numbers keyframes 0 and 1 in turn, and two in a row must differ (idr_pic_id, ITU-T H.264
            # §7.4.3): after one that was sent, none is thrown away.
            fits = fits or (keyframe and self._after_keyframe)
        self._after_keyframe = keyframe
        self._control.made(size, qp, keyframe=keyframe, refreshed=refreshed)
        return Coded(
            payloads=h264_payloads(units, self._payload_bytes),
            keyframe=keyframe,
            sets=tuple(unit for unit in units if unit[0] & 0x1F in (NAL_SPS, NAL_PPS)),
            tries=tries,
        )


class _Vp8:
    def __init__(self, profile: VideoProfile, width: int, height: int, rate: int) -> None:
        self.bitrate = profile.bitrate
        self._payload_bytes = profile.payload_bytes
        self._width, self._height, self._rate = width, height, rate
        self._picture_id = 0
        self._context = self._open()

    def _open(self) -> av.VideoCodecContext:
        context = av.VideoCodecContext.create("libvpx", "w")
        assert isinstance(context, av.VideoCodecContext)
        context.width, context.height, context.pix_fmt = self._width, self._height, "yuv420p"
        context.time_base = Fraction(1, TICKS)
        context.framerate = Fraction(self._rate, 1)
        context.gop_size = FAR_KEYFRAME
        context.thread_count = 1
        context.bit_rate = self.bitrate
        limits = {
            "minrate": str(self.bitrate),
            "maxrate": str(self.bitrate),
            "bufsize": str(round(KEYFRAME_PICTURES * self.bitrate / self._rate)),
        }
        context.options = {**VPX_OPTIONS, **limits}
        context.open()
        return context

    def set_bitrate(self, bitrate: int) -> None:
        if not 1 / VP8_STEP < bitrate / self.bitrate < VP8_STEP:
            self.bitrate = bitrate
            self._context = self._open()

    def encode(self, picture: Picture, timeline_ns: int, *, keyframe: bool, refreshed: bool) -> Coded:
        frame = picture.frame
        frame.pts = timeline_ns * TICKS // SECOND_NS
        frame.time_base = Fraction(1, TICKS)
        frame.pict_type = PictureType.I if keyframe else PictureType.NONE
        packets = self._context.encode(frame)
        data = b"".join(map(bytes, packets))
        self._picture_id = (self._picture_id + 1) & MAX_PICTURE_ID
        return Coded(
            payloads=vp8_payloads(data, self._picture_id, self._payload_bytes) if data else [],
            keyframe=any(packet.is_keyframe for packet in packets),
        )


class VideoEncoder:
    """One encoder of one size and profile."""

    def __init__(
        self,
        profile: VideoProfile,
        width: int,
        height: int,
        rate: float = 0.0,
        slicing: Slicing | None = None,
    ) -> None:
        """
        Args:
            profile: Codec and limits.
            width: Pixels, even.
            height: Pixels, even.
            rate: Pictures a second as declared; 0 for unknown.
            slicing: Decides how many slices there are; None for as many as the pictures have use for.
        """
        self.profile = profile
        self.width, self.height = width, height
        self.rate = min(round(rate) or DEFAULT_RATE, MAX_RATE)
        self.most_slices = most_slices(profile.codec, width, height)
        self.slices = self.most_slices if slicing is None else slicing.slices(self.most_slices, self.rate)
        """How many slices each picture has use for, and is encoded in, a thread each."""
        self._since_keyframe = self._since_refreshed = 0
        """How many pictures ago the last keyframe was made, and the last `refreshed` picture came."""
        self._codec: _Codec
        with one_slice_each(self.slices) as started:
            if profile.codec == "h264":
                self._codec = _H264(profile, width, height, self.rate, self.slices)
            else:
                self._codec = _Vp8(profile, width, height, self.rate)
        self.threads = tuple(started)
        """Numbers of the threads that encode beside the caller's."""

    def __repr__(self) -> str:
        return f"<VideoEncoder {self.profile.codec} {self.width}x{self.height} {self.bitrate} bit/s>"

    @property
    def bitrate(self) -> int:
        """What is aimed at, in bits per second."""
        return self._codec.bitrate

    @property
    def _interval(self) -> int:
        """Pictures from one keyframe to the next at most."""
        seconds = self.profile.keyframe_seconds
        return FAR_KEYFRAME if seconds is None else max(1, round(seconds * self.rate))

    def comes_round(self, *, refreshed: bool) -> bool:
        """Whether the next picture is one of the keyframes that come by themselves.

        A picture that changed all over costs as many bits as a keyframe, and half as much time again. Where
        the publisher's keyframes come at least half an interval apart, ours are the same pictures: there is
        one expensive picture an interval then, not two.
        """
        if self._since_keyframe >= self._interval:
            return True
        return refreshed and max(self._since_keyframe, self._since_refreshed) >= self._interval // 2

    def set_bitrate(self, bitrate: int) -> None:
        """Aim at `bitrate` bits per second from the next picture on, at most the profile's."""
        self._codec.set_bitrate(min(bitrate, self.profile.bitrate))

    def encode(self, picture: Picture, timeline_ns: int, *, keyframe: bool, refreshed: bool = False) -> Coded:
        """Encode `picture`.

        Args:
            picture: Of this encoder's size.
            timeline_ns: Its time; must rise from call to call.
            keyframe: Make it one that a decoder can start with.
            refreshed: As in `relay.records.VideoFrame`.

        Raises:
            CODEC_ERRORS: The codec failed; make a new encoder.
        """
        coded = self._codec.encode(
            picture,
            timeline_ns,
            keyframe=keyframe or self.comes_round(refreshed=refreshed),
            refreshed=refreshed,
        )
        self._since_keyframe = 1 if coded.keyframe else self._since_keyframe + 1
        self._since_refreshed = 1 if refreshed else self._since_refreshed + 1
        return coded


class OpusEncoder:
    """PCM of any rate in records to Opus packets of 20 ms, 48 kHz."""

    def __init__(self, *, rate: int, channels: int, bitrate: int) -> None:
        self.rate, self.channels, self.bitrate = rate, channels, bitrate
        context = av.AudioCodecContext.create("libopus", "w")
        assert isinstance(context, av.AudioCodecContext)
        context.sample_rate = OPUS_RATE
        context.format = "s16"
        context.layout = "stereo" if channels == 2 else "mono"
        context.bit_rate = bitrate
        context.options = {"application": "lowdelay", "frame_duration": "20", "packet_loss": "5"}
        context.open()
        self._context = context
        self._resampler = av.AudioResampler("s16", context.layout, OPUS_RATE)
        self._pending = bytearray()
        self._pts = 0

    @property
    def pending_ns(self) -> int:
        """How much sound waits for the rest of its packet."""
        return len(self._pending) // (2 * self.channels) * SECOND_NS // OPUS_RATE

    def encode(self, samples: Buffer) -> list[bytes]:
        """The packets that `samples` (interleaved, 16 bits) complete: none, one or more.

        Raises:
            av.FFmpegError: The codec failed; make a new encoder.
        """
        self._pending += self._resampled(samples)
        size = 2 * self.channels * OPUS_SAMPLES
        packets = []
        while len(self._pending) >= size:
            frame = _pcm(bytes(self._pending[:size]), OPUS_RATE, self.channels)
            del self._pending[:size]
            frame.pts, frame.time_base = self._pts, Fraction(1, OPUS_RATE)
            self._pts += OPUS_SAMPLES
            packets += [bytes(packet) for packet in self._context.encode(frame)]
        return packets

    def _resampled(self, samples: Buffer) -> bytes:
        if self.rate == OPUS_RATE:
            return bytes(samples)
        frame = _pcm(bytes(samples), self.rate, self.channels)
        frame.pts = None
        size = 2 * self.channels
        return b"".join(bytes(out.planes[0])[: out.samples * size] for out in self._resampler.resample(frame))

    def fits(self, frame: AudioFrame) -> bool:
        """Whether `frame` has the rate and channels this encoder was made for."""
        return (frame.rate, frame.channels) == (self.rate, self.channels)


def _pcm(samples: bytes, rate: int, channels: int) -> av.AudioFrame:
    count = len(samples) // (2 * channels)
    frame = av.AudioFrame("s16", "stereo" if channels == 2 else "mono", count)
    frame.sample_rate = rate
    frame.planes[0].update(samples.ljust(frame.planes[0].buffer_size, b"\x00"))
    return frame
