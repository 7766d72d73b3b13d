"""One supervised process: started, listened to, restarted with back-off, ended.

It never ends half: a worker whose report pipe closes or whose main task ends is gone as a process, and what
is done about that is decided here alone.

No two processes share a stream. Each has a standard input, a report pipe and a log pipe of its own, whose
other ends only the supervisor holds, and a null device for standard output: what one writes never blocks
another, and a terminal or a file behind the supervisor's log is nothing that both sides of a lane can touch.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from relay.errors import MedferryError

log = logging.getLogger(__name__)

FIRST_BACKOFF = 0.05
LAST_BACKOFF = 10.0
"""Seconds before the second, and before any late restart in a row. The first restart is immediate: what was
killed once should be back before a peer's retry."""

STABLE_SECONDS = 10.0
"""A process that lived this long is healthy: its next restart counts as the first again."""

MAX_REPORT = 256 * 1024
"""Bytes of one report line; a worker that sends more is not ours any more and is ended."""

MAX_LOG_LINE = 16 * 1024
"""Bytes of one line of a worker's log; a longer one is cut into several."""

LOG_LINES_PER_SECOND = 500
LOG_LINES_AT_ONCE = 2000
"""What one process may write into the log, steadily and in a burst (tracebacks, debugging). The rest is
dropped and counted, so that a worker in the wrong hands cannot fill the disk."""

LAST_WORDS_SECONDS = 1.0
"""For what an ended process left in its pipes, should a child of it still hold them open."""

PASSED_ENVIRONMENT = (
    "LANG",
    "LC_ALL",
    "LC_CTYPE",
    "LD_LIBRARY_PATH",
    "PATH",
    "PYTHONDONTWRITEBYTECODE",
    "PYTHONFAULTHANDLER",
    "PYTHONPATH",
    "PYTHONUTF8",
    "PYTHONWARNINGS",
    "TZ",
)
"""Variables that a worker gets: how to find Python's libraries and which language and time to print. Secrets
of a service's environment, and the service manager's own socket, are none of its business."""

_CONTROL_BYTES = bytes(set(range(0x20)) - {0x09, 0x0A} | {0x7F})
_PRINTABLE = bytes.maketrans(_CONTROL_BYTES, b"?" * len(_CONTROL_BYTES))


@dataclass(frozen=True, slots=True)
class Launch:
    """How to start a process once: its command, the descriptors it inherits, and what it reads first."""

    command: list[str]
    descriptors: tuple[int, ...]
    stdin: bytes = field(default=b"", repr=False)


