"""Side B of a media lane: records off the link, encoded anew, sent as WebRTC and as plain RTP.

Inlet ─▶ Hub ─▶ encoders ─┬▶ Whep ─▶ viewers
                          └▶ RtpOut ─▶ a receiver's address
"""

from __future__ import annotations

import asyncio

from aiohttp import web

from relay.link import Arrival
from relay.worker import SinkSide, Status
from rtc import pages
from rtc.fanout import Hub
from rtc.rtp_out import RtpOut
from rtc.settings import MediaLane
from rtc.whep import Whep

SDP_PATH = "/rtp.sdp"
"""Where the viewers' listener serves the description of the plain RTP stream."""


async def run(side: SinkSide) -> None:
    """Serve until the side drains or the link ends.

    Raises:
        MedferryError: A certificate or a listener cannot be used.
    """
    lane = side.lane
    assert isinstance(lane, MediaLane)
    settings = lane.sink
    hub = Hub(
        side.metrics,
        max_streams=settings.max_streams,
        max_pixels_per_second=settings.max_pixels_per_second,
        max_frame_rate=settings.max_frame_rate,
    )
    rtp = RtpOut(settings.rtp, hub, side) if settings.rtp else None
    whep = Whep(settings.whep, hub, side) if settings.whep else None
    if rtp is not None:
        hub.appeared = rtp.appeared

    def status() -> Status:
        figures: Status = {
            "streams": hub.figures(),
            "refused_records": hub.refused,
            "stale_records": hub.stale,
        }
        if whep is not None:
            figures["viewers"] = whep.figures()
        if rtp is not None:
            figures["rtp"] = rtp.figures()
            figures["complaints"] = [rtp.trouble] if rtp.trouble else []
        return figures

    side.status = status
    if whep is not None:
        await whep.start(_extra_routes(rtp))
    side.ready()
    try:
        await _serve(side, hub, rtp)
    finally:
        if whep is not None:
            await whep.stop()
        if rtp is not None:
            rtp.close()
        await hub.close()


async def _serve(side: SinkSide, hub: Hub, rtp: RtpOut | None) -> None:
    """Until the side drains or A has ended for good; an encoder's failure ends the worker."""

    def deliver(arrival: Arrival) -> None:
        hub.heard_source(side.inlet.epoch)
        hub.deliver(arrival)

    async with asyncio.TaskGroup() as tasks:
        work = [
            tasks.create_task(side.inlet.pump(deliver), name="link"),
            tasks.create_task(side.draining.wait(), name="drain"),
        ]
        watch = tasks.create_task(hub.watch(), name="encoders")
        opening = [tasks.create_task(rtp.open(), name="rtp")] if rtp is not None else []
        await asyncio.wait([*work, watch], return_when=asyncio.FIRST_COMPLETED)
        for task in (*work, watch, *opening):
            task.cancel()


def _extra_routes(rtp: RtpOut | None) -> list[web.RouteDef]:
    """What is served beside WHEP: the viewer page, and the description of the plain RTP stream."""
    if rtp is None:
        return pages.routes("sink")

    async def sdp(_: web.Request) -> web.Response:
        if not rtp.sdp:
            raise web.HTTPServiceUnavailable(text=f"{rtp.trouble or 'the receiver is being looked for'}\n")
        return web.Response(text=rtp.sdp, content_type="application/sdp", charset=None)

    return [*pages.routes("sink"), web.get(SDP_PATH, sdp)]
