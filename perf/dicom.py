"""The DICOM benchmark: medferry beside no relay at all, Orthanc and a plain pynetdicom relay, in one run.

    python -m perf.dicom                 # everything: about twenty minutes on two cores
    python -m perf.dicom --quick         # the same shapes, small: shows that it works, not how fast it is
    python -m perf.dicom --sets ct --peers direct,medferry --parts transfers --repeat 5

Parts: ``transfers`` (the three sets), ``latency``, ``echo``, ``idle``, ``curves``. Repeats are interleaved,
so that a slow minute of the machine hits every way alike; medians and ratios are reported. Exit code 0: all
targets that were measured hold; 1: one was missed, or medferry or the direct way failed; 2: wrong usage.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from perf import curves, report, steady
from perf.client import NotUnderstood
from perf.samples import FULL, QUICK, Sample, load
from perf.scratch import put_away, remove_all
from perf.transfer import Plan, Transfer, run
from perf.ways import WAYS, WayFailed
from tests.interop.dicom_peers import PeerFailed, program

PARTS = ("transfers", "latency", "echo", "idle", "curves")

RECEIVERS = ("nodelay", "stock")

STALLING = ("orthanc", "orthanc-nodelay", "pynetdicom")
"""Ways that need tens of milliseconds an object: they are sent the first `STALLING_OBJECTS` of a set."""

STALLING_OBJECTS = 200

LOG_COLUMNS = 120
"""Width of the tables where the output is no terminal."""

FAILURES = (*WayFailed, NotUnderstood, TimeoutError, ConnectionError)
"""What a way under test may do wrong. It is recorded and the benchmark goes on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How much of everything; the quick one shows only that it works."""

    latency_objects: int
    echoes: int
    idle_seconds: float
    curve_sizes: tuple[int, ...]
    curve_associations: tuple[int, ...]
    curve_contexts: tuple[int, ...]
    curve_waiting: tuple[int, ...]


FULL_SIZES = Sizes(
    latency_objects=300,
    echoes=2000,
    idle_seconds=10.0,
    curve_sizes=(10_000, 100_000, 1_000_000, 10_000_000, 100_000_000),
    curve_associations=(1, 2, 4, 8, 16, 32),
    curve_contexts=(1, 16, 64, 128),
    curve_waiting=(10, 1_000, 100_000),
)
QUICK_SIZES = Sizes(
    latency_objects=40,
    echoes=300,
    idle_seconds=2.0,
    curve_sizes=(10_000, 1_000_000, 10_000_000),
    curve_associations=(1, 4, 16),
    curve_contexts=(1, 128),
    curve_waiting=(10, 1_000),
)


@dataclass(slots=True, kw_only=True)
class Bench:
    """One run of the benchmark: its options, its progress bar, and the results so far."""

    options: argparse.Namespace
    sizes: Sizes
    samples: dict[str, list[Sample]]
    directory: Path
    progress: Progress
    results: report.Results = field(default_factory=dict)

    def step(self, text: str, count: int) -> tuple[TaskID, Callable[[int], None]]:
        """Begin a task on the progress bar; its id, and a function that says how much of it is done."""
        task = self.progress.add_task(text, total=count)
        return task, lambda done: self.progress.update(task, completed=done)

    def _plans(self) -> list[Plan]:
        """Everything through a receiver that does not stall, then the relays with one that is as it comes."""
        options = self.options
        plans = []
        if "nodelay" in options.receivers:
            plans += [
                Plan(way=way, set=set_, associations=associations, nodelay=nodelay)
                for set_ in options.sets
                for nodelay in options.nodelay
                for associations in options.associations
                for way in options.peers
            ]
        if "stock" in options.receivers:
            plans += [
                Plan(way=way, set=set_, stock_receiver=True)
                for set_ in options.sets
                for way in options.peers
                if way != "direct"
            ]
        return plans

    def transfers(self) -> None:
        """Every set by every way; repeats outermost, ways innermost."""
        plans = self._plans()
        done: list[dict[str, Any]] = self.results.setdefault("transfers", [])
        task, advance = self.step("transfers", len(plans) * self.options.repeat)
        for repeat in range(self.options.repeat):
            for number, plan in enumerate(plans):
                senders = "TCP_NODELAY" if plan.nodelay else "stock"
                text = f"{plan.set}, {senders}, {plan.associations} association(s), {plan.way}"
                text += ", stock receiver" if plan.stock_receiver else ""
                self.progress.update(task, description=text)
                done.append(asdict(self._transfer(plan)))
                advance(repeat * len(plans) + number + 1)

    def _transfer(self, plan: Plan) -> Transfer:
        samples = self.samples[plan.set]
        stalls = plan.way in STALLING or (plan.way == "direct" and not plan.nodelay)
        if stalls and not self.options.whole:
            samples = samples[:STALLING_OBJECTS]
        try:
            return run(plan, samples, self.samples["small"][0], self.directory)
        except FAILURES as error:
            return Transfer(plan=plan, objects=len(samples), bytes=0, seconds=0.0, failure=str(error))

    def each_way(self, part: str, measure: Callable[[str, Path], Any]) -> None:
        """Measure one figure of every way; a way that fails is recorded as such."""
        found = self.results.setdefault(part, {})
        task, advance = self.step(part, len(self.options.peers))
        for number, way in enumerate(self.options.peers):
            self.progress.update(task, description=f"{part}, {way}")
            found[way] = self.attempt(part, way, partial(measure, way, self.directory), {})
            advance(number + 1)

    def attempt(self, part: str, way: str, measure: Callable[[], Any], otherwise: Any) -> Any:
        """What `measure` returns; where a way fails, a line in ``failures`` and `otherwise`."""
        try:
            return measure()
        except FAILURES as error:
            failure = {"part": part, "way": way, "what": f"{type(error).__name__}: {error}"}
            self.results.setdefault("failures", []).append(failure)
            return otherwise
        finally:
            put_away(self.directory)

    def curves(self) -> None:
        """The four growth curves, of medferry and of no relay at all."""
        ways = [way for way in ("direct", "medferry") if way in self.options.peers]
        ours = [way for way in ways if way == "medferry"]
        sizes = self.sizes
        small, ct = self.samples["small"], self.samples["ct"]
        directory = self.directory
        measures: dict[str, Callable[[curves.Progress], list[curves.Point]]] = {
            "size": lambda say: curves.by_size(ways, sizes.curve_sizes, directory, say),
            "associations": lambda say: curves.by_associations(
                ways, sizes.curve_associations, ct, small[0], directory, say
            ),
            "contexts": lambda say: curves.by_contexts(ways, sizes.curve_contexts, directory, say),
            "waiting": lambda say: curves.by_waiting(sizes.curve_waiting, directory, say) if ours else [],
        }
        found = self.results.setdefault("curves", {})
        task, advance = self.step("curves", len(measures))
        for number, (name, measure) in enumerate(measures.items()):

            def say(text: str) -> None:
                self.progress.update(task, description=text)

            found[name] = self.attempt(f"curve of {name}", "medferry", partial(measure, say), [])
            advance(number + 1)

    def all(self) -> None:
        """The parts that were asked for, in order."""
        parts: dict[str, Callable[[], None]] = {
            "transfers": self.transfers,
            "latency": lambda: self.each_way(
                "latency", lambda way, at: steady.latency(way, at, self.sizes.latency_objects)
            ),
            "echo": lambda: self.each_way("echo", lambda way, at: steady.echo(way, at, self.sizes.echoes)),
            "idle": lambda: self.each_way(
                "idle", lambda way, at: steady.idle(way, at, self.sizes.idle_seconds)
            ),
            "curves": self.curves,
        }
        for part in PARTS:
            if part in self.options.parts:
                parts[part]()


def _version(name: str) -> str:
    try:
        done = subprocess.run([program(name), "--version"], capture_output=True, text=True, check=False)
    except PeerFailed as error:
        return str(error)
    return done.stdout.splitlines()[0].strip("$ \n") if done.stdout else "?"


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    with open("/proc/cpuinfo") as file:
        models = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    return {
        "cores": len(os.sched_getaffinity(0)),
        "cpu": models[0] if models else platform.machine(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "dcmtk": _version("storescp"),
        "orthanc": _version("Orthanc"),
    }


def _choice(known: Sequence[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        chosen = [word.strip() for word in text.split(",") if word.strip()]
        for word in chosen:
            if word not in known:
                raise argparse.ArgumentTypeError(f"{word!r}: choose from {','.join(known)}")
        return chosen

    return parse


def _counts(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line, parsed."""
    parser = argparse.ArgumentParser(prog="python -m perf.dicom", description=__doc__.partition("\n")[0])
    parser.add_argument("--sets", type=_choice(list(FULL)), default=list(FULL), help="small,ct,large")
    parser.add_argument("--parts", type=_choice(PARTS), default=list(PARTS), help=",".join(PARTS))
    parser.add_argument("--peers", type=_choice(list(WAYS)), default=list(WAYS), help=",".join(WAYS))
    parser.add_argument("--associations", type=_counts, default=[1, 4], help="at once; default 1,4")
    parser.add_argument(
        "--nodelay", type=_choice(("on", "off")), default=["on", "off"], help="of the senders"
    )
    parser.add_argument("--repeat", type=int, default=3, help="of every transfer; medians are reported")
    parser.add_argument("--quick", action="store_true", help="small sets, one repeat")
    parser.add_argument("--whole", action="store_true", help="send whole sets to the ways that stall, too")
    parser.add_argument(
        "--receivers",
        type=_choice(RECEIVERS),
        default=list(RECEIVERS),
        help="storescp with TCP_NODELAY in its environment, and as it comes (relays only); default both",
    )
    parser.add_argument("--json", type=Path, help="where results go; default perf/results/dicom.json")
    parser.add_argument("--plot", type=Path, help="write a picture (needs matplotlib)")
    default = Path(tempfile.gettempdir()) / "medferry-perf"
    parser.add_argument("--work", type=Path, default=default, help=f"samples and runs; default {default}")
    chosen = parser.parse_args(arguments)
    chosen.nodelay = [word == "on" for word in chosen.nodelay]
    if chosen.quick:
        chosen.repeat = 1
    return chosen


