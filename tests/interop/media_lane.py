"""A media lane with every kind of end, on free ports, and the benchmark's own ends joined to it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

from rtc.bench_ends import RtpReceiver, RtpSender
from rtc.bench_report import Sighting
from rtc.camera import Camera, Size
from rtc.settings import VideoCodec
from tests.interop.media_peers import address, free_pair
from tests.peers import free_port
from tests.product import Product, running

SIZE = Size(width=640, height=360, rate=30)
BITRATE = 1_500_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Lane:
    """A running relay with one lane: where each of its ends is."""

    product: Product
    rtp_in: str
    rtp_out: str
    whip: str
    whep: str

    def pid(self, part: str) -> int:
        """Process id of ``source``, ``valve`` or ``sink``."""
        pid: int = self.product.status()["lanes"][0][part]["pid"]
        return pid


@contextlib.contextmanager
def lane(
    directory: Path,
    *,
    codec: VideoCodec = "h264",
    host: str = "127.0.0.1",
    rtp_out: str | None = None,
    bitrate: int = BITRATE,
    shows: str | None = "camera",
) -> Iterator[Lane]:
    """Run a relay.

    Args:
        directory: For its files.
        codec: Of plain RTP, in and out.
        host: Where all of its ends are.
        rtp_out: Where it sends plain RTP to; a free port if not given.
        bitrate: Of plain RTP out.
        shows: The stream of plain RTP out; None for the first that appears.
    """
    rtp_in, rtp_out = address(host, free_pair(host)), rtp_out or address(host, free_pair(host))
    whip, whep = (address(host, free_port(host=host)) for _ in range(2))
    config = f"""\
[relay]
name = "test"
state = "state"
[[lane]]
name = "camera"
kind = "media"
lab = true
[lane.source.rtp]
listen = "{rtp_in}"
codec = "{codec}"
[lane.source.whip]
listen = "{whip}"
[lane.sink.rtp]
address = "{rtp_out}"
codec = "{codec}"
{f'stream = "{shows}"' if shows else ""}
bitrate = {bitrate}
[lane.sink.whep]
listen = "{whep}"
"""
    with running(config, directory) as product:
        yield Lane(
            product=product,
            rtp_in=rtp_in,
            rtp_out=rtp_out,
            whip=f"http://{whip}/whip/room",
            whep=f"http://{whep}/whep/room",
        )


@dataclass(slots=True, kw_only=True)
class Showing:
    """A camera that runs until the block ends, and what came out."""

    camera: Camera
    seen: list[Sighting]
    receiver: RtpReceiver

    async def more(self, count: int, seconds: float = 20.0) -> list[Sighting]:
        """Wait for `count` more pictures; those."""
        start = len(self.seen)
        async with asyncio.timeout(seconds):
            while len(self.seen) < start + count:
                await asyncio.sleep(0.02)
        return self.seen[start:]


@contextlib.asynccontextmanager
async def showing(
    source: str, sink: str, *, codec: VideoCodec = "h264", size: Size = SIZE, bitrate: int = BITRATE
) -> AsyncIterator[Showing]:
    """Send a camera to `source` by plain RTP, and read what arrives at `sink`."""
    receiver = RtpReceiver(sink, codec)
    sender = RtpSender(source, codec, bitrate, size.rate, keyframe_seconds=2.0, mux=True)
    camera = Camera(size)
    running_camera = asyncio.create_task(camera.run(3600, sender.offer))
    try:
        yield Showing(camera=camera, seen=receiver.sightings.seen, receiver=receiver)
    finally:
        running_camera.cancel()
        await asyncio.wait([running_camera])
        await sender.close()
        await receiver.close()
