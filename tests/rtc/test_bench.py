"""The benchmark's figures are what its sightings say, and its two ends see every picture of each other."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import socket
from pathlib import Path

import numpy as np
import pytest

from relay.errors import MedferryError
from rtc.bench import Options, bench_rtp, bench_webrtc, direct_rtp
from rtc.bench_ends import RtpReceiver, RtpSender
from rtc.bench_peer import BenchPeer
from rtc.bench_report import Report, Sighting, evaluate, lines, percentile, plot
from rtc.camera import Camera, Size
from rtc.settings import VideoCodec
from rtc.stamp import read
from tests.netproxy import Impairment, UdpProxy

SMALL = Size(width=320, height=180, rate=30)


def sightings(*latencies_ms: float, start: int = 0, gap_ms: int = 33) -> list[Sighting]:
    return [
        Sighting(
            counter=start + index,
            painted_us=1_000_000 + 1000 * gap_ms * index,
            seen_us=1_000_000 + 1000 * gap_ms * index + round(1000 * latency),
        )
        for index, latency in enumerate(latencies_ms)
    ]


@pytest.mark.parametrize(
    ("share", "value"), [(0.0, 1.0), (0.5, 50.0), (0.95, 95.0), (0.99, 99.0), (0.991, 100.0), (1.0, 100.0)]
)
def test_percentiles_are_of_the_values_themselves(share: float, value: float) -> None:
    assert percentile([float(number) for number in range(1, 101)], share) == value


def test_percentile_of_nothing() -> None:
    assert math.isnan(percentile([], 0.5))


def test_latency_and_jitter() -> None:
    report = evaluate("x", sightings(10, 12, 10, 30), range(4))
    assert (report.p50_ms, report.max_ms, report.pictures, report.dropped) == (10, 30, 4, 0)
    assert report.jitter_ms == pytest.approx((2 + 2 + 20) / 3, abs=0.001)
    assert report.freezes == 0


def test_drops_are_what_was_painted_and_never_seen() -> None:
    seen = sightings(10, 10, 10, 10)
    report = evaluate("x", [seen[0], seen[3]], range(4))
    assert (report.pictures, report.dropped, report.sent) == (2, 2, 4)
    assert report.longest_gap_ms == 99


def test_a_picture_that_is_seen_twice_counts_once_and_early() -> None:
    once = sightings(10)
    again = [Sighting(counter=0, painted_us=once[0].painted_us, seen_us=once[0].seen_us + 70_000)]
    report = evaluate("x", once + again, range(1))
    assert (report.pictures, report.max_ms) == (1, 10)


def test_pictures_outside_of_the_measured_time_do_not_count() -> None:
    report = evaluate("x", sightings(500, 10, 10), range(1, 3))
    assert (report.pictures, report.max_ms) == (2, 10)


def test_a_freeze_is_a_gap_above_half_a_second() -> None:
    early, late = sightings(10, 10), sightings(10, start=40, gap_ms=33)
    stuck = [Sighting(counter=40, painted_us=late[0].painted_us, seen_us=early[-1].seen_us + 501_000)]
    assert evaluate("x", early + stuck, range(41)).freezes == 1


@pytest.mark.parametrize(
    ("seen", "gap_ms"),
    [([], 2000), ([30], 1000), ([0], 1967), ([59], 1967), (list(range(60)), 33)],
)
def test_what_is_not_seen_at_the_edges_is_a_gap(seen: list[int], gap_ms: float) -> None:
    sightings_ = [
        Sighting(counter=number, painted_us=33_333 * number, seen_us=33_333 * number + 5000)
        for number in seen
    ]
    assert evaluate("x", sightings_, range(60)).longest_gap_ms == pytest.approx(gap_ms, abs=1)


@pytest.mark.parametrize(
    ("gap_ms", "frozen", "late"),
    [(33, 0, 0), (66, 0, 0), (100, 0, 0.0167), (182, 0, 0.0577), (183.4, 0.0917, 0.0584)],
)
def test_frozen_time_is_as_browsers_count_it(gap_ms: float, frozen: float, late: float) -> None:
    """Of two seconds at 30 pictures a second with one interval of `gap_ms` in the middle."""
    step = 1e6 / 30
    seen = [
        Sighting(
            counter=number,
            painted_us=round(number * step),
            seen_us=round(number * step + (1000 * gap_ms - step) * (number >= 30)),
        )
        for number in range(60)
    ]
    report = evaluate("x", seen, range(60))
    assert (report.frozen_share, report.late_share) == pytest.approx((frozen, late), abs=0.0001)


async def test_a_receiver_may_decode_one_keyframe_interval_of_two() -> None:
    receiver = RtpReceiver("127.0.0.1:0", "h264", every=2)
    sender = RtpSender(receiver.address, "h264", 500_000, SMALL.rate, keyframe_seconds=0.5, mux=True)
    camera = Camera(SMALL)
    await camera.run(2.0, sender.offer)
    await sender.close()
    await receiver.close()
    sightings = receiver.sightings
    assert len(sightings.whole_ns) >= 50
    assert 15 <= len(sightings.seen) <= 45
    breaks = sum(b.counter - a.counter > 5 for a, b in itertools.pairwise(sightings.seen))
    assert 1 <= breaks <= 3, "what is decoded is decoded whole"


def test_order() -> None:
    seen = sightings(10, 10, 10)
    assert evaluate("x", [seen[1], seen[0], seen[2]], range(3)).out_of_order == 1


def test_the_report_can_be_read_by_people_and_scripts(tmp_path: Path) -> None:
    report = evaluate("relay", sightings(10, 12, 11), range(3))
    assert json.loads(json.dumps(report.as_json()))["p50_ms"] == 11
    assert dict(lines(report))["pictures"] == "3 of 3"
    plot([report], str(tmp_path / "plot.png"))
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_camera_stamps_what_it_shows() -> None:
    camera = Camera(SMALL)
    for counter in (0, 7):
        frame = camera.picture(counter)
        stamp = read(np.frombuffer(frame.planes[0], np.uint8).reshape(180, 320))
        assert stamp is not None
        assert (stamp.counter, stamp.time_us) == (counter, frame.captured_ns // 1000)
    assert camera.painted == [0, 7]


@pytest.mark.parametrize("codec", ["h264", "vp8"])
async def test_the_ends_see_each_other(codec: VideoCodec) -> None:
    report = await direct_rtp(
        Options(
            source="", sink="", seconds=1.0, warm_up_seconds=0.5, codec=codec, size=SMALL, bitrate=500_000
        )
    )
    assert report.sent >= 10
    assert report.pictures >= report.sent - 2
    assert 0 < report.p50_ms < 500
    assert report.name == "direct"


async def test_ipv6_and_loss_are_repaired_between_the_ends() -> None:
    async with UdpProxy(target=("::1", 0), seed=5) as nothing:
        free = nothing.address[1]
    async with UdpProxy(target=("::1", free), forward=Impairment(drop=0.03), seed=5) as proxy:
        report = await bench_rtp(
            Options(
                source=f"[::1]:{proxy.address[1]}",
                sink=f"[::1]:{free}",
                seconds=2,
                size=SMALL,
                bitrate=500_000,
            )
        )
        assert proxy.sent.dropped > 0
    assert report.pictures >= 0.8 * report.sent
    assert report.freezes == 0


async def test_nothing_that_comes_is_an_error_with_a_cure() -> None:
    options = Options(source="127.0.0.1:9", sink="127.0.0.1:0", seconds=0.1, warm_up_seconds=0.1, size=SMALL)
    with pytest.raises(MedferryError, match=r"no picture came .* one lane"):
        await bench_rtp(options)


async def test_an_endpoint_that_is_not_there() -> None:
    options = Options(source="http://127.0.0.1:9/whip/x", sink="http://127.0.0.1:9/whep/x", size=SMALL)
    with pytest.raises(MedferryError, match="is the relay running"):
        await bench_webrtc(options)


async def test_an_endpoint_that_does_not_answer_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("rtc.bench_peer.CONNECT_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = "http://{}:{}/whip/x".format(*silent.getsockname())
        peer = BenchPeer(url, None)
        with pytest.raises(MedferryError, match=r"whip/x: no answer within 0.1 s"):
            await peer.post("v=0")
        peer._location = url
        async with asyncio.timeout(5):
            await peer.end()
    assert peer.connection.connectionState == "closed"
    assert "could not be told: " in caplog.text


def test_a_report_is_a_value() -> None:
    one = evaluate("x", sightings(1), range(1))
    assert isinstance(one, Report)
    assert "latencies_ms" not in repr(one)
