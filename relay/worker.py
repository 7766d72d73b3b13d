"""What a source or a sink runs in: one process, one side of one lane, one uvloop.

The supervisor starts ``python -m relay.worker``, confined (`confine.py`), and writes a `Bootstrap` to its
standard input: settings, the lane's key, the epoch, and the numbers of inherited descriptors. The worker runs
the lane kind's coroutine with a `SourceSide` or `SinkSide` and reports to the supervisor on one pipe, as JSON
lines: ready, then figures each second. Nothing comes from the supervisor but signals: SIGTERM drains.

A worker whose main coroutine ends, ends as a process; the supervisor decides about a restart.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import gc
import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import uvloop
from aiohttp import web

from relay import wire
from relay.config import LaneSettings, Settings, SideSettings
from relay.errors import MedferryError
from relay.lanes import load
from relay.link import HEARTBEAT_SECONDS, Inlet, Outlet
from relay.log import configure
from relay.metrics import Metrics
from relay.records import Heartbeat
from relay.trays import tray_to_read, tray_to_write
from relay.valve_link import ValveInlet, ValveOutlet
from relay.web import METRICS_LIMITS, WebServer

Status = dict[str, Any]
"""JSON-able figures of a side, for `medferry status`. Never patient data, never a peer's free text."""

REPORT_SECONDS = 1.0
"""Between two reports to the supervisor."""

LOCK_SECONDS = 10.0
"""How long a worker waits for its predecessor, killed or ending, to let go of the side's directory."""

SWITCH_INTERVAL = 0.0005
"""Seconds a thread may keep the interpreter while another wants it. The default of 5 ms is what a loop would
wait for a thread that just came back from fsync or from a codec."""


class InheritedListener(Settings):
    """A socket that the supervisor opened, by the listener's name."""

    name: str
    fd: int


class Bootstrap(Settings):
    """What the supervisor tells a worker, once, on standard input."""

    relay_name: str
    side: Literal["source", "sink"]
    lane: dict[str, Any]
    serve: str
    """The lane kind's coroutine for this side, as `lanes.LaneKind` writes it."""
    settings: str
    """The lane kind's model, likewise."""
    lane_number: int
    key: str
    epoch: int
    link_is_new: bool
    state: str
    link_fd: int
    tray_fd: int | None = None
    """Of this side's tray, where the link has trays."""
    report_fd: int
    listeners: tuple[InheritedListener, ...]
    files: dict[str, int]
    drain_seconds: float
    log_style: Literal["json", "text"]
    log_level: str


@dataclass(slots=True, kw_only=True)
class Side:
    """What either side gets from the relay, and the two things it owes: `ready()` and `status`."""

    relay_name: str
    lane: LaneSettings
    """The lane's table, with this side's part only: the other side's is blank."""
    epoch: int
    """Rises with each start of this side. Never reused, so it may serve in unique identifiers."""
    state: str
    """This side's own directory, as a path that this process can use."""
    sockets: dict[str, list[socket.socket]]
    """Listening sockets (TCP) and bound sockets (UDP) by `config.Listener.name`; non-blocking."""
    files: dict[str, int] = field(default_factory=dict)
    metrics: Metrics
    log: logging.Logger
    draining: asyncio.Event
    """Set by SIGTERM: finish what was accepted, refuse what is new, then return."""
    drain_seconds: float
    """After `draining` is set the process is ended by the supervisor at the latest after this."""
    status: Callable[[], Status] = field(default=dict)
    """Set by the lane kind: called each second for the side's figures."""
    ready: Callable[[], None] = field(default=lambda: None)
    """To be called once, when the side listens and can work."""

    def file(self, path: str) -> str:
        """Where to read a file that the settings' `files()` named: the supervisor passed its contents."""
        return f"/proc/self/fd/{self.files[path]}" if path in self.files else path


