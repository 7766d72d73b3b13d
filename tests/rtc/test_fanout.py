"""Votes, budgets and streams that come and go, without codecs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import cast

from rtc.encode import VideoProfile
from rtc.encode_thread import CodedPicture, EncodeThread
from rtc.fanout import FREEZE_NS, RAISE_NS, Branch, Hub, PixelBudget, Stream
from rtc.sound_thread import CodedSound
from tests.rtc.sink_fakes import picture, sink_side


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


def test_pixel_budget() -> None:
    budget = PixelBudget(1_000_000)
    spent = sum(budget.spend(100_000, 10**9 + step * 10_000_000) for step in range(200))
    assert 20 <= spent <= 27, "two seconds at ten a second, and what may be spent at once"


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
