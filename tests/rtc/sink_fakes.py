"""A sink side without a relay around it: records are fed by hand, and pictures tell their number.

The number of a synthetic picture is in its top left corner as sixteen light or dark blocks, big enough to
survive any encoder at any bitrate, so a test can say which picture came out.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from pathlib import Path
from typing import Any

import av
import numpy as np

from relay.link import Arrival, Deliver
from relay.metrics import Metrics
from relay.records import AudioFrame, Record, VideoFrame, plane_sizes
from relay.worker import SinkSide
from rtc.settings import MediaLane

BLOCK = 16
BITS = 16


class FakeInlet:
    """An inlet that gives what a test puts in; buffers are written over afterwards, as a link may."""

    silent = False
    epoch = 1

    def __init__(self) -> None:
        self._queue: asyncio.Queue[Arrival | None] = asyncio.Queue()

    async def pump(self, deliver: Deliver) -> None:
        """See `relay.link.Inlet.pump`."""
        while (arrival := await self._queue.get()) is not None:
            waiting = deliver(arrival)
            if waiting is not None:
                await waiting
            if isinstance(arrival.record, VideoFrame):
                for plane in arrival.record.planes:
                    if isinstance(plane, bytearray):
                        plane[:] = bytes(len(plane))

    def put(self, record: Record, *, entered_ns: int | None = None) -> None:
        """Let `record` arrive."""
        now_ns = time.monotonic_ns()
        self._queue.put_nowait(Arrival(record, now_ns if entered_ns is None else entered_ns, now_ns))

    def end(self) -> None:
        """Side A is gone for good."""
        self._queue.put_nowait(None)


def picture(number: int, *, width: int = 320, height: int = 240, **changes: Any) -> VideoFrame:
    """A synthetic picture: a gradient that moves, chroma 100 and 160, the number in blocks."""
    rows, columns = np.mgrid[0:height, 0:width]
    luma = ((rows + columns + 3 * number) % 128 + 64).astype(np.uint8)
    for bit in range(BITS):
        luma[:BLOCK, bit * BLOCK : (bit + 1) * BLOCK] = 235 if number >> bit & 1 else 16
    _, size, _ = plane_sizes(width, height)
    now_ns = time.monotonic_ns()
    fields: dict[str, Any] = {
        "stream": "room",
        "epoch": 1,
        "seq": number,
        "captured_ns": now_ns,
        "decoded_ns": now_ns,
        "media_ns": now_ns,
        "width": width,
        "height": height,
        "planes": (bytearray(luma.tobytes()), bytearray([100]) * size, bytearray([160]) * size),
        **changes,
    }
    return VideoFrame(**fields)


def number_in(frame: av.VideoFrame) -> int:
    """The number of a decoded synthetic picture."""
    luma = frame.to_ndarray(format="yuv420p")[: frame.height]
    found = 0
    for bit in range(BITS):
        block = luma[4 : BLOCK - 4, bit * BLOCK + 4 : (bit + 1) * BLOCK - 4]
        found |= int(block.mean() > 128) << bit
    return found


def tone(number: int, *, rate: int = 48_000, channels: int = 2, **changes: Any) -> AudioFrame:
    """20 ms of a sine."""
    count = rate // 50
    times = (np.arange(count) + number * count) / rate
    mono = (8000 * np.sin(2 * np.pi * 440 * times)).astype("<i2")
    now_ns = time.monotonic_ns()
    fields: dict[str, Any] = {
        "stream": "room",
        "epoch": 1,
        "seq": number,
        "captured_ns": now_ns,
        "decoded_ns": now_ns,
        "media_ns": now_ns,
        "rate": rate,
        "channels": channels,
        "samples": bytearray(np.repeat(mono, channels).tobytes()),
        **changes,
    }
    return AudioFrame(**fields)


def sink_side(
    sink: dict[str, Any], tmp_path: Path, *, inlet: FakeInlet | None = None, listen: bool = False
) -> SinkSide:
    """A `SinkSide` with the given ``[lane.sink]`` table; `listen` opens WHEP's socket on a free port."""
    lane = MediaLane.model_validate(
        {
            "name": "camera",
            "kind": "media",
            "lab": True,
            "source": {"rtp": {"listen": "127.0.0.1:5004"}},
            "sink": sink,
        }
    )
    sockets: dict[str, list[socket.socket]] = {}
    if listen:
        sock = socket.create_server(("127.0.0.1", 0))
        sock.setblocking(False)
        sockets["whep"] = [sock]
    return SinkSide(
        relay_name="test",
        lane=lane,
        epoch=1,
        state=str(tmp_path),
        sockets=sockets,
        metrics=Metrics("camera", "sink"),
        log=logging.getLogger("test.sink"),
        draining=asyncio.Event(),
        drain_seconds=5.0,
        inlet=inlet or FakeInlet(),
    )