@dataclass(slots=True, kw_only=True)
class SourceSide(Side):
    """Side A's half: what it sends on `outlet` is the only thing that ever leaves it."""

    outlet: Outlet
    link_is_new: bool
    """The link is not the one of this side's last run: what was on its way then may be lost."""


@dataclass(slots=True, kw_only=True)
class SinkSide(Side):
    """Side B's half: `inlet` is the only thing it ever learns of side A."""

    inlet: Inlet


class Reporter:
    """Writes JSON lines to the supervisor. A full pipe drops a line: reports are repeated anyway."""

    def __init__(self, fd: int) -> None:
        os.set_blocking(fd, False)
        self._fd = fd
        self._rest = b""
        """Of a line of which the pipe took a part: it must not be lost, nor torn by another."""
        self.dropped = 0

    def send(self, **fields: Any) -> None:
        self._write(self._rest)
        if self._rest:
            self.dropped += 1
        else:
            self._write(json.dumps(fields).encode() + b"\n")

    def _write(self, line: bytes) -> None:
        try:
            self._rest = line[os.write(self._fd, line) :]
        except BlockingIOError:
            self._rest = line


async def _heartbeats(outlet: Outlet) -> None:
    while True:
        await outlet.send(Heartbeat(sent_ns=time.monotonic_ns()))
        await asyncio.sleep(HEARTBEAT_SECONDS)


async def _serve_metrics(side: Side) -> WebServer | None:
    """Serve /metrics on the side's own listener, where one is configured."""
    sockets = side.sockets.get("metrics", [])
    if not sockets:
        return None

    async def exposition(_: web.Request) -> web.Response:
        return web.Response(body=side.metrics.exposition(), content_type="text/plain", charset="utf-8")

    application = web.Application()
    application.router.add_get("/metrics", exposition)
    server = WebServer("metrics", application, METRICS_LIMITS, side.metrics)
    await server.start(sockets)
    return server


def _link_status(side: SourceSide | SinkSide) -> Status:
    if isinstance(side, SourceSide):
        outlet = side.outlet
        assert isinstance(outlet, ValveOutlet)
        return {"fragments": outlet.fragments, "bytes": outlet.bytes, "waits": outlet.waits}
    inlet = side.inlet
    assert isinstance(inlet, ValveInlet)
    counters = inlet.decoder.counters
    return {
        "fragments": counters.fragments,
        "duplicates": counters.duplicates,
        "gaps": counters.gaps,
        "missing": counters.missing,
        "refused": dict(counters.refused),
        "silent": inlet.silent,
    }


async def _reports(side: SourceSide | SinkSide, reporter: Reporter) -> None:
    while True:
        link = _link_status(side)
        for name, value in link.items():
            if not isinstance(value, dict):
                side.metrics.gauge(f"link_{name}", f"Link: {name}", float(value))
        side.metrics.gauge(
            "reports_dropped", "Reports that the supervisor was too slow for", float(reporter.dropped)
        )
        reporter.send(status={**side.status(), "link": link})
        await asyncio.sleep(REPORT_SECONDS)


async def _run(
    side: SourceSide | SinkSide, main: Callable[[Any], Awaitable[None]], reporter: Reporter
) -> None:
    """Run the lane kind's coroutine with the tasks every side has, until it returns."""
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, side.draining.set)
    side.ready = lambda: reporter.send(ready=True)
    metrics = await _serve_metrics(side)
    async with asyncio.TaskGroup() as tasks:
        helpers = [tasks.create_task(_reports(side, reporter), name="reports")]
        if isinstance(side, SourceSide):
            helpers.append(tasks.create_task(_heartbeats(side.outlet), name="heartbeats"))
        await main(side)
        for helper in helpers:
            helper.cancel()
    reporter.send(status={**side.status(), "link": _link_status(side)})
    if metrics is not None:
        await metrics.stop()


def _alarm(*_: object) -> None:
    raise TimeoutError


