"""A synthetic camera: pictures that move, each with a stamp that says when it was painted.

It offers bare pictures, as a decoder would; who encodes and sends them is another's business.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from relay.records import VideoFrame, plane_sizes
from rtc.stamp import Plane, Stamp, paint

TILE = 64
"""Pixels of the smooth blobs that the scene is made of."""

MARGIN = 128
"""Pixels that the view can pan over the scene, each way."""

GRAIN = 3
"""Luma of the noise in the scene: enough that a codec has work, as with a real camera."""


@dataclass(slots=True)
class Size:
    """Pixels and pictures a second."""

    width: int = 1280
    height: int = 720
    rate: int = 30


@dataclass(slots=True)
class Camera:
    """Paints `size.rate` pictures a second while `run` runs."""

    size: Size
    stream: str = "camera"
    painted: list[int] = field(default_factory=list)
    """Counters of the pictures so far."""
    _scene: Plane = field(init=False, repr=False)
    _planes: tuple[Plane, Plane, Plane] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        width, height = self.size.width, self.size.height
        self._scene = _scene(width + MARGIN, height + MARGIN)
        chroma = ((height + 1) // 2, (width + 1) // 2)
        self._planes = (
            np.empty((height, width), np.uint8),
            np.full(chroma, 116, np.uint8),
            np.full(chroma, 138, np.uint8),
        )
        assert tuple(plane.size for plane in self._planes) == plane_sizes(width, height)

    def picture(self, counter: int) -> VideoFrame:
        """Paint picture `counter` now. Its planes are overwritten by the next one."""
        luma, u, v = self._planes
        x = round((1 + np.sin(counter / 23)) * (MARGIN - 1) / 2)
        y = round((1 + np.cos(counter / 31)) * (MARGIN - 1) / 2)
        luma[:] = self._scene[y : y + self.size.height, x : x + self.size.width]
        now_ns = time.monotonic_ns()
        paint(luma, (u, v), Stamp(time_us=now_ns // 1000, counter=counter))
        self.painted.append(counter)
        return VideoFrame(
            stream=self.stream,
            epoch=0,
            seq=counter,
            captured_ns=now_ns,
            decoded_ns=now_ns,
            media_ns=now_ns,
            width=self.size.width,
            height=self.size.height,
            planes=(luma.reshape(-1).data, u.reshape(-1).data, v.reshape(-1).data),
        )

    async def run(self, seconds: float, offer: Callable[[VideoFrame], None]) -> None:
        """Offer pictures for `seconds`, evenly; one that is late is left out, as a camera would."""
        loop = asyncio.get_running_loop()
        started = loop.time()
        for counter in range(round(seconds * self.size.rate)):
            due = started + counter / self.size.rate
            wait = due - loop.time()
            if wait < -1 / self.size.rate:
                continue
            await asyncio.sleep(max(wait, 0))
            offer(self.picture(counter))


def _scene(width: int, height: int) -> Plane:
    """Smooth blobs with a little grain."""
    source = np.random.default_rng(1)
    coarse = source.integers(50, 200, (height // TILE + 2, width // TILE + 2)).astype(np.float32)
    rows, columns = np.arange(height) / TILE, np.arange(width) / TILE
    top, left = rows.astype(int), columns.astype(int)
    down, right = (rows - top)[:, None], (columns - left)[None, :]
    upper = coarse[top][:, left] * (1 - right) + coarse[top][:, left + 1] * right
    lower = coarse[top + 1][:, left] * (1 - right) + coarse[top + 1][:, left + 1] * right
    smooth = upper * (1 - down) + lower * down
    grain = source.normal(0, GRAIN, (height, width))
    scene: Plane = np.clip(smooth + grain, 16, 235).astype(np.uint8)
    return scene
