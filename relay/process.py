"""One supervised process: started, listened to, restarted with back-off, ended.

It never ends half: a worker whose report pipe closes or whose main task ends is gone as a process, and what
is done about that is decided here alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

log = logging.getLogger(__name__)

FIRST_BACKOFF = 0.05
LAST_BACKOFF = 10.0
"""Seconds before the second, and before any late restart in a row. The first restart is immediate: what was
killed once should be back before a peer's retry."""

STABLE_SECONDS = 10.0
"""A process that lived this long is healthy: its next restart counts as the first again."""

MAX_REPORT = 256 * 1024
"""Bytes of one report line; a worker that sends more is not ours any more and is ended."""


@dataclass(frozen=True, slots=True)
class Launch:
    """How to start a process once: its command, the descriptors it inherits, and what it reads first."""

    command: list[str]
    descriptors: tuple[int, ...]
    stdin: bytes = b""


@dataclass(slots=True)
class Process:
    """A process under supervision.

    `launch` is called before each start with the write end of the report pipe, so that every start has a
    fresh epoch and a pipe of its own.
    """

    name: str
    launch: Callable[[int], Launch]
    on_report: Callable[[dict[str, Any]], None] = lambda _: None
    pid: int | None = None
    ready: bool = False
    restarts: int = 0
    last_exit: int | None = None
    figures: dict[str, Any] = field(default_factory=dict)
    started_at: float = 0.0
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    _process: asyncio.subprocess.Process | None = None
    _last_start: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the process is not to be started again."""

    def __repr__(self) -> str:
        state = "ready" if self.ready else "up" if self.pid else "down"
        return f"<Process {self.name} {state} pid={self.pid} restarts={self.restarts}>"

    async def run(self) -> None:
        """Keep the process alive until `stop` or `finish` was asked for."""
        backoff = 0.0
        try:
            while not self._last_start.is_set():
                await self._once()
                if self._last_start.is_set():
                    break
                self.restarts += 1
                lived = time.monotonic() - self.started_at
                backoff = 0.0 if lived > STABLE_SECONDS else min(backoff * 2 or FIRST_BACKOFF, LAST_BACKOFF)
                log.warning(
                    "%s ended (%s) after %.1f s; starting it again in %.2f s",
                    self.name,
                    describe_exit(self.last_exit),
                    lived,
                    backoff,
                )
                await within(backoff, self._last_start.wait())
        finally:
            self.ended.set()

    async def _once(self) -> None:
        report_out, report_in = os.pipe()
        try:
            launch = self.launch(report_in)
            self.started_at = time.monotonic()
            self._process = await asyncio.create_subprocess_exec(
                *launch.command,
                stdin=asyncio.subprocess.PIPE,
                pass_fds=(*launch.descriptors, report_in),
                start_new_session=True,
            )
        finally:
            os.close(report_in)
        process = self._process
        self.pid = process.pid
        try:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                process.stdin.write(launch.stdin)
                await process.stdin.drain()
            process.stdin.close()
            await self._listen(report_out)
            self.last_exit = await process.wait()
        except asyncio.CancelledError:
            self.kill()
            await process.wait()
            raise
        finally:
            self.pid, self.ready, self._process = None, False, None

    async def _listen(self, pipe: int) -> None:
        """Read reports until the process closes the pipe, that is until it ends."""
        reader = asyncio.StreamReader(limit=MAX_REPORT)
        loop = asyncio.get_running_loop()
        transport, _ = await loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(pipe, "rb", 0)
        )
        try:
            while line := await reader.readline():
                self._take(line)
        except ValueError:
            log.error("%s sent an endless report; ending it", self.name)
            self.kill()
        finally:
            transport.close()

    def _take(self, line: bytes) -> None:
        try:
            report = json.loads(line)
        except ValueError:
            report = None
        if not isinstance(report, dict):
            log.error("%s sent a report that is not one; ending it", self.name)
            self.kill()
            return
        if report.get("ready"):
            self.ready = True
        status = report.get("status")
        if isinstance(status, dict):
            self.figures = status
        self.on_report(report)

    def stop(self, signal: int) -> None:
        """Send `signal` and do not restart: the process is expected to end."""
        self._last_start.set()
        self._signal(signal)

    def finish(self) -> None:
        """Do not restart when it ends by itself."""
        self._last_start.set()

    def kill(self) -> None:
        """End it at once. Safe at any point: custody never depends on a graceful end."""
        self._signal(9)

    def _signal(self, number: int) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    def state(self) -> dict[str, Any]:
        """What status shows of it."""
        return {
            "pid": self.pid,
            "state": "running" if self.ready else "starting" if self.pid else "down",
            "restarts": self.restarts,
            "up_seconds": round(time.monotonic() - self.started_at, 1) if self.pid else 0.0,
            "last_exit": None if self.last_exit is None else describe_exit(self.last_exit),
            "figures": self.figures,
        }


def describe_exit(code: int | None) -> str:
    """An exit status for people: ``exit 1``, ``signal 9``."""
    if code is None:
        return "not started"
    return f"signal {-code}" if code < 0 else f"exit {code}"


async def within(seconds: float, waiting: Awaitable[object]) -> bool:
    """Whether `waiting` was done within `seconds`."""
    try:
        await asyncio.wait_for(waiting, max(seconds, 0.0))
    except TimeoutError:
        return False
    return True
