"""GStreamer's RTSP server is the camera; the relay pulls it, and pictures come out as plain RTP on side B.

Every picture has a stamp with its number, and the camera plays 30 of them a second: how late a picture is,
compared with others, follows from its number and the time at which it was seen.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import signal
import socket
import subprocess
import urllib.parse
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rtc.bench_ends import RtpReceiver
from rtc.bench_report import Sighting, percentile
from rtc.rtsp import FIRST_WAIT, OPEN_SECONDS, SILENCE_SECONDS
from tests.interop import rtsp_camera
from tests.interop.media_peers import CLIP_PICTURES, SIZE, clip, free_pair, spawned, until
from tests.interop.rtsp_camera import PASSWORD, TONE_HERTZ, USER
from tests.peers import free_port, require, require_rtsp_server
from tests.product import Product, running

pytestmark = pytest.mark.peer

READY_SECONDS = 10.0

ARRIVAL_SECONDS = 20.0
"""From a server that is there to pictures: connecting, a second of analysis, a loaded machine."""

PICTURES = 45
"""A second and a half: past a keyframe interval of the camera."""

STALL_SECONDS = 2.0
"""Less than `SILENCE_SECONDS`: the connection lasts, and what the camera could not send comes at once."""

SETTLING_PICTURES = 60
"""After a stall: what was late, and some more."""

NOISE_MS = 150
"""What a busy machine may add. A backlog of the stall would be seconds."""

ESCAPED = urllib.parse.quote(PASSWORD, safe="")

WRONG = "mistaken-password"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The clip that cameras show."""
    return clip(tmp_path_factory.mktemp("clip") / "clip.yuv")


@contextlib.contextmanager
def camera(pictures: Path, log: Path, *ports: str) -> Iterator[subprocess.Popen[bytes]]:
    """A camera at each of these ports, listening."""
    size = f"{SIZE.width}x{SIZE.height}"
    script = rtsp_camera.__file__
    command = [require_rtsp_server(), script, str(pictures), size, str(SIZE.rate), *ports]
    with spawned(command, log) as process:
        until(lambda: "ready" in log.read_text(), READY_SECONDS, lambda: f"the camera said {log.read_text()}")
        yield process


def pull(stream: str, url: str, transport: str = "tcp") -> str:
    return f'[[lane.source.rtsp]]\nurl = "{url}"\nstream = "{stream}"\ntransport = "{transport}"\n'


def configuration(pulls: str, sink: str, more: str = "") -> str:
    """A lane with these pulls; the stream ``ward`` goes to `sink`."""
    return f"""\
[relay]
name = "test"
state = "state"
[[lane]]
name = "camera"
kind = "media"
lab = true
{pulls}
[lane.sink.rtp]
address = "{sink}"
codec = "h264"
stream = "ward"
bitrate = 2_000_000
{more}
"""


def figures(relay: Product) -> dict[str, Any]:
    """The source's streams by name."""
    streams: dict[str, Any] = relay.status()["lanes"][0]["source"]["figures"]["streams"]
    return streams


def connection(relay: Product, stream: str = "ward") -> dict[str, Any]:
    """How the pull of a stream does."""
    found: dict[str, Any] = figures(relay)[stream]["tracks"]["rtsp"]
    return found


@contextlib.asynccontextmanager
async def receiver() -> AsyncIterator[RtpReceiver]:
    """Side B's end of the stream ``ward``."""
    made = RtpReceiver(f"127.0.0.1:{free_pair('127.0.0.1')}", "h264")
    try:
        yield made
    finally:
        await made.close()


async def eventually(condition: Callable[[], bool], seconds: float, what: Callable[[], str]) -> None:
    """`until`, while the receiver goes on receiving."""
    await asyncio.to_thread(until, condition, seconds, what)


async def more(end: RtpReceiver, relay: Product, count: int = PICTURES) -> list[Sighting]:
    """Wait for `count` more pictures; those."""
    seen, start = end.sightings.seen, len(end.sightings.seen)
    await eventually(
        lambda: len(seen) >= start + count,
        ARRIVAL_SECONDS,
        lambda: f"{len(seen) - start} pictures; {figures(relay)}; {relay.log}",
    )
    return seen[start:]


