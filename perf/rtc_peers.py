"""The ways from a camera to a viewer that are compared: none in between, GStreamer, FFmpeg, aiortc, medferry.

Each is a context manager that is given what is to be carried, and yields where each stream goes in and comes
out, and the processes to account for. All re-encode with the same encoder, preset and bitrate.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path

from perf.clip import KEYFRAME_SECONDS
from rtc.bench_ends import PAYLOAD_TYPE
from rtc.camera import Size
from rtc.settings import VideoCodec
from tests.interop.dicom_peers import storescp
from tests.interop.media_peers import GST_DECODERS, free_pair, spawned
from tests.peers import free_port
from tests.product import REPOSITORY, Product, ProductFailed, running, studies

HOST = "127.0.0.1"

WayFailed = (ProductFailed, RuntimeError)
"""A way that cannot be opened here: not installed, or broken."""

LISTEN_SECONDS = 1.5
"""GStreamer and FFmpeg do not say when they listen."""

START_SECONDS = 30.0

POLL_SECONDS = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What is carried."""

    codec: VideoCodec = "h264"
    size: Size
    bitrate: int = 4_000_000
    streams: int = 1
    studies: bool = False
    """Whether a relay with a DICOM lane runs too: medferry, beside whatever carries the streams."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """Where each stream goes in and comes out (``host:port`` or URL), and whose CPU counts."""

    sources: list[str]
    sinks: list[str]
    pids: list[int]
    product: Product | None = None
    """The running relay, where the way is medferry."""
    studies: tuple[str, int] | None = None
    """Where the DICOM lane listens."""


Way = Callable[[Path, Load], AbstractContextManager[Entry]]


def _ports(count: int) -> list[int]:
    found: list[int] = []
    while len(found) < count:
        port = free_pair(HOST)
        if port not in found:
            found.append(port)
    return found


def _addresses(ports: list[int]) -> list[str]:
    return [f"{HOST}:{port}" for port in ports]


@contextlib.contextmanager
def direct(directory: Path, load: Load) -> Iterator[Entry]:
    """No relay: the sender sends to the receiver. With a DICOM lane, medferry runs beside it."""
    addresses = _addresses(_ports(load.streams))
    if not load.studies:
        yield Entry(sources=addresses, sinks=addresses, pids=[])
        return
    with _medferry(directory, load, "") as (product, listen):
        yield Entry(sources=addresses, sinks=addresses, pids=[product.process.pid], studies=listen)


@contextlib.contextmanager
def direct_webrtc(directory: Path, load: Load) -> Iterator[Entry]:
    """No relay: one WebRTC connection between the two ends."""
    del directory
    nowhere = ["no relay"] * load.streams
    yield Entry(sources=nowhere, sinks=nowhere, pids=[])


def _gst_encoder(load: Load) -> str:
    kilobits, keyframes = load.bitrate // 1000, KEYFRAME_SECONDS * load.size.rate
    if load.codec == "h264":
        encoder = (
            f"x264enc tune=zerolatency speed-preset=ultrafast bitrate={kilobits} key-int-max={keyframes}"
        )
        return f"{encoder} ! rtph264pay pt={PAYLOAD_TYPE} config-interval=-1 aggregate-mode=zero-latency"
    encoder = f"vp8enc deadline=1 cpu-used=8 lag-in-frames=0 target-bitrate={load.bitrate}"
    return f"{encoder} keyframe-max-dist={keyframes} ! rtpvp8pay pt={PAYLOAD_TYPE}"


@contextlib.contextmanager
def through_gstreamer(directory: Path, load: Load) -> Iterator[Entry]:
    """One gst-launch a stream: depayload, decode, encode, payload."""
    ports = _ports(2 * load.streams)
    into, out = ports[: load.streams], ports[load.streams :]
    caps = f"application/x-rtp,media=video,clock-rate=90000,encoding-name={load.codec.upper()}"
    with ExitStack() as stack:
        pids = []
        for number in range(load.streams):
            source = f"udpsrc address={HOST} port={into[number]} buffer-size=4194304 caps={caps}"
            pipeline = f"! {GST_DECODERS[load.codec].replace('h264parse ! ', '')} ! {_gst_encoder(load)}"
            sink = f"! udpsink host={HOST} port={out[number]} sync=false"
            command = ["gst-launch-1.0", "-q", *source.split(), *pipeline.split(), *sink.split()]
            pids.append(_started(stack, command, directory / f"gstreamer-{number}.log"))
        yield Entry(sources=_addresses(into), sinks=_addresses(out), pids=pids)


def _ffmpeg_encoder(load: Load) -> str:
    keyframes = KEYFRAME_SECONDS * load.size.rate
    if load.codec == "h264":
        return f"-c:v libx264 -preset ultrafast -tune zerolatency -b:v {load.bitrate} -g {keyframes} -bf 0"
    return f"-c:v libvpx -deadline realtime -cpu-used 8 -lag-in-frames 0 -b:v {load.bitrate} -g {keyframes}"


@contextlib.contextmanager
def through_ffmpeg(directory: Path, load: Load) -> Iterator[Entry]:
    """One ffmpeg a stream, with the options that its guides give for low delay."""
    ports = _ports(2 * load.streams)
    into, out = ports[: load.streams], ports[load.streams :]
    with ExitStack() as stack:
        pids = []
        for number in range(load.streams):
            sdp = directory / f"in-{number}.sdp"
            sdp.write_text(
                f"v=0\no=- 0 0 IN IP4 {HOST}\ns=in\nc=IN IP4 {HOST}\nt=0 0\n"
                f"m=video {into[number]} RTP/AVP {PAYLOAD_TYPE}\n"
                f"a=rtpmap:{PAYLOAD_TYPE} {load.codec.upper()}/90000\n"
            )
            before = "-hide_banner -loglevel warning -protocol_whitelist file,udp,rtp -fflags nobuffer"
            before += " -flags low_delay -analyzeduration 500000 -reorder_queue_size 0 -i"
            after = f"-an {_ffmpeg_encoder(load)} -flush_packets 1 -payload_type {PAYLOAD_TYPE} -f rtp"
            url = f"rtp://{HOST}:{out[number]}?pkt_size=1200"
            command = ["ffmpeg", *before.split(), str(sdp), *after.split(), url]
            pids.append(_started(stack, command, directory / f"ffmpeg-{number}.log"))
        yield Entry(sources=_addresses(into), sinks=_addresses(out), pids=pids)


def _started(stack: ExitStack, command: list[str], log: Path) -> int:
    """Start a peer and make sure that it did not end at once."""
    try:
        process = stack.enter_context(spawned(command, log))
    except FileNotFoundError:
        raise RuntimeError(f"{command[0]} is not installed") from None
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(LISTEN_SECONDS)
        raise RuntimeError(f"{command[0]} ended: {log.read_text()[-300:]}")
    return process.pid


LANE = """\
[[lane]]
name = "camera-{number}"
kind = "media"
lab = true
[lane.source.rtp]
listen = "{source}"
codec = "{codec}"
[lane.sink.rtp]
address = "{sink}"
codec = "{codec}"
bitrate = {bitrate}
"""


WEBRTC_LANE = """\
[[lane]]
name = "camera"
kind = "media"
lab = true
[lane.source.whip]
listen = "{whip}"
addresses = ["{host}"]
[lane.sink.whep]
listen = "{whep}"
addresses = ["{host}"]
bitrate = {bitrate}
"""


@contextlib.contextmanager
def _medferry(directory: Path, load: Load, lanes: str) -> Iterator[tuple[Product, tuple[str, int] | None]]:
    """A relay with the media lanes, and a DICOM lane with its receiver where the load has one."""
    with ExitStack() as stack:
        if not load.studies:
            config = f'[relay]\nname = "perf"\nstate = "state"\n{lanes}'
            yield stack.enter_context(running(config, directory / "medferry", drain=False)), None
            return
        receiver = stack.enter_context(storescp(directory / "receiver", nodelay=True))
        port = free_port()
        config = studies(
            listen=f"{HOST}:{port}", destinations={"receiver": (receiver.ae_title, receiver.address)}
        )
        product = stack.enter_context(running(config + lanes, directory / "medferry", drain=False))
        yield product, (HOST, port)


@contextlib.contextmanager
def through_medferry(directory: Path, load: Load) -> Iterator[Entry]:
    """medferry, a lane a stream, RTP in and out, nothing but defaults."""
    ports = _ports(2 * load.streams)
    into, out = _addresses(ports[: load.streams]), _addresses(ports[load.streams :])
    lanes = "".join(
        LANE.format(number=number, source=source, sink=sink, codec=load.codec, bitrate=load.bitrate)
        for number, (source, sink) in enumerate(zip(into, out, strict=True))
    )
    with _medferry(directory, load, lanes) as (product, listen):
        yield Entry(sources=into, sinks=out, pids=[product.process.pid], product=product, studies=listen)


@contextlib.contextmanager
def through_medferry_webrtc(directory: Path, load: Load) -> Iterator[Entry]:
    """medferry, one lane, WHIP in and WHEP out."""
    whip, whep = free_port(), free_port()
    lane = WEBRTC_LANE.format(whip=f"{HOST}:{whip}", whep=f"{HOST}:{whep}", host=HOST, bitrate=load.bitrate)
    with _medferry(directory, load, lane) as (product, _):
        yield _webrtc(load, whip, whep, product)


@contextlib.contextmanager
def through_aiortc(directory: Path, load: Load) -> Iterator[Entry]:
    """A plain aiortc relay."""
    port = free_port()
    log = directory / "aiortc.log"
    command = [sys.executable, str(REPOSITORY / "perf/plain_media_relay.py"), str(port)]
    with ExitStack() as stack:
        pid = _started(stack, command, log)
        _wait_for(port, log)
        yield _webrtc(load, port, port, pid)


def _wait_for(port: int, log: Path) -> None:
    """Until somebody listens on a TCP port."""
    end = time.monotonic() + START_SECONDS
    while True:
        try:
            socket.create_connection((HOST, port), timeout=1).close()
        except OSError:
            if time.monotonic() > end:
                raise RuntimeError(f"nobody listens on port {port}: {log.read_text()[-300:]}") from None
            time.sleep(POLL_SECONDS)
        else:
            return


def _webrtc(load: Load, whip: int, whep: int, relay: Product | int) -> Entry:
    names = [f"camera-{number}" for number in range(load.streams)]
    return Entry(
        sources=[f"http://{HOST}:{whip}/whip/{name}" for name in names],
        sinks=[f"http://{HOST}:{whep}/whep/{name}" for name in names],
        pids=[relay if isinstance(relay, int) else relay.process.pid],
        product=None if isinstance(relay, int) else relay,
    )


WAYS: dict[str, Way] = {
    "direct": direct,
    "medferry": through_medferry,
    "gstreamer": through_gstreamer,
    "ffmpeg": through_ffmpeg,
    "direct-webrtc": direct_webrtc,
    "medferry-webrtc": through_medferry_webrtc,
    "aiortc": through_aiortc,
}
