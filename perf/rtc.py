"""The media benchmark: medferry beside no relay, GStreamer, FFmpeg and a plain aiortc relay, in one run.

    python -m perf.rtc                  # everything: about ten minutes on two cores
    python -m perf.rtc --quick          # the same shapes, short: shows that it works, not how fast it is
    python -m perf.rtc --parts latency --ways direct,medferry --codecs h264 --heights 720

Parts: ``latency`` (every codec and size, one stream), ``streams`` (one to six at once, CPU), ``loss`` (1 %,
5 %, bursts, on the way into the relay). Sender and receiver are the same for all ways, encode and decode in
this process, and read the time from a stamp in the picture; "added" is what a way takes beyond ``direct``.
WebRTC ways are compared with the same direct way: SRTP on loopback is a fraction of a millisecond.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import uvloop
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from perf import report, rtc_report
from perf.dicom import machine
from perf.processes import cpu_seconds, tree
from perf.rtc_peers import KEYFRAME_SECONDS, WAYS, Entry, Load, WayFailed
from relay.config import split_address
from relay.errors import MedferryError
from rtc.bench import Options, bench_rtp, bench_webrtc
from rtc.bench_report import Report
from rtc.camera import Size
from tests.netproxy import Impairment, UdpProxy

PARTS = ("latency", "streams", "loss")

HEIGHTS = {720: Size(width=1280, height=720), 1080: Size(width=1920, height=1080)}

BITRATES = {720: 4_000_000, 1080: 8_000_000}

LOSSES = {
    "none": Impairment(),
    "1 %": Impairment(drop=0.01),
    "5 %": Impairment(drop=0.05),
    "bursts": Impairment(burst=0.002, burst_length=12),
}

STREAMS_WAYS = ("direct", "medferry", "gstreamer")
LOSS_WAYS = ("medferry", "gstreamer", "ffmpeg")
WEBRTC_WAYS = ("medferry-webrtc", "aiortc")

WARM_UP_SECONDS = 3.0
"""FFmpeg shows nothing before it has probed its input and met a keyframe."""

LOG_COLUMNS = 140
"""Width of the tables where the output is no terminal."""

FAILURES = (*WayFailed, MedferryError, TimeoutError)
"""What a way under test may do wrong. It is recorded and the benchmark goes on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One run: so many streams of one kind, by one way, over one network."""

    way: str
    codec: str
    height: int
    streams: int = 1
    loss: str = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What it was. `cpu_share` is of one core, for the relay's processes and all streams together."""

    plan: Plan
    reports: list[dict[str, Any]] = field(default_factory=list)
    cpu_share: float = 0.0
    failure: str = ""


def plans(chosen: argparse.Namespace) -> Iterator[Plan]:
    """The runs that were asked for. Repeats are outermost: a slow minute hits every way alike."""
    for _ in range(chosen.repeat):
        if "latency" in chosen.parts:
            for height in chosen.heights:
                for codec in chosen.codecs:
                    for way in chosen.ways:
                        if way not in WEBRTC_WAYS or height == 720:
                            yield Plan(way=way, codec=codec, height=height)
        if "streams" in chosen.parts:
            for streams in chosen.streams:
                for way in STREAMS_WAYS:
                    if way in chosen.ways:
                        yield Plan(way=way, codec="h264", height=720, streams=streams)
        if "loss" in chosen.parts:
            for loss in chosen.losses:
                for way in LOSS_WAYS:
                    if way in chosen.ways:
                        yield Plan(way=way, codec="h264", height=720, loss=loss)


async def _measure(plan: Plan, entry: Entry, seconds: float) -> list[Report]:
    """All streams at once, through the bad network where the plan has one."""
    webrtc = plan.way in WEBRTC_WAYS
    async with AsyncExitStack() as stack:
        measurements = []
        for number, (source, sink) in enumerate(zip(entry.sources, entry.sinks, strict=True)):
            if plan.loss != "none":
                network = UdpProxy(target=split_address(source), forward=LOSSES[plan.loss], seed=number)
                source = "{}:{}".format(*(await stack.enter_async_context(network)).address)
            options = Options(
                source=source,
                sink=sink,
                seconds=seconds,
                warm_up_seconds=WARM_UP_SECONDS,
                codec="vp8" if plan.codec == "vp8" else "h264",
                size=HEIGHTS[plan.height],
                bitrate=BITRATES[plan.height],
                keyframe_seconds=KEYFRAME_SECONDS,
                # Only medferry is sent reports on the media port: its answers come back through the proxy.
                mux=plan.loss != "none" and plan.way == "medferry",
                name=plan.way,
            )
            measurements.append(bench_webrtc(options) if webrtc else bench_rtp(options))
        return await asyncio.gather(*measurements)


