"""WHIP: WebRTC publishers over HTTP (RFC 9725).

    POST   /whip/{stream}            offer in, 201 with answer, Location, ETag, Link
    PATCH  /whip/{stream}/{session}  trickled candidates (If-Match: the ETag); ICE restarts are answered 501
    DELETE /whip/{stream}/{session}  the end
    OPTIONS on both                  CORS, and what POST accepts

A stream has one publisher at a time (409), a source a limited number (503 with Retry-After). The session's
resource is a capability: its name cannot be guessed, and the token is asked for as well.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from aiohttp import web
from aiohttp.web_routedef import AbstractRouteDef

from relay.errors import MedferryError, PeerError
from relay.records import StopReason, is_stream_name
from relay.worker import Side
from rtc import http, packets
from rtc.clock import SenderClock
from rtc.http import Problem
from rtc.ice import IceSettings
from rtc.offer import DIRECTIONS, AnswerMedia, Codec, Offer, OfferedMedia, read_offer
from rtc.peer import Peer, PeerEnd, PeerState
from rtc.publication import Publication, Stage
from rtc.settings import AUDIO_CLOCK, VIDEO_CLOCK, WhipSettings
from rtc.track import AudioTrack, Track, VideoTrack

REPORT_SECONDS = 1.0
"""Between two receiver reports of a session, each with the bitrate that it may use."""

FIRST_REPORT_SECONDS = 0.1
"""The same until all media have begun: browsers believe a first REMB within two seconds, and start high."""

H264_PROFILES = frozenset({"42", "4d", "64"})
"""profile_idc of baseline, main and high, as profile-level-id writes them (RFC 6184 §8.1)."""

H264_LEVEL = "33"
"""Level 5.1, what we decode; said where the offer allows levels to differ by direction."""

FEEDBACK = frozenset({"nack", "nack pli", "ccm fir", "goog-remb"})
"""RTCP feedback that we send, of what is offered."""

STOP_REASONS = {
    PeerEnd.CLOSED: StopReason.ENDED,
    PeerEnd.LEFT: StopReason.ENDED,
    PeerEnd.LOST: StopReason.LOST,
    PeerEnd.FAILED: StopReason.LOST,
}

REFUSALS = {"busy": 409, "full": 503, "sdp": 400, "candidate": 400, "candidates": 400, "codec": 422}
"""HTTP status by the reason of a peer's fault."""

log = logging.getLogger("medferry.rtc")


def _is_opus(codec: Codec) -> bool:
    return codec.name == "opus" and codec.clock == AUDIO_CLOCK


def _is_h264(codec: Codec) -> bool:
    return (
        codec.name == "h264"
        and codec.clock == VIDEO_CLOCK
        and codec.fmtp.get("packetization-mode", "0") in ("0", "1")
        and codec.fmtp.get("profile-level-id", "42e01f")[:2].lower() in H264_PROFILES
    )


def _is_vp8(codec: Codec) -> bool:
    return codec.name == "vp8" and codec.clock == VIDEO_CLOCK


ACCEPTS: dict[str, Callable[[Codec], bool]] = {"h264": _is_h264, "vp8": _is_vp8, "opus": _is_opus}


def _fmtp(codec: Codec) -> Mapping[str, str]:
    """What the answer says about a codec's parameters."""
    if codec.name == "h264":
        profile = codec.fmtp.get("profile-level-id", "42e01f")
        asymmetric = codec.fmtp.get("level-asymmetry-allowed") == "1"
        return {
            "level-asymmetry-allowed": "1" if asymmetric else "0",
            "packetization-mode": codec.fmtp.get("packetization-mode", "0"),
            "profile-level-id": profile[:4] + H264_LEVEL if asymmetric else profile,
        }
    if codec.name == "opus":
        return {"minptime": "10", "useinbandfec": "1", "stereo": "1"}
    return codec.fmtp


