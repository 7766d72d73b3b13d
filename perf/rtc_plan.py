"""What is measured: one `Plan` a run, and for each part of the benchmark the plans that it needs.

A part is a generator that yields plans and is sent what came of each, because some depend on it: the number
of streams rises until a way no longer keeps up. Repeats are outermost and ways innermost, so that a slow
minute of the machine hits every way alike.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from perf import rtc_figures
from rtc.camera import Size
from rtc.settings import VideoCodec
from tests.netproxy import Impairment

Edge = Literal["in", "viewer"]

SIZES = {"720p30": (1280, 720, 30), "1080p30": (1920, 1080, 30), "720p60": (1280, 720, 60)}

BITRATES = {"720p30": 4_000_000, "1080p30": 8_000_000, "720p60": 6_000_000}

RTT_SECONDS = 0.04

_HALF = RTT_SECONDS / 2

LOSSES = {
    "none": Impairment(),
    "1 %": Impairment(drop=0.01, delay=_HALF),
    "5 %": Impairment(drop=0.05, delay=_HALF),
    "bursts": Impairment(burst=0.002, burst_length=12, delay=_HALF),
}
"""Each way of a lossy edge: media one way, feedback the other. Random losses, or runs of 12 datagrams."""

VIEWERS = (1, 5)
VIEWER_BITRATE = 2_500_000

FALL_BITRATE = 3_000_000
"""Of the stream before the path falls: it fits the path, and a third of it fits the fallen one."""
FALL_FROM, FALL_TO = 4_000_000, 1_000_000

RTP_WAYS = ("direct", "medferry", "gstreamer", "ffmpeg")
WEBRTC_WAYS = ("direct-webrtc", "medferry-webrtc", "aiortc")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One run: so many streams of one kind, by one way, over one network. `bitrate` in bits a second."""

    part: str
    way: str
    codec: VideoCodec = "h264"
    kind: str = "720p30"
    bitrate: int = BITRATES["720p30"]
    streams: int = 1
    viewers: int = 1
    """WebRTC only, of the first stream; all but one only count what comes."""
    loss: str = "none"
    edge: Edge = "in"
    """Where the loss is: on the way into the relay, or between it and its viewer."""
    flood: bool = False
    """A DICOM lane of the same relay is flooded meanwhile."""
    every: int = 1
    """Of so many keyframe intervals one is decoded and measured."""
    repeat: int = 0
    """Also the seed of the bad network."""

    @property
    def size(self) -> Size:
        """Pixels and pictures a second."""
        return Size(*SIZES[self.kind])

    @property
    def webrtc(self) -> bool:
        """Whether it is WebRTC at both ends."""
        return self.way in WEBRTC_WAYS

    def __str__(self) -> str:
        words = [self.part, self.kind, self.codec, self.way]
        words += [f"{self.streams} streams"] if self.streams > 1 else []
        words += [f"{self.viewers} viewers"] if self.viewers > 1 else []
        words += [f"loss {self.loss} {self.edge}"] if self.loss != "none" else []
        words += ["flood"] if self.flood else []
        return ", ".join(words)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What it was. CPU shares are of one core, over the measured time."""

    plan: Plan
    reports: list[dict[str, Any]] = field(default_factory=list)
    """One a stream: `Report` as JSON, and `arrived_share` of the pictures sent that arrived whole."""
    cpu_share: float = 0.0
    """Of the relay's processes, for all streams and viewers together."""
    ends_cpu_share: float = 0.0
    """Of the benchmark's own process: sender, bad network and receiver."""
    hops: list[dict[str, dict[str, float]]] = field(default_factory=list)
    """medferry only, one a stream: the sink's latency histograms, by hop."""
    recovery_seconds: float | None = None
    """Part ``fall`` only."""
    stored: int = 0
    """Objects that the flood stored."""
    series: list[dict[str, float]] = field(default_factory=list)
    """Part ``slope`` only: minutes, p50_ms and megabytes of each process over time."""
    failure: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What the command line asked for."""

    parts: list[str]
    ways: list[str]
    codecs: list[VideoCodec]
    kinds: list[str]
    losses: list[str]
    streams: int
    """Always measured up to here; beyond, as long as a way keeps up."""
    most_streams: int = rtc_figures.MAX_STREAMS
    """Never more than so many."""
    repeat: int = 1


Plans = Generator[Plan, Run, None]


def _latency(choice: Choice, repeat: int) -> Plans:
    for kind in choice.kinds:
        for codec in choice.codecs:
            for way in choice.ways:
                # VP8 is for information, and WebRTC is compared at one size.
                if kind == "720p30" or (codec == "h264" and way in RTP_WAYS):
                    yield Plan(
                        part="latency", way=way, codec=codec, kind=kind, bitrate=BITRATES[kind], repeat=repeat
                    )


def _streams(choice: Choice, repeat: int) -> Plans:
    """One, two, three … streams at once. A number that a way does not sustain is tried once more."""
    done: list[dict[str, Any]] = []
    running = [way for way in ("medferry", "gstreamer", "ffmpeg") if way in choice.ways]
    for count in range(1, choice.most_streams + 1):
        for way in ["direct", *running]:
            for _ in range(2):
                plan = Plan(
                    part="streams", way=way, streams=count, every=2 if count > 1 else 1, repeat=repeat
                )
                ran = yield plan
                done.append(asdict(ran))
                if rtc_figures.sustained(done, way, count) or (way == "direct" and not ran.failure):
                    break
        if count >= choice.streams:
            running = [way for way in running if rtc_figures.sustained(done, way, count)]
        if not running:
            return


def _viewers(choice: Choice, repeat: int) -> Plans:
    for viewers in VIEWERS:
        for way in ("medferry-webrtc", "aiortc"):
            if way in choice.ways:
                yield Plan(part="viewers", way=way, viewers=viewers, bitrate=VIEWER_BITRATE, repeat=repeat)


def _loss(choice: Choice, repeat: int) -> Plans:
    for loss in choice.losses:
        for way in choice.ways:
            if way in ("medferry", "gstreamer", "ffmpeg"):
                yield Plan(part="loss", way=way, loss=loss, edge="in", repeat=repeat)
            elif way in ("medferry-webrtc", "aiortc"):
                yield Plan(
                    part="loss", way=way, loss=loss, edge="viewer", bitrate=VIEWER_BITRATE, repeat=repeat
                )


def _fall(choice: Choice, repeat: int) -> Plans:
    for way in ("medferry-webrtc", "aiortc"):
        if way in choice.ways:
            yield Plan(part="fall", way=way, edge="viewer", bitrate=FALL_BITRATE, repeat=repeat)


def _flood(choice: Choice, repeat: int) -> Plans:
    for flood in (False, True):
        for way in ("direct", "medferry"):
            if way in choice.ways:
                yield Plan(part="flood", way=way, flood=flood, repeat=repeat)


def _slope(choice: Choice, repeat: int) -> Plans:
    if "medferry" in choice.ways:
        yield Plan(part="slope", way="medferry", repeat=repeat)


PARTS: dict[str, Callable[[Choice, int], Plans]] = {
    "latency": _latency,
    "streams": _streams,
    "viewers": _viewers,
    "loss": _loss,
    "fall": _fall,
    "flood": _flood,
    "slope": _slope,
}

ON_REQUEST = ("slope",)
"""Parts that take half an hour and are run only when they are named."""


def plans(choice: Choice) -> Plans:
    """All that was asked for."""
    for repeat in range(choice.repeat):
        for part in choice.parts:
            yield from PARTS[part](choice, repeat)


def carry_out(plans: Plans, execute: Callable[[Plan], Run]) -> Iterator[Run]:
    """Execute the plans as they come; the runs."""
    try:
        plan = next(plans)
        while True:
            run = execute(plan)
            yield run
            plan = plans.send(run)
    except StopIteration:
        return
