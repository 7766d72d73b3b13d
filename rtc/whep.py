"""WHEP: WebRTC viewers over HTTP (draft-ietf-wish-whep; sessions as in RFC 9725).

    POST   /whep/{stream}        offer in, answer out: 201, Location, ETag, Link
    PATCH  /whep/{stream}/{id}   trickled candidates: 204
    DELETE /whep/{stream}/{id}   ends the session: 200
    GET    /streams              what can be watched, with latency figures

| status | when                                                                                |
|--------|-------------------------------------------------------------------------------------|
| 400    | the body is not SDP, or SDP that WebRTC does not allow                              |
| 401    | a token is needed and there is none, or another one                                 |
| 404    | no such stream, no such session                                                     |
| 409    | the stream is known and its publisher is away; Retry-After says when to ask again   |
| 412    | If-Match names another ICE session; 428 where it is missing                         |
| 413    | the body is too large                                                               |
| 415    | the body's type is not the one for this method                                      |
| 422    | nothing of the offer can be sent; an ICE restart                                    |
| 503    | all sessions are taken, or no port is free; Retry-After                             |

Never here: who publishes. Tokens of viewers are this side's own.
"""

from __future__ import annotations

import hmac
import ssl
from collections.abc import Awaitable, Callable, Iterable

from aiohttp import web
from aiohttp.web_routedef import AbstractRouteDef

from relay.config import split_address
from relay.errors import MedferryError, PeerError
from relay.records import is_stream_name
from relay.worker import SinkSide, Status
from rtc.fanout import Hub, Stream
from rtc.ice import IceSettings
from rtc.offer import MAX_SDP_BYTES, read_offer
from rtc.peer import PeerState
from rtc.settings import ANY_STREAM, IceServer, WhepSettings, split_ports
from rtc.viewer import Viewer

SDP = "application/sdp"
FRAGMENT = "application/trickle-ice-sdpfrag"

RETRY_SECONDS = "5"
"""For viewers who come when all sessions are taken or the publisher is away."""

PREFLIGHT_SECONDS = "86400"
"""How long a browser may remember a preflight's answer."""

MAX_FRAGMENT_LINES = 200
"""Of one trickle PATCH."""

ALLOWED_HEADERS = "Authorization, Content-Type, If-Match"
EXPOSED_HEADERS = "Location, ETag, Link, Accept-Patch, Retry-After, WWW-Authenticate"

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def ice_settings(settings: WhepSettings, *, lab: bool) -> IceSettings:
    """Where ICE works, from the table's keys; one STUN and one TURN server are used."""
    urls = [(url, server) for server in settings.ice_servers for url in server.urls]
    stun = next((_server_address(url) for url, _ in urls if url.startswith("stun:")), None)
    turn = next(((url, server) for url, server in urls if url.startswith("turn")), None)
    return IceSettings(
        addresses=settings.addresses,
        ports=split_ports(settings.udp_ports) if settings.udp_ports else None,
        loopback=lab,
        stun=stun,
        turn=_server_address(turn[0]) if turn else None,
        turn_tls=bool(turn and turn[0].startswith("turns:")),
        turn_transport="tcp"
        if turn and ("transport=tcp" in turn[0] or turn[0].startswith("turns:"))
        else "udp",
        turn_username=turn[1].username if turn else None,
        turn_password=turn[1].credential if turn else None,
    )


def _server_address(url: str) -> tuple[str, int]:
    """Host and port of ``stun:host[:port]`` and its like (RFC 7064, RFC 7065)."""
    scheme, _, rest = url.partition(":")
    where = rest.partition("?")[0]
    if where.rpartition(":")[2].isdigit() and not where.endswith("]"):
        return split_address(where)
    return where.strip("[]"), 5349 if scheme.endswith("s") else 3478


def ice_link(server: IceServer, url: str) -> str:
    """A Link header for one ICE server (RFC 9725 §4.6)."""
    parts = [f"<{url}>", 'rel="ice-server"']
    if server.username and server.credential:
        parts += [
            f'username="{_quoted(server.username)}"',
            f'credential="{_quoted(server.credential)}"',
            'credential-type="password"',
        ]
    return "; ".join(parts)


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')


