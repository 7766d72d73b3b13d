"""Carries out one plan: opens the way, lets the ends run, watches what it costs, and closes everything."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import uvloop

from dicom.bench_objects import image
from perf import rtc_ends
from perf.clip import clip
from perf.processes import cpu_seconds, resident, tree
from perf.rtc_ends import Feed
from perf.rtc_fall import recovery_seconds
from perf.rtc_peers import WAYS, Entry, Load, WayFailed
from perf.rtc_plan import FALL_TO, Plan, Run
from perf.samples import FULL
from relay.errors import MedferryError
from rtc.bench_report import percentile
from tests.interop.dicom_peers import PeerFailed
from tests.product import REPOSITORY

WARM_UP_SECONDS = 3.0
"""FFmpeg shows nothing before it has probed its input and met a keyframe; codecs and rates settle."""

TAIL_SECONDS = 0.5
"""After the measured time, for pictures still on their way."""

BEFORE_THE_FALL = 0.2
"""Share of the measured time that passes before the path falls."""

SLOPE_POINTS = 50

END_SECONDS = 10.0

FAILURES = (*WayFailed, PeerFailed, MedferryError, TimeoutError)
"""What a way under test may do wrong. It is recorded and the benchmark goes on."""


@dataclasses.dataclass(slots=True)
class _Notes:
    """What is noted while a run goes on, beside what its ends see."""

    recovery_seconds: float | None = None
    memory: list[dict[str, float]] = dataclasses.field(default_factory=list)
    """Minutes since the beginning, and megabytes by process."""


During = Callable[[list[Feed], Entry, float, _Notes], Awaitable[None]]
"""What happens in the measured time of so many seconds; returns when it is over."""


async def _pass(feeds: list[Feed], entry: Entry, seconds: float, notes: _Notes) -> None:
    await asyncio.sleep(seconds)


async def _fall(feeds: list[Feed], entry: Entry, seconds: float, notes: _Notes) -> None:
    """The path to the viewer falls, and stays so."""
    await asyncio.sleep(BEFORE_THE_FALL * seconds)
    (feed,) = feeds
    (proxy,) = feed.proxies
    proxy.impair(back=dataclasses.replace(proxy.impairments[1], rate=FALL_TO))
    fell_us = _now_us()
    await asyncio.sleep((1 - BEFORE_THE_FALL) * seconds)
    seen = feed.player.resolve(feed.sightings.seen)
    notes.recovery_seconds = recovery_seconds(seen, fell_us, _now_us(), feed.player.clip.size.rate)


async def _slope(feeds: list[Feed], entry: Entry, seconds: float, notes: _Notes) -> None:
    """Note the memory of each process, evenly."""
    started = time.monotonic()
    for number in range(SLOPE_POINTS):
        await asyncio.sleep(max(started + seconds * (number + 1) / SLOPE_POINTS - time.monotonic(), 0))
        point = {name: size / 1e6 for root in entry.pids for name, size in resident(root).items()}
        notes.memory.append({"minutes": round((time.monotonic() - started) / 60, 3), **point})


DURING: dict[str, During] = {"fall": _fall, "slope": _slope}


def _now_us() -> int:
    return time.monotonic_ns() // 1000


def _cpu(pids: Sequence[int]) -> float:
    return sum(cpu_seconds(pid) for root in pids for pid in tree(root))


async def _measure(plan: Plan, entry: Entry, seconds: float) -> Run:
    notes = _Notes()
    async with rtc_ends.running(plan, entry) as feeds:
        await asyncio.sleep(WARM_UP_SECONDS)
        for feed in feeds:
            feed.begin()
        start_us, cpu, own = _now_us(), _cpu(entry.pids), time.process_time()
        await DURING.get(plan.part, _pass)(feeds, entry, seconds, notes)
        end_us = _now_us()
        wall = (end_us - start_us) / 1e6
        cpu_share, own_share = (_cpu(entry.pids) - cpu) / wall, (time.process_time() - own) / wall
        await asyncio.sleep(TAIL_SECONDS)
    reports = [feed.report(start_us, end_us) for feed in feeds]
    series: list[dict[str, float]] = []
    if plan.part == "slope":
        series = [{**point, **p50} for point, p50 in zip(notes.memory, _medians(reports[0]), strict=True)]
        # Half an hour's are in the series.
        reports[0]["latencies_ms"] = []
    return Run(
        plan=plan,
        reports=reports,
        cpu_share=cpu_share,
        ends_cpu_share=own_share,
        recovery_seconds=notes.recovery_seconds,
        series=series,
    )


def _medians(report: dict[str, Any]) -> Iterator[dict[str, float]]:
    """The latency's median in each of the slope's intervals."""
    latencies = report["latencies_ms"]
    for number in range(SLOPE_POINTS):
        start, end = (len(latencies) * at // SLOPE_POINTS for at in (number, number + 1))
        yield {"p50_ms": percentile(sorted(latencies[start:end]), 0.5)}


@contextlib.contextmanager
def _flooding(entry: Entry, flood: bool) -> Iterator[list[int]]:
    """A flood of the DICOM lane while the block runs; then the list holds how many objects were stored."""
    stored: list[int] = []
    if not flood:
        yield stored
        return
    assert entry.studies is not None
    # Made here, so that the flood begins at once: it takes a second.
    image(FULL["ct"])
    host, port = entry.studies
    command = [sys.executable, "-m", "perf.flood", host, str(port), "MEDFERRY"]
    process = subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        yield stored
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            output, _ = process.communicate(timeout=END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
    last = output.strip().rpartition("\n")[2]
    if not last.isdigit():
        raise RuntimeError(f"the flood ended: {output[-300:]}")
    stored.append(int(last))


def run(plan: Plan, seconds: float, directory: Path) -> Run:
    """Open the way, measure for so many seconds, close it. A failure of the way is in the run."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    size = plan.size
    load = Load(
        codec=plan.codec, size=size, bitrate=plan.bitrate, streams=plan.streams, studies=plan.part == "flood"
    )
    # Encoded before anything is measured.
    clip(plan.codec, size.width, size.height, size.rate, plan.bitrate)
    try:
        with WAYS[plan.way](directory, load) as entry, _flooding(entry, plan.flood) as stored:
            found = uvloop.run(_measure(plan, entry, seconds))
            hops = _hops(entry, plan)
    except FAILURES as error:
        return Run(plan=plan, failure=f"{type(error).__name__}: {error}")
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    return dataclasses.replace(found, hops=hops, stored=sum(stored))


def _hops(entry: Entry, plan: Plan) -> list[dict[str, dict[str, float]]]:
    """Each stream's latency histograms, as medferry's status has them."""
    if entry.product is None or not plan.way.startswith("medferry"):
        return []
    lanes = entry.product.status()["lanes"]
    sinks = [lane["sink"]["figures"] for lane in lanes if "streams" in lane["sink"].get("figures", {})]
    return [stream["latency"] for sink in sinks for stream in sink["streams"].values()]
