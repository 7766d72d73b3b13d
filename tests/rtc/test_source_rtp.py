"""Plain RTP in, as a source runs it: UDP datagrams in, records out."""

from __future__ import annotations

import asyncio
import itertools
import socket
import struct
from pathlib import Path
from typing import Any

import pytest

from relay.records import StopReason, StreamKind
from tests.rtc.coded import coded_pictures, coded_sound, rtp, video_packets
from tests.rtc.fakes import MemoryOutlet, bound, lane, running, side, until


class Rig:
    """A source with one RTP stream, and sockets to send to it."""

    def __init__(
        self,
        tmp_path: Path,
        host: str = "127.0.0.1",
        settings: dict[str, Any] | None = None,
        source: dict[str, Any] | None = None,
    ) -> None:
        self.outlet = MemoryOutlet()
        self.ports = {
            name: bound(socket.SOCK_DGRAM, host)
            for name in ("rtp", "rtp-rtcp", "rtp-audio", "rtp-audio-rtcp")
        }
        rtp_table: dict[str, Any] = {"listen": "127.0.0.1:5004", "audio": {"listen": "127.0.0.1:5104"}}
        rtp_table |= settings or {}
        self.addresses = {name: sock.getsockname() for name, sock in self.ports.items()}
        sockets = {name: [sock] for name, sock in self.ports.items()}
        self.side = side(lane(rtp=rtp_table, **(source or {})), self.outlet, tmp_path, sockets)
        self._running = running(self.side)
        self.sender = bound(socket.SOCK_DGRAM, host)
        self.stranger = bound(socket.SOCK_DGRAM, host)

    def send(self, data: bytes, port: str = "rtp", sock: socket.socket | None = None) -> None:
        (sock or self.sender).sendto(data, self.addresses[port])

    async def send_pictures(self, packets: list[list[bytes]]) -> None:
        """Send picture by picture, each when the one before has crossed: none is replaced by a newer one."""
        for picture in packets:
            count = len(self.outlet.pictures)
            for packet in picture:
                self.send(packet)
            await until(lambda count=count: len(self.outlet.pictures) > count)  # type: ignore[misc]

    async def send_blindly(self, packets: list[list[bytes]]) -> None:
        """Send everything, a picture every few milliseconds."""
        for picture in packets:
            for packet in picture:
                self.send(packet)
            await asyncio.sleep(0.005)

    async def __aenter__(self) -> Rig:
        await self._running.__aenter__()
        return self

    async def __aexit__(self, *exc: Any) -> None:
        await self._running.__aexit__(*exc)
        for sock in (self.sender, self.stranger, *self.ports.values()):
            sock.close()

    @property
    def figures(self) -> dict[str, dict[str, object]]:
        tracks: dict[str, dict[str, object]] = self.side.status()["streams"]["camera"]["tracks"]
        return tracks


@pytest.mark.parametrize("codec", ["h264", "vp8"])
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_every_picture_becomes_a_record(tmp_path: Path, codec: str, host: str) -> None:
    async with Rig(tmp_path, host, {"codec": codec}) as rig:
        await rig.send_pictures(video_packets(codec, coded_pictures(codec, 10)))
        await until(lambda: len(rig.outlet.pictures) == 10)
    pictures = rig.outlet.pictures
    assert [item.kind for item in rig.outlet.started] == [StreamKind.VIDEO]
    assert [item.seq for item in pictures] == list(range(10))
    assert {(item.width, item.height, item.stream) for item in pictures} == {(320, 240, "camera")}
    media = [item.media_ns for item in pictures]
    assert [after - before for before, after in itertools.pairwise(media)] == pytest.approx(
        [33_333_333] * 9, abs=2
    )
    assert all(item.captured_ns < item.decoded_ns for item in pictures)
    assert [item.refreshed for item in pictures] == [True] + [False] * 9
    # The grey rises from picture to picture, so these are the right pictures in the right order.
    means = [sum(bytes(item.planes[0])) / len(item.planes[0]) for item in pictures]
    assert means == sorted(means)
    assert [(item.reason, item.frames) for item in rig.outlet.stopped] == [(StopReason.DRAINED, 10)]


async def test_the_last_picture_does_not_wait_for_the_next(tmp_path: Path) -> None:
    async with Rig(tmp_path) as rig:
        await rig.send_pictures(video_packets("h264", coded_pictures("h264", 5)))
        await until(lambda: len(rig.outlet.pictures) == 5)
        delays = [
            sent - record.captured_ns for record, sent in rig.outlet.records if record in rig.outlet.pictures
        ]
    assert min(delays) < 15_000_000


