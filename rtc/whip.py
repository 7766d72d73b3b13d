"""WHIP: WebRTC publishers over HTTP (RFC 9725). What it shares with WHEP is in `rtc.sessions`.

    POST  /whip/{stream}   offer in, answer out: 201, Location, ETag, Link

A stream has one publisher at a time (409).
"""

from __future__ import annotations

from typing import Any

from relay.records import StopReason
from relay.worker import Side
from rtc.offer import Offer
from rtc.publication import Stage
from rtc.publisher import Publisher, plan
from rtc.sessions import SessionService
from rtc.settings import WhipSettings


class Whip(SessionService[Publisher]):
    """The ``[lane.source.whip]`` table at work."""

    def __init__(self, stage: Stage, settings: WhipSettings, side: Side) -> None:
        super().__init__("whip", settings, side)
        self._stage = stage
        self._whip = settings

    def begin(self, stream: str, offer: Offer) -> Publisher:
        """See `SessionService`."""
        # Before the name is taken: what cannot be answered must not keep others out.
        plan(offer, self._whip.codecs)
        return Publisher(self._stage.open(stream), self._whip, self.ice, self.ended)

    async def end(self, session: Publisher) -> None:
        """See `SessionService`."""
        await session.close(StopReason.DRAINED)

    def tracks(self) -> dict[str, dict[str, Any]]:
        """Figures of each session, by stream."""
        return {session.stream_name: session.status() for session in self.sessions.values()}

    def status(self) -> dict[str, Any]:
        """Figures of the service."""
        return {"sessions": len(self.sessions), "most_sessions": self.settings.max_sessions}
