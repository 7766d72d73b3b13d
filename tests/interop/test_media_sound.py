"""Sound beside pictures over plain RTP, from and to peers that are not ours: it is there, and in sync.

The clip's picture 0, 30, 60 … comes with a beep. The receiver writes both into one file by its own clock,
which it has from the relay's sender reports, and the test compares when the beeps begin there with when those
pictures are shown.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import av
import numpy as np
import pytest

from rtc.stamp import read
from tests.interop.media_peers import (
    FFMPEG_ENCODERS,
    GST_DECODERS,
    GST_ENCODERS,
    SIZE,
    clip,
    free_pair,
    spawned,
    until,
)
from tests.interop.test_media_rtp import sdp_of
from tests.peers import require
from tests.product import running

pytestmark = pytest.mark.peer

HOST = "127.0.0.1"
RATE = 48_000
LIP_SYNC_MS = 40.0

FIRST_SYNC_MS = 150.0
"""Before the sender's first reports have told how its clocks belong together, which GStreamer sends after
seconds. What they correct is applied slowly, 30 ms a second, so that no time jumps."""

LOUD = 1_500
"""Of 32,767: above what Opus makes of silence."""

QUIET_SECONDS = 0.4
"""Between two beeps, which are 100 ms long, there is more silence than this."""

BEEPS = 3
SETTLED_BEEPS = 12
SECONDS = 60.0

BEEP = f"aevalsrc='0.3*sin(2*PI*1000*t)*lt(mod(t\\,1)\\,0.1)':s={RATE}:c=stereo"


def ffmpeg_sender(video: int, sound: int, source: Path) -> list[str]:
    """FFmpeg, with a packetizer and sender reports for each of the two."""
    raw = f"-f rawvideo -pix_fmt yuv420p -s {SIZE.width}x{SIZE.height} -r {SIZE.rate}"
    inputs = f"-hide_banner -loglevel warning -re -stream_loop -1 {raw} -i {source} -re -f lavfi -i {BEEP}"
    pictures = (
        f"-map 0:v {FFMPEG_ENCODERS['h264']} -payload_type 96 -f rtp rtp://{HOST}:{video}?pkt_size=1200"
    )
    beeps = f"-map 1:a -c:a libopus -b:a 64k -payload_type 97 -f rtp rtp://{HOST}:{sound}"
    return [require("ffmpeg"), *f"{inputs} {pictures} {beeps}".split()]


def gstreamer_sender(video: int, sound: int, source: Path) -> list[str]:
    """GStreamer, with one RTP session for both."""
    parse = f"rawvideoparse width={SIZE.width} height={SIZE.height} format=i420 framerate={SIZE.rate}/1"
    pictures = (
        f"multifilesrc location={source} loop=true ! {parse} ! {GST_ENCODERS['h264']} ! r.send_rtp_sink_0"
    )
    ticks = "audiotestsrc is-live=true wave=ticks freq=1000 sine-periods-per-tick=100 volume=0.3"
    beeps = f"{ticks} ! audio/x-raw,rate={RATE},channels=2 ! opusenc ! rtpopuspay pt=97 ! r.send_rtp_sink_1"
    ends = " ".join(
        f"r.send_rtp_src_{number} ! udpsink host={HOST} port={port} sync=true async=false "
        f"r.send_rtcp_src_{number} ! udpsink host={HOST} port={port + 1} sync=false async=false"
        for number, port in enumerate((video, sound))
    )
    return [require("gst-launch-1.0"), *f"-q rtpbin name=r {pictures} {beeps} {ends}".split()]


def ffmpeg_receiver(sdp: Path, video: int, sound: int, output: Path) -> list[str]:
    """FFmpeg, by the relay's SDP file."""
    del video, sound
    before = "-hide_banner -loglevel warning -protocol_whitelist file,udp,rtp -analyzeduration 1000000 -i"
    after = (
        "-map 0:v -map 0:a -c:v rawvideo -pix_fmt yuv420p -vsync passthrough -c:a pcm_s16le -f matroska -y"
    )
    return [require("ffmpeg"), *before.split(), str(sdp), *after.split(), str(output)]