def run(plan: Plan, seconds: float, directory: Path) -> Run:
    """Open the way, measure, close it."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    load = Load(
        codec="vp8" if plan.codec == "vp8" else "h264",
        size=HEIGHTS[plan.height],
        bitrate=BITRATES[plan.height],
        streams=plan.streams,
    )
    try:
        with WAYS[plan.way](directory, load) as entry:
            before = sum(cpu_seconds(pid) for root in entry.pids for pid in tree(root))
            started = time.monotonic()
            reports = uvloop.run(_measure(plan, entry, seconds))
            used = sum(cpu_seconds(pid) for root in entry.pids for pid in tree(root)) - before
            share = used / (time.monotonic() - started)
    except FAILURES as error:
        return Run(plan=plan, failure=f"{type(error).__name__}: {error}")
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    return Run(plan=plan, reports=[item.as_json() for item in reports], cpu_share=share)


def _words(known: Sequence[str]) -> Any:
    def parse(text: str) -> list[str]:
        chosen = [word.strip() for word in text.split(",") if word.strip()]
        for word in chosen:
            if word not in known:
                raise argparse.ArgumentTypeError(f"{word!r}: choose from {','.join(known)}")
        return chosen

    return parse


def _numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line, parsed."""
    parser = argparse.ArgumentParser(prog="python -m perf.rtc", description=__doc__.partition("\n")[0])
    parser.add_argument("--parts", type=_words(PARTS), default=list(PARTS), help=",".join(PARTS))
    parser.add_argument("--ways", type=_words(list(WAYS)), default=list(WAYS), help=",".join(WAYS))
    parser.add_argument("--codecs", type=_words(("h264", "vp8")), help="h264,vp8")
    parser.add_argument("--heights", type=_numbers, help="720,1080")
    parser.add_argument("--streams", type=_numbers, help="at once; default 1,2,4,6")
    losses = ",".join(list(LOSSES)[1:]).replace("%", "%%")
    parser.add_argument("--losses", type=_words(list(LOSSES)), help=losses)
    parser.add_argument("--seconds", type=float, help="of each run; default 10")
    parser.add_argument("--repeat", type=int, default=1, help="of every run; medians are reported")
    parser.add_argument("--quick", action="store_true", help="720p H.264 only, short")
    parser.add_argument("--json", type=Path, default=Path("perf/results/rtc.json"), help="where results go")
    parser.add_argument("--plot", type=Path, help="write a picture (needs matplotlib)")
    default = Path(tempfile.gettempdir()) / "medferry-perf-rtc"
    parser.add_argument("--work", type=Path, default=default, help=f"default {default}")
    chosen = parser.parse_args(arguments)
    quick = chosen.quick
    chosen.codecs = chosen.codecs or (["h264"] if quick else ["h264", "vp8"])
    chosen.heights = chosen.heights or ([720] if quick else [720, 1080])
    chosen.streams = chosen.streams or ([2] if quick else [1, 2, 4, 6])
    chosen.losses = chosen.losses or (["5 %"] if quick else list(LOSSES)[1:])
    chosen.seconds = chosen.seconds or (4.0 if quick else 10.0)
    if unknown := set(chosen.heights) - set(HEIGHTS):
        parser.error(f"heights {sorted(unknown)}: choose from {sorted(HEIGHTS)}")
    return chosen


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit code: 0 all measured targets hold, 1 one was missed or medferry failed."""
    chosen = options(arguments)
    console = Console() if sys.stdout.isatty() else Console(width=LOG_COLUMNS)
    results: report.Results = {"machine": machine(), "quick": chosen.quick, "runs": []}
    wanted = list(plans(chosen))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("media", total=len(wanted))
        for plan in wanted:
            text = f"{plan.height}p {plan.codec}, {plan.streams} stream(s), loss {plan.loss}, {plan.way}"
            progress.update(task, description=text)
            results["runs"].append(asdict(run(plan, chosen.seconds, chosen.work)))
            progress.advance(task)
    found = report.rows(results, rtc_report.TARGETS)
    results["rows"] = [row.as_json() for row in found]
    chosen.json.parent.mkdir(parents=True, exist_ok=True)
    chosen.json.write_text(json.dumps(results, indent=1))
    console.print(rtc_report.runs_table(results))
    console.print(report.table(found, "Targets"))
    for item in results["runs"]:
        if item["failure"]:
            console.print(f"failed: {item['plan']['way']}: {item['failure']}", style="red", markup=False)
    if chosen.plot:
        rtc_report.plot(results, chosen.plot)
    ours = [
        item for item in results["runs"] if item["failure"] and item["plan"]["way"].startswith("medferry")
    ]
    return 1 if ours or any(row.verdict == "missed" for row in found) else 0


if __name__ == "__main__":
    sys.exit(main())
