"""WHEP, viewed by aiortc: sessions, refusals, keyframes, one encoder for all."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiortc import RTCPeerConnection, RTCSessionDescription
from aiortc.mediastreams import MediaStreamError

from relay.records import StopReason, StreamKind, StreamStopped
from relay.worker import SinkSide
from rtc import sink
from rtc.fanout import Branch, Hub
from tests.rtc.sink_fakes import FakeInlet, number_in, picture, sink_side, tone

TOKEN = "a-token-of-the-viewers"
SDP = {"Content-Type": "application/sdp"}
BEARER = {"Authorization": f"Bearer {TOKEN}"}


class Room:
    """A sink that runs, with a publisher of 30 pictures a second."""

    def __init__(self, side: SinkSide, inlet: FakeInlet) -> None:
        self.side = side
        self.inlet = inlet
        port = side.sockets["whep"][0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.number = 0
        self.publishing = True

    async def publish(self) -> None:
        """Pictures and sound until cancelled."""
        while True:
            if self.publishing:
                self.inlet.put(picture(self.number))
                for part in range(2):
                    self.inlet.put(tone(2 * self.number + part))
                self.number += 1
            await asyncio.sleep(1 / 30)


@contextlib.asynccontextmanager
async def room(tmp_path: Path, **keys: Any) -> AsyncIterator[Room]:
    inlet = FakeInlet()
    side = sink_side({"whep": {"listen": "127.0.0.1:0", **keys}}, tmp_path, inlet=inlet, listen=True)
    ready = asyncio.Event()
    side.ready = ready.set
    running = asyncio.create_task(sink.run(side))
    await ready.wait()
    place = Room(side, inlet)
    publishing = asyncio.create_task(place.publish())
    await asyncio.sleep(0.1)
    try:
        yield place
    finally:
        publishing.cancel()
        side.draining.set()
        await asyncio.wait_for(running, 5)


class Watcher:
    """An aiortc viewer."""

    def __init__(self) -> None:
        self.connection = RTCPeerConnection()
        self.tracks: dict[str, Any] = {}
        self.location = ""

        @self.connection.on("track")
        def _(track: Any) -> None:
            self.tracks[track.kind] = track

    async def offer(self, *kinds: str) -> str:
        for kind in kinds:
            self.connection.addTransceiver(kind, direction="recvonly")
        await self.connection.setLocalDescription(await self.connection.createOffer())
        return str(self.connection.localDescription.sdp)

    async def watch(self, place: Room, *kinds: str, headers: dict[str, str] | None = None) -> None:
        offer = await self.offer(*kinds)
        url = f"{place.url}/whep/room"
        async with (
            aiohttp.ClientSession() as http,
            http.post(url, data=offer, headers=SDP | (headers or {})) as response,
        ):
            assert response.status == 201, await response.text()
            assert response.content_type == "application/sdp"
            self.location = response.headers["Location"]
            self.etag = response.headers["ETag"]
            answer = await response.text()
        await self.connection.setRemoteDescription(RTCSessionDescription(sdp=answer, type="answer"))

    async def numbers(self, count: int) -> list[int]:
        return [number_in(await self.tracks["video"].recv()) for _ in range(count)]


async def test_a_viewer_sees_and_hears(tmp_path: Path) -> None:
    async with room(tmp_path) as place:
        watcher = Watcher()
        await watcher.watch(place, "video", "audio")
        numbers = await asyncio.wait_for(watcher.numbers(10), 5)
        assert numbers == list(range(numbers[0], numbers[0] + 10))
        heard = [await asyncio.wait_for(watcher.tracks["audio"].recv(), 2) for _ in range(5)]
        assert heard[-1].sample_rate == 48_000
        figures = place.side.status()
        viewer = figures["viewers"][0]
        assert viewer["state"] == "connected"
        for dropped in ("sound_dropped", "dropped_sends", "resends_refused", "malformed"):
            assert viewer[dropped] == 0
        assert figures["streams"]["room"]["latency"]["total"]["p50_ms"] < 50
        async with aiohttp.ClientSession() as http, http.delete(place.url + watcher.location) as response:
            assert response.status == 200
        assert place.side.status()["viewers"] == []
        with pytest.raises(MediaStreamError):
            for _ in range(100):
                await asyncio.wait_for(watcher.tracks["video"].recv(), 2)
        await watcher.connection.close()


async def test_six_viewers_share_one_encoder_and_few_keyframes(tmp_path: Path) -> None:
    async with room(tmp_path, codecs=["vp8"]) as place:
        watchers = [Watcher() for _ in range(6)]
        await asyncio.gather(*(watcher.watch(place, "video") for watcher in watchers))
        for watcher in watchers:
            assert len(await asyncio.wait_for(watcher.numbers(3), 10)) == 3
        stream = place.side.status()["streams"]["room"]
        assert stream["receivers"] == 6
        [encoder] = stream["encoders"]
        assert encoder["codec"] == "vp8"
        assert encoder["keyframe_requests"] >= 6
        assert encoder["keyframes"] < 6 + encoder["encoded"] // 9
        await asyncio.gather(*(watcher.connection.close() for watcher in watchers))


async def test_a_viewer_of_a_still_picture_gets_it_as_a_keyframe(tmp_path: Path) -> None:
    async with room(tmp_path) as place:
        first, second = Watcher(), Watcher()
        await first.watch(place, "video")
        await asyncio.wait_for(first.numbers(3), 5)
        place.publishing = False
        await second.watch(place, "video")
        begin = asyncio.get_running_loop().time()
        # aiortc shows a picture only when the next one begins: ask twice.
        for _ in range(2):
            for branch in _branches(place):
                branch.thread.request_keyframe()
            await asyncio.sleep(0.5)
        assert (await asyncio.wait_for(second.numbers(1), 5))[0] == place.number - 1
        assert asyncio.get_running_loop().time() - begin < 2
        await asyncio.gather(first.connection.close(), second.connection.close())


def _branches(place: Room) -> list[Branch]:
    """The encoders of the room, which the sink's status function holds on to."""
    cells = [cell.cell_contents for cell in getattr(place.side.status, "__closure__", ())]
    hub = next(item for item in cells if isinstance(item, Hub))
    return list(hub.streams["room"].branches.values())