def choose(media: OfferedMedia, wanted: Iterable[str]) -> tuple[Codec, ...]:
    """The codec of a media section that we take, and its retransmissions (RFC 4588); empty for none.

    Args:
        media: A section of the offer.
        wanted: Codec names, the most wanted first.
    """
    sends = DIRECTIONS[media.direction] in ("recvonly", "sendrecv")
    if media.rejected or not sends or not media.protocol.startswith("UDP/TLS/RTP/SAVP"):
        return ()
    for name in wanted:
        # H.264 in single NAL units (mode 0) is a last resort: it limits a slice to a packet.
        fitting = sorted(
            filter(ACCEPTS[name], media.codecs),
            key=lambda codec: name == "h264" and codec.fmtp.get("packetization-mode", "0") == "0",
        )
        if fitting:
            chosen = _answered(fitting[0])
            again = [codec for codec in media.codecs if _repeats(codec, chosen)]
            return (chosen, *map(_answered, again[:1]))
    return ()


def _repeats(codec: Codec, chosen: Codec) -> bool:
    return codec.name == "rtx" and codec.fmtp.get("apt") == str(chosen.payload_type)


def _answered(codec: Codec) -> Codec:
    return Codec(
        payload_type=codec.payload_type,
        name=codec.name,
        clock=codec.clock,
        channels=codec.channels,
        fmtp=_fmtp(codec),
        feedback=tuple(item for item in codec.feedback if item in FEEDBACK),
    )


def plan(offer: Offer, video: Iterable[str]) -> list[AnswerMedia]:
    """What to answer: the first section of video and the first of sound that we can take.

    Raises:
        PeerError: ``codec``: there is nothing to take.
    """
    wanted: dict[str, Iterable[str]] = {"video": tuple(video), "audio": ("opus",)}
    answers = []
    for media in offer.media:
        codecs = choose(media, wanted[media.kind]) if media.kind in wanted else ()
        if codecs:
            del wanted[media.kind]
        answers.append(AnswerMedia(codecs=codecs, direction="recvonly" if codecs else "inactive"))
    if not any(answer.codecs for answer in answers):
        raise PeerError("codec", "offer H.264 (baseline, main, high) or VP8 to send, and Opus for sound")
    return answers


