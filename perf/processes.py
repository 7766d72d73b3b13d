"""What processes cost, read from /proc: CPU seconds and peak memory of a process and all it started."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

PROCESS_CLOCK = 2
"""Of a process' clocks the scheduler's (the kernel's CPUCLOCK_SCHED)."""

TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """One process: CPU seconds so far and the most memory it ever had, in bytes."""

    pid: int
    name: str
    cpu_seconds: float
    peak_bytes: int


def _read(path: str) -> str:
    """The text of a /proc file; empty where the process is gone."""
    try:
        return Path(path).read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def children(pid: int) -> list[int]:
    """The process ids that the threads of `pid` started."""
    found: list[int] = []
    try:
        tasks = os.listdir(f"/proc/{pid}/task")
    except FileNotFoundError:
        return found
    for task in tasks:
        found += map(int, _read(f"/proc/{pid}/task/{task}/children").split())
    return found


def tree(pid: int) -> list[int]:
    """`pid` and all its living descendants."""
    found = [pid]
    for one in found:
        found += children(one)
    return found


def cpu_seconds(pid: int) -> float:
    """CPU that `pid` used, threads that have ended included, to the nanosecond; 0.0 where it is gone.

    Linux has a CPU clock for every process; its number is made of the process id (clock_getcpuclockid(3)).
    """
    try:
        return time.clock_gettime(~pid << 3 | PROCESS_CLOCK)
    except OSError:
        return 0.0


def _name(pid: int) -> str:
    command = _read(f"/proc/{pid}/cmdline").split("\0")
    return " ".join(Path(word).name if "/" in word else word for word in command).strip()[:80]


def usage(pid: int) -> list[Usage]:
    """Every process of the tree below `pid`, the root first. Those that end meanwhile are left out."""
    found = []
    for one in tree(pid):
        fields = dict(line.split(":", 1) for line in _read(f"/proc/{one}/status").splitlines())
        stat = _read(f"/proc/{one}/stat").rpartition(")")[2].split()
        if "VmHWM" not in fields or not stat:
            continue
        found.append(
            Usage(
                pid=one,
                name=_name(one),
                cpu_seconds=(int(stat[11]) + int(stat[12])) / TICKS,
                peak_bytes=int(fields["VmHWM"].split()[0]) * 1024,
            )
        )
    return found


def resident(pid: int) -> dict[str, int]:
    """Bytes that each process of the tree below `pid` has in memory now, shared pages included, by name.

    A process is named by its command line; those that share one are told apart by their order.
    """
    found: dict[str, int] = {}
    for one in tree(pid):
        fields = dict(line.split(":", 1) for line in _read(f"/proc/{one}/status").splitlines())
        if "VmRSS" in fields:
            name = _name(one)
            taken = sum(known.partition(" #")[0] == name for known in found)
            found[f"{name} #{taken + 1}" if taken else name] = int(fields["VmRSS"].split()[0]) * 1024
    return found
