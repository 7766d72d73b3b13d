"""WHIP in and WHEP out, each over a network that loses one datagram in twenty, both ways."""

from __future__ import annotations

import asyncio
import re
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from aiortc import RTCPeerConnection, RTCSessionDescription

from rtc.bench_ends import WhepReceiver, WhipSender
from rtc.bench_report import evaluate
from rtc.camera import Camera
from rtc.settings import VideoCodec
from tests.interop.media_lane import BITRATE, SIZE, lane
from tests.netproxy import Impairment, UdpProxy

LOSSY = Impairment(drop=0.05)

CANDIDATE = re.compile(r"a=candidate:\S+ 1 udp \d+ 127\.0\.0\.1 (\d+) typ host")


class Unaddressed(RTCPeerConnection):
    """Offers no address, so that the other side cannot reach it but by the way its packets come."""

    @property
    def localDescription(self) -> RTCSessionDescription:
        found = super().localDescription
        lines = found.sdp.split("\r\n")
        kept = [line for line in lines if not line.startswith("a=candidate")]
        return RTCSessionDescription("\r\n".join(kept), found.type)


async def join_by_proxy(stack: AsyncExitStack, connection: RTCPeerConnection, seed: int) -> list[UdpProxy]:
    """Let the connection reach its peer through a proxy, which is perfect at first.

    Both ways lead through it: two paths at once would be two sources, of which the relay heeds one.
    """
    proxies: list[UdpProxy] = []
    take = connection.setRemoteDescription

    async def replaced(description: RTCSessionDescription) -> None:
        found = CANDIDATE.search(description.sdp)
        assert found is not None, description.sdp
        target = ("127.0.0.1", int(found[1]))
        proxy = UdpProxy(target=target, seed=seed)
        proxies.append(await stack.enter_async_context(proxy))
        lines = [line for line in description.sdp.split("\r\n") if not line.startswith("a=candidate")]
        at = lines.index("a=end-of-candidates")
        lines.insert(at, f"a=candidate:1 1 udp 2130706431 127.0.0.1 {proxy.address[1]} typ host")
        await take(RTCSessionDescription("\r\n".join(lines), description.type))

    connection.__class__ = Unaddressed
    setattr(connection, "setRemoteDescription", replaced)  # noqa: B010 - a method of this one connection
    return proxies


@pytest.mark.parametrize(
    ("codec", "seconds"),
    [
        ("h264", 3),
        pytest.param("h264", 30, marks=pytest.mark.slow),
        pytest.param("vp8", 30, marks=pytest.mark.slow),
    ],
)
async def test_loss_on_each_edge_freezes_nothing_for_long(
    codec: VideoCodec, seconds: float, tmp_path: Path
) -> None:
    with lane(tmp_path) as relay:
        async with AsyncExitStack() as stack:
            sender = WhipSender(relay.whip, codec, BITRATE, SIZE.rate)
            into = await join_by_proxy(stack, sender.connection, seed=21)
            await sender.connect()
            camera = Camera(SIZE, "room")
            running = asyncio.create_task(camera.run(seconds + 60, sender.offer))
            viewer = WhepReceiver(relay.whep, codec)
            out = await join_by_proxy(stack, viewer.connection, seed=22)
            try:
                await asyncio.sleep(0.5)
                await viewer.connect()
                async with asyncio.timeout(10):
                    while len(viewer.sightings.seen) < 10:
                        await asyncio.sleep(0.02)
                before = into[0].sent.received, out[0].answered.received
                for proxy in (*into, *out):
                    proxy.impair(LOSSY, LOSSY)
                start = camera.painted[-1] + 1
                await asyncio.sleep(seconds)
                counted = range(start, camera.painted[-1] - SIZE.rate // 3)
            finally:
                running.cancel()
                await asyncio.wait([running])
                await viewer.close()
                await sender.close()
    report = evaluate("loss", viewer.sightings.seen, counted)
    for passed, early in zip((into[0].sent, out[0].answered), before, strict=True):
        # At least two packets a picture, of which about as many are lost as were to be.
        assert passed.received - early > 2 * SIZE.rate * seconds, "media took another way"
        assert passed.dropped > LOSSY.drop / 3 * (passed.received - early), "the way was not lossy"
    assert report.longest_gap_ms < 1000, report
    assert report.pictures > 0.7 * report.sent, report
