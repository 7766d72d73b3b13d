"""The benchmark's own ends: a clip that plays in a loop, a detour without a way around it, what they see."""

from __future__ import annotations

import asyncio
import itertools
import os
import subprocess
import threading
import time

import pytest

from perf.clip import CLIP_SECONDS, Player, clip
from perf.detour import candidate, with_candidate, without_candidates
from perf.processes import cpu_seconds, resident
from perf.rtc_ends import PRIORITY, before_all, running
from perf.rtc_fall import STEADY_SECONDS, recovery_seconds
from perf.rtc_peers import Entry
from perf.rtc_plan import Plan
from relay.confine import may_go_first
from rtc.bench_report import Sighting
from rtc.encode_thread import CodedPicture
from tests.interop.media_peers import free_pair


def sighting(counter: int, seen_us: int, painted_us: int = 0) -> Sighting:
    return Sighting(counter=counter, painted_us=painted_us, seen_us=seen_us)


def played(*sendings: tuple[int, int]) -> Player:
    """A player that sent these numbers at these times."""
    player = Player(clip("h264", 320, 180, 30, 400_000))
    for number, when_us in sendings:
        player._sendings.setdefault(number, []).append(len(player.sent_us))
        player.sent_us.append(when_us)
        player.numbers.append(number)
    return player


def test_a_clip_has_a_keyframe_every_two_seconds() -> None:
    made = clip("h264", 320, 180, 30, 400_000)
    assert len(made.pictures) == 30 * CLIP_SECONDS
    assert [number for number, coded in enumerate(made.pictures) if coded.keyframe][:3] == [0, 60, 120]
    assert [made.next_keyframe(number) for number in (0, 1, 60, 359)] == [0, 60, 60, 0]


@pytest.mark.parametrize("granted", [True, False])
def test_the_ends_go_before_all_where_they_may(monkeypatch: pytest.MonkeyPatch, granted: bool) -> None:
    calls: list[tuple[int, int]] = []

    def setscheduler(pid: int, policy: int, param: os.sched_param) -> None:
        if not granted:
            raise PermissionError
        assert pid == 0
        calls.append((policy, param.sched_priority))

    monkeypatch.setattr(os, "sched_setscheduler", setscheduler)
    with before_all():
        assert calls == ([(os.SCHED_RR, PRIORITY)] if granted else [])
    assert calls[1:] == ([(os.SCHED_OTHER, 0)] if granted else [])


@pytest.mark.skipif(not may_go_first(), reason="needs CAP_SYS_NICE")
def test_threads_that_the_ends_start_go_before_all_too_and_none_afterwards() -> None:
    policies: list[int] = []

    def note() -> None:
        policies.append(os.sched_getscheduler(0))

    with before_all():
        thread = threading.Thread(target=note)
        thread.start()
        thread.join()
    note()
    assert policies == [os.SCHED_RR, os.SCHED_OTHER]


def test_a_picture_is_the_last_one_of_its_number_that_was_sent_before_it_was_seen() -> None:
    player = played((0, 100), (1, 200), (0, 300), (1, 400))
    seen = [sighting(0, 150), sighting(0, 299), sighting(1, 450), sighting(0, 50), sighting(7, 500)]
    assert [(item.counter, item.painted_us) for item in player.resolve(seen)] == [
        (0, 100),
        (0, 100),
        (3, 400),
    ]
    assert player.sent_within(200, 400) == range(1, 3)


async def test_a_player_goes_on_with_a_keyframe_when_one_is_wanted() -> None:
    player = Player(clip("h264", 320, 180, 30, 400_000))
    shown: list[CodedPicture] = []
    enough = asyncio.Event()

    def publish(picture: CodedPicture) -> None:
        shown.append(picture)
        if len(shown) == 3:
            player.want_keyframe()
        if len(shown) == 6:
            enough.set()

    task = asyncio.create_task(player.run(publish))
    async with asyncio.timeout(10):
        await enough.wait()
    task.cancel()
    await asyncio.wait([task])
    assert player.numbers[:6] == [0, 1, 2, 60, 61, 62]
    assert [picture.coded.keyframe for picture in shown[:4]] == [True, False, False, True]
    assert all(after > before for before, after in itertools.pairwise(player.sent_us))


