"""The media benchmark: medferry beside no relay, GStreamer, FFmpeg and a plain aiortc relay, in one run.

    python -m perf.rtc                  # all but the slope: about half an hour on two cores
    python -m perf.rtc --quick          # the same shapes, short: shows that it works, not how fast it is
    python -m perf.rtc --parts slope --minutes 30
    python -m perf.rtc --parts latency --ways direct,gstreamer,medferry --kinds 720p30 --repeat 5

Parts:

* ``latency``: one stream at 720p30, 1080p30 and 720p60, H.264; VP8 and WebRTC at 720p30. "Added" is what a
  way takes beyond the direct one, which is the same ends with nothing in between: for the WebRTC ways, one
  WebRTC connection between them, so that SRTP and the viewer's own share are in both and cancel out.
* ``streams``: one, two, three … up to twelve at once: CPU a stream, and how many are sustained (added p99
  below 33 ms, 98 % of the pictures there).
* ``viewers``: the relay's CPU with five WebRTC viewers of a stream, less that with one, for each of the four.
* ``loss``: 1 %, 5 % and bursts at an RTT of 40 ms, media and feedback alike, on the way into the relay (RTP)
  and on the way to its viewer (WebRTC). Frozen time is counted as browsers do (`rtc.bench_report`).
* ``fall``: the path to a WebRTC viewer, who reports what arrives, falls from 4 to 1 Mb/s: seconds until its
  latency is back below 200 ms for two seconds, without a freeze.
* ``flood``: video with and without a C-STORE flood on another lane of the same relay.
* ``slope``: only on request: latency and memory over `--minutes`, first fifth against last.

Exit code 0: all targets that were measured hold; 1: one was missed, or medferry failed; 2: wrong usage.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from perf import report, rtc_plot, rtc_report
from perf.dicom import machine
from perf.rtc_figures import MAX_STREAMS, Runs
from perf.rtc_peers import WAYS
from perf.rtc_plan import LOSSES, ON_REQUEST, PARTS, SIZES, Choice, Plan, Run, carry_out, plans
from perf.rtc_run import run

LOG_COLUMNS = 150
"""Width of the tables where the output is no terminal."""

SECONDS, QUICK_SECONDS = 10.0, 4.0

FALL_SECONDS = 20.0
"""Of a ``fall`` run at least: four before the path falls, and sixteen to come back."""


def _words(known: Sequence[str]) -> Any:
    def parse(text: str) -> list[str]:
        chosen = [word.strip() for word in text.split(",") if word.strip()]
        for word in chosen:
            if word not in known:
                raise argparse.ArgumentTypeError(f"{word!r}: choose from {','.join(known)}")
        return chosen

    return parse


def _earlier(text: str) -> Runs:
    """The runs of a file that ``--json`` wrote."""
    try:
        runs: Runs = json.loads(Path(text).read_text())["runs"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise argparse.ArgumentTypeError(f"{text} has no results of this benchmark: {error}") from None
    return runs


def options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line, parsed. `choice` is what of it says what to measure."""
    parser = argparse.ArgumentParser(
        prog="python -m perf.rtc",
        description=(__doc__ or "").replace("%", "%%"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    losses = list(LOSSES)[1:]
    default_parts = [part for part in PARTS if part not in ON_REQUEST]
    parser.add_argument("--parts", type=_words(list(PARTS)), default=default_parts, help=",".join(PARTS))
    parser.add_argument("--ways", type=_words(list(WAYS)), default=list(WAYS), help=",".join(WAYS))
    parser.add_argument("--codecs", type=_words(("h264", "vp8")), help="h264,vp8")
    parser.add_argument("--kinds", type=_words(list(SIZES)), help=",".join(SIZES))
    parser.add_argument("--streams", type=int, help="always measured up to so many; default 6")
    parser.add_argument("--losses", type=_words(losses), help=",".join(losses).replace("%", "%%"))
    parser.add_argument("--seconds", type=float, help="of each run; default 10")
    parser.add_argument("--minutes", type=float, default=30.0, help="of the slope run; default 30")
    parser.add_argument("--repeat", type=int, default=1, help="of every run; medians are reported")
    parser.add_argument("--quick", action="store_true", help="720p30 H.264, two streams, one loss, short")
    parser.add_argument("--json", type=Path, default=Path("perf/results/rtc.json"), help="where results go")
    parser.add_argument(
        "--with",
        type=_earlier,
        nargs="+",
        default=[],
        dest="earlier",
        metavar="JSON",
        help="results of earlier runs, reported and plotted with these; with --parts '' they are all",
    )
    parser.add_argument("--plot", type=Path, help="write a picture (needs matplotlib)")
    default = Path(tempfile.gettempdir()) / "medferry-perf-rtc"
    parser.add_argument("--work", type=Path, default=default, help=f"default {default}")
    chosen = parser.parse_args(arguments)
    quick = chosen.quick
    chosen.seconds = chosen.seconds or (QUICK_SECONDS if quick else SECONDS)
    chosen.choice = Choice(
        parts=chosen.parts,
        ways=chosen.ways,
        codecs=chosen.codecs or (["h264"] if quick else ["h264", "vp8"]),
        kinds=chosen.kinds or (["720p30"] if quick else list(SIZES)),
        losses=chosen.losses or (["1 %"] if quick else losses),
        streams=chosen.streams or (2 if quick else 6),
        most_streams=(chosen.streams or 2) if quick else MAX_STREAMS,
        repeat=chosen.repeat,
    )
    return chosen


def _seconds(plan: Plan, chosen: argparse.Namespace) -> float:
    if plan.part == "slope":
        return float(60 * chosen.minutes)
    return float(max(chosen.seconds, FALL_SECONDS) if plan.part == "fall" else chosen.seconds)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit code as above."""
    chosen = options(arguments)
    console = Console() if sys.stdout.isatty() else Console(width=LOG_COLUMNS)
    earlier = [run for runs in chosen.earlier for run in runs]
    results: report.Results = {"machine": machine(), "quick": chosen.quick, "runs": earlier}
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("media")
        for done in carry_out(plans(chosen.choice), lambda plan: _run(plan, chosen, progress, task)):
            results["runs"].append(asdict(done))
            # After each run: what was measured is kept if the rest is broken off.
            _write(results, chosen.json)
    found = report.rows(results, rtc_report.TARGETS)
    console.print(rtc_report.runs_table(results))
    console.print(rtc_report.notes_table(results))
    console.print(report.table(found, "Targets"))
    for item in results["runs"]:
        if item["failure"]:
            console.print(f"failed: {item['plan']['way']}: {item['failure']}", style="red", markup=False)
    if chosen.plot:
        rtc_plot.plot(results, chosen.plot)
    ours = [
        item for item in results["runs"] if item["failure"] and item["plan"]["way"].startswith("medferry")
    ]
    return 1 if ours or any(row.verdict == "missed" for row in found) else 0


def _write(results: report.Results, path: Path) -> None:
    results["rows"] = [row.as_json() for row in report.rows(results, rtc_report.TARGETS)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1))


def _run(plan: Plan, chosen: argparse.Namespace, progress: Progress, task: TaskID) -> Run:
    progress.update(task, description=str(plan))
    return run(plan, _seconds(plan, chosen), chosen.work)


if __name__ == "__main__":
    sys.exit(main())
