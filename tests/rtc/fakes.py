"""What a source gets from the relay, in memory: an outlet that keeps records, and a side around it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from relay.metrics import Metrics
from relay.records import AudioFrame, Record, StreamStarted, StreamStopped, VideoFrame
from relay.worker import SourceSide
from rtc.settings import MediaLane
from rtc.source import run

R = TypeVar("R")

WAIT_SECONDS = 10.0
"""For anything that a test waits for; on an idle machine it takes a fraction of a second."""


@dataclass
class MemoryOutlet:
    """An outlet whose link takes everything, until `hold` is called."""

    records: list[tuple[Record, int]] = field(default_factory=list)
    """Each with the time at which the link took it."""
    open: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.open.set()

    async def send(self, *records: Record) -> None:
        await self.open.wait()
        now_ns = time.monotonic_ns()
        self.records += [(record, now_ns) for record in records]

    @property
    def congested(self) -> bool:
        return not self.open.is_set()

    def hold(self) -> None:
        """Stop taking, as a full link does."""
        self.open.clear()

    def of(self, kind: type[R]) -> list[R]:
        """The records of one kind, in order."""
        return [record for record, _ in self.records if isinstance(record, kind)]

    @property
    def pictures(self) -> list[VideoFrame]:
        return self.of(VideoFrame)

    @property
    def sounds(self) -> list[AudioFrame]:
        return self.of(AudioFrame)

    @property
    def started(self) -> list[StreamStarted]:
        return self.of(StreamStarted)

    @property
    def stopped(self) -> list[StreamStopped]:
        return self.of(StreamStopped)


async def until(condition: Callable[[], object], seconds: float = WAIT_SECONDS) -> None:
    """Wait until `condition` holds; fail the test where it does not."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


def lane(**source: Any) -> MediaLane:
    """A lab lane with this source and a sink that nothing is sent to."""
    return MediaLane.model_validate(
        {
            "name": "camera",
            "kind": "media",
            "lab": source.pop("lab", True),
            "source": source,
            "sink": source.pop("sink", {"rtp": {"address": "127.0.0.1:9", "plaintext": True}}),
        }
    )


def bound(kind: socket.SocketKind, host: str = "127.0.0.1") -> socket.socket:
    """A non-blocking socket on a free port of `host`."""
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, kind)
    sock.setblocking(False)
    sock.bind((host, 0))
    if kind == socket.SOCK_STREAM:
        sock.listen(32)
    return sock


def side(
    settings: MediaLane, outlet: MemoryOutlet, state: Path, sockets: dict[str, list[socket.socket]]
) -> SourceSide:
    """A source's side around `outlet`."""
    return SourceSide(
        relay_name="test",
        lane=settings,
        epoch=1,
        state=str(state),
        sockets=sockets,
        metrics=Metrics(settings.name, "source"),
        log=logging.getLogger("medferry.test"),
        draining=asyncio.Event(),
        drain_seconds=4.0,
        outlet=outlet,
        link_is_new=True,
    )


@contextlib.asynccontextmanager
async def running(source_side: SourceSide) -> AsyncIterator[SourceSide]:
    """A source that runs while the block does, and drains at its end."""
    ready = asyncio.Event()
    source_side.ready = ready.set
    task = asyncio.create_task(run(source_side))
    waiting = asyncio.create_task(ready.wait())
    await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    try:
        if not task.done():
            yield source_side
    finally:
        source_side.draining.set()
        async with asyncio.timeout(WAIT_SECONDS):
            await task