def _prepare(chosen: argparse.Namespace, progress: Progress) -> dict[str, list[Sample]]:
    specs = QUICK if chosen.quick else FULL
    names = [*chosen.sets, *(name for name in ("small", "ct") if name not in chosen.sets)]
    samples = {}
    for name in names:
        task = progress.add_task(f"making {name}", total=specs[name].count)
        samples[name] = load(specs[name], chosen.work / "samples", partial(progress.advance, task))
        progress.remove_task(task)
    return samples


def _terminated(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit code."""
    chosen = options(arguments)
    signal.signal(signal.SIGTERM, _terminated)
    console = Console() if sys.stdout.isatty() else Console(width=LOG_COLUMNS)
    started = time.monotonic()
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        bench = Bench(
            options=chosen,
            sizes=QUICK_SIZES if chosen.quick else FULL_SIZES,
            samples=_prepare(chosen, progress),
            directory=chosen.work / f"run-{os.getpid()}",
            progress=progress,
            results={"machine": machine(), "quick": chosen.quick, "repeat": chosen.repeat},
        )
        try:
            bench.all()
        except KeyboardInterrupt:
            console.print("interrupted; what was measured so far:")
            bench.results["interrupted"] = True
        finally:
            remove_all(bench.directory)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    bench.results["seconds"] = round(time.monotonic() - started, 1)
    return _conclude(bench.results, chosen, console)


def _conclude(results: report.Results, chosen: argparse.Namespace, console: Console) -> int:
    found = report.rows(results)
    results["rows"] = [row.as_json() for row in found]
    path = chosen.json or Path("perf/results/dicom.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1))
    console.print(report.rates_table(results))
    console.print(report.table(found, "Targets"))
    failures = [
        {"part": "transfer", "way": item["plan"]["way"], "what": item["failure"]}
        for item in results.get("transfers", [])
        if item["failure"]
    ]
    failures += results.get("failures", [])
    for failure in failures:
        console.print("failed: {part}, {way}: {what}".format(**failure), style="red", markup=False)
    failed = [failure for failure in failures if failure["way"] not in STALLING]
    if chosen.plot:
        report.plot(results, chosen.plot)
    console.print(f"{path}" + (f", {chosen.plot}" if chosen.plot else ""))
    missed = any(row.verdict == "missed" for row in found)
    return 1 if missed or failed or results.get("interrupted") else 0


if __name__ == "__main__":
    sys.exit(main())