OFFER = (
    "m=video 9 UDP\r\n"
    "a=candidate:1 1 udp 2 10.0.0.1 5 typ host\r\n"
    "a=candidate:2 1 udp 1 ::1 6 typ host\r\n"
    "a=x\r\n"
)


def test_a_detour_leaves_no_candidate_but_its_own() -> None:
    assert candidate(OFFER) == ("10.0.0.1", 5)
    assert without_candidates(OFFER).count("candidate:") == 1
    assert "10.0.0.1" not in without_candidates(OFFER)
    changed = with_candidate(OFFER, ("127.0.0.1", 7))
    assert candidate(changed) == ("127.0.0.1", 7)
    assert changed.count("candidate:") == 1
    assert changed.endswith("a=x\r\n")


def test_a_detour_needs_an_address_that_it_can_reach() -> None:
    with pytest.raises(RuntimeError, match="no IPv4 host candidate"):
        candidate("a=candidate:1 1 udp 2 ::1 5 typ host\r\n")


FELL_US = 10_000_000


def after_the_fall(*latencies_ms: float) -> list[Sighting]:
    """Seen every 33 ms from the fall on."""
    seen_us = [FELL_US + 33_333 * at for at in range(1, len(latencies_ms) + 1)]
    return [
        sighting(at, seen, round(seen - 1000 * latency))
        for at, (seen, latency) in enumerate(zip(seen_us, latencies_ms, strict=True))
    ]


STEADY = [50.0] * (round(30 * STEADY_SECONDS) + 5)


def test_it_is_back_when_it_stays_back() -> None:
    def seconds(*latencies_ms: float) -> float:
        seen = after_the_fall(*latencies_ms)
        return recovery_seconds(seen, FELL_US, FELL_US + 8_000_000, 30)

    assert seconds(*STEADY) == 0
    assert seconds(*[250.0] * 30, *STEADY) == pytest.approx(1, abs=0.01)
    assert seconds(*[250.0] * 15, 50.0, *[250.0] * 14, *STEADY) == pytest.approx(1, abs=0.01)
    assert seconds(*[250.0] * 30, *STEADY[:30]) == 8, "steady for a second is not enough"
    assert seconds() == 8


def test_a_freeze_is_no_recovery() -> None:
    early, late = after_the_fall(*[50.0] * 5), after_the_fall(*[50.0] * 45, *STEADY)[45:]
    assert recovery_seconds(early + late, FELL_US, FELL_US + 8_000_000, 30) == pytest.approx(
        46 / 30, abs=0.01
    )


@pytest.mark.parametrize(
    "plan",
    [
        Plan(part="latency", way="direct", bitrate=1_000_000),
        Plan(part="latency", way="direct-webrtc", bitrate=1_000_000),
        Plan(part="streams", way="direct", streams=2, every=2, bitrate=1_000_000),
    ],
    ids=str,
)
async def test_the_ends_see_each_other(plan: Plan) -> None:
    addresses = [f"127.0.0.1:{free_pair('127.0.0.1')}" for _ in range(plan.streams)]
    async with running(plan, Entry(sources=addresses, sinks=addresses, pids=[])) as feeds:
        async with asyncio.timeout(20):
            while not all(len(feed.sightings.seen) >= 30 for feed in feeds):
                await asyncio.sleep(0.05)
        for feed in feeds:
            report = feed.report(feed.player.sent_us[0], feed.player.sent_us[-1])
            assert report["pictures"] >= 20
            assert 0 < report["p50_ms"] < 500
            assert 0.5 < report["arrived_share"] <= 1


def test_memory_is_known_by_process() -> None:
    sizes = resident(os.getpid())
    assert next(iter(sizes.values())) > 1_000_000


def test_the_cpu_of_threads_that_have_ended_counts() -> None:
    before = cpu_seconds(os.getpid())
    thread = threading.Thread(target=lambda: sum(range(3_000_000)))
    thread.start()
    thread.join()
    used = cpu_seconds(os.getpid()) - before
    assert used > 0.005
    assert cpu_seconds(os.getpid()) == pytest.approx(time.process_time(), abs=0.05)


def test_a_process_that_is_gone_uses_nothing() -> None:
    with subprocess.Popen(["true"]) as process:
        process.wait()
    assert cpu_seconds(process.pid) == 0.0
