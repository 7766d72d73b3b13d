"""H.264 as cameras make it: main and high profile, with B-frames, CABAC and 8×8 transforms, all the way."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from rtc.bench_ends import RtpReceiver
from tests.interop.media_lane import lane
from tests.interop.media_peers import CLIP_PICTURES, clip, ffmpeg_sender, spawned
from tests.rtc.fakes import until

pytestmark = pytest.mark.peer

PICTURES = 60


@pytest.mark.parametrize(
    ("profile", "options"),
    [
        ("high", "-bf 2 -x264-params 8x8dct=1:cabac=1:b-adapt=0:scenecut=0"),
        pytest.param("main", "-bf 0 -x264-params cabac=1", marks=pytest.mark.slow),
        pytest.param("high", "-bf 0 -tune zerolatency", marks=pytest.mark.slow),
    ],
)
async def test_every_profile_crosses(profile: str, options: str, tmp_path: Path) -> None:
    pictures = clip(tmp_path / "clip.yuv")
    with lane(tmp_path / "relay") as relay:
        receiver = RtpReceiver(relay.rtp_out, "h264")
        encoder = (
            f"-c:v libx264 -profile:v {profile} -preset veryfast {options} -b:v 1500k -g 30 -loglevel info"
        )
        host, _, port = relay.rtp_in.rpartition(":")
        command = ffmpeg_sender("h264", host, int(port), pictures, tmp_path / "sender.sdp", encoder)
        with spawned(command, tmp_path / "sender.log"):
            try:
                await until(lambda: len(receiver.sightings.seen) >= PICTURES, 20)
            finally:
                await receiver.close()
            figures = relay.product.status()["lanes"][0]["source"]["figures"]["streams"]["camera"]
    seen = [sighting.counter for sighting in receiver.sightings.seen]
    steps = [(after - before) % CLIP_PICTURES for before, after in itertools.pairwise(seen[5:])]
    assert set(steps) == {1}, f"missing, or in the order of the bitstream: {seen}"
    assert figures["faults"] == {}
    log = (tmp_path / "sender.log").read_text()
    assert f"profile {profile.capitalize()}, level" in log, log
