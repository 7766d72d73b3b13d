"""One timed transfer: storescu to the receiver by one way, with one or several associations at once.

The clock starts when the first sender is started and stops when the last object is a closed file in the
receiver's directory. Every object is then compared, byte by byte, with what was sent: a benchmark that loses
or changes one has failed, however fast it was.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from perf.arrivals import Arrivals
from perf.client import CT_IMAGE_STORAGE, EXPLICIT_LE, Client
from perf.processes import Usage, usage
from perf.samples import HEADER_BYTES, Sample, dataset_start, new_uid_block, stamp, uid
from perf.ways import Entry, opened
from tests.interop.dicom_peers import NO_STALL, Station, program, spawned, tail

COMPARE_BYTES = 1 << 20

WARM_UP_SECONDS = 30.0

STALL_SECONDS = 0.15
"""A sender that stalls needs 44 ms an object, and a receiver that stalls as much again; with room for noise."""

SLOWEST_BYTES_PER_SECOND = 10e6


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What one transfer is."""

    way: str
    set: str
    associations: int = 1
    nodelay: bool = True
    stock_receiver: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """What one transfer was. Rates are of the whole, from the sender's start to the last object stored."""

    plan: Plan
    objects: int
    bytes: int
    seconds: float
    """0.0 where the transfer failed."""
    slowest_share: float = 1.0
    """Rate of the slowest association over the mean of all."""
    identical: int = 0
    """Data sets that arrived byte for byte."""
    pixels_equal: int = 0
    processes: list[Usage] = field(default_factory=list)
    failure: str = ""

    @property
    def rate(self) -> float:
        """Objects a second; 0.0 where the transfer failed."""
        return self.objects / self.seconds if self.seconds and not self.failure else 0.0


def time_limit(samples: list[Sample]) -> float:
    """Seconds after which a transfer has failed: every object stalls twice and the disk is slow."""
    return 30 + len(samples) * STALL_SECONDS + sum(s.file_bytes for s in samples) / SLOWEST_BYTES_PER_SECOND


def compare(sample: Sample, received: Path) -> tuple[bool, bool]:
    """Whether the data set arrived byte for byte, and whether at least its pixels did."""
    with open(sample.path, "rb") as sent, received.open("rb") as got:
        start = dataset_start(got.read(HEADER_BYTES)[:144])
        same_size = received.stat().st_size - start == sample.file_bytes - sample.dataset_at
        if same_size and _equal_from(sent, sample.dataset_at, got, start):
            return True, True
        got.seek(-sample.pixel_bytes, os.SEEK_END)
        return False, _equal_from(sent, sample.file_bytes - sample.pixel_bytes, got, got.tell())


def _equal_from(one, one_at, other, other_at) -> bool:  # type: ignore[no-untyped-def]
    one.seek(one_at)
    other.seek(other_at)
    while piece := one.read(COMPARE_BYTES):
        if piece != other.read(COMPARE_BYTES):
            return False
    return not other.read(1)


def warm_up(entry: Entry, arrivals: Arrivals, sample: Sample) -> None:
    """Send one small object first, so that no way pays for its imports and first association in the figure."""
    name = uid(new_uid_block())
    data = bytearray(Path(sample.path).read_bytes()[sample.dataset_at :])
    at = sample.uid_at - sample.dataset_at
    data[at : at + len(name)] = name.encode()
    contexts = [(CT_IMAGE_STORAGE, [EXPLICIT_LE])]
    with Client((entry.host, entry.port), entry.ae_title, contexts) as client:
        client.store(CT_IMAGE_STORAGE, name, bytes(data))
    if not arrivals.wait([name], WARM_UP_SECONDS):
        raise TimeoutError(f"the first object did not arrive within {WARM_UP_SECONDS:.0f} s")


def divide(stamped: dict[str, Sample], associations: int, directory: Path) -> list[tuple[Path, list[str]]]:
    """One directory of links to files for each association, with the UIDs in it."""
    parts = []
    for number in range(associations):
        part = directory / f"association-{number}"
        part.mkdir(parents=True)
        names = list(stamped)[number::associations]
        for name in names:
            os.symlink(stamped[name].path, part / Path(stamped[name].path).name)
        parts.append((part, names))
    return parts


def send(entry: Entry, part: Path, *, nodelay: bool) -> tuple[list[str], dict[str, str]]:
    """Command and environment of DCMTK's storescu for one directory."""
    command = [program("storescu"), "--max-pdu", "131072", "--scan-directories", "--call", entry.ae_title]
    return [*command, entry.host, str(entry.port), str(part)], NO_STALL if nodelay else {}


def run(
    plan: Plan,
    samples: list[Sample],
    small: Sample,
    directory: Path,
    progress: Callable[[int], None] = lambda count: None,
) -> Transfer:
    """Open the way, send the set over it, check what arrived, close it again, remove what it wrote."""
    shutil.rmtree(directory, ignore_errors=True)
    try:
        with opened(plan.way, directory, stock_receiver=plan.stock_receiver) as (entry, receiver):
            return _timed(plan, samples, small, directory, entry, receiver, progress)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _timed(
    plan: Plan,
    samples: list[Sample],
    small: Sample,
    directory: Path,
    entry: Entry,
    receiver: Station,
    progress: Callable[[int], None],
) -> Transfer:
    stamped = stamp(samples)
    parts = divide(stamped, plan.associations, directory / "sent")
    with Arrivals(receiver.directory) as arrivals, ExitStack() as stack:
        warm_up(entry, arrivals, small)
        before = {item.pid: item.cpu_seconds for item in usage(entry.pid)}
        started = time.monotonic_ns()
        senders = []
        for number, (part, _) in enumerate(parts):
            command, environment = send(entry, part, nodelay=plan.nodelay)
            log = directory / f"storescu-{number}.log"
            senders.append((stack.enter_context(spawned(command, log, **environment)), log))
        all_there = arrivals.wait(stamped, time_limit(samples), progress)
        processes = [
            Usage(
                pid=item.pid,
                name=item.name,
                cpu_seconds=round(item.cpu_seconds - before.get(item.pid, 0.0), 3),
                peak_bytes=item.peak_bytes,
            )
            for item in usage(entry.pid)
        ]
        failure = "" if all_there else f"{len(stamped.keys() - arrivals.times.keys())} objects never arrived"
        failure = failure or _sender_failure(senders)
    rates = [len(names) / (max(arrivals.times.get(n, 0) for n in names) - started) for _, names in parts]
    identical = pixels = 0
    for path in receiver.directory.iterdir():
        sample = stamped.get(path.name.partition(".")[2])
        if sample is not None:
            whole, same_pixels = compare(sample, path)
            identical += whole
            pixels += same_pixels
    if not failure and pixels != len(samples):
        failure = f"pixels of {len(samples) - pixels} objects changed on the way"
    last = max((arrivals.times.get(name, started) for name in stamped), default=started)
    return Transfer(
        plan=plan,
        objects=len(samples),
        bytes=sum(sample.file_bytes for sample in samples),
        seconds=0.0 if failure else (last - started) / 1e9,
        slowest_share=1.0 if failure else min(rates) / (sum(rates) / len(rates)),
        identical=identical,
        pixels_equal=pixels,
        processes=processes,
        failure=failure,
    )


def _sender_failure(senders: list[tuple[subprocess.Popen[bytes], Path]]) -> str:
    for process, log in senders:
        code = process.wait(WARM_UP_SECONDS)
        if code:
            return f"storescu ended with {code}: {tail(log, 500)}"
    return ""
