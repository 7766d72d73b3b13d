"""WHEP: WebRTC viewers over HTTP (draft-ietf-wish-whep-03). What it shares with WHIP is in `rtc.sessions`.

    POST /whep/{stream}   offer in, answer out: 201, Location, ETag, Link
    GET  /streams         what can be watched, with counts and sums of latency by hop

Never here: who publishes. Tokens of viewers are this side's own.
"""

from __future__ import annotations

from aiohttp import web

from relay.errors import PeerError
from relay.worker import SinkSide, Status
from rtc.fanout import Hub, Stream
from rtc.http import Problem, check_token, preflight
from rtc.offer import Offer
from rtc.sessions import SessionService
from rtc.settings import ANY_STREAM, WhepSettings
from rtc.viewer import Viewer


class Whep(SessionService[Viewer]):
    """The ``[lane.sink.whep]`` table at work."""

    def __init__(self, settings: WhepSettings, hub: Hub, side: SinkSide) -> None:
        super().__init__("whep", settings, side)
        self._whep = settings
        self._hub = hub
        self._known: set[str] = {name for name in settings.tokens if name != ANY_STREAM}

    def check_stream(self, stream: str) -> None:
        """See `SessionService`."""
        self._stream(stream)

    def _stream(self, name: str) -> Stream:
        stream = self._hub.streams.get(name)
        if stream is not None and stream.live:
            return stream
        if stream is not None or name in self._known or name in self._hub.past:
            raise PeerError("away", "the stream is not live now: ask again later")
        raise PeerError("unknown", "no such stream")

    def begin(self, stream: str, offer: Offer) -> Viewer:
        """See `SessionService`."""
        return Viewer(self._stream(stream), self._hub, self._whep, self.ice, self.ended)

    def extra_routes(self) -> list[web.RouteDef]:
        """See `SessionService`."""
        return [web.get("/streams", self._streams), web.options("/streams", self._options_streams)]

    async def _streams(self, request: web.Request) -> web.Response:
        """Names and figures of the streams that the caller's token opens."""
        opened = {name for name in self._hub.streams if self._opens(request, name)}
        if not opened and not any(
            self._opens(request, name) for name in self.settings.tokens or [ANY_STREAM]
        ):
            raise Problem(401, "send a token as Authorization: Bearer", {"WWW-Authenticate": "Bearer"})
        shown = [
            {"name": name, **figures, "viewers": self.watching(name)}
            for name, figures in self._hub.figures(brief=True).items()
            if name in opened
        ]
        return web.json_response({"streams": shown}, headers={"Cache-Control": "no-store"})

    async def _options_streams(self, _: web.Request) -> web.Response:
        return preflight("GET, HEAD, OPTIONS")

    def _opens(self, request: web.Request, stream: str) -> bool:
        try:
            check_token(request, self.settings, stream)
        except Problem:
            return False
        return True

    def watching(self, name: str) -> int:
        """How many viewers a stream has."""
        return sum(viewer.stream_name == name for viewer in self.sessions.values())

    def figures(self) -> list[Status]:
        """Of each viewer, for status."""
        return [viewer.figures() for viewer in self.sessions.values()]
