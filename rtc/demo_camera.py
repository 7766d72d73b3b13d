"""The camera of `medferry demo`: shown to a running relay, its latency measured on the other side."""

from __future__ import annotations

from rtc.bench import Options, bench_rtp, bench_webrtc
from rtc.bench_report import Report


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
