"""WHIP and WHEP as HTTP services: all that is the same whichever way the media go (RFC 9725, WHEP draft -03).

    POST    /{kind}/{stream}        offer in, answer out: 201, Location, ETag, Link
    GET     on both                 204: the resources are there and have no representation (§4.1)
    PATCH   /{kind}/{stream}/{id}   trickled candidates: 204
    DELETE  /{kind}/{stream}/{id}   ends the session: 200
    OPTIONS on both                 CORS, and what POST accepts

| status | when                                                                                |
|--------|-------------------------------------------------------------------------------------|
| 400    | the body is not SDP, or SDP that WebRTC does not allow                              |
| 401    | a token is needed and there is none, or one that opens nothing                      |
| 403    | the token opens another stream                                                      |
| 404    | no such stream, no such session                                                     |
| 406    | the client would not take an SDP answer                                             |
| 408    | the body did not come in time                                                       |
| 409    | the stream has a publisher already; WHEP: it has none now, and Retry-After          |
| 412    | If-Match names another ICE session; 428 where it is missing                         |
| 413    | the body is too large                                                               |
| 415    | the body's type is not the one for this method                                      |
| 422    | nothing of the offer can be taken; an ICE restart (§4.3.1: not supported)           |
| 503    | all sessions are taken, or no port is free; Retry-After                             |

ICE servers, and their credentials, are told in the 201 only. A session's resource is a capability: its name
cannot be guessed, and the token is asked for as well.
"""

from __future__ import annotations

import logging
import ssl
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Generic, Literal, Protocol, TypeVar

from aiohttp import web
from aiohttp.web_routedef import AbstractRouteDef

from relay.errors import MedferryError, PeerError
from relay.records import is_stream_name
from relay.web import MEDIA_LIMITS, WebServer
from relay.worker import Side
from rtc import http
from rtc.http import Problem
from rtc.offer import Offer, read_offer
from rtc.peer import Peer
from rtc.settings import WebRtcSettings

REFUSALS = {
    "away": 409,
    "busy": 409,
    "candidate": 400,
    "codec": 422,
    "full": 503,
    "port": 503,
    "sdp": 400,
    "unknown": 404,
}
"""HTTP status by the reason of a `PeerError`."""

PASSING = frozenset({"away", "full", "port"})
"""Reasons that pass: the client is told when to ask again."""

log = logging.getLogger("medferry.rtc")


class Session(Protocol):
    """A publisher or a viewer."""

    id: str
    """The last part of its resource's path."""
    tag: str
    """Entity tag of the ICE session (RFC 9725 §4.3.1), quoted as HTTP has it."""
    peer: Peer

    @property
    def stream_name(self) -> str:
        """The stream that it is of."""

    async def answer(self, offer: Offer) -> str:
        """The SDP answer; the session connects from then on.

        Raises:
            PeerError: The offer has nothing for us.
            MedferryError: No socket could be opened.
        """

    async def close(self) -> None:
        """End it, telling the other side."""


S = TypeVar("S", bound=Session)


