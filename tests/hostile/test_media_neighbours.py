"""A publisher of garbage beside a healthy one, in the same source: the healthy one does not notice."""

from __future__ import annotations

import asyncio
import itertools
import random
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from relay.records import VideoFrame
from rtc.depayload import NAL_SPS
from rtc.packetize import h264_payloads
from tests.interop.media_peers import free_pair
from tests.rtc.coded import coded_pictures, nal_units, payloads, rtp, video_packets
from tests.rtc.test_source_rtp import Rig

PERIOD = 1 / 30

ALONE = 45
TOGETHER = 75
"""Pictures of the healthy stream, without and with its neighbour."""

ARRIVE_SECONDS = 10.0
"""For the last pictures to be decoded on a busy machine."""

NOISE_NS = 8_000_000
"""What two busy processors may add to the median: one of them decodes the neighbour's pictures."""

GIANT_SPS = bytes.fromhex("67420033da0040002019")
"""Of H.264 baseline: 4096×4096."""

GIANT_VP8 = b"\x10\x10\x00\x00\x9d\x01\x2a\x00\x10\x00\x10" + bytes(20)
"""The first bytes of a VP8 keyframe of 4096×4096."""

SIZES = {
    "h264": ((320, 240), (640, 480), (322, 242), (176, 144)),
    "vp8": ((320, 240), (640, 480), (321, 241), (176, 144)),
}
"""One after the other. H.264 crops 4:2:0 in steps of two; VP8 has odd sizes."""

PER_SIZE = 4


def sdp_file(directory: Path, port: int, codec: str) -> str:
    path = directory / "bad.sdp"
    path.write_text(
        "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=-\nc=IN IP4 127.0.0.1\nt=0 0\n"
        f"m=video {port} RTP/AVP 96\na=rtpmap:96 {codec.upper()}/90000\n"
    )
    return str(path)


def flipped(payload: bytes, randomly: random.Random) -> bytes:
    damaged = bytearray(payload)
    for _ in range(3):
        damaged[randomly.randrange(len(damaged))] ^= 1 << randomly.randrange(8)
    return bytes(damaged)


def bad_pictures(codec: str) -> Iterator[list[bytes]]:
    """The payloads of one bad picture after the other, for ever: damaged, cut, giant, of ever new sizes."""
    randomly = random.Random(7)
    for width, height in itertools.cycle(SIZES[codec]):
        first, *others = coded_pictures(codec, PER_SIZE, width, height)
        yield payloads(codec, first)
        for number, picture in enumerate(others, 1):
            yield [flipped(part, randomly) for part in payloads(codec, picture, number)]
        yield [part[: randomly.randrange(1, len(part) + 1)] for part in payloads(codec, first)]
        yield giant(codec, first)


def giant(codec: str, keyframe: bytes) -> list[bytes]:
    """A keyframe that says it has 4096×4096 pixels."""
    if codec == "vp8":
        return [GIANT_VP8]
    units = [unit for unit in nal_units(keyframe) if unit[0] & 0x1F != NAL_SPS]
    return h264_payloads([GIANT_SPS, *units])


async def show(rig: Rig, packets: list[list[bytes]], bad: Iterator[list[bytes]] | None, port: int) -> None:
    """Send a picture of each, thirty times a second."""
    seq, timestamp = 0, 0
    due = time.monotonic()
    for picture in packets:
        for packet in picture:
            rig.send(packet)
        for payload in (parts := next(bad)) if bad is not None else ():
            data = rtp(payload, seq=seq, timestamp=timestamp, marker=payload is parts[-1], ssrc=99)
            rig.stranger.sendto(data, ("127.0.0.1", port))
            seq += 1
        timestamp += 3000
        due += PERIOD
        await asyncio.sleep(max(due - time.monotonic(), 0))


@pytest.mark.parametrize("codec", ["h264", "vp8"])
async def test_a_bad_neighbour_costs_the_healthy_stream_nothing(tmp_path: Path, codec: str) -> None:
    for width, height in SIZES[codec]:
        coded_pictures(codec, PER_SIZE, width, height)
    healthy = video_packets("h264", coded_pictures("h264", ALONE + TOGETHER, 640, 360))
    port = free_pair("127.0.0.1")
    table = {"file": sdp_file(tmp_path, port, codec), "stream": "bad"}
    async with Rig(tmp_path, source={"sdp": [table]}) as rig:
        await show(rig, healthy[:ALONE], None, port)
        await show(rig, healthy[ALONE:], bad_pictures(codec), port)
        async with asyncio.timeout(ARRIVE_SECONDS):
            while rig.side.status()["streams"]["camera"]["pictures"] < ALONE + TOGETHER:
                await asyncio.sleep(0.02)
        streams = rig.side.status()["streams"]
    pictures = [(item, sent_ns) for item, sent_ns in rig.outlet.records if isinstance(item, VideoFrame)]
    took = [sent_ns - item.captured_ns for item, sent_ns in pictures if item.stream == "camera"]
    assert len(took) == ALONE + TOGETHER
    assert streams["camera"]["faults"] == {}
    before, beside = (statistics.median(part) for part in (took[10:ALONE], took[ALONE:]))
    assert beside < before + NOISE_NS, f"{before / 1e6:.1f} ms alone, {beside / 1e6:.1f} ms beside"
    faults = streams["bad"]["faults"]
    assert faults["size"] >= 2, faults
    assert len(faults) >= 2, faults
    assert {(item.width, item.height) for item, _ in pictures if item.stream == "bad"} == {*SIZES[codec]}
