"""One timed transfer: storescu to the receiver by one way, with one or several associations at once.

The clock starts when the first sender opens its socket (loading and scanning the directory come before, and
are no part of a transfer) and stops when the last object is a closed file in the receiver's directory. Every
object is then compared, byte by byte, with what was sent: a benchmark that loses or changes one has failed,
however fast it was.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

from dicom.bench_objects import new_uid_block, uid
from perf.arrivals import Arrivals
from perf.client import CT_IMAGE_STORAGE, EXPLICIT_LE, Client
from perf.processes import Usage, usage
from perf.samples import HEADER_BYTES, Sample, dataset_start, stamp
from perf.scratch import put_away
from perf.ways import Entry, opened
from tests.interop.dicom_peers import NO_STALL, Station, program, spawned, tail

COMPARE_BYTES = 1 << 20

WARM_UP_SECONDS = 30.0

LOOK_SECONDS = 0.0005
"""Between two looks at whether a sender has connected: the error of the clock's start."""

STALL_SECONDS = 0.15
"""A sender that stalls needs 44 ms an object, a receiver that stalls as much again; with room for noise."""

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
    """What one transfer was. Rates are of the whole, from the first connection to the last object stored."""

    plan: Plan
    objects: int
    bytes: int
    seconds: float
    """0.0 where the transfer failed."""
    preparation_seconds: float = 0.0
    """What the first sender needed until it connected; not in `seconds`."""
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


def _equal_from(one: BinaryIO, one_at: int, other: BinaryIO, other_at: int) -> bool:
    one.seek(one_at)
    other.seek(other_at)
    while piece := one.read(COMPARE_BYTES):
        if piece != other.read(COMPARE_BYTES):
            return False
    return not other.read(1)


def warm_up(entry: Entry, arrivals: Arrivals, sample: Sample) -> None:
    """Send one small object first, so that no way's figure holds its imports and first association."""
    name = uid(new_uid_block())
    data = bytearray(Path(sample.path).read_bytes()[sample.dataset_at :])
    at = sample.uid_at - sample.dataset_at
    data[at : at + len(name)] = name.encode()
    contexts = [(CT_IMAGE_STORAGE, [EXPLICIT_LE])]
    with Client((entry.host, entry.port), entry.ae_title, contexts) as client:
        client.store(CT_IMAGE_STORAGE, name, bytes(data))
    if not arrivals.wait([name], WARM_UP_SECONDS):
        raise TimeoutError(f"the first object did not arrive within {WARM_UP_SECONDS:.0f} s")


def read_ahead(path: Path) -> None:
    """Have the file in the page cache, so that no way pays for the sender's disk."""
    with path.open("rb", buffering=0) as file:
        while file.read(COMPARE_BYTES):
            pass


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


def sender(host: str, port: int, ae_title: str, part: Path) -> list[str]:
    """The command that sends one directory with DCMTK's storescu."""
    options = ["--max-pdu", "131072", "--scan-directories", "--call", ae_title]
    return [program("storescu"), *options, host, str(port), str(part)]


def connection(processes: Sequence[subprocess.Popen[bytes]]) -> int:
    """Wait until one of `processes` holds a socket, or all have ended; that moment in monotonic ns.

    Their other descriptors are files. The look costs some 20 µs and happens before there is anything to time.
    """
    while any(process.poll() is None for process in processes):
        if any(map(_has_socket, processes)):
            break
        time.sleep(LOOK_SECONDS)
    return time.monotonic_ns()


def _has_socket(process: subprocess.Popen[bytes]) -> bool:
    directory = f"/proc/{process.pid}/fd"
    try:
        links = [os.readlink(f"{directory}/{name}") for name in os.listdir(directory)]
    except FileNotFoundError:  # the process, or one of its descriptors, went while we looked
        return False
    return any(link.startswith("socket:") for link in links)


