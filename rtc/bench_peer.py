"""The WebRTC connection of a benchmark's end: aiortc's, opened by an offer that somebody answers.

Who answers is a function: a WHIP or WHEP endpoint as a rule; the other end itself, to measure WebRTC without
a relay; or an endpoint whose answer was changed on the way, to lead the media through a bad network.
"""

from __future__ import annotations

import asyncio
import logging
import urllib.parse
from collections.abc import Awaitable, Callable

import aiohttp
from aiortc import RTCConfiguration, RTCPeerConnection, RTCSessionDescription

from relay.errors import MedferryError

CONNECT_SECONDS = 10.0
"""For an answer over HTTP, and from there for the connection."""

log = logging.getLogger("medferry.rtc")

Exchange = Callable[[str], Awaitable[str]]
"""Takes an SDP offer and returns the answer. Raises MedferryError where there is none."""


class BenchPeer:
    """A WHIP or WHEP session (RFC 9725 §4.2). `url` is where it is posted, and what errors name."""

    def __init__(self, url: str, token: str | None) -> None:
        self._url = url
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._location: str | None = None
        self.connection = RTCPeerConnection(RTCConfiguration(iceServers=[]))

    async def negotiate(self, exchange: Exchange | None = None) -> None:
        """Offer, take the answer, wait for the connection. `exchange` None: post the offer to the URL.

        Raises:
            MedferryError: The server refused, or no connection came about.
        """
        await self.connection.setLocalDescription(await self.connection.createOffer())
        answer = await (exchange or self.post)(self.connection.localDescription.sdp)
        await self.connection.setRemoteDescription(RTCSessionDescription(answer, "answer"))
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                await self._connected()
        except TimeoutError:
            raise MedferryError(f"{self._url}: no connection within {CONNECT_SECONDS:.0f} s") from None

    async def post(self, offer: str) -> str:
        """The endpoint's answer.

        Raises:
            MedferryError: It refused, is not there, or does not answer within `CONNECT_SECONDS`.
        """
        headers = {**self._headers, "Content-Type": "application/sdp"}
        try:
            async with (
                self._http() as http,
                http.post(self._url, data=offer, headers=headers) as answer,
            ):
                text = await answer.text()
                if answer.status != 201:
                    raise MedferryError(f"{self._url}: {answer.status} {text.strip()[:200]}")
                self._location = urllib.parse.urljoin(self._url, answer.headers["Location"])
        except TimeoutError:
            raise MedferryError(f"{self._url}: no answer within {CONNECT_SECONDS:.3g} s") from None
        except aiohttp.ClientError as error:
            raise MedferryError(f"{self._url}: {error}: is the relay running?") from None
        return text

    async def answer(self, offer: str) -> str:
        """Answer another end's offer, so that both are joined with nothing in between."""
        await self.connection.setRemoteDescription(RTCSessionDescription(offer, "offer"))
        await self.connection.setLocalDescription(await self.connection.createAnswer())
        sdp: str = self.connection.localDescription.sdp
        return sdp

    async def _connected(self) -> None:
        changed = asyncio.Event()
        self.connection.on("connectionstatechange", lambda: changed.set())
        while self.connection.connectionState != "connected":
            if self.connection.connectionState in ("failed", "closed"):
                raise MedferryError(f"{self._url}: the connection failed")
            await changed.wait()
            changed.clear()

    async def end(self) -> None:
        """DELETE the session and close the connection; a server that does not answer is not waited for."""
        location, self._location = self._location, None
        try:
            if location is not None:
                async with self._http() as http, http.delete(location, headers=self._headers):
                    pass
        except (TimeoutError, aiohttp.ClientError) as error:
            log.warning("%s: the session's end could not be told: %s", self._url, str(error) or "no answer")
        finally:
            await self.connection.close()

    def _http(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=CONNECT_SECONDS))
