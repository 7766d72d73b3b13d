"""A media relay as aiortc's users write it, to compare with: ``plain_media_relay.py PORT``.

POST /whip/{stream} publishes, POST /whep/{stream} watches; `MediaRelay` hands each decoded frame to every
viewer, whose sender encodes it anew. Nothing is crippled: it is what aiortc's own examples do.
"""

from __future__ import annotations

import asyncio
import sys

from aiohttp import web
from aiortc import RTCConfiguration, RTCPeerConnection, RTCSessionDescription
from aiortc.contrib.media import MediaRelay
from aiortc.mediastreams import MediaStreamTrack


class PlainRelay:
    """Publishers' tracks by name, and everybody's connections."""

    def __init__(self) -> None:
        self._relay = MediaRelay()
        self._tracks: dict[str, MediaStreamTrack] = {}
        self._connections: set[RTCPeerConnection] = set()

    def _connection(self) -> RTCPeerConnection:
        connection = RTCPeerConnection(RTCConfiguration(iceServers=[]))
        self._connections.add(connection)
        return connection

    @staticmethod
    async def _answer(connection: RTCPeerConnection, request: web.Request) -> web.Response:
        await connection.setRemoteDescription(RTCSessionDescription(await request.text(), "offer"))
        await connection.setLocalDescription(await connection.createAnswer())
        headers = {"Location": f"{request.path}/session"}
        sdp = connection.localDescription.sdp
        return web.Response(status=201, text=sdp, content_type="application/sdp", headers=headers)

    async def publish(self, request: web.Request) -> web.Response:
        connection = self._connection()
        name = request.match_info["stream"]
        connection.on("track", lambda track: self._tracks.update({name: track}))
        return await self._answer(connection, request)

    async def watch(self, request: web.Request) -> web.Response:
        track = self._tracks.get(request.match_info["stream"])
        if track is None:
            raise web.HTTPNotFound
        connection = self._connection()
        connection.addTrack(self._relay.subscribe(track))
        return await self._answer(connection, request)

    async def end(self, request: web.Request) -> web.Response:
        del request
        return web.Response()

    def application(self) -> web.Application:
        application = web.Application()
        application.add_routes(
            [
                web.post("/whip/{stream}", self.publish),
                web.post("/whep/{stream}", self.watch),
                web.delete("/{kind}/{stream}/session", self.end),
            ]
        )
        return application


async def main(port: str) -> None:
    """Serve on loopback until killed."""
    runner = web.AppRunner(PlainRelay().application(), access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", int(port)).start()
    print("ready", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
