"""The whole sink with records in and packets out."""

from __future__ import annotations

import asyncio
import socket
import time
from pathlib import Path

import av
import pytest

from relay.records import StreamKind, StreamStarted
from rtc import sink
from rtc.packets import parse_rtcp, parse_rtp
from tests.peers import free_port, require
from tests.rtc.sink_fakes import FakeInlet, number_in, picture, sink_side


def _bound() -> tuple[socket.socket, int]:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    sock.bind(("127.0.0.1", 0))
    sock.setblocking(False)
    return sock, sock.getsockname()[1]


def _drain(sock: socket.socket) -> list[bytes]:
    found = []
    while True:
        try:
            found.append(sock.recv(2000))
        except BlockingIOError:
            return found


def depacketize(packets: list[bytes]) -> dict[int, bytes]:
    """H.264 access units by RTP timestamp, in order of arrival; the marker must end each one."""
    units: dict[int, bytes] = {}
    ended: set[int] = set()
    for data in packets:
        packet = parse_rtp(data, 0)
        assert packet is not None
        assert packet.timestamp not in ended, "a packet after the marker"
        if packet.marker:
            ended.add(packet.timestamp)
        body = packet.payload
        kind = body[0] & 31
        out = b""
        if kind == 24:
            position = 1
            while position < len(body):
                size = int.from_bytes(body[position : position + 2], "big")
                out += b"\0\0\0\1" + body[position + 2 : position + 2 + size]
                position += 2 + size
        elif kind == 28:
            start = b"\0\0\0\1" + bytes((body[0] & 0x60 | body[1] & 31,)) if body[1] & 0x80 else b""
            out = start + body[2:]
        else:
            out = b"\0\0\0\1" + body
        units[packet.timestamp] = units.get(packet.timestamp, b"") + out
    assert ended == set(units)
    return units


async def test_rtp_out_carries_every_picture_and_its_description(tmp_path: Path) -> None:
    receiver, port = _bound()
    rtcp, rtcp_port = _bound()
    inlet = FakeInlet()
    table = {"address": f"127.0.0.1:{port}", "rtcp": f"127.0.0.1:{rtcp_port}", "sdp_file": "camera.sdp"}
    side = sink_side({"rtp": table}, tmp_path, inlet=inlet)
    running = asyncio.create_task(sink.run(side))
    inlet.put(StreamStarted(stream="room", kind=StreamKind.VIDEO, epoch=1, frame_rate_milli=30_000))
    packets: list[bytes] = []
    for number in range(12):
        inlet.put(picture(number))
        await asyncio.sleep(0.03)
        packets += _drain(receiver)
    status = side.status()
    inlet.end()
    await asyncio.wait_for(running, 5)
    packets += _drain(receiver)
    units = depacketize(packets)
    decoder = av.CodecContext.create("h264", "r")
    assert isinstance(decoder, av.VideoCodecContext)
    frames = [frame for unit in units.values() for frame in decoder.decode(av.Packet(unit))]
    frames += decoder.decode(None)
    assert [number_in(frame) for frame in frames] == list(range(12))
    assert status["streams"]["room"]["latency"]["total"]["count"] >= 10
    assert status["rtp"]["stream"] == "room"
    reports = [parse_rtcp(data, time.monotonic_ns()) for data in _drain(rtcp)]
    assert any(reports)
    described = (tmp_path / "camera.sdp").read_text()
    assert f"m=video {port} RTP/AVP 96" in described
    assert "sprop-parameter-sets=" in described
    receiver.close()
    rtcp.close()


@pytest.mark.peer
@pytest.mark.parametrize("codec", ["h264", "vp8"])
async def test_ffmpeg_plays_what_the_description_says(tmp_path: Path, codec: str) -> None:
    ffmpeg = require("ffmpeg")
    port = free_port(socket.SOCK_DGRAM) & ~1
    inlet = FakeInlet()
    table = {
        "address": f"127.0.0.1:{port}",
        "codec": codec,
        "sdp_file": "camera.sdp",
        "keyframe_seconds": 0.5,
    }
    side = sink_side({"rtp": table}, tmp_path, inlet=inlet)
    running = asyncio.create_task(sink.run(side))
    inlet.put(picture(0))
    await asyncio.sleep(0.3)
    player = await asyncio.create_subprocess_exec(
        *(ffmpeg, "-v", "error", "-protocol_whitelist", "file,rtp,udp", "-i", str(tmp_path / "camera.sdp")),
        *("-frames:v", "15", "-fps_mode", "passthrough", "-f", "rawvideo", "-pix_fmt", "gray", "-"),
        stdout=asyncio.subprocess.PIPE,
    )

    async def publish() -> None:
        number = 1
        while True:
            inlet.put(picture(number))
            number += 1
            await asyncio.sleep(1 / 30)

    publishing = asyncio.create_task(publish())
    try:
        out, _ = await asyncio.wait_for(player.communicate(), 15)
    finally:
        publishing.cancel()
        inlet.end()
        await asyncio.wait_for(running, 5)
    assert player.returncode == 0
    assert len(out) == 15 * 320 * 240
