"""What the pull of a camera does between the camera and its publication."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import av
import pytest

from relay.mailbox import Mailbox
from relay.metrics import Metrics
from relay.records import StopReason
from relay.worker import SourceSide
from rtc import rtsp
from rtc.budget import PixelBudget
from rtc.decode_thread import DecodedSound, Fault
from rtc.publication import AUDIO_BYTES, Stage
from rtc.rtsp import MAX_PARTS, PART_NS, PART_SECONDS, RtspPull, Trickle
from rtc.settings import RtspSettings
from tests.rtc.coded import coded_pictures
from tests.rtc.fakes import WAIT_SECONDS, MemoryOutlet, lane, running, side, until

PARTS = 7
"""Of one packet of 128 ms, with what was left of the one before."""


def sound(parts: int, first: int = 0) -> DecodedSound:
    """Parts whose samples are their numbers."""
    samples = b"".join(bytes([number]) * AUDIO_BYTES for number in range(first, first + parts))
    return DecodedSound(samples, 0, 0, 0)


async def test_a_long_packet_of_sound_leaves_in_its_own_time() -> None:
    out: list[tuple[int, int, float]] = []
    trickle = Trickle(lambda part, ns: out.append((part.samples[0], ns // PART_NS, time.monotonic())))
    trickle.put(sound(PARTS), 10 * PART_NS)
    assert [number for number, _, _ in out] == [0], "the first leaves at once"
    assert trickle.fill == PARTS - 1
    await until(lambda: len(out) == PARTS)
    assert [(number, at) for number, at, _ in out] == [(number, 10 + number) for number in range(PARTS)]
    assert out[-1][2] - out[0][2] >= (PARTS - 1) * PART_SECONDS - 0.005
    assert (trickle.fill, trickle.dropped) == (0, 0)


async def test_too_much_sound_pushes_the_oldest_out() -> None:
    out: list[int] = []
    trickle = Trickle(lambda part, _: out.append(part.samples[0]))
    trickle.put(sound(1), 0)
    trickle.put(sound(MAX_PARTS + 5, first=1), 0)
    assert (trickle.fill, trickle.dropped) == (MAX_PARTS, 5)
    assert repr(trickle) == f"<Trickle {MAX_PARTS} of {MAX_PARTS} parts, 5 dropped>"
    await until(lambda: len(out) == 2)
    assert out == [0, 6]
    trickle.close()
    assert trickle.fill == 0


class FakeCamera:
    """A file for a camera: what it shows, and then silence until `go_on`, where there is one."""

    def __init__(self, path: Path, go_on: threading.Event | None = None) -> None:
        self._container = av.open(str(path))
        self._go_on = go_on

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._container.close()

    @property
    def streams(self) -> Any:
        return self._container.streams

    def demux(self, streams: list[Any]) -> Iterator[Any]:
        yield from self._container.demux(streams)
        if self._go_on is not None:
            self._go_on.wait(WAIT_SECONDS)


@pytest.fixture
def shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that cameras show: four pictures of 320x240. Attempts follow each other quickly."""
    monkeypatch.setattr(rtsp, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(rtsp, "LONGEST_WAIT", 0.02)
    path = tmp_path / "shown.h264"
    path.write_bytes(b"".join(bytes(item) for item in coded_pictures("h264", 4)))
    monkeypatch.setattr(rtsp._Puller, "_open", lambda _: FakeCamera(path))
    return path


def pulling(outlet: MemoryOutlet, state: Path, *streams: str, **source: Any) -> SourceSide:
    pulls = [{"url": f"rtsp://camera.example/{name}", "stream": name} for name in streams]
    return side(lane(rtsp=pulls, **source), outlet, state, {})


def last_end(made: SourceSide, stream: str = "ward") -> str:
    text: str = made.status()["streams"][stream]["tracks"]["rtsp"]["last_end"]
    return text


@pytest.mark.usefixtures("shown")
async def test_a_stream_that_ends_is_asked_for_again(tmp_path: Path) -> None:
    outlet = MemoryOutlet()
    made = pulling(outlet, tmp_path, "ward")
    async with running(made):
        await until(lambda: len(outlet.stopped) >= 2)
        assert last_end(made) == "it ended the stream"
    assert outlet.stopped[0].reason is StopReason.LOST
    assert outlet.started[0].epoch < outlet.started[1].epoch


async def test_a_drain_is_not_a_loss(shown: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outlet, go_on = MemoryOutlet(), threading.Event()
    monkeypatch.setattr(rtsp._Puller, "_open", lambda _: FakeCamera(shown, go_on))
    made = pulling(outlet, tmp_path, "ward")
    async with running(made):
        await until(lambda: outlet.pictures)
        assert made.status()["streams"]["ward"]["tracks"]["rtsp"]["state"] == "live"
    go_on.set()
    assert [item.reason for item in outlet.stopped] == [StopReason.DRAINED]


@pytest.mark.usefixtures("shown")
async def test_a_size_without_a_budget_is_refused_before_anything_crosses(tmp_path: Path) -> None:
    outlet = MemoryOutlet()
    made = pulling(outlet, tmp_path, "ward", max_pixels_per_second=1_000_000)
    async with running(made):
        await until(lambda: "budget" in last_end(made))
    assert not outlet.records


async def test_a_camera_beyond_the_limit_waits_for_room(
    shown: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outlet, go_on = MemoryOutlet(), threading.Event()
    monkeypatch.setattr(rtsp._Puller, "_open", lambda _: FakeCamera(shown, go_on))
    made = pulling(outlet, tmp_path, "one", "two", max_streams=1)
    async with running(made):
        await until(lambda: "limit" in last_end(made, "one") + last_end(made, "two"))
        assert sorted(item["state"] for item in made.status()["streams"].values()) == ["live", "waiting"]
        (complaint,) = made.status()["complaints"]
        assert "is not shown: " in complaint and "limit" in complaint
        go_on.set()


async def test_a_fault_of_ours_is_not_taken_for_the_cameras(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object) -> FakeCamera:
        raise KeyError("ours")

    monkeypatch.setattr(rtsp._Puller, "_open", broken)
    stage = Stage(
        mailbox=Mailbox(),
        metrics=Metrics("camera", "source"),
        epoch=1,
        max_streams=1,
        max_frame_rate=60.0,
        budget=PixelBudget(1_000_000, 60.0),
    )
    pull = RtspPull(stage, RtspSettings(url="rtsp://camera.example/1", stream="ward"))
    with pytest.raises(KeyError, match="ours"):
        async with asyncio.timeout(WAIT_SECONDS):
            await pull.run()


async def test_each_fault_is_told_in_words_also_before_there_is_a_stream(
    caplog: pytest.LogCaptureFixture,
) -> None:
    metrics = Metrics("camera", "source")
    stage = Stage(
        mailbox=Mailbox(),
        metrics=metrics,
        epoch=1,
        max_streams=1,
        max_frame_rate=60,
        budget=PixelBudget(10**9, 60.0),
    )
    pull = RtspPull(stage, RtspSettings(url="rtsp://camera.example/x", stream="ward"))
    pull.take(Fault("decode", "cannot be decoded: early"), 0.0)
    pull.take(sound(1), 0.0)
    pull.take(Fault("decode", "cannot be decoded: late"), 0.0)
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert told == ["stream ward: cannot be decoded: early", "stream ward: cannot be decoded: late"]
    assert b'medferry_media_faults_total{lane="camera",reason="decode",side="source"} 2.0' in (
        metrics.exposition()
    )
    pull._stop(StopReason.ENDED)
