"""WHEP: WebRTC viewers over HTTP (draft-ietf-wish-whep; sessions as in RFC 9725).

    POST   /whep/{stream}        offer in, answer out: 201, Location, ETag, Link
    PATCH  /whep/{stream}/{id}   trickled candidates: 204
    DELETE /whep/{stream}/{id}   ends the session: 200
    GET    /streams              what can be watched, with latency figures

| status | when                                                                                |
|--------|-------------------------------------------------------------------------------------|
| 400    | the body is not SDP, or SDP that WebRTC does not allow                              |
| 401    | a token is needed and there is none; 403 where it opens another stream              |
| 404    | no such stream, no such session                                                     |
| 406    | the client would not take an SDP answer                                             |
| 409    | the stream is known and its publisher is away; Retry-After says when to ask again   |
| 412    | If-Match names another ICE session; 428 where it is missing                         |
| 413    | the body is too large                                                               |
| 415    | the body's type is not the one for this method                                      |
| 422    | nothing of the offer can be sent; an ICE restart                                    |
| 503    | all sessions are taken, or no port is free; Retry-After                             |

Never here: who publishes. Tokens of viewers are this side's own.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterable

from aiohttp import web
from aiohttp.web_routedef import AbstractRouteDef

from relay.errors import MedferryError, PeerError
from relay.records import is_stream_name
from relay.worker import SinkSide, Status
from rtc.fanout import Hub, Stream
from rtc.http import (
    FRAGMENT_TYPE,
    RETRY_SECONDS,
    SDP_TYPE,
    Problem,
    check_accept,
    check_if_match,
    check_token,
    cross_origin,
    ice_settings,
    link_headers,
    preflight,
    read_body,
    read_fragment,
    tls_context,
)
from rtc.offer import MAX_SDP_BYTES, read_offer
from rtc.peer import PeerState
from rtc.settings import ANY_STREAM, WhepSettings
from rtc.viewer import Viewer

RETRY = {"Retry-After": str(RETRY_SECONDS)}


class Whep:
    """The ``[lane.sink.whep]`` table at work."""

    def __init__(self, settings: WhepSettings, hub: Hub, side: SinkSide) -> None:
        self.viewers: dict[str, Viewer] = {}
        self._settings = settings
        self._hub = hub
        self._side = side
        self._ice = ice_settings(settings, lab=side.lane.lab)
        self._answering = 0
        self._known: set[str] = {name for name in settings.tokens if name != ANY_STREAM}

    def __repr__(self) -> str:
        return f"<Whep viewers={len(self.viewers)}>"

    async def start(self, extra: Iterable[AbstractRouteDef] = ()) -> web.AppRunner:
        """Serve on the side's ``whep`` sockets; `extra` are the pages beside it.

        Raises:
            MedferryError: Certificate and key do not fit or cannot be read.
        """
        application = web.Application(client_max_size=MAX_SDP_BYTES)
        application.on_response_prepare.append(cross_origin(self._settings))
        application.add_routes(
            [
                web.post("/whep/{stream}", self._post),
                web.patch("/whep/{stream}/{id}", self._patch),
                web.delete("/whep/{stream}/{id}", self._delete),
                web.get("/streams", self._streams),
                web.options("/whep/{stream}", self._options),
                web.options("/whep/{stream}/{id}", self._options),
                web.options("/streams", self._options),
                *extra,
            ]
        )
        runner = web.AppRunner(application, access_log=None, shutdown_timeout=1.0)
        await runner.setup()
        tls = self._tls()
        for sock in self._side.sockets.get("whep", []):
            await web.SockSite(runner, sock, ssl_context=tls).start()
        return runner

    def _tls(self) -> ssl.SSLContext | None:
        settings, side = self._settings, self._side
        if settings.tls_certificate is None or settings.tls_key is None:
            return None
        try:
            return tls_context(side.file(settings.tls_certificate), side.file(settings.tls_key))
        except (OSError, ssl.SSLError) as error:
            reason = error.strerror or str(error)
            what = f"WHEP: certificate and key cannot be used: {reason}: check both files"
            raise MedferryError(what) from None

    def _count(self, outcome: str) -> None:
        self._side.metrics.count("whep_requests", "WHEP requests by outcome", outcome=outcome)

    def _stream(self, name: str) -> Stream:
        stream = self._hub.streams.get(name)
        if stream is not None and stream.live:
            return stream
        if stream is not None or name in self._known or name in self._hub.past:
            self._count("away")
            raise Problem(409, "the stream is not live now: ask again later", RETRY)
        self._count("unknown")
        raise Problem(404, "no such stream")

    async def _options(self, request: web.Request) -> web.Response:
        if request.path == "/streams":
            return preflight("GET, OPTIONS")
        if "id" in request.match_info:
            response = preflight("PATCH, DELETE, OPTIONS")
            response.headers["Accept-Patch"] = FRAGMENT_TYPE
            return response
        response = preflight("POST, OPTIONS", SDP_TYPE)
        self._add_links(response)
        return response

    def _add_links(self, response: web.Response) -> None:
        for link in link_headers(self._settings.ice_servers):
            response.headers.add("Link", link)

    async def _post(self, request: web.Request) -> web.Response:
        name = request.match_info["stream"]
        check_token(request, self._settings, name)
        if not is_stream_name(name):
            raise Problem(404, "no such stream")
        stream = self._stream(name)
        check_accept(request)
        text = await read_body(request, SDP_TYPE)
        if self._side.draining.is_set() or len(self.viewers) + self._answering >= self._settings.max_sessions:
            self._count("full")
            raise Problem(503, "all sessions are taken: ask again later", RETRY)
        self._answering += 1
        try:
            viewer, answer = await self._answer(stream, text)
        finally:
            self._answering -= 1
        self._count("created")
        response = web.Response(status=201, text=answer, content_type=SDP_TYPE, charset=None)
        response.headers["Location"] = f"/whep/{name}/{viewer.id}"
        response.headers["ETag"] = viewer.etag
        response.headers["Accept-Patch"] = FRAGMENT_TYPE
        self._add_links(response)
        return response

    async def _answer(self, stream: Stream, text: str) -> tuple[Viewer, str]:
        viewer = Viewer(stream, self._hub, self._settings, self._ice, self._ended)
        try:
            offer = read_offer(text)
            answer = await viewer.answer(offer)
        except PeerError as error:
            self._count(error.reason)
            raise Problem(422 if error.reason == "codec" else 400, str(error)) from None
        except MedferryError as error:
            self._side.log.error("WHEP: %s", error)
            self._count("no_port")
            raise Problem(503, "no port is free: ask again later", RETRY) from None
        if viewer.peer.state is not PeerState.ENDED:
            self.viewers[viewer.id] = viewer
        self._side.log.info("viewer of %s: %s", stream.name, viewer.codec or "sound")
        return viewer, answer

    def _ended(self, viewer: Viewer) -> None:
        if self.viewers.pop(viewer.id, None) is not None and viewer.peer.ended is not None:
            reason = viewer.peer.ended.value
            self._side.metrics.count("whep_ended", "WHEP sessions ended by reason", reason=reason)
            self._side.log.info("viewer of %s ended: %s", viewer.stream.name, reason)

    def _viewer(self, request: web.Request) -> Viewer:
        name = request.match_info["stream"]
        check_token(request, self._settings, name)
        viewer = self.viewers.get(request.match_info["id"])
        if viewer is None or viewer.stream.name != name:
            raise Problem(404, "no such session")
        return viewer

    async def _patch(self, request: web.Request) -> web.Response:
        viewer = self._viewer(request)
        text = await read_body(request, FRAGMENT_TYPE)
        condition = check_if_match(request, viewer.etag)
        try:
            fragment = read_fragment(text)
            if condition == "*" or fragment.ufrag != viewer.peer.remote_ufrag:
                raise Problem(422, "ICE restarts are not supported: make a new session")
            for candidate in fragment.candidates:
                await viewer.peer.add_candidate(candidate)
        except PeerError as error:
            raise Problem(400, str(error)) from None
        return web.Response(status=204, headers={"ETag": viewer.etag})

    async def _delete(self, request: web.Request) -> web.Response:
        await self._viewer(request).peer.close()
        return web.Response()

    async def _streams(self, request: web.Request) -> web.Response:
        """Names and figures of the streams that the caller's token opens."""
        opened = {name for name in self._hub.streams if self._opens(request, name)}
        if not opened and not any(
            self._opens(request, name) for name in self._settings.tokens or [ANY_STREAM]
        ):
            raise Problem(401, "send a token as Authorization: Bearer", {"WWW-Authenticate": "Bearer"})
        shown = [
            {"name": name, **figures, "viewers": self.watching(name)}
            for name, figures in self._hub.figures().items()
            if name in opened
        ]
        return web.json_response({"streams": shown}, headers={"Cache-Control": "no-store"})

    def _opens(self, request: web.Request, stream: str) -> bool:
        try:
            check_token(request, self._settings, stream)
        except Problem:
            return False
        return True

    def watching(self, name: str) -> int:
        """How many viewers a stream has."""
        return sum(viewer.stream.name == name for viewer in self.viewers.values())

    def figures(self) -> list[Status]:
        """Of each viewer, for status."""
        return [viewer.figures() for viewer in self.viewers.values()]

    async def close(self) -> None:
        """End all sessions, telling each viewer."""
        for viewer in list(self.viewers.values()):
            await viewer.peer.close()