def run(
    plan: Plan,
    samples: list[Sample],
    small: Sample,
    directory: Path,
    progress: Callable[[int], None] = lambda count: None,
) -> Transfer:
    """Open the way, send the set over it, check what arrived, close it again, put away what it wrote.

    Args:
        plan: Which way, how many associations, which senders.
        samples: The set; its files get new SOP Instance UIDs.
        small: A small object to warm the way up with.
        directory: For what the run writes; not there before, put away after (`scratch.put_away`).
        progress: Called with the number of objects that have arrived.
    """
    try:
        stamped = stamp(samples)
        for sample in samples:
            read_ahead(Path(sample.path))
        parts = divide(stamped, plan.associations, directory / "sent")
        with (
            opened(plan.way, directory, stock_receiver=plan.stock_receiver) as (entry, receiver),
            Arrivals(receiver.directory) as arrivals,
        ):
            warm_up(entry, arrivals, small)
            sent = _send(plan, entry, parts, arrivals, time_limit(samples), directory, progress)
            return _result(plan, stamped, parts, arrivals.times, receiver, sent)
    finally:
        put_away(directory)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sent:
    started_ns: int
    connected_ns: int
    processes: list[Usage]
    failure: str


def _send(
    plan: Plan,
    entry: Entry,
    parts: list[tuple[Path, list[str]]],
    arrivals: Arrivals,
    limit: float,
    directory: Path,
    progress: Callable[[int], None],
) -> _Sent:
    wanted = [name for _, names in parts for name in names]
    before = {item.pid: item.cpu_seconds for item in usage(entry.pid)}
    environment = NO_STALL if plan.nodelay else {}
    senders = []
    with ExitStack() as stack:
        started = time.monotonic_ns()
        for number, (part, _) in enumerate(parts):
            log = directory / f"storescu-{number}.log"
            command = sender(entry.host, entry.port, entry.ae_title, part)
            senders.append((stack.enter_context(spawned(command, log, **environment)), log))
        connected = connection([process for process, _ in senders])
        all_there = arrivals.wait(wanted, limit, progress)
        processes = [
            replace(item, cpu_seconds=round(item.cpu_seconds - before.get(item.pid, 0.0), 3))
            for item in usage(entry.pid)
        ]
        if all_there:
            failure = _sender_failure(senders)
        else:
            failure = f"{len(set(wanted) - arrivals.times.keys())} objects never arrived"
    return _Sent(started_ns=started, connected_ns=connected, processes=processes, failure=failure)


def _sender_failure(senders: list[tuple[subprocess.Popen[bytes], Path]]) -> str:
    for process, log in senders:
        code = process.wait(WARM_UP_SECONDS)
        if code:
            return f"storescu ended with {code}: {tail(log, 500)}"
    return ""


def _result(
    plan: Plan,
    stamped: dict[str, Sample],
    parts: list[tuple[Path, list[str]]],
    times: dict[str, int],
    receiver: Station,
    sent: _Sent,
) -> Transfer:
    identical = pixels = 0
    for path in receiver.directory.iterdir():
        sample = stamped.get(path.name.partition(".")[2])
        if sample is not None:
            whole, same_pixels = compare(sample, path)
            identical += whole
            pixels += same_pixels
    failure = sent.failure
    if not failure and pixels != len(stamped):
        failure = f"pixels of {len(stamped) - pixels} objects changed on the way"
    seconds, share = 0.0, 1.0
    if not failure:
        begun = sent.connected_ns
        rates = [len(names) / max(max(times[name] for name in names) - begun, 1) for _, names in parts]
        seconds = (max(times[name] for name in stamped) - begun) / 1e9
        share = min(rates) / (sum(rates) / len(rates))
    return Transfer(
        plan=plan,
        objects=len(stamped),
        bytes=sum(sample.file_bytes for sample in stamped.values()),
        seconds=seconds,
        preparation_seconds=(sent.connected_ns - sent.started_ns) / 1e9,
        slowest_share=share,
        identical=identical,
        pixels_equal=pixels,
        processes=sent.processes,
        failure=failure,
    )
