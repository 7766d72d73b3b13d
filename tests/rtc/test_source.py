"""A source as a whole: SDP files, cameras that do not answer, HTTPS, budgets, figures, draining."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from pathlib import Path

import aiohttp
import pytest
import trustme

from relay.errors import ConfigError, MedferryError
from relay.records import StopReason
from rtc import rtsp
from tests.interop.media_peers import free_pair
from tests.rtc.coded import coded_pictures, video_packets
from tests.rtc.fakes import MemoryOutlet, bound, lane, running, side, until
from tests.rtc.test_source_rtp import Rig
from tests.rtc.test_whip import OFFER, SDP


def sdp_file(directory: Path, port: int) -> str:
    path = directory / "camera.sdp"
    path.write_text(
        "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=-\nc=IN IP4 127.0.0.1\nt=0 0\n"
        f"m=video {port} RTP/AVP 96\na=rtpmap:96 H264/90000\na=fmtp:96 packetization-mode=1\n"
    )
    return str(path)


async def test_an_sdp_file_describes_a_stream(tmp_path: Path) -> None:
    outlet, port = MemoryOutlet(), free_pair("127.0.0.1")
    settings = lane(sdp=[{"file": sdp_file(tmp_path, port), "stream": "ward"}])
    with bound(socket.SOCK_DGRAM) as sender:
        async with running(side(settings, outlet, tmp_path, {})):
            for packet in video_packets("h264", coded_pictures("h264", 1))[0]:
                sender.sendto(packet, ("127.0.0.1", port))
            await until(lambda: outlet.pictures)
    assert outlet.pictures[0].stream == "ward"


async def test_an_unusable_sdp_file_ends_the_source(tmp_path: Path) -> None:
    settings = lane(sdp=[{"file": str(tmp_path / "missing.sdp"), "stream": "ward"}])
    with pytest.raises(ConfigError, match=r"missing\.sdp"):
        async with running(side(settings, MemoryOutlet(), tmp_path, {})):
            pytest.fail("it runs")


async def test_a_port_that_is_taken_ends_the_source(tmp_path: Path) -> None:
    with bound(socket.SOCK_DGRAM) as other:
        settings = lane(sdp=[{"file": sdp_file(tmp_path, other.getsockname()[1]), "stream": "ward"}])
        with pytest.raises(MedferryError, match="choose others"):
            async with running(side(settings, MemoryOutlet(), tmp_path, {})):
                pytest.fail("it runs")


async def test_a_camera_that_does_not_answer_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rtsp, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(rtsp, "LONGEST_WAIT", 0.02)
    port = free_pair("127.0.0.1")
    settings = lane(rtsp=[{"url": f"rtsp://user:secret@127.0.0.1:{port}/live", "stream": "ward"}])
    made = side(settings, MemoryOutlet(), tmp_path, {})
    async with running(made):
        await until(lambda: made.status()["streams"]["ward"]["tracks"]["rtsp"]["attempts"] >= 3)
        figures = made.status()["streams"]["ward"]
        # Said without a pause, however many attempts follow each other.
        (complaint,) = made.status()["complaints"]
    assert complaint == "camera ward is not shown: Connection refused"
    assert figures["state"] == "waiting"
    assert "refused" in figures["tracks"]["rtsp"]["last_end"]
    assert "secret" not in str(figures)


async def test_whip_over_https(tmp_path: Path) -> None:
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    issued.cert_chain_pems[0].write_to_path(certificate)
    issued.private_key_pem.write_to_path(key)
    listener = bound(socket.SOCK_STREAM)
    table = {
        "listen": "127.0.0.1:8081",
        "addresses": ["127.0.0.1"],
        "tls_certificate": str(certificate),
        "tls_key": str(key),
    }
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    url = f"https://127.0.0.1:{listener.getsockname()[1]}/whip/room"
    async with (
        running(side(lane(whip=table), MemoryOutlet(), tmp_path, {"whip": [listener]})),
        aiohttp.ClientSession() as http,
        http.post(url, data=OFFER, headers=SDP, ssl=trusting) as response,
    ):
        assert response.status == 201


async def test_a_picture_beyond_the_budget_is_a_fault_and_a_smaller_one_is_shown(tmp_path: Path) -> None:
    async with Rig(tmp_path, source={"max_pixels_per_second": 5_000_000}) as rig:
        for packet in video_packets("h264", coded_pictures("h264", 1, 640, 480))[0]:
            rig.send(packet)
        await until(lambda: rig.side.status()["streams"]["camera"].get("faults"))
        assert rig.side.status()["streams"]["camera"]["faults"] == {"budget": 1}
        await rig.send_pictures(video_packets("h264", coded_pictures("h264", 1), seq=9000, timestamp=90_000))
    assert [(item.width, item.height) for item in rig.outlet.pictures] == [(320, 240)]


async def test_silence_stops_the_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rtc.rtp_in.STREAM_SILENCE_NS", 100_000_000)
    monkeypatch.setattr("rtc.rtp_in.REPORT_SECONDS", 0.05)
    async with Rig(tmp_path) as rig:
        await rig.send_pictures(video_packets("h264", coded_pictures("h264", 1)))
        await until(lambda: rig.outlet.stopped)
        assert rig.outlet.stopped[0].reason is StopReason.LOST
        assert rig.side.status()["streams"]["camera"]["state"] == "waiting"


async def test_a_drain_sends_what_waits(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    async with rig:
        await rig.send_pictures(video_packets("h264", coded_pictures("h264", 2)))
        rig.outlet.hold()
        asyncio.get_running_loop().call_later(0.1, rig.outlet.open.set)
    assert [item.reason for item in rig.outlet.stopped] == [StopReason.DRAINED]


async def test_a_drain_says_what_did_not_cross(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rig = Rig(tmp_path)
    rig.side.drain_seconds = 0.2
    caplog.set_level(logging.INFO)
    async with rig:
        await rig.send_pictures(video_packets("h264", coded_pictures("h264", 2)))
        rig.outlet.hold()
    assert any(
        record.getMessage().startswith("the drain is over: ")
        and record.getMessage().endswith(" records did not cross")
        for record in caplog.records
    )


async def test_metrics_name_no_peer(tmp_path: Path) -> None:
    async with Rig(tmp_path) as rig:
        await rig.send_pictures(video_packets("h264", coded_pictures("h264", 3)))
        await until(lambda: b"mailbox_fill" in rig.side.metrics.exposition())
        text = rig.side.metrics.exposition().decode()
    assert "medferry_latency_seconds" in text
    assert "127.0.0.1" not in text
