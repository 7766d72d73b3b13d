"""A running relay of fake lanes, and a client that speaks to their sources."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from relay.config import split_address
from relay.confine import possible
from relay.supervisor import ask
from tests.peers import free_port
from tests.product import REPOSITORY, Product, running

WAIT_SECONDS = 20.0
COMMAND = (sys.executable, "-P", "-m", "tests.fake_lane.run")
"""Like the installed command, it does not look for modules in the working directory."""


def lane(
    name: str,
    *,
    port: int | None = None,
    source: str = "",
    sink: str = "",
    extra: str = "",
    kind: str = "fake",
) -> str:
    """The ``[[lane]]`` table of a fake lane, with more keys for its parts."""
    return f"""
[[lane]]
name = "{name}"
kind = "{kind}"
{extra}
[lane.source]
listen = "127.0.0.1:{free_port() if port is None else port}"
{source}
[lane.sink]
{sink}
"""


def relay(*lanes: str, keys: str = "") -> str:
    """A whole file."""
    return f'[relay]\nname = "test"\n{keys}\n' + "".join(lanes)


@contextlib.contextmanager
def medferry() -> Iterator[None]:
    """Everything that starts ``medferry`` in this block starts the one that knows fake lanes."""
    with mock.patch("tests.product.MEDFERRY", COMMAND):
        yield


@contextlib.contextmanager
def relaying(config: str, directory: Path, *, drain: bool = True) -> Iterator[Product]:
    """A relay of fake lanes; see `tests.product.running`."""
    with medferry(), running(config, directory, drain=drain) as product:
        yield product


def command(*arguments: str, directory: Path) -> subprocess.CompletedProcess[str]:
    """Run ``medferry ARGUMENTS`` to its end, as one that knows fake lanes."""
    return subprocess.run(
        [*COMMAND, *arguments],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


@dataclass(slots=True)
class Client:
    """A sender on side A."""

    sock: socket.socket

    def ask(self, line: str) -> str:
        """Send a line; the answer's first line."""
        self.sock.sendall(line.encode() + b"\n")
        answer = b""
        while not answer.endswith(b"\n"):
            more = self.sock.recv(1 << 16)
            if not more:
                raise ConnectionError("the source hung up")
            answer += more
        return answer.decode().splitlines()[0]

    def send(self, number: int) -> None:
        """Hand over the record of a number."""
        assert self.ask(f"{number:032x}") == "ok"


@contextlib.contextmanager
def client(product: Product, name: str) -> Iterator[Client]:
    """A connection to the source of lane `name`."""
    address = split_address(product.lane(name)["source"]["listen"])
    with socket.create_connection(address, WAIT_SECONDS) as sock:
        yield Client(sock)


def arrived(product: Product, name: str) -> list[int]:
    """The numbers that the sink of lane `name` has written down."""
    path = product.state / "lanes" / name / "sink" / "arrived"
    return [int(line, 16) for line in path.read_text().split()]


def lane_state(product: Product, name: str) -> dict[str, Any]:
    """The part of the status about one lane. Status 3, not all well, will do."""
    found: dict[str, Any] = next(item for item in ask(str(product.state))["lanes"] if item["name"] == name)
    return found


def pids(product: Product, name: str) -> dict[str, int]:
    """Pids of source, valve and sink."""
    state = lane_state(product, name)
    return {part: state[part]["pid"] for part in ("source", "valve", "sink")}


def until(condition: Callable[[], object], what: str) -> None:
    """Wait for something that other processes do.

    Raises:
        AssertionError: It did not come within `WAIT_SECONDS`.
    """
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain: {what}"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    """Whether a process is there and not only waits to be buried."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def root() -> bool:
    """Whether this run may change uids and namespaces."""
    return all(possible().values())
