"""kill -9 of a media lane's source: what it sent is not live for ever on the other side."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path

from rtc.bench_ends import WhipSender
from rtc.camera import Camera
from tests.interop.media_lane import BITRATE, SIZE, Lane, lane, showing

PICTURES = 20

SECONDS = 20.0
"""For a restart and what follows; it takes about two."""


def live(relay: Lane, stream: str) -> bool:
    """Whether side B says that a stream is live."""
    figures = relay.product.status()["lanes"][0]["sink"]["figures"]
    return bool(figures["streams"].get(stream, {}).get("live"))


async def until(condition: Callable[[], bool]) -> None:
    """Ask, with a process for each question, until the answer is yes."""
    async with asyncio.timeout(SECONDS):
        while not await asyncio.to_thread(condition):
            await asyncio.sleep(0.1)


async def test_a_killed_source_leaves_no_ghost(tmp_path: Path) -> None:
    with lane(tmp_path, shows=None) as relay:
        publisher = WhipSender(relay.whip, "h264", BITRATE, SIZE.rate)
        await publisher.connect()
        camera = asyncio.create_task(Camera(SIZE, "room").run(60, publisher.offer))
        try:
            await until(lambda: live(relay, "room"))
            pid = relay.pid("source")
            os.kill(pid, signal.SIGKILL)
            await until(lambda: not live(relay, "room"))
            assert relay.pid("source") != pid
            # Plain RTP out shows one stream; the one that is gone must not keep it from the next.
            async with showing(relay.rtp_in, relay.rtp_out) as show:
                await show.more(PICTURES)
            await until(lambda: not live(relay, "camera"))
        finally:
            camera.cancel()
            await asyncio.wait([camera])
            await publisher.close()
