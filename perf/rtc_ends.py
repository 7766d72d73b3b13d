"""The benchmark's own ends of a run: a player that sends each stream, and whoever reads it at the other end.

    Player ─▶ RTP │ WHIP ─▶ [bad network] ─▶ the way ─▶ [bad network] ─▶ RTP │ WHEP ─▶ Sightings

They share the machine with the way under test, so they are made cheap, for all ways alike: the pictures were
encoded before, stamps are read in the decoder's memory, and where many streams run, one keyframe interval of
two is decoded. What that leaves is in `Run.ends_cpu_share`. And they go before whatever is under test
(`before_all`): camera and viewer are other machines in truth, and wait for nothing that a relay does.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

from perf.clip import KEYFRAME_SECONDS, Player, clip
from perf.detour import Detour
from perf.rtc_peers import Entry
from perf.rtc_plan import FALL_FROM, LOSSES, RTT_SECONDS, Plan
from relay.config import split_address
from relay.errors import MedferryError
from rtc.bench_ends import RtpOutlet, RtpReceiver, WhepReceiver, WhipOutlet
from rtc.bench_report import evaluate
from rtc.bench_stamps import Sightings
from tests.netproxy import Impairment, UdpProxy

APPEAR_SECONDS = 15.0
"""Until a viewer finds the stream."""

POLL_SECONDS = 0.05

PRIORITY = 1
"""Of the ends among real-time threads: there are no others."""


@contextmanager
def before_all() -> Iterator[None]:
    """Let the calling thread, and those that it starts in the block, run as soon as they can (sched(7)).

    Processes must be started outside of it: they would inherit that. Without CAP_SYS_NICE nothing changes,
    and on a full machine the ends' own waiting is in what they measure.
    """
    try:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(PRIORITY))
    except PermissionError:
        yield
        return
    try:
        yield
    finally:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


@dataclass(slots=True, kw_only=True)
class Feed:
    """One stream from end to end. Times are microseconds of CLOCK_MONOTONIC."""

    plan: Plan
    player: Player
    sightings: Sightings
    proxies: list[UdpProxy] = field(default_factory=list)
    """Bad networks on the viewer's edge."""
    _received_bytes: int = 0

    def begin(self) -> None:
        """What comes from now on counts."""
        self._received_bytes = self.sightings.received_bytes

    def report(self, start_us: int, end_us: int) -> dict[str, Any]:
        """What became of the pictures that were sent from `start_us` until `end_us`.

        Raises:
            MedferryError: No stamped picture arrived at all.
        """
        if not self.sightings.seen:
            raise MedferryError(f"{self.sightings.unreadable} pictures came, and none with a stamp")
        sent = self.player.sent_within(start_us, end_us)
        seen = self.player.resolve(self.sightings.seen)
        counted = self._measured(sent, {sighting.counter for sighting in seen})
        whole = sum(start_us <= when_ns // 1000 < end_us for when_ns in self.sightings.whole_ns)
        rate = self.player.clip.size.rate
        bits = 8 * (self.sightings.received_bytes - self._received_bytes)
        report = evaluate(self.plan.way, seen, counted, rate, bits * 1e6 / (end_us - start_us))
        return {**report.as_json(), "arrived_share": min(1.0, whole / max(len(sent), 1))}

    def _measured(self, sent: range, seen: set[int]) -> list[int]:
        """Of what was sent, what the receiver meant to decode: all, or that between two that it saw close by.

        A hole of half a keyframe interval is an interval that was left out, not a loss.
        """
        if self.plan.every == 1:
            return list(sent)
        hole = self.player.clip.size.rate * KEYFRAME_SECONDS // 2
        counted: set[int] = set()
        for before, after in itertools.pairwise(sorted(seen & set(sent))):
            if after - before < hole:
                counted.update(range(before, after + 1))
        return sorted(counted)


@asynccontextmanager
async def running(plan: Plan, entry: Entry) -> AsyncIterator[list[Feed]]:
    """All streams of a run, sending and being watched, until the block ends.

    Raises:
        MedferryError: An end could not be opened.
    """
    async with AsyncExitStack() as stack:
        stack.enter_context(before_all())
        feeds = []
        for number, (source, sink) in enumerate(zip(entry.sources, entry.sinks, strict=True)):
            size = plan.size
            player = Player(clip(plan.codec, size.width, size.height, size.rate, plan.bitrate))
            joined = _webrtc if plan.webrtc else _rtp
            feeds.append(await joined(stack, plan, number, player, source, sink))
        yield feeds


def _play(
    stack: AsyncExitStack, plan: Plan, number: int, player: Player, outlet: RtpOutlet | WhipOutlet
) -> None:
    task = asyncio.create_task(player.run(outlet.picture, number / plan.streams))

    async def end() -> None:
        task.cancel()
        await asyncio.wait([task])
        if not task.cancelled():
            task.result()

    stack.push_async_callback(end)


async def _rtp(
    stack: AsyncExitStack, plan: Plan, number: int, player: Player, source: str, sink: str
) -> Feed:
    receiver = RtpReceiver(sink, plan.codec, every=plan.every)
    stack.push_async_callback(receiver.close)
    if plan.loss != "none":
        rule = LOSSES[plan.loss]
        network = UdpProxy(target=split_address(source), forward=rule, back=rule, seed=_seed(plan, number))
        source = "{}:{}".format(*(await stack.enter_async_context(network)).address)
    # Only medferry is sent reports on the media port: its answers come back through the bad network.
    mux = plan.loss != "none" and plan.way == "medferry"
    outlet = RtpOutlet(source, player.timeline, plan.bitrate, player.want_keyframe, mux=mux)
    stack.callback(outlet.close)
    _play(stack, plan, number, player, outlet)
    return Feed(plan=plan, player=player, sightings=receiver.sightings)


async def _webrtc(
    stack: AsyncExitStack, plan: Plan, number: int, player: Player, source: str, sink: str
) -> Feed:
    outlet = WhipOutlet(source, plan.codec, player.want_keyframe)
    stack.push_async_callback(outlet.close)
    if plan.way == "direct-webrtc":
        viewer = WhepReceiver(sink, plan.codec)
        stack.push_async_callback(viewer.close)
        await outlet.connect(viewer.answer)
        _play(stack, plan, number, player, outlet)
        return Feed(plan=plan, player=player, sightings=viewer.sightings)
    await outlet.connect()
    _play(stack, plan, number, player, outlet)
    viewer, proxies = await _watching(stack, plan, number, sink)
    for _ in range(plan.viewers - 1):
        await _watching(stack, plan, number, sink, silent=True)
    return Feed(plan=plan, player=player, sightings=viewer.sightings, proxies=proxies)


async def _watching(
    stack: AsyncExitStack, plan: Plan, number: int, sink: str, *, silent: bool = False
) -> tuple[WhepReceiver, list[UdpProxy]]:
    """A viewer who is connected, through the bad network if there is one; tried until the stream is there."""
    loop = asyncio.get_running_loop()
    until = loop.time() + APPEAR_SECONDS
    while True:
        detoured = plan.edge == "viewer"
        viewer = WhepReceiver(sink, plan.codec, silent=silent, reporting=detoured)
        forward, back = _viewer_edge(plan)
        detour = Detour(viewer.post, stack, forward=forward, back=back, seed=_seed(plan, number))
        try:
            await viewer.connect(detour if detoured else None)
        except MedferryError:
            await viewer.close()
            if loop.time() > until:
                raise
            await asyncio.sleep(POLL_SECONDS)
        else:
            stack.push_async_callback(viewer.close)
            return viewer, [] if detour.proxy is None else [detour.proxy]


def _viewer_edge(plan: Plan) -> tuple[Impairment, Impairment]:
    """What a viewer sends, and what is sent to it."""
    if plan.part == "fall":
        path = Impairment(delay=RTT_SECONDS / 2)
        return path, dataclasses.replace(path, rate=FALL_FROM)
    return LOSSES[plan.loss], LOSSES[plan.loss]


def _seed(plan: Plan, number: int) -> int:
    return 1000 * plan.repeat + number
