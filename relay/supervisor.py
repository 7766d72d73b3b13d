"""The supervisor: one process that starts, watches and ends all others, and carries no data.

For each lane it makes the link's sockets, opens the listening sockets, and keeps source, valve and sink
alive. It holds the only copies of the sockets that outlive a worker, so that any of the three may be killed
at any time and goes on where it was. SIGTERM drains: sources first, then what is in the link, then sinks,
within `relay.drain_seconds`. SIGHUP reads the configuration again; lanes that did not change are not touched.

`medferry status` asks it over a Unix socket in the state directory, open to its own user alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import itertools
import json
import logging
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from relay import valve
from relay.config import Config, LaneSettings, RelaySettings, SideSettings, read
from relay.confine import EMPTY_NETNS, Confinement, may_go_first, needed_paths, possible, reachable
from relay.errors import ConfigError, MedferryError
from relay.lanes import LANE_KINDS
from relay.listeners import open_listener
from relay.process import Launch, Process, within
from relay.systemd import notify
from relay.trays import Trays, make_trays
from relay.users import slot_of, uid_of
from relay.valve_link import Pairs, make_pairs
from relay.wire import KEY_BYTES

log = logging.getLogger("medferry")

SideName = Literal["source", "sink"]

CONTROL_SOCKET = "control.sock"
LOCK_FILE = "lock"
SOURCE_SHARE = 0.5
SINK_SHARE = 0.4
"""Of the drain time, what sources and sinks may use; the rest is for the link between them."""

MAX_FILE_BYTES = 1 << 20
"""Bytes of a key, certificate or SDP file: a longer one is refused, since it is something else."""

LIVE_NICE = -15
"""Of the processes of lanes whose data is worthless when late: pictures and sound pass before studies, which
still get one part in thirty of a processor that both want for good."""

ASK_SECONDS = 5.0
MAX_STATE_BYTES = 16 << 20
"""Limits of a status answer: time, and bytes for `config.MAX_LANES` lanes of `process.MAX_REPORT` each."""

CLAIM = "protocol separation, software-enforced one-way"
"""What one Linux machine can honestly claim; physical separation needs two and a fibre."""


@dataclass(frozen=True, slots=True)
class LogSettings:
    """How workers log; the same for all."""

    style: Literal["json", "text"] = "text"
    level: str = "info"


class Epochs:
    """Numbers that only rise, also over restarts of the supervisor: seconds of the wall clock or one more."""

    def __init__(self) -> None:
        self._last = 0

    def next(self) -> int:
        """A number that was never returned before."""
        self._last = max(self._last + 1, int(time.time()))
        return self._last


@dataclass(slots=True)
class Lane:
    """One lane at run time: its sockets, its key, its three processes."""

    settings: LaneSettings
    number: int
    slot: int
    """Which uids its processes get (`users`)."""
    relay: RelaySettings
    epochs: Epochs
    logs: LogSettings
    on_change: Callable[[], None]
    pairs: Pairs = field(default_factory=make_pairs)
    key: bytes = field(default_factory=lambda: secrets.token_bytes(KEY_BYTES))
    trays: Trays | None = None
    """Where its records are pictures."""
    sockets: dict[SideName, dict[str, list[socket.socket]]] = field(default_factory=dict)
    draining: bool = False
    _source_was_ready: bool = False
    _source_epoch: int = 0
    _files: dict[SideName, dict[str, int]] = field(default_factory=dict)
    _tasks: tuple[asyncio.Task[None], ...] = ()
    source: Process = field(init=False)
    valve: Process = field(init=False)
    sink: Process = field(init=False)

    def __post_init__(self) -> None:
        name = self.settings.name
        self.source = Process(f"{name}.source", lambda fd: self._launch("source", fd), self._source_heard)
        self.valve = Process(f"{name}.valve", self._launch_valve, self._heard)
        self.sink = Process(f"{name}.sink", lambda fd: self._launch("sink", fd), self._heard)

    @property
    def processes(self) -> tuple[Process, Process, Process]:
        """Source, valve, sink."""
        return self.source, self.valve, self.sink

    @property
    def ready(self) -> bool:
        """Whether all three are up and listen."""
        return all(process.ready for process in self.processes)

    def _source_heard(self, report: dict[str, Any]) -> None:
        self._source_was_ready |= bool(report.get("ready"))
        self._heard(report)

    def _heard(self, report: dict[str, Any]) -> None:
        if report.get("ready"):
            self.on_change()

    def side(self, name: SideName) -> SideSettings:
        """The settings of one side."""
        return self.settings.source if name == "source" else self.settings.sink

    def directory(self, name: SideName) -> str:
        """The side's own directory."""
        return os.path.join(os.path.abspath(self.relay.state), "lanes", self.settings.name, name)

    def confinement(self, name: SideName | Literal["valve"]) -> Confinement:
        """What the process `name` gives up on this host, as this user."""
        measures = possible()
        if name == "valve":
            paths = (*needed_paths(), os.path.dirname(os.path.abspath(valve.__file__)))
            netns = EMPTY_NETNS if measures["network namespace"] else None
        else:
            paths = (*needed_paths(), self.directory(name))
            netns = self.side(name).netns
        uid = None
        if self.relay.separate_users and measures["own uid"]:
            own = uid_of(self.relay.uid_base, self.slot, name)
            uid = own if measures["own view of files"] or reachable(own, paths) else None
        nice = LIVE_NICE if LANE_KINDS[self.settings.kind].live and may_go_first() else 0
        return Confinement(uid=uid, netns=netns, paths=paths, nice=nice, parent=os.getpid())

    def open(self) -> None:
        """Open the listening sockets, the directories of both sides, and the trays.

        Raises:
            MedferryError: Something cannot be opened; nothing stays open.
        """
        try:
            if LANE_KINDS[self.settings.kind].live:
                self.trays = self._make_trays()
            for name in ("source", "sink"):
                side = self.side(name)
                if side.netns is not None and not possible()["network namespace"]:
                    raise MedferryError(
                        f"lane {self.settings.name!r}.{name}: netns = {side.netns!r} needs CAP_SYS_ADMIN: "
                        "run medferry as root or remove the key"
                    )
                for listener in side.listeners():
                    try:
                        opened = open_listener(listener, side.netns)
                    except MedferryError as error:
                        key = _key_of(side.model_dump(), listener.address) or listener.name
                        raise MedferryError(f"lane {self.settings.name!r}.{name}.{key}: {error}") from None
                    self.sockets.setdefault(name, {}).setdefault(listener.name, []).extend(opened)
                self._prepare_directory(name)
                self._copy_files(name)
        except OSError as error:
            self.close()
            raise MedferryError(
                f"lane {self.settings.name!r}: {error.filename}: {error.strerror}: "
                "medferry's user must be able to read files and to write into the state directory"
            ) from None
        except MedferryError:
            self.close()
            raise

    def _make_trays(self) -> Trays:
        try:
            return make_trays()
        except OSError as error:
            raise MedferryError(
                f"lane {self.settings.name!r}: no memory for its pictures to cross by: {error.strerror}: "
                "raise LimitNOFILE= or MemoryMax= of the service, or run fewer lanes"
            ) from None

    def _prepare_directory(self, name: SideName) -> None:
        directory = self.directory(name)
        os.makedirs(directory, mode=0o700, exist_ok=True)
        uid = self.confinement(name).uid
        if uid is None or os.stat(directory).st_uid == uid:
            return
        for parent, _, files in os.walk(directory):
            for path in (parent, *(os.path.join(parent, file) for file in files)):
                os.chown(path, uid, uid, follow_symlinks=False)

    def start(self, tasks: asyncio.TaskGroup) -> None:
        """Start the three processes and keep them alive, in `tasks`: a fault of ours ends the relay."""
        self._tasks = tuple(tasks.create_task(item.run(), name=item.name) for item in self.processes)

    def _copy_files(self, name: SideName) -> dict[str, int]:
        """The contents of the side's files in sealed memory, since its uid may not read them."""
        self._close_files(name)
        copies = self._files.setdefault(name, {})
        for path in self.side(name).files():
            with open(path, "rb") as file:
                content = file.read(MAX_FILE_BYTES + 1)
            if len(content) > MAX_FILE_BYTES:
                # A part of it would be something else than what was meant.
                raise MedferryError(
                    f"lane {self.settings.name!r}.{name}: {path} has over {MAX_FILE_BYTES} bytes: "
                    "name a file with a key, a certificate or an SDP alone"
                )
            fd = copies[path] = os.memfd_create("file", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.write(fd, content)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        return copies

    def _close_files(self, name: SideName) -> None:
        for fd in self._files.pop(name, {}).values():
            os.close(fd)

    def _launch(self, name: SideName, report_fd: int) -> Launch:
        end = (self.pairs.source_end if name == "source" else self.pairs.sink_end).fileno()
        tray = self.trays and (self.trays.source_end if name == "source" else self.trays.sink_end)
        listeners = [
            {"name": key, "fd": sock.fileno()}
            for key, sockets in self.sockets.get(name, {}).items()
            for sock in sockets
        ]
        files = self._copy_files(name)
        epoch = self.epochs.next()
        if name == "source":
            # No earlier source can have spoken for this epoch: the valve passes none beyond it.
            self._source_epoch = epoch
            self.valve.renew()
        boot = {
            "relay_name": self.relay.name,
            "side": name,
            # Without the other side's table: B must not even hold the names and addresses of A.
            "lane": self.settings.model_dump(
                mode="json", by_alias=True, exclude={"sink" if name == "source" else "source"}
            ),
            "lane_number": self.number,
            "serve": getattr(LANE_KINDS[self.settings.kind], name),
            "settings": LANE_KINDS[self.settings.kind].settings,
            "key": self.key.hex(),
            "epoch": epoch,
            "link_is_new": name == "source" and not self._source_was_ready,
            "state": self.directory(name),
            "link_fd": end,
            "tray_fd": tray,
            "report_fd": report_fd,
            "listeners": listeners,
            "files": files,
            "drain_seconds": self.relay.drain_seconds * (SOURCE_SHARE if name == "source" else SINK_SHARE),
            "log_style": self.logs.style,
            "log_level": self.logs.level,
        }
        ends = (end,) if tray is None else (end, tray)
        inherited = (*ends, *(sock.fileno() for sock in self._listening(name)), *files.values())
        return Launch(
            command=self.confinement(name).command([sys.executable, "-m", "relay.worker"]),
            descriptors=inherited,
            stdin=json.dumps(boot).encode(),
        )

    def _listening(self, name: SideName) -> Iterator[socket.socket]:
        for sockets in self.sockets.get(name, {}).values():
            yield from sockets

    def _launch_valve(self, report_fd: int) -> Launch:
        if not self.draining:
            self._renew_pairs()
        ends = (self.pairs.valve_in.fileno(), self.pairs.valve_out.fileno())
        trays = () if self.trays is None else (self.trays.valve_in, self.trays.valve_out)
        rate = self.settings.link_bytes_per_second
        arguments = (*ends, report_fd, self.number, self._source_epoch, rate, *trays)
        program = [sys.executable, "-I", os.path.abspath(valve.__file__), *map(str, arguments)]
        return Launch(command=self.confinement("valve").command(program), descriptors=(*ends, *trays))

    def _renew_pairs(self) -> None:
        """Give a side that shut its own end of the link a new one, in a new process."""
        old, self.pairs = self.pairs, self.pairs.renewed()
        if self.pairs.source_end is not old.source_end:
            log.error("%s shut its end of the link; ending it", self.source.name)
            self.source.kill()
        if self.pairs.sink_end is not old.sink_end:
            log.error("%s shut its end of the link; ending it", self.sink.name)
            self.sink.kill()

    async def drain(self, deadline: float) -> None:
        """End the lane in the direction of the data, by `deadline` (of `time.monotonic`) at the latest."""
        self.draining = True
        started = time.monotonic()
        self.source.stop(signal.SIGTERM)
        await self._end(self.source, started + (deadline - started) * SOURCE_SHARE)
        # The valve sees the end of A once nobody holds A's end, and the sink the end of the valve.
        self.pairs.source_end.close()
        self.valve.finish()
        await self._end(self.valve, deadline - (deadline - started) * SINK_SHARE / 2)
        self.pairs.valve_in.close()
        self.pairs.valve_out.close()
        self.sink.stop(signal.SIGTERM)
        await self._end(self.sink, deadline)
        # Not gather(): who cancels a drain must not take its processes' caretakers with it.
        await asyncio.wait(self._tasks)
        self.close()

    async def _end(self, process: Process, deadline: float) -> None:
        if not await within(deadline - time.monotonic(), process.ended.wait()):
            log.warning("%s did not end in time and was killed; what it held is in its spool", process.name)
            process.stop(signal.SIGKILL)
            await process.ended.wait()

    def close(self) -> None:
        """Close every socket of the lane."""
        self.pairs.close()
        if self.trays is not None:
            self.trays.close()
            self.trays = None
        for name in ("source", "sink"):
            self._close_files(name)
            for sock in self._listening(name):
                sock.close()

    def state(self) -> dict[str, Any]:
        """What status shows of the lane."""
        up = [process.ready for process in self.processes]
        state = (
            "draining" if self.draining else "running" if all(up) else "degraded" if any(up) else "starting"
        )
        isolation = {
            "source": self.confinement("source"),
            "valve": self.confinement("valve"),
            "sink": self.confinement("sink"),
        }
        return {
            "name": self.settings.name,
            "kind": self.settings.kind,
            "lab": self.settings.lab,
            "state": state,
            **{
                name: {**process.state(), "isolation": confinement.describe()}
                for (name, confinement), process in zip(isolation.items(), self.processes, strict=True)
            },
        }


def _key_of(table: dict[str, Any], address: str) -> str:
    """The key below `table` whose value is `address`, as ``whip.listen``; nothing where it is no key's."""
    for key, value in table.items():
        if value == address:
            return key
        if isinstance(value, dict) and (inner := _key_of(value, address)):
            return f"{key}.{inner}"
    return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """A reload that did not take place."""

    problems: tuple[str, ...]
    back: tuple[str, ...] = ()
    """Lanes that were ended for it and run again as before."""
    lost: tuple[str, ...] = ()
    """Lanes that were ended for it and could not be put back."""

    @property
    def outcome(self) -> str:
        """What became of the lanes, for the log."""
        parts = []
        if self.back:
            parts.append(f"ended and started again as before: {', '.join(self.back)}")
        if self.lost:
            parts.append(f"ended and not put back: {', '.join(self.lost)}")
        return "; ".join(parts) or "nothing changed"


class Supervisor:
    """All lanes of one relay, from `run` to its end."""

    def __init__(self, path: str, config: Config, logs: LogSettings) -> None:
        self._path = path
        self._config = config
        self._logs = logs
        self._epochs = Epochs()
        self._lanes: dict[str, Lane] = {}
        self._started_at = time.monotonic()
        self._not_started: dict[str, str] = {}
        self._refused = ""
        """What the service manager is told beside that the lanes listen: of a reload that was refused."""
        self._changed = asyncio.Event()
        self._announced = False
        self._stop = asyncio.Event()
        self._reload = asyncio.Event()
        self._state = "starting"

    async def run(self) -> None:
        """Run until SIGTERM or SIGINT, then drain.

        Raises:
            MedferryError: The relay cannot start: the state directory is taken, or a lane cannot listen.
        """
        lock = self._lock_state()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        loop.add_signal_handler(signal.SIGHUP, self._reload.set)
        # The command held back those that came before this; processes must not inherit that.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
        control = await self._serve_control()
        try:
            for settings in self._config.lanes:
                self._lanes[settings.name] = self._open(settings)
            async with asyncio.TaskGroup() as tasks:
                for lane in self._lanes.values():
                    lane.start(tasks)
                watchers = [tasks.create_task(self._announce()), tasks.create_task(self._reloads(tasks))]
                await self._stop.wait()
                for watcher in watchers:
                    watcher.cancel()
                await self._drain(list(self._lanes.values()))
        finally:
            for lane in self._lanes.values():
                lane.close()
            control.close()
            with contextlib.suppress(FileNotFoundError):  # Python 3.13 removes it on closing
                os.unlink(self._control_path)
            os.close(lock)

    def _lock_state(self) -> int:
        state = os.path.abspath(self._config.relay.state)
        try:
            os.makedirs(state, mode=0o711, exist_ok=True)
            self._directory = os.open(state, os.O_DIRECTORY | os.O_RDONLY | os.O_CLOEXEC)
            fd = os.open(LOCK_FILE, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=self._directory)
        except OSError as error:
            raise MedferryError(
                f"cannot use {state}: {error.strerror}: choose another [relay] state"
            ) from None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise MedferryError(f"{state} is in use by another medferry: stop it first") from None
        return fd

    @property
    def _control_path(self) -> str:
        # Through the descriptor, since a socket's path may have no more than 107 bytes.
        return f"/proc/self/fd/{self._directory}/{CONTROL_SOCKET}"

    async def _serve_control(self) -> asyncio.Server:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._control_path)
        mask = os.umask(0o177)
        try:
            return await asyncio.start_unix_server(self._answer, self._control_path)
        finally:
            os.umask(mask)

    async def _answer(self, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            writer.write(json.dumps(self.state()).encode())
            if not await within(ASK_SECONDS, writer.drain()):
                # Who asked gave up by now: what is left of the answer need not be kept for it.
                writer.transport.abort()
        writer.close()

    def _open(self, settings: LaneSettings) -> Lane:
        relay, running = self._config.relay, self._lanes.values()
        numbers = {lane.number for lane in running}
        lanes = os.path.join(os.path.abspath(relay.state), "lanes")
        lane = Lane(
            settings=settings,
            number=next(number for number in itertools.count(1) if number not in numbers),
            slot=slot_of(lanes, settings.name, relay.uid_base, {lane.slot for lane in running}),
            relay=relay,
            epochs=self._epochs,
            logs=self._logs,
            on_change=self._changed.set,
        )
        lane.open()
        return lane

    async def _announce(self) -> None:
        """Say on standard output and to the service manager that every lane listens; again after a reload."""
        while True:
            self._changed.clear()
            if not self._announced and all(lane.ready for lane in self._lanes.values()):
                self._announced = True
                self._state = "ready"
                listen = f"{len(self._lanes)} lane(s) listen"
                print(f"ready: {listen}: {', '.join(self._lanes)}", flush=True)
                notify(READY=1, STATUS=listen + self._refused, MAINPID=os.getpid())
            await self._changed.wait()

    async def _reloads(self, tasks: asyncio.TaskGroup) -> None:
        while True:
            await self._reload.wait()
            self._reload.clear()
            notify(RELOADING=1, MONOTONIC_USEC=time.monotonic_ns() // 1000)
            refusal = await self._reload_once(tasks)
            self._refused = ""
            if refusal is not None:
                for problem in refusal.problems:
                    log.error("reload refused, %s: %s", refusal.outcome, problem)
                self._refused = f"; reload refused: {len(refusal.problems)} problem(s), see the log"
            if refusal is None or refusal.back or refusal.lost:
                self._announced, self._state = False, "starting"
                self._changed.set()
            else:
                notify(READY=1, STATUS=self._refused.removeprefix("; "))

    async def _reload_once(self, tasks: asyncio.TaskGroup) -> Refusal | None:
        """Go over to the file as it is now, or say why not and put everything back as it was."""
        try:
            config = read(self._path)
        except ConfigError as error:
            return Refusal(problems=tuple(error.problems))
        if config.relay != self._config.relay:
            return Refusal(problems=("[relay] itself changed: restart medferry for that",))
        wanted = {settings.name: settings for settings in config.lanes}
        gone = {name: lane for name, lane in self._lanes.items() if lane.settings != wanted.get(name)}
        # New lanes may listen where old ones did, so these end before it is known that those can start.
        await self._drain(list(gone.values()))
        for name in gone:
            del self._lanes[name]
        problems = self._open_all([item for name, item in wanted.items() if name not in self._lanes], tasks)
        if problems:
            self._not_started = {}
            for lane in gone.values():
                for problem in self._open_all([lane.settings], tasks):
                    log.error("lane %s could not be put back: %s", lane.settings.name, problem)
                    self._not_started[lane.settings.name] = problem
            back = tuple(name for name in gone if name not in self._not_started)
            return Refusal(problems=tuple(problems), back=back, lost=tuple(self._not_started))
        self._config, self._not_started = config, {}
        log.info("reloaded: %d lane(s), %d ended or changed", len(self._lanes), len(gone))
        return None

    def _open_all(self, lanes: list[LaneSettings], tasks: asyncio.TaskGroup) -> list[str]:
        """Open and start all of `lanes`, or none; returns what was in the way."""
        opened: list[Lane] = []
        problems = []
        for settings in lanes:
            try:
                lane = self._open(settings)
            except MedferryError as error:
                problems.append(str(error))
                continue
            opened.append(lane)
            self._lanes[settings.name] = lane
        for lane in opened:
            if problems:
                lane.close()
                del self._lanes[lane.settings.name]
            else:
                lane.start(tasks)
        return problems

    async def _drain(self, lanes: list[Lane]) -> None:
        if self._stop.is_set():
            self._state = "draining"
            notify(STOPPING=1)
        deadline = time.monotonic() + self._config.relay.drain_seconds
        await asyncio.gather(*(lane.drain(deadline) for lane in lanes))

    def state(self) -> dict[str, Any]:
        """The whole relay, as `medferry status --json` prints it."""
        return {
            "relay": self._config.relay.name,
            "pid": os.getpid(),
            "state": self._state,
            "up_seconds": round(time.monotonic() - self._started_at, 1),
            "claim": CLAIM,
            "isolation_possible": possible(),
            "lanes": [lane.state() for lane in self._lanes.values()],
            "not_started": self._not_started,
        }


def ask(state_directory: str) -> dict[str, Any]:
    """The state of the relay that runs on `state_directory`.

    Raises:
        MedferryError: None runs there, or it belongs to another user.
    """
    try:
        directory = os.open(state_directory, os.O_DIRECTORY | os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise MedferryError(
            f"no relay on {state_directory}: {error.strerror}: name its state directory with --state"
        ) from None
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(ASK_SECONDS)
            sock.connect(f"/proc/self/fd/{directory}/{CONTROL_SOCKET}")
            with sock.makefile("rb") as answer:
                state: dict[str, Any] = json.loads(answer.read(MAX_STATE_BYTES))
                return state
    except (OSError, ValueError) as error:
        # ValueError: it ended in the middle of its answer.
        reason = (error.strerror if isinstance(error, OSError) else None) or "it does not answer"
        raise MedferryError(
            f"no relay runs on {state_directory} ({reason}): start it with medferry run FILE"
        ) from None
    finally:
        os.close(directory)