class WhipSession:
    """One publisher. Its end ends the stream."""

    def __init__(self, publication: Publication, settings: WhipSettings, ice: IceSettings) -> None:
        self.id = secrets.token_urlsafe(16)
        self.tag = f'"{secrets.token_hex(8)}"'
        """Entity tag of the ICE session (RFC 9725 §4.3.1)."""
        self.publication = publication
        self.peer = Peer(ice, self)
        self.tracks: dict[int, Track] = {}
        """By payload type."""
        self.unknown = 0
        """Packets of no payload type of the answer, or malformed."""
        self._settings = settings
        self._repeats: dict[int, int] = {}
        """Payload type of retransmissions to that of what they repeat."""
        self._reporter: asyncio.Task[None] | None = None
        self.watcher: asyncio.Task[None] | None = None
        """The server's task that waits for the session's end."""

    def __repr__(self) -> str:
        return f"<WhipSession {self.publication.name} {self.peer!r}>"

    async def answer(self, offer: Offer) -> str:
        """The answer to a publisher's offer.

        Raises:
            PeerError: The offer has nothing for us.
            MedferryError: No socket could be opened.
        """
        answers = plan(offer, self._settings.codecs)
        text = await self.peer.answer(offer, answers)
        sender = SenderClock()
        for answer in answers:
            if answer.codecs:
                self._add_track(answer.codecs, sender)
        return text

    def _add_track(self, codecs: tuple[Codec, ...], sender: SenderClock) -> None:
        codec, *repeats = codecs
        track: Track
        if codec.name == "opus":
            track = AudioTrack(self.publication, sender=sender, send=self.peer.send_rtcp)
        else:
            track = VideoTrack(
                self.publication, codec=codec.name, sender=sender, send=self.peer.send_rtcp, trusting=True
            )
        self.tracks[codec.payload_type] = track
        for item in repeats:
            self._repeats[item.payload_type] = codec.payload_type

    def rtp_received(self, packet: bytes, arrival_ns: int) -> None:
        """A packet of a publisher: to the track of its payload type."""
        parsed = packets.parse_rtp(packet, arrival_ns)
        if parsed is None:
            self.unknown += 1
            return
        original = self._repeats.get(parsed.payload_type)
        if original is not None:
            ssrc = self.tracks[original].ssrc
            parsed = packets.unwrap_rtx(parsed, ssrc, original) if ssrc is not None else None
            if parsed is None:
                return
        track = self.tracks.get(parsed.payload_type)
        if track is None:
            self.unknown += 1
            return
        track.receive(parsed)

    def rtcp_received(self, packet: bytes, arrival_ns: int) -> None:
        """Sender reports set the clocks; a goodbye lets another SSRC follow."""
        for report in packets.parse_rtcp(packet, arrival_ns) or ():
            for track in self.tracks.values():
                if isinstance(report, packets.SenderReport):
                    track.report(report)
                elif track.ssrc in report.ssrcs:
                    track.goodbye()

    def peer_changed(self, state: PeerState) -> None:
        """Connected: begin to report. Ended: stop the stream."""
        if state is PeerState.CONNECTED:
            log.info(
                "stream %s: publisher connected", self.publication.name, extra={"event": "whip_connected"}
            )
            self._reporter = asyncio.create_task(self._report(), name="whip reports")
        elif state is PeerState.ENDED:
            self._stop()

    def _stop(self, reason: StopReason | None = None) -> None:
        if self._reporter is not None:
            self._reporter.cancel()
        for track in self.tracks.values():
            track.close()
        end = self.peer.ended or PeerEnd.CLOSED
        if not self.publication.stopped:
            text = "stream %s: publisher %s"
            log.info(text, self.publication.name, end.value, extra={"event": "whip_ended"})
        self.publication.stop(reason or STOP_REASONS[end])

    async def close(self, reason: StopReason = StopReason.ENDED) -> None:
        """End the session and the stream."""
        self._stop(reason)
        await self.peer.close()

    async def _report(self) -> None:
        """Receiver reports, and the bitrate that the publisher may use, at once and then each second."""
        while True:
            now_ns = time.monotonic_ns()
            for track in self.tracks.values():
                self._report_track(track, now_ns)
            known = all(track.ssrc is not None for track in self.tracks.values())
            await asyncio.sleep(REPORT_SECONDS if known else FIRST_REPORT_SECONDS)

    def _report_track(self, track: Track, now_ns: int) -> None:
        block = track.report_block(now_ns)
        message = packets.receiver_report(track.own_ssrc, self.peer.cname, [block] if block else [])
        if isinstance(track, VideoTrack):
            track.set_rtt(self.peer.rtt_ns)
            if track.ssrc is not None:
                message += packets.max_bitrate(track.own_ssrc, track.ssrc, self._settings.max_bitrate)
        self.peer.send_rtcp(message)

    def status(self) -> dict[str, Any]:
        """Figures of the session's tracks and transport."""
        rtt_ns = self.peer.rtt_ns
        found: dict[str, Any] = {
            "audio" if isinstance(track, AudioTrack) else "video": track.status()
            for track in self.tracks.values()
        }
        found["transport"] = {
            "state": self.peer.state.value,
            "rtt_ms": None if rtt_ns is None else round(rtt_ns / 1e6, 2),
            "refused": self.peer.refused,
            "unauthentic": self.peer.unauthentic,
            "unknown": self.unknown,
        }
        return found


