"""One video encoder on a thread of its own, fed newest-wins: it never works through a backlog.

    loop ─ offer ─▶ [ one waiting picture ] ─▶ thread: encode, cut ─▶ loop: publish

A picture that arrives while another waits replaces it. A picture that was held up on the link waits a moment
for a newer one. A keyframe that is wanted while no picture comes is made of the last one again.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from relay.link import Arrival
from relay.records import VideoFrame
from rtc.encode import CODEC_ERRORS, Canvas, Coded, Picture, VideoEncoder, VideoProfile, wrap
from rtc.feedback import KeyframeGate
from rtc.placement import give_way
from rtc.slicing import Slicing

STALE_NS = 100_000_000
"""A picture that took so long over the link was held up: by a stopped process, or by a slow link."""

GRACE_NS = 15_000_000
"""How long a stale picture waits for a newer one: after a stall those stand right behind it."""

REPEAT_NS = 150_000_000
"""A wanted keyframe waits so long for a picture; then the last one is sent again as a keyframe. A publisher
that shows a still screen may send one picture a second."""

MAX_UNPUBLISHED = 3
"""Encoded pictures that the loop has not taken yet. A stalled loop must find few of them, not a backlog."""

RATE_SAMPLE = 60
"""Pictures over which the true rate is measured."""

RATE_OFF = 1.5
"""An encoder made for a rate that is this many times off budgets its bits wrongly, and is made anew."""

MIN_STEP_NS = 1_000_000
"""Two pictures of one encoder are at least so far apart on the timeline."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """Of one picture, CLOCK_MONOTONIC ns: the stamps of its record and of the link."""

    captured_ns: int
    decoded_ns: int
    entered_ns: int
    left_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CodedPicture:
    """What subscribers get. `times` is None for a repeated picture, which says nothing about latency."""

    coded: Coded
    timeline_ns: int
    width: int
    height: int
    encoded_ns: int
    times: Times | None


@dataclass(frozen=True, slots=True)
class Shown:
    """The last picture of a stream, when it was on the timeline and when it came (CLOCK_MONOTONIC ns)."""

    canvas: Picture
    timeline_ns: int
    offered_ns: int

    def copy(self) -> Shown:
        """The same on a canvas of its own."""
        return Shown(self.canvas.copy(), self.timeline_ns, self.offered_ns)


@dataclass(slots=True)
class _Job:
    canvas: Picture
    timeline_ns: int
    ready_ns: int
    times: Times | None
    offered_ns: int
    refreshed: bool = False


class EncodeThread:
    """An encoder of one stream and profile. All methods but the thread's own are called on the loop."""

    def __init__(
        self,
        name: str,
        profile: VideoProfile,
        rate: float,
        publish: Callable[[CodedPicture], None],
        failed: Callable[[BaseException], None],
    ) -> None:
        self.profile = profile
        self.gate = KeyframeGate()
        self.replaced = 0
        """Pictures that a newer one replaced before they were encoded."""
        self.encoded = 0
        self.again = 0
        """How often a picture came out too large and was encoded again (`rtc.rate_control`)."""
        self.keyframes = 0
        self.faults = 0
        self.bitrate = profile.bitrate
        self._rate = rate
        self._publish = publish
        self._failed = failed
        self._loop = asyncio.get_running_loop()
        self._changed = threading.Condition()
        self._waiting: _Job | None = None
        self._last: _Job | None = None
        self._spare: list[Canvas] = []
        self._unpublished = 0
        self._closed = False
        self._encoder: VideoEncoder | None = None
        self._slicing = Slicing()
        self._measure = (0, 0)
        self._stopped = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name=f"encode {name}", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        return f"<EncodeThread {self._encoder or self.profile.codec} encoded={self.encoded}>"

    @property
    def slices(self) -> int:
        """How many a picture is encoded in now; 0 before the first."""
        encoder = self._encoder
        return 0 if encoder is None else encoder.slices

    def offer(self, arrival: Arrival, frame: VideoFrame, timeline_ns: int) -> None:
        """Let a picture be encoded next; it is copied, unless its memory is its own."""
        now_ns = time.monotonic_ns()
        canvas = self._canvas(arrival, frame)
        stale = now_ns - arrival.entered_ns > STALE_NS
        times = Times(
            captured_ns=frame.captured_ns,
            decoded_ns=frame.decoded_ns,
            entered_ns=arrival.entered_ns,
            left_ns=arrival.left_ns,
        )
        with self._changed:
            self.replaced += self._waiting is not None
            ready_ns = now_ns + GRACE_NS * stale
            self._waiting = _Job(canvas, timeline_ns, ready_ns, times, now_ns, frame.refreshed)
            self._changed.notify()

    def _canvas(self, arrival: Arrival, frame: VideoFrame) -> Picture:
        wrapped = wrap(arrival, frame)
        if wrapped is not None:
            return wrapped
        with self._changed:
            # The one that waits is replaced in any case, so its memory may be drawn over at once.
            job, self._waiting = self._waiting, None
            self.replaced += job is not None
            old = job.canvas if job is not None else None
            canvas = old if isinstance(old, Canvas) else self._spare.pop() if self._spare else None
        if canvas is None or not canvas.fits(frame):
            canvas = Canvas(frame.width, frame.height)
        canvas.draw(frame)
        return canvas

    def show(self, shown: Shown) -> None:
        """Begin with a picture that was there before; its canvas is this thread's from now on."""
        now_ns = time.monotonic_ns()
        timeline_ns = shown.timeline_ns + now_ns - shown.offered_ns
        with self._changed:
            self._waiting = _Job(shown.canvas, timeline_ns, now_ns, None, now_ns)
            self._changed.notify()

    @property
    def shown(self) -> Shown | None:
        """The last picture offered. Its canvas may be written over by the next offer but one."""
        with self._changed:
            job = self._waiting or self._last
            return None if job is None else Shown(job.canvas, job.timeline_ns, job.offered_ns)

    def request_keyframe(self) -> None:
        """Make one soon; many requests make one."""
        with self._changed:
            self.gate.request(time.monotonic_ns())
            self._changed.notify()

    def set_bitrate(self, bits_per_second: int) -> None:
        """From the next picture on."""
        self.bitrate = min(bits_per_second, self.profile.bitrate)

    async def close(self) -> None:
        """End the thread; returns when it has ended."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        await self._stopped.wait()

    def _next(self) -> _Job | None:
        """The picture to encode now; waits for it. None at the end."""
        with self._changed:
            while not self._closed:
                now_ns = time.monotonic_ns()
                due_ns = self._due_ns()
                if due_ns is not None and now_ns >= due_ns:
                    return self._take(now_ns)
                self._changed.wait(None if due_ns is None else (due_ns - now_ns) / 1e9)
        return None

    def _due_ns(self) -> int | None:
        if self._unpublished >= MAX_UNPUBLISHED:
            return None
        if self._waiting is not None:
            return self._waiting.ready_ns
        wanted_ns = self.gate.due_ns()
        if self._last is None or wanted_ns is None:
            return None
        return max(wanted_ns, self._last.offered_ns + REPEAT_NS)

    def _take(self, now_ns: int) -> _Job:
        job, self._waiting = self._waiting, None
        last = self._last
        if job is None:
            assert last is not None
            elapsed = now_ns - last.offered_ns
            job = _Job(last.canvas, last.timeline_ns + elapsed, now_ns, None, now_ns)
        elif last is not None:
            self._spare = [last.canvas] if isinstance(last.canvas, Canvas) else []
            job.timeline_ns = max(job.timeline_ns, last.timeline_ns + MIN_STEP_NS)
        self._last = job
        return job

    def _run(self) -> None:
        give_way()
        try:
            while (job := self._next()) is not None:
                self._encode(job)
        except Exception as error:  # noqa: BLE001 - handed to the loop, which ends the worker with it
            self._loop.call_soon_threadsafe(self._failed, error)
        self._loop.call_soon_threadsafe(self._stopped.set)

    def _encode(self, job: _Job) -> None:
        began_ns = time.monotonic_ns()
        keyframe = self.gate.is_due(began_ns)
        encoder = self._encoder_for(job, keyframe=keyframe)
        try:
            coded = encoder.encode(job.canvas, job.timeline_ns, keyframe=keyframe, refreshed=job.refreshed)
        except CODEC_ERRORS:
            # One fresh try on the same picture; a second failure is ours and ends the worker.
            self.faults += 1
            self._encoder = None
            coded = self._encoder_for(job, keyframe=True).encode(job.canvas, job.timeline_ns, keyframe=True)
        if not coded.payloads:
            return
        encoded_ns = time.monotonic_ns()
        self.encoded += 1
        self.again += coded.tries - 1
        if self._slicing.encoded() and self._badly_sliced(encoder) and self.profile.keyframe_seconds is None:
            # Else the next keyframe that comes by itself is soon enough.
            self.request_keyframe()
        picture = CodedPicture(
            coded=coded,
            timeline_ns=job.timeline_ns,
            width=job.canvas.width,
            height=job.canvas.height,
            encoded_ns=encoded_ns,
            times=job.times,
        )
        with self._changed:
            if coded.keyframe:
                self.keyframes += 1
                self.gate.made(began_ns)
            self._unpublished += 1
        self._loop.call_soon_threadsafe(self._deliver, picture)

    def _deliver(self, picture: CodedPicture) -> None:
        with self._changed:
            self._unpublished -= 1
            self._changed.notify()
        self._publish(picture)

    def _badly_sliced(self, encoder: VideoEncoder) -> bool:
        """Whether one like it would have another number of slices now."""
        return self._slicing.slices(encoder.most_slices, encoder.rate) != encoder.slices

    def _encoder_for(self, job: _Job, *, keyframe: bool) -> VideoEncoder:
        """The encoder for a picture: a new one where the old one does not fit, or has not the right number of
        slices and the picture is a keyframe in any case."""
        canvas = job.canvas
        encoder = self._encoder
        rate = self._measured_rate(job)
        if (
            encoder is None
            or (encoder.width, encoder.height) != (canvas.width, canvas.height)
            or (rate and not 1 / RATE_OFF < rate / encoder.rate < RATE_OFF)
            or (self._badly_sliced(encoder) and (keyframe or encoder.comes_round(refreshed=job.refreshed)))
        ):
            self._rate = rate or self._rate
            encoder = VideoEncoder(self.profile, canvas.width, canvas.height, self._rate, self._slicing)
            self._encoder = encoder
            threads = (threading.get_native_id(), *encoder.threads)
            self._slicing.watch(threads if encoder.most_slices > 1 else ())
        if self.bitrate != encoder.bitrate:
            encoder.set_bitrate(self.bitrate)
        return encoder

    def _measured_rate(self, job: _Job) -> float:
        """Pictures a second, once in `RATE_SAMPLE` pictures; else 0."""
        count, since_ns = self._measure
        if job.times is None:
            return 0.0
        if count == 0 or job.timeline_ns <= since_ns:
            self._measure = (1, job.timeline_ns)
            return 0.0
        if count < RATE_SAMPLE:
            self._measure = (count + 1, since_ns)
            return 0.0
        self._measure = (1, job.timeline_ns)
        return max(1.0, count * 1e9 / (job.timeline_ns - since_ns))
