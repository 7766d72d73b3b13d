"""Coded media for tests: pictures and sound encoded here and cut into RTP packets."""

from __future__ import annotations

import functools
import re
import struct
from collections.abc import Iterator, Sequence
from fractions import Fraction

import av
import numpy as np

from rtc.packetize import h264_payloads, vp8_payloads

ENCODERS = {"h264": "libx264", "vp8": "libvpx"}


@functools.cache
def coded_pictures(
    codec: str, count: int, width: int = 320, height: int = 240, options: tuple[tuple[str, str], ...] = ()
) -> tuple[bytes, ...]:
    """`count` coded pictures, the first a keyframe; a grey level that rises with each."""
    context = av.CodecContext.create(ENCODERS[codec], "w")
    assert isinstance(context, av.VideoCodecContext)
    context.width, context.height = width, height
    context.pix_fmt = "yuv420p"
    context.time_base = Fraction(1, 30)
    context.framerate = Fraction(30, 1)
    context.gop_size = 1000
    context.bit_rate = 1_000_000
    context.thread_count = 1
    defaults = {"preset": "ultrafast", "tune": "zerolatency"} if codec == "h264" else {"deadline": "realtime"}
    context.options = {**defaults, **dict(options)}
    found: list[bytes] = []
    noise = np.random.default_rng(1).integers(0, 24, (height * 3 // 2, width), np.uint8)
    for index in range(count):
        grey = 40 + 3 * (index % 60)
        if width % 2 or height % 2:
            # An array cannot hold chroma that is rounded up: these are flat.
            frame = av.VideoFrame(width, height, "yuv420p")
            for plane in frame.planes:
                plane.update(bytes([grey]) * plane.buffer_size)
        else:
            frame = av.VideoFrame.from_ndarray(noise + np.uint8(grey), "yuv420p")
        frame.pts = index
        found += [bytes(packet) for packet in context.encode(frame)]
    found += [bytes(packet) for packet in context.encode(None)]
    return tuple(found)


def nal_units(annex_b: bytes) -> Iterator[bytes]:
    """The NAL units of a byte stream (ITU-T H.264 Annex B), without start codes and trailing zeros."""
    return filter(None, (unit.rstrip(b"\0") for unit in re.split(rb"\x00\x00\x01", annex_b)[1:]))


def payloads(codec: str, picture: bytes, number: int = 0) -> list[bytes]:
    """The RTP payloads of one coded picture."""
    if codec == "h264":
        return h264_payloads(list(nal_units(picture)))
    return vp8_payloads(picture, number)


@functools.cache
def coded_sound(count: int) -> tuple[bytes, ...]:
    """`count` Opus packets of 20 ms: a tone."""
    context = av.CodecContext.create("libopus", "w")
    assert isinstance(context, av.AudioCodecContext)
    context.sample_rate = 48_000
    context.layout = "stereo"
    context.format = "s16"
    context.time_base = Fraction(1, 48_000)
    found: list[bytes] = []
    for index in range(count + 2):
        times = (np.arange(960) + 960 * index) / 48_000
        tone = (np.sin(2 * np.pi * 440 * times) * 8000).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(np.repeat(tone, 2).reshape(1, -1), "s16", "stereo")
        frame.sample_rate = 48_000
        frame.pts = 960 * index
        found += [bytes(packet) for packet in context.encode(frame)]
    return tuple(found[:count])


def rtp(
    payload: bytes,
    *,
    seq: int,
    timestamp: int,
    marker: bool = False,
    ssrc: int = 0x1234,
    payload_type: int = 96,
) -> bytes:
    """One RTP packet."""
    second = (0x80 if marker else 0) | payload_type
    return struct.pack("!BBHII", 0x80, second, seq & 0xFFFF, timestamp & 0xFFFFFFFF, ssrc) + payload


def video_packets(
    codec: str, pictures: Sequence[bytes], *, seq: int = 1000, timestamp: int = 0, ssrc: int = 0x1234
) -> list[list[bytes]]:
    """The RTP packets of each picture, 30 pictures a second."""
    found = []
    for index, picture in enumerate(pictures):
        parts = payloads(codec, picture, index)
        packets = []
        for at, part in enumerate(parts):
            packets.append(rtp(part, seq=seq, timestamp=timestamp, marker=at == len(parts) - 1, ssrc=ssrc))
            seq += 1
        timestamp += 3000
        found.append(packets)
    return found