class WhipServer:
    """The HTTP service of a lane's publishers."""

    def __init__(self, stage: Stage, settings: WhipSettings, *, lab: bool, side: Side) -> None:
        self._stage = stage
        self._settings = settings
        self._ice = http.ice_settings(settings, lab=lab)
        self._side = side
        self._runner: web.AppRunner | None = None
        self._draining = False
        self.sessions: dict[str, WhipSession] = {}

    def application(self, extra: Iterable[AbstractRouteDef] = ()) -> web.Application:
        """The aiohttp application; `extra` are the pages beside it."""
        application = web.Application()
        application.on_response_prepare.append(http.cross_origin(self._settings))
        application.add_routes(
            [
                web.post("/whip/{stream}", self._post),
                web.options("/whip/{stream}", self._options_endpoint),
                web.patch("/whip/{stream}/{session}", self._patch),
                web.delete("/whip/{stream}/{session}", self._delete),
                web.options("/whip/{stream}/{session}", self._options_session),
                *extra,
            ]
        )
        return application

    async def start(self, extra: Iterable[AbstractRouteDef] = ()) -> None:
        """Serve on the side's ``whip`` sockets."""
        settings = self._settings
        context = None
        if settings.tls_certificate is not None and settings.tls_key is not None:
            certificate, key = (self._side.file(p) for p in (settings.tls_certificate, settings.tls_key))
            context = http.tls_context(certificate, key)
        self._runner = web.AppRunner(self.application(extra), access_log=None)
        await self._runner.setup()
        for sock in self._side.sockets.get("whip", []):
            await web.SockSite(self._runner, sock, ssl_context=context).start()

    async def stop(self) -> None:
        """Refuse new publishers, end those that are there, close the listener."""
        self._draining = True
        for session in list(self.sessions.values()):
            await session.close(StopReason.DRAINED)
        if self._runner is not None:
            await self._runner.cleanup()

    def _authorize(self, request: web.Request) -> str:
        stream = request.match_info["stream"]
        if not is_stream_name(stream):
            raise Problem(404, "a stream's name has 1 to 32 of a-z, 0-9 and inner hyphens")
        http.check_token(request, self._settings, stream)
        return stream

    def _session(self, request: web.Request) -> WhipSession:
        stream = self._authorize(request)
        session = self.sessions.get(request.match_info["session"])
        if session is None or session.publication.name != stream:
            raise Problem(404, "there is no such session, or it has ended")
        return session

    async def _post(self, request: web.Request) -> web.Response:
        stream = self._authorize(request)
        http.check_accept(request)
        text = await http.read_body(request, http.SDP_TYPE)
        if self._draining or len(self.sessions) >= self._settings.max_sessions:
            raise Problem(503, "no room for another publisher now", _retry())
        try:
            offer = read_offer(text)
            plan(offer, self._settings.codecs)
            publication = self._stage.open(stream)
        except PeerError as error:
            raise self._problem(stream, error) from None
        session = WhipSession(publication, self._settings, self._ice)
        self.sessions[session.id] = session
        try:
            answer = await session.answer(offer)
        except PeerError as error:
            await self._discard(session)
            raise self._problem(stream, error) from None
        except MedferryError as error:
            await self._discard(session)
            log.error("%s", error)
            raise Problem(503, "no UDP port is free for another session", _retry()) from None
        session.watcher = asyncio.create_task(self._forget(session), name="whip session")
        response = web.Response(status=201, text=answer, content_type=http.SDP_TYPE)
        response.headers["Location"] = f"/whip/{stream}/{session.id}"
        response.headers["ETag"] = session.tag
        response.headers["Accept-Patch"] = http.FRAGMENT_TYPE
        for link in http.link_headers(self._settings.ice_servers):
            response.headers.add("Link", link)
        return response

    def _problem(self, stream: str, error: PeerError) -> Problem:
        status = REFUSALS.get(error.reason, 400)
        log.info("stream %s refused: %s", stream, error, extra={"event": "whip_refused", "status": status})
        return Problem(status, str(error), _retry() if status == 503 else None)

    async def _discard(self, session: WhipSession) -> None:
        self.sessions.pop(session.id, None)
        await session.close()

    async def _forget(self, session: WhipSession) -> None:
        await session.peer.wait_ended()
        self.sessions.pop(session.id, None)

    async def _patch(self, request: web.Request) -> web.Response:
        session = self._session(request)
        condition = http.check_if_match(request, session.tag)
        text = await http.read_body(request, http.FRAGMENT_TYPE)
        try:
            fragment = http.read_fragment(text)
            if condition == "*" or fragment.ufrag != session.peer.remote_ufrag:
                raise Problem(501, "ICE restarts are not supported: publish anew")
            for candidate in fragment.candidates:
                await session.peer.add_candidate(candidate)
        except PeerError as error:
            raise Problem(400, str(error)) from None
        return web.Response(status=204, headers={"ETag": session.tag})

    async def _delete(self, request: web.Request) -> web.Response:
        session = self._session(request)
        await self._discard(session)
        return web.Response(status=200)

    async def _options_endpoint(self, _: web.Request) -> web.Response:
        return http.preflight("OPTIONS, POST", accept_post=http.SDP_TYPE)

    async def _options_session(self, _: web.Request) -> web.Response:
        return http.preflight("DELETE, OPTIONS, PATCH")

    def tracks(self) -> dict[str, dict[str, Any]]:
        """Figures of each session, by stream."""
        return {session.publication.name: session.status() for session in self.sessions.values()}

    def status(self) -> dict[str, Any]:
        """Figures of the service."""
        return {"sessions": len(self.sessions), "most_sessions": self._settings.max_sessions}


def _retry() -> dict[str, str]:
    return {"Retry-After": str(http.RETRY_SECONDS)}
