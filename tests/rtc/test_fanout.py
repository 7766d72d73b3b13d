"""Votes, budgets and streams that come and go, without codecs."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import cast

import pytest

from relay.link import Arrival
from relay.records import Heartbeat, Record, StopReason, StreamKind, StreamStarted, StreamStopped
from rtc.encode import VideoProfile
from rtc.encode_thread import CodedPicture, EncodeThread
from rtc.fanout import FREEZE_NS, LINK_LOOKS, RAISE_NS, STREAM_LOOKS, Branch, Hub, Stream
from rtc.sound_thread import CodedSound
from tests.rtc.fakes import until
from tests.rtc.sink_fakes import picture, sink_side, tone

H264 = VideoProfile(codec="h264", bitrate=10**6)
VP8 = VideoProfile(codec="vp8", bitrate=10**6)


@dataclasses.dataclass
class FakeThread:
    bitrate: int = 4_000_000
    changes: int = 0

    def set_bitrate(self, bits_per_second: int) -> None:
        self.bitrate = bits_per_second
        self.changes += 1


@dataclasses.dataclass
class FakeViewer:
    rate: int | None
    seen: int = 0

    def picture(self, picture: CodedPicture) -> None:
        self.seen += 1

    def sound(self, sound: CodedSound) -> None:
        pass

    def vote(self, now_ns: int) -> int | None:
        return self.rate


def branch(*votes: int | None) -> tuple[Branch, FakeThread]:
    thread = FakeThread()
    return Branch(cast("EncodeThread", thread), [FakeViewer(vote) for vote in votes]), thread


def test_down_at_once_up_slowly() -> None:
    made, thread = branch(1_000_000)
    made.follow_votes(RAISE_NS)
    assert thread.bitrate == 1_000_000
    cast("FakeViewer", made.subscribers[0]).rate = 3_000_000
    made.follow_votes(2 * RAISE_NS - 1)
    assert thread.bitrate == 1_000_000
    made.follow_votes(2 * RAISE_NS)
    assert thread.bitrate == 3_000_000
    cast("FakeViewer", made.subscribers[0]).rate = 500_000
    made.follow_votes(2 * RAISE_NS + 1)
    assert thread.bitrate == 500_000


def test_small_differences_and_no_opinions_change_nothing() -> None:
    made, thread = branch(4_100_000, None)
    made.follow_votes(RAISE_NS)
    assert thread.changes == 0
    made, thread = branch(None)
    made.follow_votes(RAISE_NS)
    assert thread.changes == 0


def test_a_picture_that_stands_still_is_frozen() -> None:
    stream = Stream("room")
    assert not stream.frozen(10**9), "not live"
    stream.saw_picture(picture(0), 10**9)
    assert not stream.frozen(10**9 + FREEZE_NS)
    assert stream.frozen(10**9 + FREEZE_NS + 1)


async def test_a_stream_that_comes_anew_while_a_viewer_connects(tmp_path: Path) -> None:
    side = sink_side({"rtp": {"address": "127.0.0.1:9"}}, tmp_path)
    hub = Hub(side.metrics, max_streams=2, max_pixels_per_second=10**9)
    gone = Stream("room")
    assert hub.adopt(gone) is gone
    hub.streams["room"] = present = Stream("room")
    assert hub.adopt(gone) is present
    viewer = FakeViewer(None)
    hub.subscribe(present, VideoProfile(codec="h264", bitrate=10**6), viewer)
    assert not present.idle
    hub.unsubscribe(present, viewer)
    assert "room" not in hub.streams
    assert "room" in hub.past
    await hub.close()


@contextlib.asynccontextmanager
async def a_hub(
    tmp_path: Path, *, max_streams: int = 2, pixels_per_second: int = 10**9
) -> AsyncIterator[Hub]:
    side = sink_side({"rtp": {"address": "127.0.0.1:9"}}, tmp_path)
    hub = Hub(
        side.metrics, max_streams=max_streams, max_pixels_per_second=pixels_per_second, max_frame_rate=240
    )
    hub.heard_source(1)
    yield hub
    await hub.close()


def deliver(hub: Hub, *records: Record) -> None:
    now_ns = time.monotonic_ns()
    for record in records:
        hub.deliver(Arrival(record, now_ns, now_ns))


def stopped(epoch: int, frames: int = 1, kind: StreamKind = StreamKind.VIDEO) -> StreamStopped:
    return StreamStopped(stream="room", kind=kind, epoch=epoch, reason=StopReason.ENDED, frames=frames)


def started(epoch: int) -> StreamStarted:
    return StreamStarted(stream="room", kind=StreamKind.VIDEO, epoch=epoch, frame_rate_milli=30_000)


async def test_streams_of_a_source_that_was_killed_end_when_it_is_back(tmp_path: Path) -> None:
    async with a_hub(tmp_path) as hub:
        deliver(hub, picture(0, stream="ghost"), picture(0, epoch=7), tone(0, epoch=7))
        viewer = FakeViewer(None)
        hub.subscribe(hub.streams["room"], H264, viewer)
        hub.heard_source(2)
        deliver(hub, Heartbeat(sent_ns=1))
        assert hub.past == {"ghost": None}
        assert not hub.figures()["room"]["live"], "it has a viewer, who is told that nothing comes"
        deliver(hub, picture(0, epoch=3))
        assert hub.figures()["room"]["live"], "a clock that was set back hurts no new publisher"
        assert b'why="restart"} 2.0' in hub.metrics.exposition()


async def test_without_a_word_from_side_a_nothing_is_live(tmp_path: Path) -> None:
    async with a_hub(tmp_path) as hub:
        seen: list[str] = []
        hub.appeared = lambda stream: seen.append(stream.name)
        deliver(hub, picture(0), picture(0, stream="ward"))
        for _ in range(LINK_LOOKS):
            hub.look()
        assert all(item["live"] for item in hub.figures().values())
        deliver(hub, Heartbeat(sent_ns=1))
        for _ in range(LINK_LOOKS):
            hub.look()
        assert len(hub.streams) == 2, "a heartbeat is a word"
        hub.look()
        assert hub.streams == {}
        assert seen == ["room", "ward"]
        deliver(hub, picture(1))
        assert seen == ["room", "ward", "room"]


async def test_a_stream_whose_end_was_lost_is_not_live_for_ever(tmp_path: Path) -> None:
    async with a_hub(tmp_path) as hub:
        deliver(hub, picture(0), picture(0, stream="ward"))
        for _ in range(STREAM_LOOKS + 1):
            deliver(hub, Heartbeat(sent_ns=1), tone(0, stream="ward"))
            hub.look()
        assert list(hub.streams) == ["ward"]
        assert b'why="silence"} 1.0' in hub.metrics.exposition()


async def test_a_later_publisher_follows_and_an_earlier_one_is_not_heard(tmp_path: Path) -> None:
    async with a_hub(tmp_path) as hub:
        deliver(hub, started(5), picture(0, epoch=5), tone(0, epoch=5), started(6), picture(0, epoch=6))
        assert hub.streams["room"].kinds == {StreamKind.VIDEO}, "the sound was the earlier one's"
        deliver(hub, tone(1, epoch=5), stopped(5))
        assert hub.stale == 1
        assert hub.streams["room"].kinds == {StreamKind.VIDEO}
        deliver(hub, stopped(6))
        assert hub.streams == {}


async def test_streams_that_only_viewers_hold_on_to_take_no_place(tmp_path: Path) -> None:
    async with a_hub(tmp_path, max_streams=1) as hub:
        deliver(hub, picture(0))
        hub.subscribe(hub.streams["room"], H264, FakeViewer(None))
        deliver(hub, picture(0, stream="ward"))
        assert hub.refused == 1
        deliver(hub, stopped(1), picture(0, stream="ward"))
        assert [hub.figures()[name]["live"] for name in ("room", "ward")] == [False, True]


async def test_a_greedy_stream_takes_no_pictures_from_a_modest_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrivals = sorted(
        (10**9 + index * 10**9 // rate, rate) for rate in (30, 240) for index in range(4 * rate)
    )
    frames = {rate: picture(0, stream=f"at-{rate}", width=64, height=64) for rate in (30, 240)}
    async with a_hub(tmp_path, pixels_per_second=2 * 30 * 64 * 64) as hub:
        for rate, frame in frames.items():
            deliver(hub, frame)
            hub.subscribe(hub.streams[f"at-{rate}"], H264, FakeViewer(None))
        for now_ns, rate in arrivals:
            with monkeypatch.context() as patch:
                patch.setattr("rtc.fanout.time.monotonic_ns", lambda now_ns=now_ns: now_ns)
                hub._video(Arrival(frames[rate], now_ns, now_ns), frames[rate])
        lost = {name: figures["over_budget"] for name, figures in hub.figures().items()}
        assert lost["at-30"] == 0
        assert 780 < lost["at-240"] <= 840


async def test_whoever_joins_a_still_stream_is_shown_its_picture(tmp_path: Path) -> None:
    async with a_hub(tmp_path) as hub:
        deliver(hub, picture(1), picture(2, width=160, height=120))
        stream = hub.streams["room"]
        assert stream.last is not None
        kept = stream.last.canvas
        deliver(hub, picture(3, width=160, height=120))
        assert stream.last.canvas is kept, "one canvas, drawn over"
        viewers = [FakeViewer(None) for _ in range(4)]
        for viewer, profile in zip(viewers, (H264, H264, VP8, VP8), strict=True):
            began = time.monotonic()
            hub.subscribe(stream, profile, viewer)
            await until(lambda viewer=viewer: viewer.seen)  # type: ignore[misc]
            assert time.monotonic() - began < 0.5
            assert stream.last is None, "the encoder's canvas is the only one"
        for viewer in viewers:
            hub.unsubscribe(stream, viewer)
        late = FakeViewer(None)
        hub.subscribe(stream, H264, late)
        await until(lambda: late.seen)
        assert "encode" not in hub.metrics.latencies("room"), "what was there says nothing about latency"
        hub.unsubscribe(stream, late)
        assert stream.last is not None
        deliver(hub, stopped(1))
        assert stream.last is None


async def test_frames_that_never_came_are_counted_when_their_stream_ends(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with a_hub(tmp_path) as hub:
        viewer = FakeViewer(None)
        sound_start = dataclasses.replace(started(1), kind=StreamKind.AUDIO, frame_rate_milli=0)
        deliver(hub, started(1), sound_start, picture(0), tone(0), tone(1))
        hub.subscribe(hub.streams["room"], H264, viewer)
        deliver(hub, stopped(1, 4), stopped(1, 2, StreamKind.AUDIO))
        assert hub.figures()["room"]["missing"] == 3
        assert b"medferry_media_missing_total{" in hub.metrics.exposition()
        told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert told == ["stream room: 3 of 4 video frames that side A sent never came"]
        # Nothing is concluded where the beginning was not seen, nor of a run before.
        deliver(hub, picture(0, epoch=2), stopped(2, 9))
        deliver(hub, started(3), picture(0, epoch=3))
        hub.heard_source(2)
        deliver(hub, picture(0, epoch=1), stopped(1, 9))
        deliver(hub, started(4), started(5), picture(0, epoch=5), stopped(5, 1))
        assert hub.figures()["room"]["missing"] == 3