REFUSALS: list[tuple[str, str, dict[str, str], str | bytes, int]] = [
    ("POST", "/whep/room", SDP, "", 401),
    ("POST", "/whep/room", SDP | {"Authorization": "Bearer another-token-entirely"}, "", 401),
    ("POST", "/whep/room", SDP | {"Authorization": f"Basic {TOKEN}"}, "", 401),
    ("POST", "/whep/nobody", SDP | BEARER, "", 404),
    ("POST", "/whep/No%20Name", SDP | BEARER, "", 404),
    ("POST", "/whep/gone", SDP | BEARER, "", 409),
    ("POST", "/whep/room", {"Content-Type": "text/plain", "Authorization": f"Bearer {TOKEN}"}, "", 415),
    ("POST", "/whep/room", SDP | BEARER, "", 400),
    ("POST", "/whep/room", SDP | BEARER, "v=0\r\ngarbage", 400),
    ("POST", "/whep/room", SDP | BEARER, b"\xff\xfe", 400),
    ("POST", "/whep/room", SDP | BEARER, "v=0\r\n" * 20_000, 413),
    ("GET", "/whep/room", {}, "", 401),
    ("GET", "/whep/room", BEARER, "", 204),
    ("GET", "/whep/room/nothing", BEARER, "", 404),
    ("PUT", "/whep/room", {}, "", 405),
    ("DELETE", "/whep/room/nothing", BEARER, "", 404),
    ("DELETE", "/whep/room/nothing", {}, "", 401),
    ("PATCH", "/whep/room/nothing", BEARER, "", 404),
    ("OPTIONS", "/whep/room", {"Origin": "https://ward.example"}, "", 204),
    ("POST", "/whep/room", SDP | BEARER | {"Accept": "text/html"}, "", 406),
    ("GET", "/streams", {}, "", 401),
    ("GET", "/", {}, "", 200),
    ("GET", "/streams", BEARER, "", 200),
]