def gstreamer_receiver(sdp: Path, video: int, sound: int, output: Path) -> list[str]:
    """GStreamer, told of the streams in caps."""
    del sdp
    caps = {
        video: "application/x-rtp,media=video,clock-rate=90000,encoding-name=H264,payload=96",
        sound: "application/x-rtp,media=audio,clock-rate=48000,encoding-name=OPUS,payload=111",
    }
    sources = " ".join(
        f"udpsrc address={HOST} port={port} caps={text} ! r.recv_rtp_sink_{number} "
        f"udpsrc address={HOST} port={port + 1} ! r.recv_rtcp_sink_{number}"
        for number, (port, text) in enumerate(caps.items())
    )
    pictures = f"r. ! {GST_DECODERS['h264']} ! videoconvert ! video/x-raw,format=I420 ! queue ! m."
    beeps = "r. ! rtpopusdepay ! opusdec ! audio/x-raw,format=S16LE ! queue ! m."
    sink = f"matroskamux name=m streamable=true ! filesink location={output} buffer-mode=unbuffered"
    command = f"-q rtpbin name=r latency=50 {sources} {sink} {pictures} {beeps}"
    return [require("gst-launch-1.0"), *command.split()]


def heard_and_shown(path: Path) -> tuple[list[float], list[float]]:
    """When beeps begin, and when the pictures that belong to them are shown: seconds of the file."""
    beeps: list[float] = []
    shown: list[float] = []
    quiet = 0.0
    try:
        with av.open(str(path)) as file:
            for frame in file.decode():
                if frame.pts is None:
                    continue
                if isinstance(frame, av.VideoFrame):
                    stamp = read(frame.to_ndarray(format="yuv420p")[: frame.height])
                    if stamp is not None and stamp.counter % SIZE.rate == 0:
                        shown.append(float(frame.time))
                elif isinstance(frame, av.AudioFrame):
                    samples = frame.to_ndarray().reshape(-1, 2)[:, 0].astype(np.int32)
                    loud = np.flatnonzero(np.abs(samples) > LOUD)
                    if len(loud) and quiet > QUIET_SECONDS:
                        beeps.append(float(frame.time) + int(loud[0]) / RATE)
                    quiet = 0.0 if len(loud) else quiet + len(samples) / RATE
    except (av.FFmpegError, FileNotFoundError):
        # The peer has written only a part of it yet.
        pass
    return beeps, shown


@pytest.mark.parametrize(
    ("sender", "receiver", "beeps", "limit_ms"),
    [
        pytest.param(gstreamer_sender, ffmpeg_receiver, BEEPS, FIRST_SYNC_MS, id="at-first"),
        pytest.param(
            gstreamer_sender,
            ffmpeg_receiver,
            SETTLED_BEEPS,
            LIP_SYNC_MS,
            id="gstreamer-to-ffmpeg",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ffmpeg_sender,
            gstreamer_receiver,
            SETTLED_BEEPS,
            LIP_SYNC_MS,
            id="ffmpeg-to-gstreamer",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_sound_crosses_in_sync(
    sender: Callable[[int, int, Path], list[str]],
    receiver: Callable[[Path, int, int, Path], list[str]],
    beeps: int,
    limit_ms: float,
    tmp_path: Path,
) -> None:
    pictures = clip(tmp_path / "clip.yuv")
    received = tmp_path / "received.mkv"
    video_in, sound_in, video_out, sound_out = (free_pair(HOST) for _ in range(4))
    config = f"""\
[relay]
name = "test"
state = "state"
[[lane]]
name = "camera"
kind = "media"
lab = true
[lane.source.rtp]
listen = "{HOST}:{video_in}"
[lane.source.rtp.audio]
listen = "{HOST}:{sound_in}"
[lane.sink.rtp]
address = "{HOST}:{video_out}"
bitrate = 2_000_000
keyframe_seconds = 1
sdp_file = "camera.sdp"
[lane.sink.rtp.audio]
address = "{HOST}:{sound_out}"
"""
    with ExitStack() as stack:
        relay = stack.enter_context(running(config, tmp_path / "relay"))
        stack.enter_context(spawned(sender(video_in, sound_in, pictures), tmp_path / "sender.log"))
        until(lambda: "sprop" in sdp_of(relay).read_text(), 10, lambda: "no parameter sets in the SDP")
        command = receiver(sdp_of(relay), video_out, sound_out, received)
        stack.enter_context(spawned(command, tmp_path / "receiver.log"))

        def said() -> str:
            logs = [(tmp_path / f"{name}.log").read_text() for name in ("sender", "receiver")]
            return f"{heard_and_shown(received)}; they said {logs}; {relay.status()}"

        # One more, since the first may be from before the receiver has heard a report.
        until(lambda: min(map(len, heard_and_shown(received))) > beeps, SECONDS, said)
    heard, shown = heard_and_shown(received)
    offsets = [1000 * min((beep - picture for picture in shown), key=abs) for beep in heard]
    assert max(map(abs, offsets[-BEEPS:])) < limit_ms, offsets
