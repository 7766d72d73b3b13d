"""The running product, as its users start it: ``medferry run FILE`` in a process of its own.

    with running(studies(listen=port, destinations={"pacs": pacs.address}), tmp_path) as relay:
        ...
        relay.status()["lanes"]

`running` waits for the line that begins with "ready"; at the end it sends SIGTERM and insists on exit code 0.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import tomllib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from relay.config import split_address

READY_SECONDS = 30.0
"""From start to the "ready" line. Imports take the most of it on a loaded machine."""

COMMAND_SECONDS = 30.0
"""For a short command such as ``status``."""

MEDFERRY = (sys.executable, "-m", "relay.cli")

REPOSITORY = Path(__file__).resolve().parents[1]


class ProductFailed(AssertionError):
    """The product did not start, or did not end as promised. Carries what it printed."""


@dataclass(slots=True, kw_only=True)
class Product:
    """A relay that runs. `process` is its supervisor."""

    process: subprocess.Popen[str]
    directory: Path
    config_file: Path
    config: dict[str, Any]
    lines: list[str] = field(default_factory=list)
    """What it printed so far, standard output and standard error together."""
    _ready: threading.Event = field(default_factory=threading.Event)
    _reader: threading.Thread | None = None

    @property
    def state(self) -> Path:
        """The state directory: spools and quarantine."""
        return Path(self.directory / self.config["relay"].get("state", "medferry-state"))

    @property
    def log(self) -> str:
        """What it printed so far."""
        return "".join(self.lines)

    def lane(self, name: str) -> dict[str, Any]:
        """The ``[[lane]]`` table of this name, as written."""
        return next(lane for lane in self.config["lane"] if lane["name"] == name)

    def address(self, lane: str) -> tuple[str, int]:
        """Where the source of the DICOM lane listens."""
        return split_address(self.lane(lane)["source"]["listen"])

    def command(self, *arguments: str, expect: Collection[int] = (0,)) -> str:
        """Run ``medferry ARGUMENTS`` beside the running relay; its standard output.

        Raises:
            ProductFailed: The exit code is none of `expect`.
        """
        done = subprocess.run(
            [*MEDFERRY, *arguments],
            cwd=self.directory,
            env=_environment(),
            capture_output=True,
            text=True,
            timeout=COMMAND_SECONDS,
            check=False,
        )
        if done.returncode not in expect:
            raise ProductFailed(f"medferry {' '.join(arguments)}: exit {done.returncode}: {done.stderr}")
        return done.stdout

    def status(self) -> dict[str, Any]:
        """``medferry status --json``. Exit code 3, which it has while something is not well, is allowed."""
        text = self.command("status", "--state", str(self.state), "--json", expect=(0, 3))
        answer: dict[str, Any] = json.loads(text)
        return answer

    def quarantine(self) -> list[dict[str, Any]]:
        """``medferry quarantine ls --json``: what was refused."""
        text = self.command("quarantine", "ls", "--state", str(self.state), "--json", "--limit", "1000")
        items: list[dict[str, Any]] = json.loads(text)
        return items

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if line.startswith("ready"):
                self._ready.set()
        self._ready.set()

    def _wait_ready(self) -> None:
        self._reader = threading.Thread(target=self._read, name="product output")
        self._reader.start()
        self._ready.wait(READY_SECONDS)
        if not any(line.startswith("ready") for line in self.lines):
            raise ProductFailed(f"not ready after {READY_SECONDS:.0f} s; it printed:\n{self.log}")

    def terminate(self) -> int:
        """SIGTERM, then the exit code. It must have drained within its own drain time and some grace.

        Raises:
            ProductFailed: It had to be killed.
        """
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        limit = float(self.config["relay"].get("drain_seconds", 20)) + 10
        try:
            return self.process.wait(limit)
        except subprocess.TimeoutExpired:
            raise ProductFailed(f"still running {limit:.0f} s after SIGTERM:\n{self.log}") from None

    def kill(self) -> None:
        """SIGKILL to the supervisor and all it started, if anything is left."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        if self._reader is not None:
            self._reader.join()
        if self.process.stdout is not None:
            self.process.stdout.close()


def _environment() -> dict[str, str]:
    paths = [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}


@contextlib.contextmanager
def running(config: str, directory: Path, *, drain: bool = True) -> Iterator[Product]:
    """Start ``medferry run`` with the text of a configuration file; stop it when the block ends.

    Args:
        config: TOML. Listening addresses must name free ports (`tests.peers.free_port`).
        directory: Working directory: the file is written here, a relative state directory lies here.
        drain: At the end send SIGTERM and insist on exit code 0. Otherwise kill everything.

    Raises:
        ProductFailed: Not ready in time, or a drain that failed. An error in the block comes first.
    """
    directory.mkdir(parents=True, exist_ok=True)
    config_file = directory / "medferry.toml"
    config_file.write_text(config)
    process = subprocess.Popen(
        [*MEDFERRY, "run", str(config_file)],
        cwd=directory,
        env=_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    product = Product(
        process=process, directory=directory, config_file=config_file, config=tomllib.loads(config)
    )
    try:
        product._wait_ready()
        yield product
        if drain and product.terminate() != 0:
            raise ProductFailed(f"exit code {process.returncode} after SIGTERM:\n{product.log}")
    finally:
        product.kill()


def studies(
    *,
    listen: str,
    destinations: Mapping[str, tuple[str, str]],
    source: str = "",
    sink: str = "",
    relay: str = "",
) -> str:
    """A configuration with one DICOM lane named ``studies``, open to everyone on loopback.

    Args:
        listen: ``host:port`` of the source.
        destinations: By name, AE title and ``host:port``.
        source: More lines for the source's table.
        sink: More lines for the sink's table.
        relay: More lines for the relay's table.
    """
    tables = "".join(
        f'[[lane.sink.destination]]\nname = "{name}"\nae_title = "{ae_title}"\naddress = "{address}"\n'
        for name, (ae_title, address) in destinations.items()
    )
    return f"""\
[relay]
name = "test"
state = "state"
{relay}
[[lane]]
name = "studies"
kind = "dicom"
lab = true
[lane.source]
listen = "{listen}"
ae_title = "MEDFERRY"
accept = [ {{ ae_title = "*", from = ["127.0.0.0/8", "::1/128"] }} ]
{source}
[lane.sink]
ae_title = "MEDFERRY"
{sink}
{tables}"""