def _lock(directory: str) -> int:
    """Hold the side's directory: one worker at a time, even while a killed predecessor is still ending.

    Raises:
        MedferryError: Another process kept it for `LOCK_SECONDS`.
    """
    fd = os.open(f"{directory}/lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    signal.signal(signal.SIGALRM, _alarm)
    signal.setitimer(signal.ITIMER_REAL, LOCK_SECONDS)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
    except TimeoutError:
        os.close(fd)
        raise MedferryError(f"{directory} is in use by another process; stop that relay first") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return fd


def _own_part(model: type[LaneSettings], boot: Bootstrap) -> LaneSettings:
    """The lane as this side may know it. The supervisor checked the whole; the other side's part is blank."""
    table = dict(boot.lane)
    own: type[SideSettings] = cast(Any, model.model_fields[boot.side].annotation)
    sides = {
        "source": SideSettings(),
        "sink": SideSettings(),
        boot.side: own.model_validate(table.pop(boot.side)),
    }
    return model.model_construct(None, **table, **sides)


def _build(boot: Bootstrap, lane: LaneSettings) -> SourceSide | SinkSide:
    sockets: dict[str, list[socket.socket]] = {}
    for listener in boot.listeners:
        sock = socket.socket(fileno=listener.fd)
        sock.setblocking(False)
        sockets.setdefault(listener.name, []).append(sock)
    link = socket.socket(fileno=boot.link_fd)
    key = bytes.fromhex(boot.key)
    common: dict[str, Any] = {
        "relay_name": boot.relay_name,
        "lane": lane,
        "epoch": boot.epoch,
        "state": boot.state,
        "sockets": sockets,
        "files": boot.files,
        "metrics": Metrics(lane.name, boot.side),
        "log": logging.getLogger(f"medferry.{lane.name}.{boot.side}"),
        "draining": asyncio.Event(),
        "drain_seconds": boot.drain_seconds,
    }
    if boot.side == "source":
        encoder = wire.Encoder(lane=boot.lane_number, key=key, epoch=boot.epoch)
        tray = None if boot.tray_fd is None else tray_to_write(boot.tray_fd)
        return SourceSide(outlet=ValveOutlet(link, encoder, tray), link_is_new=boot.link_is_new, **common)
    decoder = wire.Decoder(lane=boot.lane_number, key=key)
    tray = None if boot.tray_fd is None else tray_to_read(boot.tray_fd)
    return SinkSide(inlet=ValveInlet(link, decoder, tray), **common)


def _leaves(group: BaseExceptionGroup[Exception]) -> Iterator[Exception]:
    """The errors of a group and of the groups within it: each has its own message, a group has none."""
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error


def main() -> int:
    """Entry of ``python -m relay.worker``; the exit status is 0 after a drain, 1 after a fault."""
    boot = Bootstrap.model_validate_json(sys.stdin.buffer.read())
    configure(boot.log_style, boot.log_level, lane=boot.lane["name"], side=boot.side)
    sys.setswitchinterval(SWITCH_INTERVAL)
    lane = _own_part(load(boot.settings), boot)
    coroutine = load(boot.serve)
    try:
        lock = _lock(boot.state)
    except MedferryError as error:
        logging.getLogger(f"medferry.{boot.lane['name']}.{boot.side}").error("%s", error)
        return 1
    side = _build(boot, lane)
    # What was imported stays: keep the collector from walking it again and again.
    gc.collect()
    gc.freeze()
    try:
        with contextlib.closing(uvloop.new_event_loop()) as loop:
            loop.run_until_complete(_run(side, coroutine, Reporter(boot.report_fd)))
    except ExceptionGroup as group:
        expected, faults = group.split(MedferryError)
        for message in dict.fromkeys(map(str, _leaves(expected) if expected else ())):
            side.log.error("%s", message)
        if faults is not None:
            raise faults from None
        return 1
    finally:
        os.close(lock)
    return 0


if __name__ == "__main__":
    sys.exit(main())
