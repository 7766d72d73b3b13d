"""A lane that carries picture and sound for long: memory, latency and lip sync stay where they were."""

from __future__ import annotations

import asyncio
import fractions
import itertools
import statistics
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiortc.mediastreams import MediaStreamTrack
from aiortc.rtp import RtcpSrPacket
from aiortc.rtp import RtpPacket as AiortcPacket
from av import AudioFrame

from rtc.bench_ends import WhepReceiver, WhipSender
from rtc.camera import Camera
from rtc.decode import OpusDecoder
from rtc.timeline import NTP_EPOCH
from tests.interop.media_lane import BITRATE, SIZE, lane

RATE = 48_000
FRAME_SAMPLES = 960
"""20 ms."""

BEEP_FRAMES = 5
LOUD = 2_000
"""Of 32,767: above what Opus makes of silence."""

LIP_SYNC_MS = 40.0
"""ITU-R BT.1359: below 45 ms of sound that leads, nobody notices."""

DRIFT_MS = 20.0
"""From the first beep to the last, whether that is seconds or ten minutes."""

GROWTH_BYTES = 16 << 20
GROWTH = 1.10
"""Memory may grow by either: caches of codecs and allocators, no more."""


class Beeps(MediaStreamTrack):
    """A microphone that hears a beep each second. `at` has the wall time of each beginning."""

    kind = "audio"

    def __init__(self) -> None:
        super().__init__()
        self.at: list[float] = []
        self._number = 0
        self._started = 0.0

    async def recv(self) -> AudioFrame:
        """The next 20 ms, when they are due."""
        loop = asyncio.get_running_loop()
        self._started = self._started or loop.time()
        due = self._started + self._number * FRAME_SAMPLES / RATE
        await asyncio.sleep(max(due - loop.time(), 0))
        in_second = self._number % (RATE // FRAME_SAMPLES)
        if in_second == 0:
            self.at.append(time.time() - (loop.time() - due))
        wave = np.sin(np.arange(FRAME_SAMPLES) * (2 * np.pi * 1000 / RATE)) * 10_000
        samples = wave.astype(np.int16) if in_second < BEEP_FRAMES else np.zeros(FRAME_SAMPLES, np.int16)
        frame = AudioFrame.from_ndarray(np.repeat(samples, 2)[None, :], format="s16", layout="stereo")
        frame.sample_rate, frame.time_base = RATE, fractions.Fraction(1, RATE)
        frame.pts = self._number * FRAME_SAMPLES
        self._number += 1
        return frame


class Clock:
    """Sender reports of one stream: RTP timestamps as wall time, as a player takes them."""

    def __init__(self, rate: int) -> None:
        self._rate = rate
        self._reports: list[tuple[float, int]] = []

    def tap(self, receiver: Any) -> None:
        """Listen to the reports that an aiortc receiver gets."""
        handle: Callable[[Any], Awaitable[None]] = receiver._handle_rtcp_packet

        async def listen(packet: Any) -> None:
            if isinstance(packet, RtcpSrPacket):
                info = packet.sender_info
                self._reports.append((info.ntp_timestamp / 2**32 - NTP_EPOCH, info.rtp_timestamp))
            await handle(packet)

        receiver._handle_rtcp_packet = listen

    def wall(self, timestamp: int) -> float | None:
        """Unix time of a timestamp, by the report that is nearest to it; None before the first report."""
        walls = [
            (abs(ticks), seconds + ticks / self._rate)
            for seconds, at in self._reports
            for ticks in [(timestamp - at + 2**31) % 2**32 - 2**31]
        ]
        return min(walls)[1] if walls else None


class Ear:
    """Decodes what an aiortc audio receiver gets, and notes when each beep begins, as a player would."""

    def __init__(self, receiver: Any) -> None:
        self.clock = Clock(RATE)
        self.clock.tap(receiver)
        self.heard: list[float] = []
        self._decoder = OpusDecoder()
        self._quiet = 0
        receiver._handle_rtp_packet = self._received

    async def _received(self, packet: AiortcPacket, arrival_time_ms: int) -> None:
        samples = np.frombuffer(self._decoder.decode(packet.payload), np.int16).reshape(-1, 2)[:, 0]
        loud = np.flatnonzero(np.abs(samples.astype(np.int32)) > LOUD)
        if not len(loud):
            self._quiet += 1
            return
        wall = self.clock.wall(packet.timestamp + int(loud[0]))
        if self._quiet >= BEEP_FRAMES and wall is not None:
            self.heard.append(wall)
        self._quiet = 0


def memory(pid: int) -> int:
    """Resident bytes of a process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"process {pid} is gone")


@pytest.mark.parametrize(
    "seconds", [12, pytest.param(600, marks=[pytest.mark.slow, pytest.mark.timeout(900)])]
)
async def test_nothing_grows_and_lips_stay_in_sync(seconds: float, tmp_path: Path) -> None:
    wall_minus_monotonic = time.time() - time.monotonic()
    with lane(tmp_path) as relay:
        pids = {part: relay.pid(part) for part in ("source", "valve", "sink")}
        sender = WhipSender(relay.whip, "h264", BITRATE, SIZE.rate)
        beeps = Beeps()
        sender.connection.addTrack(beeps)
        await sender.connect()
        camera = asyncio.create_task(Camera(SIZE, "room").run(seconds + 60, sender.offer))
        try:
            await asyncio.sleep(1)
            viewer = WhepReceiver(relay.whep, "h264")
            picture_clock = Clock(90_000)
            picture_clock.tap(viewer.connection.getTransceivers()[0].receiver)
            ear = Ear(viewer.connection.addTransceiver("audio", direction="recvonly").receiver)
            await viewer.connect()
            await asyncio.sleep(seconds / 4)
            early = {part: memory(pid) for part, pid in pids.items()}
            await asyncio.sleep(3 * seconds / 4)
            late = {part: memory(pid) for part, pid in pids.items()}
            lane_status = relay.product.status()["lanes"][0]
            await viewer.close()
        finally:
            camera.cancel()
            await asyncio.wait([camera])
            await sender.close()
    seen = viewer.sightings.seen

    for part in pids:
        assert late[part] < max(early[part] * GROWTH, early[part] + GROWTH_BYTES), (part, early, late)
        assert lane_status[part]["restarts"] == 0

    quarter = len(seen) // 4
    first, last = (
        statistics.median(s.latency_ms for s in part) for part in (seen[:quarter], seen[-quarter:])
    )
    assert last < 1.5 * first + 1000 / SIZE.rate, f"latency went from {first:.1f} to {last:.1f} ms"
    assert len(seen) > 0.8 * seconds * SIZE.rate

    assert len(ear.heard) >= seconds / 3, f"{len(ear.heard)} beeps were heard"
    sound = [(wall, min((wall - at for at in beeps.at), key=abs)) for wall in ear.heard]
    shown = [(picture_clock.wall(s.timestamp), s.painted_us / 1e6 + wall_minus_monotonic) for s in seen[::3]]
    pictures = [(wall, wall - painted) for wall, painted in shown if wall is not None]
    offsets = lip_offsets(sound, pictures)
    offset_ms = 1000 * statistics.median(offset for _, offset in offsets)
    assert abs(offset_ms) < LIP_SYNC_MS, f"sound is {offset_ms:.1f} ms off the pictures"
    drift_ms = 1000 * slope(offsets) * (offsets[-1][0] - offsets[0][0])
    assert abs(drift_ms) < DRIFT_MS, f"sound went {drift_ms:.1f} ms away from the pictures"


def lip_offsets(
    sound: list[tuple[float, float]], pictures: list[tuple[float, float]]
) -> list[tuple[float, float]]:
    """When each beep was, and how much later than the pictures around it: seconds."""
    found = []
    for wall, late in sound:
        around = [offset for shown, offset in pictures if abs(shown - wall) < 0.5]
        if around:
            found.append((wall, late - statistics.median(around)))
    return found


def slope(points: list[tuple[float, float]]) -> float:
    """Of the line through the middle of the points: Theil and Sen's, which a few outliers do not turn."""
    rises = [
        (late - early) / (end - start)
        for (start, early), (end, late) in itertools.combinations(points, 2)
        if end > start
    ]
    return statistics.median(rises)


@pytest.mark.parametrize(("drift", "found"), [(0.0, 0.0), (0.0001, 0.0001), (-0.00005, -0.00005)])
def test_a_drift_between_sound_and_pictures_is_found(drift: float, found: float) -> None:
    pictures = [(index / 10, 0.010) for index in range(600)]
    sound = [(index + 0.5, 0.020 + drift * index + (0.2 if index == 30 else 0)) for index in range(59)]
    offsets = lip_offsets(sound, pictures)
    assert slope(offsets) == pytest.approx(found, abs=1e-7)
    assert offsets[0][1] == pytest.approx(0.010)
