"""FFmpeg and GStreamer send plain RTP into the relay and receive it on the other side, by SDP files and caps.

Every picture that comes out must carry a stamp of the clip that went in, and in its order.
"""

from __future__ import annotations

import itertools
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.interop.media_peers import (
    CLIP_PICTURES,
    address,
    clip,
    ffmpeg_receiver,
    ffmpeg_sender,
    free_pair,
    gstreamer_receiver,
    gstreamer_sender,
    spawned,
    stamps,
    until,
)
from tests.product import Product, running

pytestmark = pytest.mark.peer

PICTURES = 60
"""Two seconds: past a keyframe interval of either peer."""

ARRIVAL_SECONDS = 40.0


def configuration(source: str, sink: str, codec: str) -> str:
    return f"""\
[relay]
name = "test"
state = "state"
[[lane]]
name = "camera"
kind = "media"
lab = true
{source}
[lane.sink.rtp]
address = "{sink}"
codec = "{codec}"
bitrate = 2_000_000
sdp_file = "camera.sdp"
"""


def sdp_of(relay: Product) -> Path:
    """The SDP file that the sink wrote, once it has the parameter sets."""
    found: list[Path] = []

    def written() -> bool:
        found[:] = relay.state.rglob("camera.sdp")
        return bool(found)

    until(written, 10, lambda: f"no SDP file; the relay said {relay.log}")
    return found[0]


def check(got: list[int | None]) -> None:
    """All stamps readable but for the first pictures, and rising (the clip is looped)."""
    readable = [counter for counter in got if counter is not None]
    assert len(readable) >= 0.95 * len(got), f"{len(got) - len(readable)} of {len(got)} without a stamp"
    steps = [(after - before) % CLIP_PICTURES for before, after in itertools.pairwise(readable)]
    assert all(0 <= step < CLIP_PICTURES // 2 for step in steps), f"out of order: {readable}"
    assert sum(step == 1 for step in steps) >= 0.9 * len(steps), f"pictures are missing: {readable}"


@pytest.mark.parametrize(
    ("sender", "receiver", "codec", "host"),
    [
        ("ffmpeg", "gstreamer", "h264", "127.0.0.1"),
        ("gstreamer", "ffmpeg", "vp8", "::1"),
        pytest.param("ffmpeg", "gstreamer", "vp8", "::1", marks=pytest.mark.slow),
        pytest.param("gstreamer", "ffmpeg", "h264", "127.0.0.1", marks=pytest.mark.slow),
        pytest.param("ffmpeg", "ffmpeg", "h264", "::1", marks=pytest.mark.slow),
        pytest.param("gstreamer", "gstreamer", "vp8", "127.0.0.1", marks=pytest.mark.slow),
    ],
)
def test_pictures_cross(sender: str, receiver: str, codec: str, host: str, tmp_path: Path) -> None:
    pictures = clip(tmp_path / "clip.yuv")
    received = tmp_path / "received.yuv"
    port_in, port_out = free_pair(host), free_pair(host)
    with ExitStack() as stack:
        if sender == "ffmpeg":
            sdp = tmp_path / "sender.sdp"
            command = ffmpeg_sender(codec, host, port_in, pictures, sdp)
            stack.enter_context(spawned(command, tmp_path / "sender.log"))
            until(lambda: sdp.exists() and "m=video" in sdp.read_text(), 10, lambda: "ffmpeg wrote no SDP")
            source = f'[[lane.source.sdp]]\nfile = "{sdp}"\nstream = "camera"'
        else:
            source = f'[lane.source.rtp]\nlisten = "{address(host, port_in)}"\ncodec = "{codec}"'
        relay = stack.enter_context(
            running(configuration(source, address(host, port_out), codec), tmp_path / "relay")
        )
        if receiver == "ffmpeg":
            command = ffmpeg_receiver(sdp_of(relay), received)
        else:
            command = gstreamer_receiver(codec, host, port_out, received)
        stack.enter_context(spawned(command, tmp_path / "receiver.log"))
        if sender == "gstreamer":
            command = gstreamer_sender(codec, host, port_in, pictures)
            stack.enter_context(spawned(command, tmp_path / "sender.log"))

        def seen() -> list[int | None]:
            return [stamp.counter if stamp else None for stamp in stamps(received)]

        until(
            lambda: len(seen()) >= PICTURES,
            ARRIVAL_SECONDS,
            lambda: (
                f"{len(seen())} pictures; the receiver said "
                f"{(tmp_path / 'receiver.log').read_text()}; {relay.status()}"
            ),
        )
        # What a receiver made of pictures before the first keyframe does not count.
        check(seen()[5:])