def check(seen: list[Sighting]) -> None:
    """In their order, with next to none missing (the clip is looped)."""
    steps = [(after.counter - before.counter) % CLIP_PICTURES for before, after in itertools.pairwise(seen)]
    assert all(0 < step < CLIP_PICTURES // 2 for step in steps), f"out of order: {steps}"
    assert sum(step == 1 for step in steps) >= 0.9 * len(steps), f"pictures are missing: {steps}"


def lateness(seen: list[Sighting], origin: Sighting) -> list[float]:
    """By how many milliseconds each comes later than `origin` did, by its number: of at most one loop."""
    span = CLIP_PICTURES * 1000 / SIZE.rate
    found = []
    for sighting in seen:
        shown = (sighting.counter - origin.counter) * 1000 / SIZE.rate
        late = (sighting.seen_us - origin.seen_us) / 1000 - shown
        found.append((late + span / 2) % span - span / 2)
    return found


@pytest.mark.parametrize("transport", ["tcp", "udp"])
async def test_a_camera_that_stalls_then_is_switched_off_and_on(
    transport: str, pictures: Path, tmp_path: Path
) -> None:
    port = str(free_port())
    url = f"rtsp://127.0.0.1:{port}/live"
    async with receiver() as end:
        config = configuration(pull("ward", url, transport), end.address)
        with (
            camera(pictures, tmp_path / "camera.log", port) as shown,
            running(config, tmp_path / "relay") as relay,
        ):
            await more(end, relay)
            usual = await more(end, relay)
            check(usual)

            shown.send_signal(signal.SIGSTOP)
            try:
                await asyncio.sleep(STALL_SECONDS)
            finally:
                shown.send_signal(signal.SIGCONT)
            await more(end, relay, SETTLING_PICTURES)
            settled = await more(end, relay)
            check(settled)
            assert connection(relay)["attempts"] == 1, "the stall was too long for this test"
            before = percentile(sorted(lateness(usual, usual[0])), 0.5)
            after = percentile(sorted(lateness(settled, usual[0])), 0.5)
            assert after < before + NOISE_MS, f"{before:.0f} ms late before the stall, {after:.0f} ms after"

            shown.kill()
            shown.wait()
            await eventually(
                # Once after silence or the connection's end, once more in vain.
                lambda: connection(relay)["attempts"] >= 2 and connection(relay)["state"] == "waiting",
                SILENCE_SECONDS + OPEN_SECONDS + 2 * FIRST_WAIT + READY_SECONDS,
                lambda: f"{connection(relay)}",
            )
            away = connection(relay)
            assert "refused" in away["last_end"], away
            assert figures(relay)["ward"]["state"] == "waiting"
            assert away["again_in_seconds"] <= 2 * FIRST_WAIT, away
            with camera(pictures, tmp_path / "again.log", port):
                check((await more(end, relay))[5:])
                back = connection(relay)
                assert back["state"] == "live", back
                assert back["attempts"] <= away["attempts"] + 2, "it does not back off"


async def test_cameras_that_cannot_be_shown_say_why_and_hurt_nobody(pictures: Path, tmp_path: Path) -> None:
    plain, basic, digest, nobody = (str(free_port()) for _ in range(4))
    here = "127.0.0.1"
    with socket.socket() as mute:
        mute.bind((here, 0))
        mute.listen()
        pulls = {
            "ward": f"rtsp://{here}:{plain}/live",
            "basic": f"rtsp://{USER}:{ESCAPED}@{here}:{basic}/live",
            "digest": f"rtsp://{USER}:{ESCAPED}@{here}:{digest}/live",
            "nobody": f"rtsp://{USER}:{ESCAPED}@{here}:{nobody}/live",
            "wrong": f"rtsp://{USER}:{WRONG}@{here}:{digest}/live",
            "path": f"rtsp://{here}:{plain}/elsewhere",
            "sound": f"rtsp://{here}:{plain}/sound",
            "jpeg": f"rtsp://{here}:{plain}/jpeg",
            "mute": f"rtsp://{USER}:{ESCAPED}@{here}:{mute.getsockname()[1]}/live",
        }
        ends = {
            "nobody": "refused",
            "wrong": "user or the password",
            "path": "no such stream",
            "sound": "no video",
            "jpeg": "mjpeg: set it to H.264",
            "mute": "does not answer",
        }
        async with receiver() as end:
            config = configuration("".join(itertools.starmap(pull, pulls.items())), end.address)
            ports = (plain, f"{basic}:basic", f"{digest}:digest")
            with (
                camera(pictures, tmp_path / "camera.log", *ports),
                running(config, tmp_path / "relay") as relay,
            ):
                await more(end, relay)
                await eventually(
                    lambda: all(connection(relay, stream)["last_end"] for stream in ends),
                    OPEN_SECONDS + ARRIVAL_SECONDS,
                    lambda: json.dumps(figures(relay)),
                )
                check(await more(end, relay))
                streams = figures(relay)
                for stream, words in ends.items():
                    assert words in streams[stream]["tracks"]["rtsp"]["last_end"]
                    assert streams[stream]["state"] == "waiting"
                    assert (
                        f"stream {stream}: camera: {streams[stream]['tracks']['rtsp']['last_end']}"
                        in relay.log
                    )
                for stream in ("ward", "basic", "digest"):
                    assert streams[stream]["state"] == "live", streams[stream]
                    assert streams[stream]["tracks"]["rtsp"]["attempts"] == 1
                told = [
                    relay.log,
                    json.dumps(relay.status()),
                    relay.command("status", "--state", str(relay.state), expect=(3,)),
                ]
                told += [command_line(relay.status()["lanes"][0][part]["pid"]) for part in ("source", "sink")]
            told.append(relay.log)
            told += [path.read_bytes().decode("latin-1") for path in relay.state.rglob("*") if path.is_file()]
            for secret in (PASSWORD, ESCAPED, WRONG):
                assert not [text for text in told if secret in text], f"{secret} was told"


def command_line(pid: int) -> str:
    """What everyone on the machine can read of a process."""
    return Path(f"/proc/{pid}/cmdline").read_text()


SOUND_RATE = 48_000

WINDOW = SOUND_RATE // 50
"""Samples of 20 ms."""

SOUND_SECONDS = 3


@pytest.mark.parametrize("mount", ["aac", "pcmu"])
def test_sound_crosses(mount: str, pictures: Path, tmp_path: Path) -> None:
    port, sound = str(free_port()), free_pair("127.0.0.1")
    heard = tmp_path / "heard.pcm"
    audio = f'[lane.sink.rtp.audio]\naddress = "127.0.0.1:{sound}"'
    url = f"rtsp://127.0.0.1:{port}/{mount}"
    config = configuration(pull("ward", url), f"127.0.0.1:{free_pair('127.0.0.1')}", audio)
    caps = "application/x-rtp,media=audio,clock-rate=48000,encoding-name=OPUS,payload=111"
    pipeline = (
        "! rtpjitterbuffer latency=100 ! rtpopusdepay ! opusdec ! audioconvert "
        f"! audio/x-raw,format=S16LE,rate={SOUND_RATE},channels=1 ! filesink buffer-mode=unbuffered"
    )
    source = ["udpsrc", "address=127.0.0.1", f"port={sound}", f"caps={caps}"]
    command = [require("gst-launch-1.0"), "-q", *source, *pipeline.split(), f"location={heard}"]
    wanted = SOUND_SECONDS * SOUND_RATE
    with (
        spawned(command, tmp_path / "receiver.log"),
        camera(pictures, tmp_path / "camera.log", port),
        running(config, tmp_path / "relay") as relay,
    ):
        until(
            lambda: heard.exists() and heard.stat().st_size >= 2 * wanted,
            ARRIVAL_SECONDS,
            lambda: f"{(tmp_path / 'receiver.log').read_text()}; {figures(relay)}; {relay.log}",
        )
        assert connection(relay)["sound_dropped"] == 0
        mailbox = relay.status()["lanes"][0]["source"]["figures"]["mailbox"]
        assert mailbox["audio_dropped"] == 0
        assert figures(relay)["ward"]["pictures"] > SOUND_SECONDS * SIZE.rate / 2
    samples = np.fromfile(heard, np.int16, wanted)[WINDOW * 25 :].astype(np.float64)
    windows = samples.reshape(-1, WINDOW) * np.hanning(WINDOW)
    hertz = np.abs(np.fft.rfft(windows, axis=1)).argmax(axis=1) * SOUND_RATE / WINDOW
    level = np.sqrt((windows**2).mean(axis=1))
    clean = (hertz == TONE_HERTZ) & (level > level.max() / 2)
    assert level.max() > 1000, "silence"
    assert clean.mean() > 0.95, f"{(~clean).sum()} of {len(clean)} parts are not the tone"
