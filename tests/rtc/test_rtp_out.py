"""Plain RTP out: its description, its choice of stream, what it makes of hostile RTCP."""

from __future__ import annotations

import asyncio
import socket
import time
from pathlib import Path

import pytest
from aiortc import rtp

from relay.link import Arrival
from relay.records import Record, StopReason, StreamKind, StreamStarted, StreamStopped
from rtc import rtp_out
from rtc.fanout import Hub
from rtc.rtp_out import BURST, RtpOut, describe
from rtc.settings import RtpOutSettings
from tests.rtc.sink_fakes import picture, sink_side

SETS = (bytes.fromhex("6742c01f"), bytes.fromhex("68ce3c80"))


def _arrival(record: Record) -> Arrival:
    now_ns = time.monotonic_ns()
    return Arrival(record, now_ns, now_ns)


def _stopped(stream: str, epoch: int = 1) -> Record:
    kind, reason = StreamKind.VIDEO, StopReason.ENDED
    return StreamStopped(stream=stream, kind=kind, epoch=epoch, reason=reason, frames=1)


@pytest.mark.parametrize(
    ("table", "host", "lines"),
    [
        (
            {"address": "192.0.2.5:5006"},
            "192.0.2.5",
            [
                "c=IN IP4 192.0.2.5",
                "m=video 5006 RTP/AVP 96",
                "a=rtpmap:96 H264/90000",
                "a=fmtp:96 packetization-mode=1;profile-level-id=42c01f;"
                "sprop-parameter-sets=Z0LAHw==,aM48gA==",
            ],
        ),
        (
            {"address": "[2001:db8::5]:5006", "codec": "vp8", "rtcp": "[2001:db8::6]:7000"},
            "2001:db8::5",
            ["c=IN IP6 2001:db8::5", "a=rtpmap:96 VP8/90000", "a=rtcp:7000 IN IP6 2001:db8::6"],
        ),
        (
            {"address": "192.0.2.5:5006", "audio": {"address": "192.0.2.5:5008"}},
            "192.0.2.5",
            ["m=audio 5008 RTP/AVP 111", "a=rtpmap:111 opus/48000/2"],
        ),
    ],
)
def test_description(table: dict[str, object], host: str, lines: list[str]) -> None:
    settings = RtpOutSettings.model_validate(table)
    text = describe(settings, host=host, rtcp_host="2001:db8::6", sound_host=host, session=(7, 1), sets=SETS)
    assert text.endswith("\r\n")
    assert text.startswith("v=0\r\no=- 7 1 IN IP")
    for line in lines:
        assert line in text.split("\r\n")


async def test_the_first_stream_until_it_stops_then_the_next(tmp_path: Path) -> None:
    side = sink_side({"rtp": {"address": "127.0.0.1:9"}}, tmp_path)
    hub = Hub(side.metrics, max_streams=4, max_pixels_per_second=10**9)
    out = RtpOut(RtpOutSettings(address="127.0.0.1:9"), hub, side)
    hub.appeared = out.appeared
    await out.open()
    for record, taken in (
        (picture(0, stream="first"), "first"),
        (picture(0, stream="second"), "first"),
        (_stopped("first"), "first"),
        (StreamStarted(stream="first", kind=StreamKind.VIDEO, epoch=2), "first"),
        (_stopped("first", epoch=2), "first"),
        (_stopped("second"), "first"),
        (picture(1, stream="second"), "second"),
    ):
        hub.deliver(_arrival(record))
        assert out.figures()["stream"] == taken
    out.close()
    await hub.close()


async def test_more_streams_than_the_limit_are_refused(tmp_path: Path) -> None:
    side = sink_side({"rtp": {"address": "127.0.0.1:9"}}, tmp_path)
    hub = Hub(side.metrics, max_streams=2, max_pixels_per_second=10**9)
    for name in ("a", "b", "c", "c"):
        hub.deliver(_arrival(picture(0, stream=name)))
    assert sorted(hub.streams) == ["a", "b"]
    assert hub.refused == 2
    hub.deliver(_arrival(_stopped("a")))
    hub.deliver(_arrival(picture(0, stream="c")))
    assert sorted(hub.streams) == ["b", "c"]
    await hub.close()


