"""Media that mean harm, and bad links: the healthy stream stays healthy, the bad one is told why."""

from __future__ import annotations

import asyncio
import itertools
import random
from pathlib import Path

import pytest

from relay.records import StreamKind
from tests.rtc.coded import coded_pictures, rtp, video_packets
from tests.rtc.fakes import until
from tests.rtc.test_source_rtp import Rig

PERIOD = 1 / 60
"""Seconds between pictures: twice as fast as they say, so that the tests are quick."""


async def test_damaged_streams_cost_pictures_and_the_stream_recovers(tmp_path: Path) -> None:
    randomly = random.Random(5)
    pictures = coded_pictures("h264", 30)
    packets = video_packets("h264", pictures)
    async with Rig(tmp_path) as rig:
        await rig.send_pictures(packets[:2])
        for picture in packets[2:20]:
            for packet in picture:
                damaged = bytearray(packet)
                for _ in range(3):
                    damaged[randomly.randrange(12, len(damaged))] ^= 1 << randomly.randrange(8)
                rig.send(bytes(damaged[: randomly.randrange(13, len(damaged) + 1)]))
            await asyncio.sleep(0.005)
        good = video_packets("h264", pictures[:5], seq=40_000, timestamp=900_000)
        count = len(rig.outlet.pictures)
        for picture in good:
            for packet in picture:
                rig.send(packet)
            await asyncio.sleep(PERIOD)
        await until(lambda: len(rig.outlet.pictures) >= count + 4)
    assert [item.kind for item in rig.outlet.started] == [StreamKind.VIDEO]


@pytest.mark.parametrize("codec", ["h264", "vp8"])
async def test_truncated_parameter_sets_and_giant_sizes_are_faults(tmp_path: Path, codec: str) -> None:
    good = coded_pictures(codec, 4)
    async with Rig(tmp_path, settings={"codec": codec}) as rig:
        await rig.send_pictures(video_packets(codec, good))
        if codec == "h264":
            # 4096×4096, baseline: 256 by 256 macroblocks.
            bad = [
                b"\x67\x42\x00\x33\xf4\x02\x00\x04\x00\x40\x80",
                b"\x67\x42",
                b"\x67\xf4\x00\x1f\xff\xff\xff",
            ]
        else:
            bad = [
                b"\x10\x10\x00\x00\x9d\x01\x2a\xff\x3f\xff\x3f" + bytes(20),
                b"\x10\x00",
                b"\x10\x10\x00\x00abc",
            ]
        for index, payload in enumerate(bad):
            rig.send(rtp(payload, seq=2000 + index, timestamp=500_000 + 3000 * index, marker=True))
        # They follow a gap, so they are looked at when it has been given up.
        await until(lambda: rig.side.status()["streams"]["camera"]["faults"])
        await rig.send_pictures(video_packets(codec, good, seq=9000, timestamp=900_000))
    assert len(rig.outlet.pictures) == 8


async def test_after_a_stall_of_the_link_the_delay_is_what_it_was(tmp_path: Path) -> None:
    packets = video_packets("h264", coded_pictures("h264", 60))
    async with Rig(tmp_path) as rig:
        for index, picture in enumerate(packets):
            if index == 10:
                rig.outlet.hold()
            if index == 40:
                rig.outlet.open.set()
            for packet in picture:
                rig.send(packet)
            await asyncio.sleep(PERIOD)
        await until(lambda: rig.outlet.pictures[-1].seq == 59)
        delays = {
            record.seq: sent - record.captured_ns
            for record, sent in rig.outlet.records
            if record in rig.outlet.pictures
        }
        status = rig.side.status()
    assert status["mailbox"]["pictures_replaced"] >= 20
    # One picture was in the link's hands and one in the mailbox; every later one is fresh.
    fresh = [delay for seq, delay in delays.items() if seq > 41]
    assert sorted(fresh)[len(fresh) // 2] < 15_000_000


async def test_five_percent_loss_never_freezes_for_a_second(tmp_path: Path) -> None:
    randomly = random.Random(11)
    packets = video_packets("h264", coded_pictures("h264", 150))
    async with Rig(tmp_path) as rig:
        for picture in packets:
            for packet in picture:
                if randomly.random() >= 0.05 or picture is packets[0]:
                    rig.send(packet)
            await asyncio.sleep(PERIOD)
        await until(lambda: rig.outlet.pictures[-1].captured_ns)
        times = [record.captured_ns for record in rig.outlet.pictures]
        video = rig.figures["video"]
    assert video["given_up"]
    assert max(after - before for before, after in itertools.pairwise(times)) < 1_000_000_000
    assert len(times) > 75


async def test_duplicates_and_reordering_lose_nothing(tmp_path: Path) -> None:
    randomly = random.Random(3)
    packets = video_packets("h264", coded_pictures("h264", 20))
    async with Rig(tmp_path) as rig:
        await rig.send_pictures(packets[:1])
        for picture in packets[1:]:
            count = len(rig.outlet.pictures)
            shuffled = [*picture, *picture]
            randomly.shuffle(shuffled)
            for packet in shuffled:
                rig.send(packet)
            await until(lambda count=count: len(rig.outlet.pictures) > count)  # type: ignore[misc]
    assert [item.seq for item in rig.outlet.pictures] == list(range(20))
