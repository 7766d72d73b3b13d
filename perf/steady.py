"""What an open association feels like: latency of one object, C-ECHO round trip, and what idling costs."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from dicom.bench_objects import image, new_uid_block
from perf.arrivals import Arrivals
from perf.client import CT_IMAGE_STORAGE, EXPLICIT_LE, IMPLICIT_LE, VERIFICATION, Client, NotUnderstood
from perf.processes import cpu_seconds, tree
from perf.samples import FULL
from perf.ways import opened

ARRIVAL_SECONDS = 30.0

IDLE_ASSOCIATIONS = 64

CONTEXTS = [(VERIFICATION, [IMPLICIT_LE]), (CT_IMAGE_STORAGE, [EXPLICIT_LE])]

Figures = dict[str, float]


def quantiles(nanoseconds: list[int]) -> Figures:
    """p50, p99 and the largest, in milliseconds, by nearest rank."""
    ordered = sorted(nanoseconds)

    def rank(share: float) -> float:
        return round(ordered[max(0, -int(-share * len(ordered) // 1) - 1)] / 1e6, 3)

    return {"p50_ms": rank(0.5), "p99_ms": rank(0.99), "max_ms": rank(1.0), "count": len(ordered)}


def latency(
    way: str, directory: Path, count: int, progress: Callable[[int], None] = lambda count: None
) -> dict[str, Figures]:
    """One CT of 0.5 MB after the other over an open association, each sent when the last has been stored.

    ``custody_to_delivered`` runs from the C-STORE response to the receiver's closed file. A way that answers
    only after it has delivered has no custody of its own; it shows as zero. ``sent_to_delivered`` runs from
    the first byte sent. The first two objects open the associations and are not counted.
    """
    object_ = image(FULL["ct"])
    block = new_uid_block()
    custody, whole = [], []
    with (
        opened(way, directory) as (entry, receiver),
        Arrivals(receiver.directory) as arrivals,
        Client((entry.host, entry.port), entry.ae_title, CONTEXTS) as client,
    ):
        for number in range(count + 2):
            name = object_.renew(block + number)
            started = time.monotonic_ns()
            status = client.store(object_.sop_class, name, object_.data)
            answered = time.monotonic_ns()
            if status:
                raise NotUnderstood(f"C-STORE status {status:#06x}")
            if not arrivals.wait([name], ARRIVAL_SECONDS):
                raise TimeoutError(f"{way}: an object was not delivered within {ARRIVAL_SECONDS:.0f} s")
            custody.append(max(arrivals.times[name] - answered, 0))
            whole.append(arrivals.times[name] - started)
            progress(number)
    return {"custody_to_delivered": quantiles(custody[2:]), "sent_to_delivered": quantiles(whole[2:])}


def echo(way: str, directory: Path, count: int) -> Figures:
    """C-ECHO round trips on one open association."""
    with (
        opened(way, directory) as (entry, _),
        Client((entry.host, entry.port), entry.ae_title, CONTEXTS) as client,
    ):
        client.echo()
        return quantiles([client.echo() for _ in range(count)])


def idle(way: str, directory: Path, seconds: float) -> Figures:
    """CPU of the way's processes over `seconds` with no association, and with 64 that say nothing."""
    with opened(way, directory) as (entry, _), ExitStack() as stack:
        without = _cpu_over(entry.pid, seconds)
        for _ in range(IDLE_ASSOCIATIONS):
            client = Client((entry.host, entry.port), entry.ae_title, CONTEXTS)
            stack.enter_context(client)
            client.echo()
        with_them = _cpu_over(entry.pid, seconds)
    return {
        "associations": IDLE_ASSOCIATIONS,
        "seconds": seconds,
        "cpu_seconds_without": round(without, 4),
        "cpu_seconds": round(with_them, 4),
        "share_of_a_core": round(max(with_them - without, 0.0) / seconds, 5),
    }


def _cpu_over(pid: int, seconds: float) -> float:
    """CPU that the tree below `pid` uses while `seconds` pass."""
    pids = tree(pid)
    before = sum(map(cpu_seconds, pids))
    time.sleep(seconds)
    return sum(map(cpu_seconds, pids)) - before
