"""Side A of a media lane: everything that publishes, joined to the lane's outlet.

    WHIP, RTP, SDP files, RTSP ─▶ Stage (admission, epochs) ─▶ Mailbox ─▶ outlet

The outlet's task takes what is newest of each stream in turn; while the link is full, the mailbox replaces.
On a drain, publishers are told to go, streams are stopped, and what waits in the mailbox is sent.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from relay.errors import ConfigError
from relay.mailbox import Mailbox
from relay.process import within
from relay.worker import SourceSide, Status
from rtc import pages
from rtc.budget import PixelBudget
from rtc.publication import Stage
from rtc.rtp_in import RtpIn, open_ports
from rtc.rtsp import RtspPull
from rtc.sdp import Flow, read_sdp
from rtc.settings import MediaLane, MediaSource
from rtc.whip import Whip

MAX_SDP_FILE = 65_536
"""Bytes of an SDP file."""

GAUGE_SECONDS = 1.0
"""Between two updates of the gauges and of the log of faults."""


async def run(side: SourceSide) -> None:
    """Serve the lane's source until it is drained.

    Raises:
        ConfigError: An SDP file cannot be used.
        MedferryError: A port is taken.
    """
    lane = side.lane
    assert isinstance(lane, MediaLane)
    stage = Stage(
        mailbox=Mailbox(),
        metrics=side.metrics,
        epoch=side.epoch,
        max_streams=lane.source.max_streams,
        max_frame_rate=lane.source.max_frame_rate,
        budget=PixelBudget(lane.source.max_pixels_per_second, lane.source.max_frame_rate),
    )
    receivers = _receivers(side, lane, stage)
    pulls = [RtspPull(stage, item) for item in lane.source.rtsp]
    whip = Whip(stage, lane.source.whip, side) if lane.source.whip else None
    started_ns = time.monotonic_ns()
    side.status = lambda: _status(stage, receivers, pulls, whip, started_ns)
    async with asyncio.TaskGroup() as tasks:
        outlet = tasks.create_task(_forward(side, stage), name="outlet")
        gauges = tasks.create_task(_gauges(stage), name="gauges")
        if whip is not None:
            await whip.start(pages.routes("source"))
        publishing = [tasks.create_task(item.run(), name=repr(item)) for item in receivers]
        publishing += [tasks.create_task(item.run(), name=repr(item)) for item in pulls]
        side.ready()
        await side.draining.wait()
        if whip is not None:
            await whip.stop()
        for task in publishing:
            task.cancel()
        if publishing:
            await asyncio.wait(publishing)
        if not await within(side.drain_seconds / 2, stage.mailbox.drained()):
            side.log.info("the drain is over: %d records did not cross", stage.mailbox.fill)
        outlet.cancel()
        gauges.cancel()


async def _forward(side: SourceSide, stage: Stage) -> None:
    """Carry what is newest to the link, for ever."""
    while True:
        records = await stage.mailbox.take()
        stage.note_taken(records)
        await side.outlet.send(*records)


async def _gauges(stage: Stage) -> None:
    while True:
        await asyncio.sleep(GAUGE_SECONDS)
        stage.tell_faults()
        counters = stage.mailbox.counters
        gauge = stage.metrics.gauge
        gauge("mailbox_fill", "Records waiting for the link", stage.mailbox.fill)
        gauge("mailbox_pictures_replaced", "Pictures replaced by newer ones", counters.pictures_replaced)
        gauge("mailbox_audio_dropped", "Audio frames dropped as too old", counters.audio_dropped)
        gauge("mailbox_refused", "Records of streams beyond the mailbox's limit", counters.refused)
        gauge("streams", "Streams being published", len(stage.publications))
        gauge("pixels_per_second", "Decoded pixels a second", stage.pixels_per_second)


def _receivers(side: SourceSide, lane: MediaLane, stage: Stage) -> list[RtpIn]:
    source: MediaSource = lane.source
    found = []
    if source.rtp is not None:
        receiver = RtpIn(stage, lane.rtp_stream, source.rtp.allow)
        video = Flow(kind="video", codec=source.rtp.codec, payload_type=source.rtp.payload_type)
        receiver.add(video, _sockets(side, "rtp"))
        if source.rtp.audio is not None:
            audio = Flow(kind="audio", codec="opus", payload_type=source.rtp.audio.payload_type)
            receiver.add(audio, _sockets(side, "rtp-audio"))
        found.append(receiver)
    for item in source.sdp:
        receiver = RtpIn(stage, item.stream, item.allow)
        for flow in read_sdp(_read(side.file(item.file), item.file), item.file):
            receiver.add(flow, open_ports(flow))
        found.append(receiver)
    return found


def _sockets(side: SourceSide, name: str) -> list[Any]:
    return [*side.sockets.get(name, []), *side.sockets.get(f"{name}-rtcp", [])]


def _read(path: str, name: str) -> str:
    try:
        with open(path, "rb") as file:
            return file.read(MAX_SDP_FILE).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"{name}: {error}: name a readable SDP file"]) from None


def _status(
    stage: Stage,
    receivers: list[RtpIn],
    pulls: list[RtspPull],
    whip: Whip | None,
    started_ns: int,
) -> Status:
    tracks: dict[str, dict[str, Any]] = {item.name: item.status() for item in receivers}
    tracks |= {item.name: item.status() for item in pulls}
    if whip is not None:
        tracks |= whip.tracks()
    streams = {}
    for name in sorted({*tracks, *stage.publications}):
        publication = stage.publications.get(name)
        streams[name] = {
            "state": "live" if publication is not None and publication.live else "waiting",
            **(publication.status() if publication is not None else {}),
            "tracks": tracks.get(name, {}),
            "latency": stage.metrics.latencies(name),
        }
    counters = stage.mailbox.counters
    return {
        "kind": "media",
        "up_seconds": (time.monotonic_ns() - started_ns) // 1_000_000_000,
        "streams": streams,
        "mailbox": {
            "fill": stage.mailbox.fill,
            "taken": counters.taken,
            "pictures_replaced": counters.pictures_replaced,
            "audio_dropped": counters.audio_dropped,
        },
        "pixels_per_second": round(stage.pixels_per_second),
        "refused": dict(stage.refused),
        "whip": whip.status() if whip is not None else None,
        "complaints": _complaints(pulls),
    }


def _complaints(pulls: list[RtspPull]) -> list[str]:
    """What an operator should look at: cameras that were lost, or never there, until they are shown again."""
    found = []
    for pull in pulls:
        connection = pull.status()["rtsp"]
        if connection["state"] != "live" and connection["last_end"]:
            found.append(f"camera {pull.name} is not shown: {connection['last_end']}")
    return found