@dataclass(slots=True)
class Process:
    """A process under supervision.

    `launch` is called before each start with the write end of the report pipe, so that every start has a
    fresh epoch and a pipe of its own. Where it raises OSError or MedferryError, that start has failed and is
    tried again like one that ended.
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
    _pidfd: int | None = None
    _stop: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the process is not to be started again."""
    _stop_signal: int = 0
    _finishing: bool = False
    _renewing: bool = False

    def __repr__(self) -> str:
        state = "ready" if self.ready else "up" if self.pid else "down"
        return f"<Process {self.name} {state} pid={self.pid} restarts={self.restarts}>"

    @property
    def _done(self) -> bool:
        return self._stop.is_set() or (self._finishing and self.last_exit == 0)

    async def run(self) -> None:
        """Keep the process alive until `stop` or `finish` was asked for."""
        backoff = 0.0
        try:
            while not self._stop.is_set():
                outcome = await self._once()
                if self._done:
                    break
                if self._renewing:
                    continue
                self.restarts += 1
                lived = time.monotonic() - self.started_at
                backoff = 0.0 if lived > STABLE_SECONDS else min(backoff * 2 or FIRST_BACKOFF, LAST_BACKOFF)
                log.warning(
                    "%s %s after %.1f s; starting it again in %.2f s", self.name, outcome, lived, backoff
                )
                await within(backoff, self._stop.wait())
        finally:
            self.ended.set()

    async def _once(self) -> str:
        """Start it, wait for its end, and say how it went."""
        self.started_at = time.monotonic()
        self._renewing = False
        report_out, report_in = os.pipe()
        log_out, log_in = os.pipe()
        try:
            launch = self.launch(report_in)
            process = await asyncio.create_subprocess_exec(
                *launch.command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=log_in,
                pass_fds=(*launch.descriptors, report_in),
                start_new_session=True,
                env=worker_environment(os.environ),
                cwd="/",
            )
        except (OSError, MedferryError) as error:
            os.close(report_out)
            os.close(log_out)
            self.last_exit = None
            return f"could not be started ({error})"
        finally:
            os.close(report_in)
            os.close(log_in)
        try:
            await self._attend(process, launch.stdin, report_out, log_out)
        finally:
            self.pid, self.ready = None, False
            if self._pidfd is not None:
                os.close(self._pidfd)
                self._pidfd = None
        return f"ended ({describe_exit(self.last_exit)})"

    async def _attend(
        self, process: asyncio.subprocess.Process, stdin: bytes, report_out: int, log_out: int
    ) -> None:
        self.pid = process.pid
        # Not process.send_signal(): that polls, and so takes the exit status from under asyncio's watcher.
        with contextlib.suppress(ProcessLookupError):
            self._pidfd = os.pidfd_open(process.pid)
        if self._stop_signal:
            self._signal(self._stop_signal)
        if self._renewing:
            self.kill()
        readers = [
            asyncio.create_task(self._listen(report_out), name=f"{self.name} reports"),
            asyncio.create_task(self._copy_log(log_out), name=f"{self.name} log"),
        ]
        try:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                process.stdin.write(stdin)
                await process.stdin.drain()
            process.stdin.close()
            self.last_exit = await process.wait()
            await asyncio.wait(readers, timeout=LAST_WORDS_SECONDS)
        except asyncio.CancelledError:
            self.kill()
            await process.wait()
            raise
        finally:
            for reader in readers:
                reader.cancel()
            for result in await asyncio.gather(*readers, return_exceptions=True):
                if isinstance(result, Exception):
                    raise result

    async def _listen(self, pipe: int) -> None:
        """Read reports until the process closes the pipe; whoever closes it without ending is ended."""
        async with _reading(pipe, MAX_REPORT) as reader:
            try:
                while line := await reader.readline():
                    self._take(line)
            except ValueError:
                log.error("%s sent an endless report; ending it", self.name)
        self.kill()

    async def _copy_log(self, pipe: int) -> None:
        """Copy what the process logs to the supervisor's own standard error, a line at a time."""
        allowance, refilled, dropped = float(LOG_LINES_AT_ONCE), time.monotonic(), 0
        async with _reading(pipe, MAX_LOG_LINE) as reader:
            while line := await _line(reader):
                now = time.monotonic()
                allowance = min(allowance + (now - refilled) * LOG_LINES_PER_SECOND, LOG_LINES_AT_ONCE)
                refilled = now
                if allowance < 1:
                    dropped += 1
                    continue
                allowance -= 1
                if dropped:
                    log.warning("%s logs too much: %d lines dropped", self.name, dropped)
                    dropped = 0
                sys.stderr.write(line.translate(_PRINTABLE).decode(errors="replace"))
                sys.stderr.flush()
        if dropped:
            log.warning("%s logged too much: %d lines dropped", self.name, dropped)

    def _take(self, line: bytes) -> None:
        try:
            report = json.loads(line)
        except (ValueError, RecursionError):
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
        """Send `signal`, also to a process that is only just being started, and do not restart it."""
        self._stop_signal = signal
        self._stop.set()
        self._signal(signal)

    def finish(self) -> None:
        """Do not restart it once it has ended by itself, with exit status 0."""
        self._finishing = True

    def renew(self) -> None:
        """End it at once and start it anew with what `launch` says then. That is no failure."""
        self._renewing = True
        self.kill()

    def kill(self) -> None:
        """End it at once. Safe at any point: custody never depends on a graceful end."""
        self._signal(9)

    def _signal(self, number: int) -> None:
        if self._pidfd is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

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


@contextlib.asynccontextmanager
async def _reading(pipe: int, limit: int) -> AsyncIterator[asyncio.StreamReader]:
    """The read end of a pipe as a stream, closed at the end."""
    reader = asyncio.StreamReader(limit=limit)
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(pipe, "rb", 0)
    )
    try:
        yield reader
    finally:
        transport.close()


async def _line(reader: asyncio.StreamReader) -> bytes:
    """The next line with its end; a piece of `MAX_LOG_LINE` bytes of a longer one; nothing at the end."""
    try:
        return await reader.readuntil(b"\n")
    except asyncio.LimitOverrunError:
        return await reader.read(MAX_LOG_LINE) + b"\n"
    except asyncio.IncompleteReadError as rest:
        return rest.partial + b"\n" if rest.partial else b""


def worker_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Of the supervisor's environment what a worker gets.

    A worker finds medferry where the supervisor found it, and never looks for modules in the directory that
    medferry happened to be started in.
    """
    kept = {name: environment[name] for name in PASSED_ENVIRONMENT if name in environment}
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    if os.path.basename(here) != "site-packages":
        kept["PYTHONPATH"] = os.pathsep.join(filter(None, [kept.get("PYTHONPATH", ""), here]))
    return {**kept, "PYTHONSAFEPATH": "1"}


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