class SessionService(ABC, Generic[S]):
    """The HTTP service of one ``whip`` or ``whep`` table."""

    def __init__(self, kind: Literal["whip", "whep"], settings: WebRtcSettings, side: Side) -> None:
        self.kind = kind
        self.settings = settings
        self.side = side
        self.ice = http.ice_settings(settings, lab=side.lane.lab)
        self.sessions: dict[str, S] = {}
        """By id, from the offer on. `max_sessions` at most."""
        self._server: WebServer | None = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} sessions={len(self.sessions)}>"

    @abstractmethod
    def begin(self, stream: str, offer: Offer) -> S:
        """A session that has not answered yet. It calls `ended` at its end.

        Raises:
            PeerError: The stream or the offer does not allow one.
        """

    def check_stream(self, stream: str) -> None:
        """Whether there can be sessions of this stream, before its offer is read; WHIP takes any name.

        Raises:
            PeerError: ``unknown`` or ``away``.
        """

    async def end(self, session: S) -> None:
        """End a session because the service stops."""
        await session.close()

    def extra_routes(self) -> list[web.RouteDef]:
        """What is served beside the sessions."""
        return []

    async def start(self, pages: Iterable[AbstractRouteDef] = ()) -> None:
        """Serve on the side's sockets of this kind; `pages` are served beside.

        Raises:
            MedferryError: Certificate and key do not fit or cannot be read.
        """
        tls = self._tls()
        application = web.Application()
        application.on_response_prepare.append(http.cross_origin(self.settings))
        endpoint, session = f"/{self.kind}/{{stream}}", f"/{self.kind}/{{stream}}/{{id}}"
        application.add_routes(
            [
                web.post(endpoint, self._post),
                web.get(endpoint, self._get_endpoint),
                web.options(endpoint, self._options_endpoint),
                web.patch(session, self._patch),
                web.delete(session, self._delete),
                web.get(session, self._get_session),
                web.options(session, self._options_session),
                *self.extra_routes(),
                *pages,
            ]
        )
        self._server = WebServer(self.kind, application, MEDIA_LIMITS, self.side.metrics)
        await self._server.start(self.side.sockets.get(self.kind, []), tls)

    async def stop(self) -> None:
        """End the sessions that are there, close the listener. New ones are refused once the side drains."""
        for session in list(self.sessions.values()):
            await self.end(session)
        if self._server is not None:
            await self._server.stop()

    def _tls(self) -> ssl.SSLContext | None:
        settings, side = self.settings, self.side
        if settings.tls_certificate is None or settings.tls_key is None:
            return None
        try:
            return http.tls_context(side.file(settings.tls_certificate), side.file(settings.tls_key))
        except OSError as error:
            reason = error.strerror or str(error)
            what = f"{self.kind}: certificate and key cannot be used: {reason}: check both files"
            raise MedferryError(what) from None

    def _authorize(self, request: web.Request) -> str:
        stream = request.match_info["stream"]
        if not is_stream_name(stream):
            raise Problem(404, "a stream's name has 1 to 32 of a-z, 0-9 and inner hyphens")
        http.check_token(request, self.settings, stream)
        return stream

    def _session(self, request: web.Request) -> S:
        stream = self._authorize(request)
        session = self.sessions.get(request.match_info["id"])
        if session is None or session.stream_name != stream:
            raise Problem(404, "there is no such session, or it has ended")
        return session

    async def _post(self, request: web.Request) -> web.Response:
        stream = self._authorize(request)
        try:
            self.check_stream(stream)
            http.check_accept(request)
            text = await http.read_body(request, http.SDP_TYPE)
            if self.side.draining.is_set() or len(self.sessions) >= self.settings.max_sessions:
                raise PeerError("full", "all sessions are taken: ask again later")
            session, answer = await self._answer(stream, text)
        except PeerError as error:
            raise self._refusal(stream, error) from None
        self._count("created")
        headers = {
            "Location": f"/{self.kind}/{stream}/{session.id}",
            "ETag": session.tag,
            "Accept-Patch": http.FRAGMENT_TYPE,
        }
        response = web.Response(
            status=201, text=answer, content_type=http.SDP_TYPE, charset=None, headers=headers
        )
        for link in http.link_headers(self.settings.ice_servers):
            response.headers.add("Link", link)
        return response

    async def _answer(self, stream: str, text: str) -> tuple[S, str]:
        offer = read_offer(text)
        session = self.begin(stream, offer)
        self.sessions[session.id] = session
        try:
            return session, await session.answer(offer)
        except MedferryError as error:
            self.sessions.pop(session.id, None)
            await session.close()
            if isinstance(error, PeerError):
                raise
            log.error("stream %s: %s", stream, error, extra={"event": f"{self.kind}_no_port"})
            raise PeerError("port", "no port is free for another session: ask again later") from None

    def _refusal(self, stream: str, error: PeerError) -> Problem:
        self._count(error.reason)
        status = REFUSALS[error.reason]
        extra = {"event": f"{self.kind}_refused", "status": status}
        log.info("stream %s refused: %s", stream, error, extra=extra)
        return Problem(status, str(error), http.RETRY if error.reason in PASSING else None)

    def _count(self, outcome: str) -> None:
        name, about = f"{self.kind}_requests", f"{self.kind.upper()} requests by outcome"
        self.side.metrics.count(name, about, outcome=outcome)

    def ended(self, session: S) -> None:
        """A session has ended, by whichever side."""
        end = session.peer.ended
        if self.sessions.pop(session.id, None) is None or end is None:
            return
        name, about = f"{self.kind}_ended", f"{self.kind.upper()} sessions ended by reason"
        self.side.metrics.count(name, about, reason=end.value)
        log.info("%r has ended: %s", session, end.value, extra={"event": f"{self.kind}_ended"})

    async def _patch(self, request: web.Request) -> web.Response:
        session = self._session(request)
        http.check_if_match(request, session.tag)
        text = await http.read_body(request, http.FRAGMENT_TYPE)
        try:
            fragment = http.read_fragment(text)
            if fragment.ufrag != session.peer.remote_ufrag:
                raise Problem(422, "ICE restarts are not supported: make a new session")
            for candidate in fragment.candidates:
                await session.peer.add_candidate(candidate)
        except PeerError as error:
            raise Problem(REFUSALS[error.reason], str(error)) from None
        # Without an ETag: the ICE session is the same (§4.3.2).
        return web.Response(status=204)

    async def _delete(self, request: web.Request) -> web.Response:
        await self._session(request).close()
        return web.Response()

    async def _get_endpoint(self, request: web.Request) -> web.Response:
        self._authorize(request)
        return web.Response(status=204)

    async def _get_session(self, request: web.Request) -> web.Response:
        self._session(request)
        return web.Response(status=204)

    async def _options_endpoint(self, _: web.Request) -> web.Response:
        return http.preflight("GET, HEAD, OPTIONS, POST", accept_post=http.SDP_TYPE)

    async def _options_session(self, _: web.Request) -> web.Response:
        return http.preflight("DELETE, GET, HEAD, OPTIONS, PATCH")
