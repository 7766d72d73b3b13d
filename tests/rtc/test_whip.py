"""WHIP as a publisher meets it: RFC 9725's answers, and media through ICE, DTLS and SRTP."""

from __future__ import annotations

import asyncio
import re
import socket
import time
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import trustme
from aiortc import RTCConfiguration, RTCPeerConnection, RTCSessionDescription
from aiortc.mediastreams import AudioStreamTrack, VideoStreamTrack
from multidict import CIMultiDictProxy

from relay.errors import MedferryError
from relay.records import StopReason, StreamKind
from tests.rtc.fakes import MemoryOutlet, bound, lane, running, side, until

SDP = {"Content-Type": "application/sdp"}
FRAGMENT = "application/trickle-ice-sdpfrag"


class Rig:
    """A source with a WHIP listener, and an HTTP client."""

    def __init__(self, tmp_path: Path, settings: dict[str, Any] | None = None, **source: Any) -> None:
        self.outlet = MemoryOutlet()
        listener = bound(socket.SOCK_STREAM)
        table = {"listen": "127.0.0.1:8081", **(settings or {})}
        self.side = side(lane(whip=table, **source), self.outlet, tmp_path, {"whip": [listener]})
        self.port: int = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._running = running(self.side)

    async def __aenter__(self) -> Rig:
        await self._running.__aenter__()
        self.http = aiohttp.ClientSession(self.url)
        return self

    async def __aexit__(self, *exc: Any) -> None:
        await self.http.close()
        await self._running.__aexit__(*exc)

    async def ask(
        self, method: str, path: str, data: str = "", **headers: str
    ) -> tuple[int, CIMultiDictProxy[str], str]:
        """One request; status, headers and body of the answer."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        async with self.http.request(method, path, data=data, headers=named) as response:
            return response.status, response.headers, await response.text()

    async def post(self, stream: str, offer: str, **headers: str) -> tuple[int, CIMultiDictProxy[str], str]:
        return await self.ask("POST", f"/whip/{stream}", offer, Content_Type="application/sdp", **headers)

    @property
    def transport(self) -> dict[str, Any]:
        found: dict[str, Any] = self.side.status()["streams"]["room"]["tracks"]["transport"]
        return found


class Publisher:
    """aiortc as a publisher, with a picture and a tone of its own."""

    def __init__(self, *, video: bool = True, audio: bool = True) -> None:
        self.connection = RTCPeerConnection(RTCConfiguration(iceServers=[]))
        if video:
            self.connection.addTrack(VideoStreamTrack())
        if audio:
            self.connection.addTrack(AudioStreamTrack())

    async def offer(self) -> str:
        await self.connection.setLocalDescription(await self.connection.createOffer())
        return str(self.connection.localDescription.sdp)

    async def accept(self, answer: str) -> None:
        await self.connection.setRemoteDescription(RTCSessionDescription(sdp=answer, type="answer"))


async def publish(rig: Rig, stream: str = "room") -> tuple[Publisher, CIMultiDictProxy[str]]:
    publisher = Publisher()
    status, headers, answer = await rig.post(stream, await publisher.offer())
    assert status == 201, answer
    await publisher.accept(answer)
    return publisher, headers


async def test_a_publisher_is_seen_and_heard_until_it_deletes_its_session(tmp_path: Path) -> None:
    async with Rig(tmp_path) as rig:
        publisher, headers = await publish(rig)
        assert headers["Location"].startswith("/whip/room/")
        assert re.fullmatch(r'"[0-9a-f]{16}"', headers["ETag"])
        await until(lambda: len(rig.outlet.pictures) > 5 and len(rig.outlet.sounds) > 5)
        assert {item.kind for item in rig.outlet.started} == {StreamKind.VIDEO, StreamKind.AUDIO}
        assert {(item.width, item.height) for item in rig.outlet.pictures} == {(640, 480)}
        assert rig.transport["dropped_sends"] == 0
        status, _, _ = await rig.ask("DELETE", headers["Location"])
        assert status == 200
        await until(lambda: len(rig.outlet.stopped) == 2)
        status, _, _ = await rig.ask("DELETE", headers["Location"])
        assert status == 404
        await publisher.connection.close()
    assert {item.reason for item in rig.outlet.stopped} == {StopReason.ENDED}
    frames = {item.kind: item.frames for item in rig.outlet.stopped}
    assert frames == {StreamKind.VIDEO: len(rig.outlet.pictures), StreamKind.AUDIO: len(rig.outlet.sounds)}


async def test_a_stream_has_one_publisher_and_is_free_again_when_it_leaves(tmp_path: Path) -> None:
    async with Rig(tmp_path) as rig:
        first, _ = await publish(rig)
        second = Publisher()
        offer = await second.offer()
        status, _, body = await rig.post("room", offer)
        assert (status, "being published" in body) == (409, True)
        await until(lambda: rig.outlet.pictures)
        await first.connection.close()
        await until(lambda: rig.outlet.stopped)
        status, _, _ = await rig.post("room", offer)
        assert status == 201
        await second.connection.close()


async def test_datagrams_from_strangers_change_nothing(tmp_path: Path) -> None:
    async with Rig(tmp_path, {"addresses": ["127.0.0.1"]}) as rig:
        publisher = Publisher()
        _, _, answer = await rig.post("room", await publisher.offer())
        candidate = re.search(r"a=candidate:\S+ 1 udp \d+ (\S+) (\d+) typ host", answer)
        assert candidate is not None
        target = (candidate[1], int(candidate[2]))
        await publisher.accept(answer)
        await until(lambda: rig.outlet.pictures)
        stranger = bound(socket.SOCK_DGRAM)
        for size in (0, 1, 11, 12, 13, 20, 100, 1500, 1501, 9_000, 65_000):
            for first in (0, 1, 22, 64, 0x80, 0xBF, 0xFF):
                stranger.sendto(bytes([first]) * size, target)
            await asyncio.sleep(0.005)
        stranger.close()
        count = len(rig.outlet.pictures)
        await until(lambda: len(rig.outlet.pictures) > count + 10)
        assert rig.transport["state"] == "connected"
        assert rig.transport["refused"]["length"] >= 30
        await publisher.connection.close()


OFFER = """v=0\r
o=- 1 1 IN IP4 127.0.0.1\r
s=-\r
t=0 0\r
a=group:BUNDLE 0\r
m=video 9 UDP/TLS/RTP/SAVPF 96\r
c=IN IP4 0.0.0.0\r
a=mid:0\r
a=sendonly\r
a=rtcp-mux\r
a=ice-ufrag:abcd\r
a=ice-pwd:abcdefghijklmnopqrstuvwx\r
a=fingerprint:sha-256 {fingerprint}\r
a=setup:actpass\r
a=rtpmap:96 H264/90000\r
a=fmtp:96 level-asymmetry-allowed=1;packetization-mode=1;profile-level-id=42e01f\r
""".format(fingerprint=":".join(["AB"] * 32))

REFUSED = {
    "empty": ("", 400),
    "garbage": ("hello", 400),
    "binary": ("v=0\r\n\x00\x01\x02\r\n", 400),
    "no media": ("v=0\r\ns=-\r\n", 400),
    "no rtcp-mux": (OFFER.replace("a=rtcp-mux\r\n", ""), 400),
    "no fingerprint": (re.sub("a=fingerprint.*\r\n", "", OFFER), 400),
    "weak fingerprint": (OFFER.replace("sha-256", "md5"), 400),
    "short password": (OFFER.replace("abcdefghijklmnopqrstuvwx", "abc"), 400),
    "payload type out of range": (OFFER.replace("SAVPF 96", "SAVPF 300"), 400),
    "candidate without end": (OFFER + "a=candidate:1 1 udp\r\n", 400),
    "only unknown codecs": (OFFER.replace("H264", "AV1"), 422),
    "unknown profile": (OFFER.replace("42e01f", "f4001f"), 422),
    "a viewer": (OFFER.replace("sendonly", "recvonly"), 422),
    "too many sections": (OFFER + "m=video 9 UDP/TLS/RTP/SAVPF 96\r\n" * 20, 400),
    "too large": (OFFER + "a=x\r\n" * 30_000, 413),
}


@pytest.fixture
async def rig(tmp_path: Path) -> Any:
    async with Rig(tmp_path, {"addresses": ["127.0.0.1"]}) as made:
        yield made


async def test_bad_offers_are_told_why(rig: Rig) -> None:
    answers = {name: await rig.post("room", offer) for name, (offer, _) in REFUSED.items()}
    assert {name: status for name, (status, _, _) in answers.items()} == {
        name: status for name, (_, status) in REFUSED.items()
    }
    assert {headers["Content-Type"].split(";")[0] for _, headers, _ in answers.values()} == {
        "application/problem+json"
    }
    # Nothing of them is left: the stream is free.
    status, _, _ = await rig.post("room", OFFER)
    assert status == 201


async def test_methods_types_and_names(rig: Rig) -> None:
    assert (await rig.ask("POST", "/whip/room", OFFER, Content_Type="text/plain"))[0] == 415
    assert (await rig.post("room", OFFER, Accept="application/json"))[0] == 406
    assert (await rig.post("No%20Name", OFFER))[0] == 404
    assert (await rig.ask("PUT", "/whip/room/x"))[0] == 405
    assert (await rig.ask("DELETE", "/whip/room/x"))[0] == 404
    # The resources have no representation (RFC 9725 §4.1).
    _, headers, _ = await rig.post("room", OFFER)
    for method in ("GET", "HEAD"):
        for path, status in (("/whip/room", 204), (headers["Location"], 204), ("/whip/room/x", 404)):
            answer, _, body = await rig.ask(method, path)
            assert (method, path, answer) == (method, path, status)
            assert not body or status == 404
    status, headers, _ = await rig.ask("OPTIONS", "/whip/room", Origin="https://clinic.example")
    assert status == 204
    assert headers["Accept-Post"] == "application/sdp"
    assert headers["Access-Control-Allow-Origin"] == "*"
    assert "POST" in headers["Access-Control-Allow-Methods"]
    assert "If-Match" in headers["Access-Control-Allow-Headers"]


async def test_trickle(rig: Rig) -> None:
    _, headers, answer = await rig.post("room", OFFER)
    assert "a=rtcp-mux-only\r\n" in answer
    where, tag = headers["Location"], headers["ETag"]
    candidate = "a=candidate:1 1 udp 2130706431 127.0.0.1 40000 typ host\r\n"
    credentials = "a=ice-ufrag:abcd\r\na=ice-pwd:abcdefghijklmnopqrstuvwx\r\n"
    fragment = f"{credentials}m=video 9 RTP/AVP 0\r\na=mid:0\r\n{candidate}"

    async def patch(body: str, **named: str) -> int:
        return (await rig.ask("PATCH", where, body, **{"Content_Type": FRAGMENT, **named}))[0]

    status, headers, _ = await rig.ask("PATCH", where, fragment, Content_Type=FRAGMENT, If_Match=tag)
    assert (status, "ETag" in headers) == (204, False)
    # Of the same ICE session, whichever way it is named (RFC 9110 §13.1.1).
    assert await patch(fragment, If_Match="*") == 204
    assert await patch(fragment, If_Match=f'"other", {tag}') == 204
    assert await patch(fragment) == 428
    assert await patch(fragment, If_Match='"other"') == 412
    assert await patch(fragment.replace("abcd\r\n", "new1\r\n"), If_Match="*") == 422
    assert await patch(fragment.replace("abcd\r\n", "new1\r\n"), If_Match=tag) == 422
    assert await patch("nonsense", If_Match=tag) == 400
    assert await patch(fragment.replace("40000", "99999"), If_Match=tag) == 400
    assert await patch(fragment, If_Match=tag, Content_Type="application/sdp") == 415
    # What we cannot use, or need no more of, is left aside without a word (§4.3.2).
    for kind in ("1 tcp", "1 ssltcp", "2 udp"):
        assert await patch(fragment.replace("1 udp", kind).replace("40000", "9"), If_Match=tag) == 204
    assert await patch(fragment.replace("127.0.0.1", "0a1b.local"), If_Match=tag) == 204
    many = "".join(candidate.replace("40000", str(port)) for port in range(40_001, 40_041))
    assert await patch(fragment + many, If_Match=tag) == 204
    assert rig.transport["refused"]["candidates"] > 0


async def test_tokens(tmp_path: Path) -> None:
    tokens = {"room": "0123456789abcdef", "*": "fedcba9876543210"}
    async with Rig(tmp_path, {"tokens": tokens, "addresses": ["127.0.0.1"]}) as rig:
        status, headers, _ = await rig.post("room", OFFER)
        assert (status, headers["WWW-Authenticate"]) == (401, 'Bearer realm="media"')
        for wrong in ("wrong", tokens["room"][:-1], "\udcff\udcfe" + tokens["room"][2:]):
            status, headers, _ = await rig.post("room", OFFER, Authorization=f"Bearer {wrong}")
            expected = 'Bearer realm="media", error="invalid_token"'
            assert (status, headers["WWW-Authenticate"]) == (401, expected)
        status, headers, _ = await rig.post("other", OFFER, Authorization=f"Bearer {tokens['room']}")
        assert (status, headers["WWW-Authenticate"].split()[-1]) == (403, 'error="insufficient_scope"')
        status, headers, _ = await rig.post("room", OFFER, Authorization=f"Bearer {tokens['room']}")
        assert status == 201
        assert (await rig.ask("DELETE", headers["Location"]))[0] == 401
        assert (await rig.post("other", OFFER, Authorization=f"Bearer {tokens['*']}"))[0] == 201


async def test_full_is_temporary(tmp_path: Path) -> None:
    async with Rig(tmp_path, {"addresses": ["127.0.0.1"]}, max_streams=1) as rig:
        assert (await rig.post("one", OFFER))[0] == 201
        status, headers, _ = await rig.post("two", OFFER)
        assert (status, headers["Retry-After"]) == (503, "10")


async def test_ports_stay_in_their_range_and_run_out_politely(tmp_path: Path) -> None:
    settings = {"addresses": ["127.0.0.1"], "udp_ports": "41700-41701"}
    async with Rig(tmp_path, settings) as rig:
        answers = [await rig.post(name, OFFER) for name in ("a", "b", "c")]
    assert [status for status, _, _ in answers] == [201, 201, 503]
    ports = {re.search(r"127\.0\.0\.1 (\d+) typ host", body)[1] for _, _, body in answers[:2]}  # type: ignore[index]
    assert ports == {"41700", "41701"}


async def test_ice_servers_are_offered(tmp_path: Path) -> None:
    server = {"urls": ["turn:127.0.0.1:9"], "username": "u", "credential": "p"}
    settings = {"addresses": ["127.0.0.1"], "ice_servers": [{"urls": ["stun:127.0.0.1:9"]}, server]}
    async with (
        Rig(tmp_path, settings) as rig,
        rig.http.post("/whip/room", data=OFFER, headers=SDP) as response,
    ):
        assert response.headers.getall("Link") == [
            '<stun:127.0.0.1:9>; rel="ice-server"',
            '<turn:127.0.0.1:9>; rel="ice-server"; username="u"; credential="p"; credential-type="password"',
        ]
        # A preflight carries no token, so it must not be told any credentials.
        for path in ("/whip/room", response.headers["Location"]):
            _, headers, _ = await rig.ask("OPTIONS", path)
            assert "Link" not in headers


async def test_half_a_body_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rtc.http.BODY_SECONDS", 0.2)
    async with Rig(tmp_path, {"addresses": ["127.0.0.1"]}) as rig:
        reader, writer = await asyncio.open_connection("127.0.0.1", rig.port)
        writer.write(HALF_A_POST)
        answer = await asyncio.wait_for(reader.read(), 5)
        assert answer.startswith(b"HTTP/1.1 408 ")
        writer.close()


async def test_half_a_body_does_not_hold_up_the_drain(tmp_path: Path) -> None:
    async with Rig(tmp_path, {"addresses": ["127.0.0.1"]}) as rig:
        _, writer = await asyncio.open_connection("127.0.0.1", rig.port)
        writer.write(HALF_A_POST)
        # Another request on a connection of its own is answered later than the first was begun.
        assert (await rig.ask("GET", "/whip/room"))[0] == 204
        started = time.monotonic()
    assert time.monotonic() - started < 4
    writer.close()


HALF_A_POST = b"\r\n".join(
    [
        b"POST /whip/room HTTP/1.1",
        b"Host: x",
        b"Content-Type: application/sdp",
        b"Content-Length: 900",
        b"",
        b"v=0",
    ]
)


BAD_BODIES = {
    "gone": HALF_A_POST,
    "no chunk": HALF_A_POST.replace(b"Content-Length: 900", b"Transfer-Encoding: chunked")[:-3]
    + b"nonsense\r\n",
    "no gzip": HALF_A_POST.replace(b": 900", b": 3\r\nContent-Encoding: gzip"),
}


@pytest.mark.parametrize("sent", BAD_BODIES.values(), ids=BAD_BODIES)
async def test_a_body_that_breaks_off_or_is_no_http_leaves_no_trace(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, sent: bytes
) -> None:
    async with Rig(tmp_path, {"addresses": ["127.0.0.1"]}) as rig:
        reader, writer = await asyncio.open_connection("127.0.0.1", rig.port)
        writer.write(sent)
        if sent is HALF_A_POST:
            writer.close()
        else:
            async with asyncio.timeout(5):
                assert b" 400 " in (await reader.read()).splitlines()[0]
            writer.close()
        assert (await rig.ask("GET", "/whip/room"))[0] == 204
    assert not [record for record in caplog.records if record.exc_info]


async def test_a_key_of_another_certificate_is_said_in_words(tmp_path: Path) -> None:
    authority = trustme.CA()
    first, second = authority.issue_cert("localhost"), authority.issue_cert("localhost")
    first.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    second.private_key_pem.write_to_path(tmp_path / "key.pem")
    names = {"tls_certificate": str(tmp_path / "cert.pem"), "tls_key": str(tmp_path / "key.pem")}
    rig = Rig(tmp_path, names)
    with pytest.raises(ExceptionGroup) as raised:
        async with rig:
            raise AssertionError("it started")
    [error] = raised.value.exceptions
    assert isinstance(error, MedferryError)
    assert "certificate and key cannot be used" in str(error)