async def test_feedback_is_heeded_and_garbage_is_counted(tmp_path: Path) -> None:
    rtcp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    rtcp.bind(("127.0.0.1", 0))
    rtcp.setblocking(False)
    address = f"127.0.0.1:{rtcp.getsockname()[1]}"
    side = sink_side({"rtp": {"address": "127.0.0.1:9", "rtcp": address}}, tmp_path)
    hub = Hub(side.metrics, max_streams=2, max_pixels_per_second=10**9)
    out = RtpOut(RtpOutSettings(address="127.0.0.1:9", rtcp=address), hub, side)
    hub.appeared = out.appeared
    await out.open()
    hub.deliver(_arrival(picture(0)))
    async with asyncio.timeout(5):
        report, sender = await asyncio.get_running_loop().sock_recvfrom(rtcp, 1500)
    ssrc = int.from_bytes(report[4:8], "big")
    [branch] = hub.streams["room"].branches.values()
    assert out._end is not None and out._end.pacer.burst == BURST
    before = branch.thread.gate.requests
    for data in (
        b"",
        b"\xff" * 40,
        b"\x81\xce\x00\x02",
        bytes(rtp.RtcpPsfbPacket(fmt=rtp.RTCP_PSFB_APP, ssrc=1, media_ssrc=0, fci=b"REMB\xff\xff\xff\xff")),
        bytes(rtp.RtcpRtpfbPacket(fmt=rtp.RTCP_RTPFB_NACK, ssrc=1, media_ssrc=ssrc, lost=[1, 2, 3])),
        bytes(rtp.RtcpPsfbPacket(fmt=rtp.RTCP_PSFB_PLI, ssrc=1, media_ssrc=ssrc)),
    ):
        rtcp.sendto(data, sender)
    async with asyncio.timeout(5):
        while branch.thread.gate.requests == before:
            await asyncio.sleep(0.01)
    assert branch.thread.gate.requests == before + 1
    assert out.refused_rtcp == 3
    out.close()
    await hub.close()
    rtcp.close()


async def test_a_receiver_is_looked_for_until_its_name_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(rtp_out, "FIND_SECONDS", 0.01)
    loop = asyncio.get_running_loop()
    answers = iter([socket.gaierror(socket.EAI_NONAME, "Name or service not known")] * 3)
    asked: list[str] = []

    async def resolve(host: str, port: int, **_: object) -> list[object]:
        asked.append(host)
        if (failure := next(answers, None)) is not None:
            raise failure
        return [(socket.AF_INET, socket.SOCK_DGRAM, 0, "", ("127.0.0.1", port))]

    monkeypatch.setattr(loop, "getaddrinfo", resolve)
    side = sink_side({"rtp": {"address": "127.0.0.1:9"}}, tmp_path)
    hub = Hub(side.metrics, max_streams=2, max_pixels_per_second=10**9)
    out = RtpOut(RtpOutSettings(address="monitor.example:5006"), hub, side)
    hub.appeared = out.appeared
    hub.deliver(_arrival(picture(0, stream="room")))
    assert (out.figures()["stream"], out.sdp) == (None, "")
    await out.open()
    assert asked == ["monitor.example"] * 5
    assert caplog.text.count("cannot send RTP to monitor.example:5006: Name or service not known") == 1
    assert out.trouble == ""
    assert out.figures()["stream"] == "room"
    assert "c=IN IP4 127.0.0.1" in out.sdp
    out.close()
    await hub.close()


async def test_a_receiver_that_is_not_found_is_complained_about(tmp_path: Path) -> None:
    side = sink_side({"rtp": {"address": "127.0.0.1:9"}}, tmp_path)
    hub = Hub(side.metrics, max_streams=2, max_pixels_per_second=10**9)
    out = RtpOut(RtpOutSettings(address="no-such-host.invalid:5006"), hub, side)
    opening = asyncio.create_task(out.open())
    async with asyncio.timeout(10):
        while not out.trouble:
            await asyncio.sleep(0.01)
    assert "no-such-host.invalid:5006" in out.trouble
    assert "check the address" in out.trouble
    opening.cancel()
    out.close()
    await hub.close()
