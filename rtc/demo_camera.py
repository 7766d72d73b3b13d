"""The camera of `medferry demo`: shown to a running relay, its latency measured on the other side."""

from __future__ import annotations

from rtc.bench import Options, bench_rtp, bench_webrtc
from rtc.bench_ends import RtpSender
from rtc.bench_report import Report
from rtc.camera import Camera

FILM_SECONDS = 600
"""Of one camera, which remembers each picture that it painted; then another one goes on."""


async def show(source: str, sink: str, seconds: float) -> Report:
    """Send a camera into the relay and watch it come out.

    Args:
        source: Where the relay takes pictures: ``host:port`` of plain RTP, or the URL of a WHIP endpoint.
        sink: Where it sends them: ``host:port`` of plain RTP, or the URL of a WHEP endpoint.
        seconds: How long.

    Raises:
        MedferryError: Nothing came through.
    """
    options = Options(source=source, sink=sink, seconds=seconds, name="camera")
    bench = bench_webrtc if source.startswith(("http://", "https://")) else bench_rtp
    return await bench(options)


async def show_for_ever(source: str) -> None:
    """Send a camera into the relay by plain RTP, at ``host:port``, until cancelled.

    Raises:
        MedferryError: The address cannot be used.
    """
    options = Options(source=source, sink=source)
    keyframe_seconds = options.keyframe_seconds
    sender = RtpSender(
        source, options.codec, options.bitrate, options.size.rate, keyframe_seconds, mux=options.mux
    )
    try:
        while True:
            await Camera(options.size).run(FILM_SECONDS, sender.offer)
    finally:
        await sender.close()
