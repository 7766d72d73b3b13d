"""A real link for attacks: the real pairs, the real valve process between them, this process as A and B."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from relay import valve
from relay.trays import Trays, make_trays, tray_to_read, tray_to_write
from relay.valve_link import Pairs, make_pairs
from tests.relay.samples import LANE

NEWEST = 1000
"""The newest epoch that the valve lets pass, unless told otherwise."""

WAIT_SECONDS = 10.0


@dataclass(slots=True)
class Valve:
    """The valve process. `restart` is what the supervisor does when it was killed."""

    pairs: Pairs
    lane: int
    newest: int
    rate: int
    trays: Trays | None
    process: subprocess.Popen[bytes]
    reports: int

    @classmethod
    def start(
        cls,
        pairs: Pairs,
        lane: int = LANE,
        newest: int = NEWEST,
        rate: int = 0,
        trays: Trays | None = None,
    ) -> Valve:
        process, reports = _spawn(pairs, lane, newest, rate, trays)
        return cls(pairs, lane, newest, rate, trays, process, reports)

    def restart(self) -> None:
        self.kill()
        self.process, self.reports = _spawn(self.pairs, self.lane, self.newest, self.rate, self.trays)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.reports)

    def descriptors(self) -> dict[str, str]:
        """What the valve has open."""
        return descriptors(self.process.pid)

    def resident_bytes(self) -> int:
        """Memory of the valve."""
        with open(f"/proc/{self.process.pid}/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _spawn(
    pairs: Pairs, lane: int, newest: int, rate: int, trays: Trays | None
) -> tuple[subprocess.Popen[bytes], int]:
    reports, report_fd = os.pipe()
    ends = (pairs.valve_in.fileno(), pairs.valve_out.fileno(), report_fd)
    memories = () if trays is None else (trays.valve_in, trays.valve_out)
    command = [sys.executable, "-I", valve.__file__, *map(str, (*ends, lane, newest, rate, *memories))]
    process = subprocess.Popen(command, pass_fds=(*ends, *memories))
    os.close(report_fd)
    # Its first figures may follow at once.
    assert os.read(reports, 100).startswith(b'{"ready": true}\n')
    return process, reports


@contextlib.contextmanager
def link(*, newest: int = NEWEST, rate: int = 0, trays: bool = False) -> Iterator[Valve]:
    """Pairs with a valve in between, and trays if asked for. Closed and killed at the end."""
    pairs = make_pairs()
    running = Valve.start(pairs, newest=newest, rate=rate, trays=make_trays() if trays else None)
    try:
        yield running
    finally:
        running.kill()
        pairs.close()
        if running.trays is not None:
            running.trays.close()


def mapped(valve: Valve) -> tuple[memoryview, memoryview]:
    """A's tray, to write to, and B's, to read from, as source and sink map them."""
    assert valve.trays is not None
    return tray_to_write(os.dup(valve.trays.source_end)), tray_to_read(os.dup(valve.trays.sink_end))


def descriptors(pid: int) -> dict[str, str]:
    """Number and target of each descriptor of a process."""
    found = {}
    for number in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            found[number] = os.readlink(f"/proc/{pid}/fd/{number}")
    return found


def until(condition: Callable[[], object], what: str) -> None:
    """Wait for something that another process does.

    Raises:
        AssertionError: It did not come within `WAIT_SECONDS`.
    """
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain: {what}"
        time.sleep(0.01)


KCMP = {"x86_64": 312, "aarch64": 272}
KCMP_FILE = 0
_libc = ctypes.CDLL(None, use_errno=True)


def same_open_file(pid: int, fd: int, other_pid: int, other_fd: int) -> bool:
    """Whether two descriptors of two processes are one open file description (kcmp(2))."""
    number = KCMP.get(platform.machine())
    if number is None:
        pytest.skip(f"the number of kcmp(2) on {platform.machine()} is not known here")
    outcome = int(_libc.syscall(number, pid, other_pid, KCMP_FILE, fd, other_fd))
    if outcome < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return outcome == 0


def receive(sock: socket.socket, seconds: float = WAIT_SECONDS) -> tuple[bytes, list[tuple[int, int, bytes]]]:
    """One message with all the ancillary data there is."""
    sock.settimeout(seconds)
    data, ancillary, _, _ = sock.recvmsg(1 << 18, 1 << 16)
    return data, ancillary