def read_fragment(text: str) -> tuple[str | None, list[str]]:
    """The ICE user fragment and the candidates of a trickle fragment (RFC 8840 §4.4).

    Raises:
        PeerError: It is too long.
    """
    lines = text.replace("\r\n", "\n").split("\n")
    if len(lines) > MAX_FRAGMENT_LINES:
        raise PeerError("sdp", f"the fragment has more than {MAX_FRAGMENT_LINES} lines")
    ufrag = next((line[12:].strip() for line in lines if line.startswith("a=ice-ufrag:")), None)
    return ufrag, [line[12:].strip() for line in lines if line.startswith("a=candidate:")]


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
        application = web.Application(client_max_size=MAX_SDP_BYTES, middlewares=[self._with_cors])
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
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        try:
            context.load_cert_chain(side.file(settings.tls_certificate), side.file(settings.tls_key))
        except (OSError, ssl.SSLError) as error:
            reason = error.strerror or str(error)
            raise MedferryError(
                f"WHEP: certificate and key cannot be used: {reason}: check both files"
            ) from None
        return context

    @web.middleware
    async def _with_cors(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Let the allowed origins' pages read every answer, refusals included (Fetch §3.2)."""
        try:
            response = await handler(request)
        except web.HTTPException as refusal:
            self._add_cors(request, refusal.headers)
            raise
        self._add_cors(request, response.headers)
        return response

    def _add_cors(self, request: web.Request, headers: object) -> None:
        assert hasattr(headers, "__setitem__")
        origin = request.headers.get("Origin")
        allowed = self._settings.origins
        if origin is None or not ("*" in allowed or origin in allowed):
            return
        headers["Access-Control-Allow-Origin"] = "*" if "*" in allowed else origin
        headers["Access-Control-Expose-Headers"] = EXPOSED_HEADERS
        headers["Vary"] = "Origin"

    def _token_opens(self, request: web.Request, stream: str) -> bool:
        tokens = self._settings.tokens
        if not tokens:
            return True
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            return False
        offered = given.strip().encode("utf-8", "surrogateescape")
        expected = [tokens[key] for key in (stream, ANY_STREAM) if key in tokens]
        # All are compared, so that the time taken does not tell which one was near.
        matches = [hmac.compare_digest(offered, token.encode()) for token in expected]
        return any(matches)

    def _authorize(self, request: web.Request, stream: str) -> None:
        if not self._token_opens(request, stream):
            self._count("unauthorized")
            raise web.HTTPUnauthorized(headers={"WWW-Authenticate": "Bearer"}, text="a token is needed\n")

    def _count(self, outcome: str) -> None:
        self._side.metrics.count("whep_requests", "WHEP requests by outcome", outcome=outcome)

    async def _body(self, request: web.Request, content_type: str) -> str:
        if request.content_type != content_type:
            raise web.HTTPUnsupportedMediaType(text=f"the body must be {content_type}\n")
        try:
            return (await request.read()).decode()
        except UnicodeDecodeError:
            raise web.HTTPBadRequest(text="the body is not UTF-8\n") from None

    def _stream(self, name: str) -> Stream:
        stream = self._hub.streams.get(name)
        if stream is not None and stream.live:
            return stream
        if stream is not None or name in self._known or name in self._hub.past:
            self._count("away")
            raise web.HTTPConflict(
                text="the stream is not live now\n", headers={"Retry-After": RETRY_SECONDS}
            )
        self._count("unknown")
        raise web.HTTPNotFound(text="no such stream\n")

    async def _options(self, request: web.Request) -> web.Response:
        posts = "id" not in request.match_info and request.path != "/streams"
        methods = (
            "GET, OPTIONS"
            if request.path == "/streams"
            else "POST, OPTIONS"
            if posts
            else "PATCH, DELETE, OPTIONS"
        )
        headers = {
            "Allow": methods,
            "Access-Control-Allow-Methods": methods,
            "Access-Control-Allow-Headers": ALLOWED_HEADERS,
            "Access-Control-Max-Age": PREFLIGHT_SECONDS,
        }
        if posts:
            headers["Accept-Post"] = SDP
            response = web.Response(status=204, headers=headers)
            self._add_links(response)
            return response
        if "id" in request.match_info:
            headers["Accept-Patch"] = FRAGMENT
        return web.Response(status=204, headers=headers)

    def _add_links(self, response: web.Response) -> None:
        for server in self._settings.ice_servers:
            for url in server.urls:
                response.headers.add("Link", ice_link(server, url))

    async def _post(self, request: web.Request) -> web.Response:
        name = request.match_info["stream"]
        self._authorize(request, name)
        if not is_stream_name(name):
            raise web.HTTPNotFound(text="no such stream\n")
        stream = self._stream(name)
        text = await self._body(request, SDP)
        if self._side.draining.is_set() or len(self.viewers) + self._answering >= self._settings.max_sessions:
            self._count("full")
            raise web.HTTPServiceUnavailable(
                text="no session is free\n", headers={"Retry-After": RETRY_SECONDS}
            )
        self._answering += 1
        try:
            viewer, answer = await self._answer(stream, text)
        finally:
            self._answering -= 1
        self._count("created")
        response = web.Response(status=201, text=answer, content_type=SDP, charset=None)
        response.headers["Location"] = f"/whep/{name}/{viewer.id}"
        response.headers["ETag"] = f'"{viewer.etag}"'
        response.headers["Accept-Patch"] = FRAGMENT
        self._add_links(response)
        return response

    async def _answer(self, stream: Stream, text: str) -> tuple[Viewer, str]:
        viewer = Viewer(stream, self._hub, self._settings, self._ice, self._ended)
        try:
            offer = read_offer(text)
            answer = await viewer.answer(offer)
        except PeerError as error:
            self._count(error.reason)
            refusal = web.HTTPUnprocessableEntity if error.reason == "codec" else web.HTTPBadRequest
            raise refusal(text=f"{error}\n") from None
        except MedferryError as error:
            self._side.log.error("WHEP: %s", error)
            self._count("no_port")
            retry = {"Retry-After": RETRY_SECONDS}
            raise web.HTTPServiceUnavailable(text="no port is free\n", headers=retry) from None
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
        self._authorize(request, name)
        viewer = self.viewers.get(request.match_info["id"])
        if viewer is None or viewer.stream.name != name:
            raise web.HTTPNotFound(text="no such session\n")
        return viewer

    async def _patch(self, request: web.Request) -> web.Response:
        viewer = self._viewer(request)
        text = await self._body(request, FRAGMENT)
        match = request.headers.get("If-Match")
        if match is None:
            raise web.HTTPPreconditionRequired(text="If-Match is needed\n")
        if match == "*":
            raise web.HTTPUnprocessableEntity(text="ICE restarts are not supported: make a new session\n")
        if match != f'"{viewer.etag}"':
            raise web.HTTPPreconditionFailed(text="another ICE session\n")
        try:
            ufrag, candidates = read_fragment(text)
            if ufrag is not None and ufrag != viewer.peer.remote_ufrag:
                raise web.HTTPUnprocessableEntity(text="ICE restarts are not supported: make a new session\n")
            for candidate in candidates:
                await viewer.peer.add_candidate(candidate)
        except PeerError as error:
            raise web.HTTPBadRequest(text=f"{error}\n") from None
        return web.Response(status=204, headers={"ETag": f'"{viewer.etag}"'})

    async def _delete(self, request: web.Request) -> web.Response:
        await self._viewer(request).peer.close()
        return web.Response()

    async def _streams(self, request: web.Request) -> web.Response:
        """Names and figures of the streams that the caller's token opens."""
        figures = self._hub.figures()
        if self._settings.tokens and not request.headers.get("Authorization"):
            self._authorize(request, ANY_STREAM)
        shown = [
            {"name": name, **one, "viewers": self.watching(name)}
            for name, one in figures.items()
            if self._token_opens(request, name)
        ]
        return web.json_response({"streams": shown}, headers={"Cache-Control": "no-store"})

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
