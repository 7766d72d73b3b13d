"""Senders and receivers of RTP that are not ours: FFmpeg's and GStreamer's commands, given stamped pictures.

A clip of stamped pictures is written once; a peer encodes and sends it, another receives, decodes and writes
bare pictures, and the test reads the stamps from those.
"""

from __future__ import annotations

import contextlib
import random
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from relay.records import plane_sizes
from rtc.camera import Camera, Size
from rtc.stamp import Stamp, read
from tests.peers import require

SIZE = Size(width=320, height=180, rate=30)

CLIP_PICTURES = 300

FRAME_BYTES = sum(plane_sizes(SIZE.width, SIZE.height))

POLL_SECONDS = 0.05

PAYLOAD_TYPE = 96

END_SECONDS = 10.0

GST_ENCODERS = {
    "h264": "x264enc tune=zerolatency speed-preset=ultrafast bitrate=1500 key-int-max=30 "
    "! rtph264pay pt=96 config-interval=-1 aggregate-mode=zero-latency",
    "vp8": "vp8enc deadline=1 cpu-used=8 target-bitrate=1500000 keyframe-max-dist=30 ! rtpvp8pay pt=96",
}

GST_DECODERS = {
    "h264": "rtph264depay ! h264parse ! avdec_h264",
    "vp8": "rtpvp8depay ! vp8dec",
}

FFMPEG_ENCODERS = {
    "h264": "-c:v libx264 -preset ultrafast -tune zerolatency -b:v 1500k -g 30",
    "vp8": "-c:v libvpx -deadline realtime -cpu-used 8 -b:v 1500k -g 30",
}


PAIRS = 20_000, 32_000
"""Below the least of /proc/sys/net/ipv4/ip_local_port_range as Linux has it, 32768."""


def free_pair(host: str) -> int:
    """An even UDP port that is free at this moment, and so is the one above it.

    None of those that the system itself gives to sockets: it would give one of the pair to somebody else.
    """
    while True:
        port = random.randrange(*PAIRS, 2)
        try:
            with contextlib.ExitStack() as stack:
                for number in (port, port + 1):
                    family = socket.AF_INET6 if ":" in host else socket.AF_INET
                    stack.enter_context(socket.socket(family, socket.SOCK_DGRAM)).bind((host, number))
        except OSError:
            continue
        return port


def address(host: str, port: int) -> str:
    """``host:port``, with brackets where they belong."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def clip(path: Path) -> Path:
    """Write CLIP_PICTURES stamped pictures as bare yuv420p."""
    camera = Camera(SIZE)
    with path.open("wb") as file:
        for counter in range(CLIP_PICTURES):
            file.writelines(camera.picture(counter).planes)
    return path


@contextlib.contextmanager
def spawned(command: Sequence[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a peer; end it with the block."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def ffmpeg_sender(
    codec: str, host: str, port: int, source: Path, sdp: Path, encoder: str | None = None
) -> list[str]:
    """FFmpeg sends the clip in a loop, and writes the SDP that describes it."""
    raw = f"-f rawvideo -pix_fmt yuv420p -s {SIZE.width}x{SIZE.height} -r {SIZE.rate}"
    command = f"-hide_banner -loglevel warning -re -stream_loop -1 {raw} -i"
    output = f"{encoder or FFMPEG_ENCODERS[codec]} -payload_type {PAYLOAD_TYPE} -f rtp -sdp_file"
    url = f"rtp://{address(host, port)}?pkt_size=1200"
    return [require("ffmpeg"), *command.split(), str(source), *output.split(), str(sdp), url]


def gstreamer_sender(codec: str, host: str, port: int, source: Path) -> list[str]:
    """GStreamer sends the clip in a loop."""
    parse = f"rawvideoparse width={SIZE.width} height={SIZE.height} format=i420 framerate={SIZE.rate}/1"
    pipeline = f"! {parse} ! {GST_ENCODERS[codec]} ! udpsink host={host} port={port} sync=true"
    launch = require("gst-launch-1.0")
    return [launch, "-q", "multifilesrc", f"location={source}", "loop=true", *pipeline.split()]


def ffmpeg_receiver(sdp: Path, output: Path) -> list[str]:
    """FFmpeg receives what an SDP file describes, and writes bare pictures."""
    before = (
        "-hide_banner -loglevel warning -protocol_whitelist file,udp,rtp -fflags nobuffer -flags low_delay "
        "-analyzeduration 500000 -i"
    )
    after = "-an -vsync passthrough -f rawvideo -pix_fmt yuv420p -flush_packets 1 -y"
    return [require("ffmpeg"), *before.split(), str(sdp), *after.split(), str(output)]


def gstreamer_receiver(codec: str, host: str, port: int, output: Path) -> list[str]:
    """GStreamer receives a stream that it is told of in caps, and writes bare pictures."""
    caps = (
        f"application/x-rtp,media=video,clock-rate=90000,encoding-name={codec.upper()},payload={PAYLOAD_TYPE}"
    )
    decoder = f"{GST_DECODERS[codec]} ! videoconvert ! video/x-raw,format=I420"
    pipeline = f"! rtpjitterbuffer latency=50 ! {decoder} ! filesink"
    launch = require("gst-launch-1.0")
    source = ["udpsrc", f"address={host}", f"port={port}", f"caps={caps}"]
    return [launch, "-q", *source, *pipeline.split(), f"location={output}", "buffer-mode=unbuffered"]


def stamps(path: Path) -> list[Stamp | None]:
    """The stamp of each whole picture in a file of bare ones."""
    if not path.exists():
        return []
    data = np.fromfile(path, np.uint8)
    whole = data[: len(data) // FRAME_BYTES * FRAME_BYTES].reshape(-1, FRAME_BYTES)
    luma = SIZE.width * SIZE.height
    return [read(frame[:luma].reshape(SIZE.height, SIZE.width)) for frame in whole]


def until(condition: Callable[[], bool], seconds: float, what: Callable[[], str]) -> None:
    """Wait for a condition; fail with `what()` where it does not come about."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what()
        time.sleep(POLL_SECONDS)