async def test_sound_becomes_pcm(tmp_path: Path) -> None:
    async with Rig(tmp_path) as rig:
        for index, packet in enumerate(coded_sound(10)):
            rig.send(rtp(packet, seq=index, timestamp=960 * index, payload_type=111), "rtp-audio")
            await asyncio.sleep(0.002)
        await until(lambda: len(rig.outlet.sounds) == 10)
    assert {(len(item.samples), item.rate, item.channels) for item in rig.outlet.sounds} == {
        (3840, 48_000, 2)
    }
    assert any(rig.outlet.sounds[5].samples)


async def test_strangers_are_counted_and_change_nothing(tmp_path: Path) -> None:
    packets = video_packets("h264", coded_pictures("h264", 12))
    async with Rig(tmp_path) as rig:
        await rig.send_pictures(packets[:6])
        for size in (0, 1, 11, 12, 1500, 1501, 9000, 65_000):
            rig.send(bytes([0x80]) * size, sock=rig.stranger)
            rig.send(bytes([0x80]) * size, "rtp-rtcp", sock=rig.stranger)
            # The test's own kernel buffers are small; a flood that overflows them proves nothing.
            await asyncio.sleep(0.01)
        for ssrc in range(200):
            rig.send(rtp(b"x" * 20, seq=ssrc, timestamp=0, ssrc=ssrc), sock=rig.stranger)
        await asyncio.sleep(0.05)
        await rig.send_pictures(packets[6:])
        await until(lambda: len(rig.outlet.pictures) == 12)
        dropped = rig.figures["video"]["dropped"]
        assert isinstance(dropped, dict)
        assert dropped["source"] >= 200
        assert dropped["length"] >= 8


async def test_a_flood_of_sources_from_the_sender_itself_changes_nothing(tmp_path: Path) -> None:
    packets = video_packets("h264", coded_pictures("h264", 12))
    async with Rig(tmp_path) as rig:
        await rig.send_pictures(packets[:6])
        for ssrc in range(200):
            rig.send(rtp(b"x" * 20, seq=ssrc, timestamp=0, ssrc=ssrc))
        await asyncio.sleep(0.05)
        await rig.send_pictures(packets[6:])
        await until(lambda: len(rig.outlet.pictures) == 12)
        assert rig.figures["video"]["foreign"] == 200


async def test_only_allowed_senders_are_heard(tmp_path: Path) -> None:
    async with Rig(tmp_path, settings={"from": ["192.0.2.0/24"]}) as rig:
        await rig.send_blindly(video_packets("h264", coded_pictures("h264", 3)))
        await until(lambda: rig.figures["video"]["dropped"])
        assert rig.figures["video"]["dropped"] == {
            "source": sum(map(len, video_packets("h264", coded_pictures("h264", 3))))
        }
    assert rig.outlet.records == []


def sender_report(ssrc: int, ntp: int, timestamp: int) -> bytes:
    return struct.pack("!BBHIQIII", 0x80, 200, 6, ssrc, ntp, timestamp, 1, 1)


async def test_goodbye_ends_the_stream_and_a_new_one_has_a_higher_epoch(tmp_path: Path) -> None:
    pictures = coded_pictures("h264", 4)
    async with Rig(tmp_path) as rig:
        await rig.send_pictures(video_packets("h264", pictures))
        await until(lambda: len(rig.outlet.pictures) == 4)
        rig.send(struct.pack("!BBHI", 0x81, 203, 1, 0x1234) + bytes(4), "rtp-rtcp")
        rig.send(struct.pack("!BBHI", 0x81, 203, 1, 0x1234), "rtp-rtcp")
        rig.send(struct.pack("!BBHIBB2s", 0x81, 203, 2, 0x1234, 1, 97, b"\0\0"), "rtp-rtcp")
        await until(lambda: rig.outlet.stopped)
        assert rig.outlet.stopped[0].reason is StopReason.ENDED
        await rig.send_pictures(video_packets("h264", pictures, seq=50_000, timestamp=7, ssrc=99))
        await until(lambda: len(rig.outlet.pictures) == 8)
    epochs = [item.epoch for item in rig.outlet.started]
    assert epochs[0] < epochs[1]


async def test_reports_and_requests_go_where_the_senders_rtcp_comes_from(tmp_path: Path) -> None:
    packets = video_packets("h264", coded_pictures("h264", 6, 640, 480))
    rtcp = bound(socket.SOCK_DGRAM)
    loop = asyncio.get_running_loop()
    async with Rig(tmp_path) as rig:
        await rig.send_pictures(packets[:2])
        rig.send(sender_report(0x1234, 1 << 60, 0), "rtp-rtcp", sock=rtcp)
        await until(lambda: len(rig.outlet.pictures) == 2)
        lost = packets[2].pop(0)
        await rig.send_blindly(packets[2:])
        async with asyncio.timeout(5):
            kinds: set[int] = set()
            while not {201, 205} <= kinds:
                kinds.add((await loop.sock_recv(rtcp, 1500))[1])
        assert lost
    rtcp.close()
