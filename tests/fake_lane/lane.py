"""A lane kind for tests of the core: lines of TCP in, the same lines over TCP out, in order, nothing kept.

The source takes ``<32 hex digits>\n`` from any connection and sends an `ObjectEnd` of that id; the sink
appends the id to ``arrived`` in its directory. Words instead of an id make the source misbehave.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import sys
from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import Field

from relay.config import Address, LaneSettings, Listener, Settings, SideSettings
from relay.errors import PeerError
from relay.link import Arrival
from relay.records import ObjectEnd
from relay.worker import SinkSide, SourceSide


class FakeSource(SideSettings):
    listen: Address
    key_file: str | None = None
    fail_at_start: bool = False

    def listeners(self) -> list[Listener]:
        return [*super().listeners(), Listener(name="lines", address=self.listen, kind="tcp")]

    def files(self) -> list[str]:
        return [self.key_file] if self.key_file else []


class FakeSink(SideSettings):
    slow: Annotated[float, Field(ge=0, le=60)] = 0
    """Seconds that each record takes."""


class Extra(Settings):
    """A table in a table, for tests of how problems are told."""

    number: int = 0


class FakeLane(LaneSettings):
    kind: Literal["fake", "fake-live"]
    source: FakeSource
    sink: FakeSink
    extra: Extra = Extra()


def _flood() -> None:
    for number in range(20_000):
        sys.stderr.write(f"flood {number}\n")
    sys.stderr.flush()


def _shout() -> None:
    os.write(1, b"ready: forged on standard output\n")
    os.write(2, b"a bell \x07 and an escape \x1b[31m\n")


def _shut() -> None:
    """Shut every stream of messages there is: the end of the link is one of them."""
    for number in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError):
            sock = socket.socket(fileno=os.dup(number))
            if sock.type == socket.SOCK_SEQPACKET:
                sock.shutdown(socket.SHUT_WR)
            sock.close()


def _close_report() -> None:
    """Close every pipe, as a process that no longer wants to be watched would, and live on."""
    for number in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError):
            if number > 2 and os.readlink(f"/proc/self/fd/{number}").startswith("pipe:"):
                os.close(number)


SOURCE_DEEDS: dict[str, Callable[[], None]] = {
    "flood": _flood,
    "shout": _shout,
    "shut": _shut,
    "unwatch": _close_report,
}
"""What a line of this word makes the source do."""


async def source(side: SourceSide) -> None:
    """Serve lines until SIGTERM."""
    settings = side.lane.source
    assert isinstance(settings, FakeSource)
    if settings.fail_at_start:
        raise PeerError("fault", "told to fail")
    if settings.key_file is not None:
        with open(side.file(settings.key_file)) as file:
            side.log.info("key file has %d characters", len(file.read()))

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while line := (await reader.readline()).decode().strip():
                if line in SOURCE_DEEDS:
                    SOURCE_DEEDS[line]()
                elif line == "inspect":
                    writer.write(json.dumps(inspect()).encode() + b"\n")
                else:
                    await side.outlet.send(ObjectEnd(id=line, sha256="0" * 64))
                writer.write(b"ok\n")
                await writer.drain()
        writer.close()

    servers = [await asyncio.start_server(serve, sock=sock) for sock in side.sockets["lines"]]
    side.status = lambda: {"serving": len(servers)}
    side.ready()
    await side.draining.wait()
    for server in servers:
        server.close()


async def sink(side: SinkSide) -> None:
    """Write down each id until A's side has ended."""
    settings = side.lane.sink
    assert isinstance(settings, FakeSink)
    arrived = 0
    with open(os.path.join(side.state, "arrived"), "a", buffering=1) as file:

        async def deliver(arrival: Arrival) -> None:
            nonlocal arrived
            if isinstance(arrival.record, ObjectEnd):
                await asyncio.sleep(settings.slow)
                file.write(arrival.record.id + "\n")
                arrived += 1

        side.status = lambda: {"arrived": arrived}
        side.ready()
        await side.inlet.pump(deliver)


async def nested_faults(side: SinkSide) -> None:
    """Fail as a spool under an association under a server would."""

    async def fail(message: str) -> None:
        raise PeerError("fault", message)

    async def inner() -> None:
        async with asyncio.TaskGroup() as tasks:
            for message in ("the first", "the second"):
                tasks.create_task(fail(message))

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(inner())


def inspect() -> dict[str, object]:
    """What a taken-over source would see of itself."""
    return {
        "environment": dict(os.environ),
        "directory": os.getcwd(),
        "path": sys.path,
        "modules": sorted(sys.modules),
    }