async def test_each_request_has_its_answer(tmp_path: Path) -> None:
    server = {"urls": ["turn:127.0.0.1:9"], "username": "u", "credential": "not for strangers"}
    keys = {"tokens": {"*": TOKEN}, "ice_servers": [server]}
    async with room(tmp_path, **keys) as place, aiohttp.ClientSession() as http:
        place.inlet.put(picture(0, stream="gone"))
        place.inlet.put(
            StreamStopped(stream="gone", kind=StreamKind.VIDEO, epoch=1, reason=StopReason.ENDED, frames=1)
        )
        for method, path, headers, body, status in REFUSALS:
            async with http.request(method, place.url + path, data=body, headers=headers) as response:
                assert response.status == status, (method, path, headers, await response.text())
                assert "Link" not in response.headers
                if status == 401:
                    assert response.headers["WWW-Authenticate"].startswith("Bearer")
                if status == 409:
                    assert response.headers["Retry-After"]
                if method == "OPTIONS":
                    assert response.headers["Access-Control-Allow-Origin"] == "*"
                    assert "POST" in response.headers["Access-Control-Allow-Methods"]
                    assert response.headers["Accept-Post"] == "application/sdp"


async def test_only_named_origins_may_read(tmp_path: Path) -> None:
    async with room(tmp_path, origins=["https://ward.example"]) as place, aiohttp.ClientSession() as http:
        for origin, allowed in (
            ("https://ward.example", "https://ward.example"),
            ("https://evil.example", None),
        ):
            async with http.post(f"{place.url}/whep/nobody", headers={"Origin": origin}) as response:
                assert response.status == 404
                assert response.headers.get("Access-Control-Allow-Origin") == allowed


async def test_a_stream_that_opens_with_its_own_token(tmp_path: Path) -> None:
    tokens = {"room": TOKEN, "other": "the-other-stream's-token"}
    async with room(tmp_path, tokens=tokens) as place, aiohttp.ClientSession() as http:
        for token, status in ((tokens["other"], 403), (TOKEN, 400)):
            headers = SDP | {"Authorization": f"Bearer {token}"}
            async with http.post(f"{place.url}/whep/room", data="v=1", headers=headers) as response:
                assert response.status == status
        async with http.get(f"{place.url}/streams", headers={"Authorization": f"Bearer {TOKEN}"}) as response:
            assert [item["name"] for item in (await response.json())["streams"]] == ["room"]


async def test_limits_and_trickle(tmp_path: Path) -> None:
    async with room(tmp_path, max_sessions=1) as place, aiohttp.ClientSession() as http:
        watcher = Watcher()
        await watcher.watch(place, "video")
        session = place.url + watcher.location
        fragment = (
            "a=ice-ufrag:{}\r\na=ice-pwd:x\r\na=candidate:1 1 udp 2130706431 192.0.2.9 40000 typ host\r\n"
        )
        ufrag = watcher.connection.localDescription.sdp.split("a=ice-ufrag:")[1].split("\r\n")[0]
        kind = {"Content-Type": "application/trickle-ice-sdpfrag"}
        rows = [
            (kind, fragment.format(ufrag), 428),
            (kind | {"If-Match": '"other"'}, fragment.format(ufrag), 412),
            (kind | {"If-Match": "*"}, fragment.format("restarted"), 422),
            (kind | {"If-Match": watcher.etag}, fragment.format("restarted"), 422),
            (kind | {"If-Match": watcher.etag}, "a=candidate:garbage", 400),
            (SDP | {"If-Match": watcher.etag}, fragment.format(ufrag), 415),
            (kind | {"If-Match": watcher.etag}, fragment.format(ufrag), 204),
        ]
        for headers, body, status in rows:
            async with http.patch(session, data=body, headers=headers) as response:
                assert response.status == status, (body, await response.text())
        second = Watcher()
        offer = await second.offer("video")
        async with http.post(f"{place.url}/whep/room", data=offer, headers=SDP) as response:
            assert response.status == 503
            assert response.headers["Retry-After"]
        await asyncio.gather(watcher.connection.close(), second.connection.close())
