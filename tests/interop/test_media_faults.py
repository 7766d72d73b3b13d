"""What must not last: a stopped sink, lost packets, a late viewer, another encoder's habits."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import imageio_ffmpeg
import pytest

from relay.errors import MedferryError
from rtc.bench_ends import WhepReceiver, WhipSender
from rtc.bench_report import Sighting, evaluate, percentile
from rtc.camera import Camera
from rtc.settings import VideoCodec
from tests.interop.media_lane import BITRATE, SIZE, lane, showing
from tests.interop.media_peers import SIZE as CLIP_SIZE
from tests.interop.media_peers import clip, free_pair, spawned
from tests.netproxy import Impairment, UdpProxy

FRAME_MS = 1000 / SIZE.rate

NOISE_MS = 150
"""What a busy machine may add to one picture. A backlog of the stall would be seconds."""

WARM_UP_PICTURES = 30

JOIN_SECONDS = 0.5
"""From connected to a picture: requirement ST-6."""


def latencies(seen: list[Sighting]) -> list[float]:
    return [sighting.latency_ms for sighting in seen]


async def test_after_a_stopped_sink_the_delay_is_what_it_was(tmp_path: Path) -> None:
    with lane(tmp_path) as relay:
        pid = relay.pid("sink")
        async with showing(relay.rtp_in, relay.rtp_out) as show:
            await show.more(WARM_UP_PICTURES)
            before = latencies(await show.more(60))
            os.kill(pid, signal.SIGSTOP)
            try:
                await asyncio.sleep(5)
                during = len(show.seen)
            finally:
                os.kill(pid, signal.SIGCONT)
            await show.more(60)
            after = latencies(show.seen[during:])
        assert relay.pid("sink") == pid, "the sink was restarted"
    late = [latency for latency in after[3:] if latency > max(before) + NOISE_MS]
    assert not late, f"before at most {max(before):.0f} ms, afterwards {after[:10]}"
    ordinary = percentile(sorted(before), 0.5)
    assert percentile(sorted(after[3:]), 0.5) < 2 * ordinary + FRAME_MS


@pytest.mark.parametrize("codec", ["h264", pytest.param("vp8", marks=pytest.mark.slow)])
@pytest.mark.parametrize("seconds", [8, pytest.param(60, marks=pytest.mark.slow)])
async def test_loss_on_each_edge_freezes_nothing_for_long(
    codec: VideoCodec, seconds: float, tmp_path: Path
) -> None:
    sink = f"127.0.0.1:{free_pair('127.0.0.1')}"
    lossy = Impairment(drop=0.05)
    port = int(sink.rpartition(":")[2])
    async with UdpProxy(target=("127.0.0.1", port), forward=lossy, back=lossy, seed=11) as out:
        with lane(tmp_path, codec=codec, rtp_out=f"127.0.0.1:{out.address[1]}") as relay:
            source = int(relay.rtp_in.rpartition(":")[2])
            target = ("127.0.0.1", source)
            async with UdpProxy(target=target, forward=lossy, back=lossy, seed=12) as into:
                address = f"127.0.0.1:{into.address[1]}"
                async with showing(address, sink, codec=codec) as show:
                    await show.more(WARM_UP_PICTURES)
                    start = show.camera.painted[-1] + 1
                    await asyncio.sleep(seconds)
                    counted = range(start, show.camera.painted[-1] - SIZE.rate)
                report = evaluate("loss", show.seen, counted)
                assert into.sent.dropped > 20
                assert out.sent.dropped > 20
    assert report.longest_gap_ms < 1000, report
    assert report.pictures > 0.5 * report.sent, report


async def test_a_viewer_who_joins_sees_a_picture_within_half_a_second(tmp_path: Path) -> None:
    with lane(tmp_path) as relay:
        sender = WhipSender(relay.whip, "h264", BITRATE, SIZE.rate)
        await sender.connect()
        camera = asyncio.create_task(Camera(SIZE, "room").run(60, sender.offer))
        try:
            await asyncio.sleep(1)
            # The first one makes the encoder; the others come at any time after its last keyframe.
            delays = [await _join(relay.whep, 0.11 * number) for number in range(6)]
        finally:
            camera.cancel()
            await asyncio.wait([camera])
            await sender.close()
    assert max(delays) < JOIN_SECONDS, delays


async def test_a_viewer_who_joins_a_still_stream_sees_its_picture(tmp_path: Path) -> None:
    with lane(tmp_path) as relay:
        sender = WhipSender(relay.whip, "h264", BITRATE, SIZE.rate)
        await sender.connect()
        camera = Camera(SIZE, "room")
        try:
            # One picture, and then nothing for as long as the test takes.
            sender.offer(camera.picture(0))
            delays = [await _join(relay.whep, 0.2 * number) for number in range(3)]
        finally:
            await sender.close()
    assert max(delays) < JOIN_SECONDS, delays


async def _join(url: str, wait: float) -> float:
    """Watch after a while; seconds from connected to the first decoded picture."""
    await asyncio.sleep(wait)
    viewer = await _viewer(url)
    connected = time.monotonic()
    try:
        async with asyncio.timeout(10):
            while not viewer.sightings.seen:
                await asyncio.sleep(0.005)
        return time.monotonic() - connected
    finally:
        await viewer.close()


@pytest.mark.peer
async def test_ffmpeg_publishes_by_whip(tmp_path: Path) -> None:
    pictures = clip(tmp_path / "clip.yuv")
    with lane(tmp_path / "relay") as relay:
        raw = f"-f rawvideo -pix_fmt yuv420p -s {CLIP_SIZE.width}x{CLIP_SIZE.height} -r {CLIP_SIZE.rate}"
        video = "-c:v libx264 -profile:v baseline -preset ultrafast -tune zerolatency -b:v 1M -g 30"
        sound = "-f lavfi -i sine=frequency=440:sample_rate=48000"
        command = [
            imageio_ffmpeg.get_ffmpeg_exe(),
            *f"-hide_banner -loglevel warning -re -stream_loop -1 {raw} -i {pictures}".split(),
            *f"-re {sound} {video} -c:a libopus -ac 2 -f whip {relay.whip}".split(),
        ]
        with spawned(command, tmp_path / "ffmpeg.log"):
            seen = await _first_pictures(relay.whep, tmp_path / "ffmpeg.log")
            streams = relay.product.status()["lanes"][0]["source"]["figures"]["streams"]
            assert streams["room"]["sounds"] > 0, streams["room"]
    assert len({sighting.counter for sighting in seen}) >= 20


async def _first_pictures(url: str, log: Path) -> list[Sighting]:
    """What a viewer sees of a stream that may not be there yet."""
    async with asyncio.timeout(30):
        viewer = await _viewer(url)
        try:
            while len(viewer.sightings.seen) < 30:
                await asyncio.sleep(0.02)
        finally:
            await viewer.close()
    assert viewer.sightings.seen, log.read_text()
    return viewer.sightings.seen


async def _viewer(url: str) -> WhepReceiver:
    """A viewer of a stream, as soon as it is there."""
    async with asyncio.timeout(30):
        while True:
            viewer = WhepReceiver(url, "h264")
            try:
                await viewer.connect()
            except MedferryError:
                await viewer.close()
                await asyncio.sleep(0.2)
            else:
                return viewer
