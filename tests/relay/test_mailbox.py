"""The mailbox: newest wins, bounded, in turn."""

from __future__ import annotations

import asyncio

from relay.mailbox import MAX_AUDIO, MAX_NOTICES, MAX_STREAMS, Mailbox
from relay.records import AudioFrame, StopReason, StreamKind, StreamStarted, StreamStopped, VideoFrame


def picture(seq: int, stream: str = "a") -> VideoFrame:
    planes = (bytes(256), bytes(64), bytes(64))
    return VideoFrame(
        stream=stream,
        epoch=1,
        seq=seq,
        captured_ns=1,
        decoded_ns=2,
        media_ns=3,
        width=16,
        height=16,
        planes=planes,
    )


def sound(seq: int, stream: str = "a") -> AudioFrame:
    return AudioFrame(
        stream=stream,
        epoch=1,
        seq=seq,
        captured_ns=1,
        decoded_ns=2,
        media_ns=3,
        rate=48_000,
        channels=1,
        samples=bytes(4),
    )


def started(stream: str = "a") -> StreamStarted:
    return StreamStarted(stream=stream, kind=StreamKind.VIDEO, epoch=1)


def stopped(kind: StreamKind = StreamKind.VIDEO, stream: str = "a") -> StreamStopped:
    return StreamStopped(stream=stream, kind=kind, epoch=1, reason=StopReason.ENDED, frames=0)


async def test_the_newest_picture_wins() -> None:
    box = Mailbox()
    for seq in range(100):
        box.put(picture(seq))
        assert box.fill == 1
    assert await box.take() == [picture(99)]
    assert (box.counters.pictures_replaced, box.fill) == (99, 0)


async def test_the_oldest_sound_is_dropped() -> None:
    box = Mailbox()
    for seq in range(100):
        box.put(sound(seq))
        assert box.fill <= MAX_AUDIO
    assert await box.take() == [sound(seq) for seq in range(100 - MAX_AUDIO, 100)]
    assert box.counters.audio_dropped == 100 - MAX_AUDIO


async def test_notices_go_first_then_sound_then_the_picture() -> None:
    box = Mailbox()
    for record in (picture(1), started(), sound(1)):
        box.put(record)
    assert await box.take() == [started(), sound(1), picture(1)]


async def test_a_stop_voids_what_would_follow_it() -> None:
    box = Mailbox()
    for record in (picture(1), sound(1), stopped()):
        box.put(record)
    assert await box.take() == [stopped(), sound(1)]
    for record in (picture(1), sound(1), stopped(StreamKind.AUDIO)):
        box.put(record)
    assert await box.take() == [stopped(StreamKind.AUDIO), picture(1)]


async def test_notices_are_bounded() -> None:
    box = Mailbox()
    for _ in range(100):
        box.put(started())
    assert box.fill == MAX_NOTICES


async def test_streams_take_turns() -> None:
    box = Mailbox()
    taken = []
    for seq in range(4):
        for _ in range(5):
            box.put(picture(seq, "greedy"))
        box.put(picture(seq, "modest"))
        taken.append((await box.take())[0])
    assert [record.stream for record in taken if isinstance(record, VideoFrame)] == [
        "greedy",
        "modest",
        "greedy",
        "modest",
    ]


async def test_streams_are_bounded() -> None:
    box = Mailbox()
    assert all(box.put(picture(0, f"s{i}")) for i in range(MAX_STREAMS))
    assert not box.put(picture(0, "one-more"))
    assert box.counters.refused == 1


async def test_a_taker_waits_for_something() -> None:
    box = Mailbox()
    taking = asyncio.create_task(box.take())
    await asyncio.sleep(0)
    assert not taking.done()
    box.put(picture(7))
    assert await taking == [picture(7)]


async def test_drained_waits_for_the_taker_to_come_back() -> None:
    box = Mailbox()
    box.put(picture(1))
    sending = asyncio.Event()

    async def forward() -> None:
        while True:
            await box.take()
            await sending.wait()

    taker = asyncio.create_task(forward())
    drained = asyncio.create_task(box.drained())
    for _ in range(5):
        await asyncio.sleep(0)
    assert not drained.done()
    sending.set()
    await drained
    taker.cancel()
