"""`medferry bench rtp` and `bench webrtc`: a running relay measured from outside, glass to glass.

Each picture carries a stamp of when it was painted; the receiver reads it off the decoded picture. So the
figure includes one encoding and one decoding of the benchmark's own, as it does for a user with a camera and
a screen; ``direct`` measures just these two, for comparison.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from relay.errors import MedferryError
from relay.records import VideoFrame
from rtc.bench_ends import RtpReceiver, RtpSender, WhepReceiver, WhipSender
from rtc.bench_report import Report, evaluate
from rtc.bench_stamps import Sightings
from rtc.camera import Camera, Size
from rtc.settings import VideoCodec

TAIL_SECONDS = 1.0
"""After the last picture, for those still on their way."""

APPEAR_SECONDS = 15.0
"""Until a viewer finds the stream, or a first picture arrives."""

POLL_SECONDS = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What is sent. `source` and `sink` are addresses (RTP) or URLs (WHIP, WHEP)."""

    source: str
    sink: str
    seconds: float = 10.0
    warm_up_seconds: float = 1.0
    """Pictures painted in this time do not count, nor does it: codecs, caches and rates settle."""
    codec: VideoCodec = "h264"
    out_codec: VideoCodec | None = None
    """What the sink sends; None: the same."""
    size: Size = field(default_factory=Size)
    bitrate: int = 4_000_000
    keyframe_seconds: float = 2.0
    """Plain RTP only: between two keyframes that nobody asked for."""
    mux: bool = False
    """Plain RTP only: sender reports go to the port of the media, as through a port-forwarding path."""
    source_token: str | None = None
    sink_token: str | None = None
    name: str = "relay"


def _evaluate(options: Options, camera: Camera, sightings: Sightings) -> Report:
    counted = [
        counter for counter in camera.painted if counter >= options.warm_up_seconds * options.size.rate
    ]
    if not sightings.seen:
        what = f"{sightings.unreadable} pictures without a stamp" if sightings.unreadable else "no picture"
        raise MedferryError(f"{what} came to {options.sink}: check that it and {options.source} are one lane")
    bitrate = sightings.received_bytes * 8 / (options.warm_up_seconds + options.seconds)
    return evaluate(options.name, sightings.seen, counted, options.size.rate, bitrate)


async def bench_rtp(options: Options) -> Report:
    """Send plain RTP to `options.source`, receive it on `options.sink`, and measure.

    Raises:
        MedferryError: An address cannot be used, or no stamped picture arrived.
    """
    receiver = RtpReceiver(options.sink, options.out_codec or options.codec)
    try:
        sender = RtpSender(
            options.source,
            options.codec,
            options.bitrate,
            options.size.rate,
            options.keyframe_seconds,
            mux=options.mux,
        )
        try:
            camera = Camera(options.size)
            await camera.run(options.warm_up_seconds + options.seconds, sender.offer)
            await asyncio.sleep(TAIL_SECONDS)
        finally:
            await sender.close()
    finally:
        await receiver.close()
    return _evaluate(options, camera, receiver.sightings)


async def direct_rtp(options: Options) -> Report:
    """The same with nothing in between: what the benchmark's own encoder, decoder and sockets take.

    Raises:
        MedferryError: No port could be had.
    """
    probe = RtpReceiver("127.0.0.1:0", options.codec)
    address = probe.address
    await probe.close()
    return await bench_rtp(replace(options, source=address, sink=address, out_codec=None, name="direct"))


async def bench_webrtc(options: Options) -> Report:
    """Publish to the WHIP endpoint `options.source`, watch the WHEP endpoint `options.sink`, and measure.

    Raises:
        MedferryError: An endpoint refused, or no stamped picture arrived.
    """
    sender = WhipSender(
        options.source, options.codec, options.bitrate, options.size.rate, options.source_token
    )
    try:
        await sender.connect()
        # The stream is known at the sink from its first picture on: show something meanwhile.
        async with _Showing(options.size, sender.offer):
            receiver = await _appeared(
                lambda: WhepReceiver(options.sink, options.out_codec or options.codec, options.sink_token)
            )
        try:
            camera = Camera(options.size)
            await camera.run(options.warm_up_seconds + options.seconds, sender.offer)
            await asyncio.sleep(TAIL_SECONDS)
        finally:
            await receiver.close()
    finally:
        await sender.close()
    return _evaluate(options, camera, receiver.sightings)


class _Showing:
    """Offers pictures whose counters do not count, for as long as the block takes."""

    def __init__(self, size: Size, offer: Callable[[VideoFrame], None]) -> None:
        self._camera = Camera(size)
        self._offer = offer

    async def __aenter__(self) -> None:
        self._task = asyncio.create_task(self._camera.run(APPEAR_SECONDS * 2, self._offer))

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])


async def _appeared(make: Callable[[], WhepReceiver]) -> WhepReceiver:
    """A viewer that is connected, tried until the stream is there."""
    loop = asyncio.get_running_loop()
    until = loop.time() + APPEAR_SECONDS
    while True:
        receiver = make()
        try:
            await receiver.connect()
        except MedferryError:
            await receiver.close()
            if loop.time() > until:
                raise
            await asyncio.sleep(POLL_SECONDS)
        else:
            receiver.sightings.seen.clear()
            return receiver
