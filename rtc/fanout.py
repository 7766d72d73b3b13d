"""Encode once, send to many: streams of side B, their encoders, and who subscribes to them.

    Arrival ─▶ Hub.deliver ─▶ Stream ─┬▶ EncodeThread (a profile) ─▶ subscribers' picture()
                                      └▶ SoundThread (a bitrate)  ─▶ subscribers' sound()

An encoder exists while somebody subscribes to its profile, and one serves all of them: a viewer more costs
SRTP and sending, nothing else. Everything here runs on the loop; only the threads know codecs.

A stream is live while its publisher is heard: it ends when A says so, when A has started anew, and when
nothing came of it, or of A, for too long. The last picture of a live stream is kept, on the canvas of its
encoder or on one of its own, so that whoever joins is shown it at once.

Never here: sockets, RTP, SDP.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from relay.link import SILENCE_SECONDS, Arrival
from relay.metrics import Metrics
from relay.records import AudioFrame, StreamKind, StreamStarted, StreamStopped, VideoFrame
from relay.worker import Status
from rtc.budget import PixelBudget
from rtc.encode import Canvas, Picture, VideoProfile, wrap
from rtc.encode_thread import CodedPicture, EncodeThread, Shown
from rtc.feedback import agree
from rtc.sound_thread import CodedSound, SoundThread
from rtc.timeline import Timeline

FREEZE_NS = 500_000_000
"""Without a new picture for so long a live stream counts as frozen."""

VOTE_SECONDS = 0.25
"""Between two looks at the subscribers' votes, and at who was heard since the last one."""

LINK_LOOKS = round(SILENCE_SECONDS / VOTE_SECONDS)
"""Looks that may find the link silent; then no stream is live. Looks are counted and not time, since a sink
that was itself stopped has heard nothing either, and must not cut off who was sending all along."""

STREAM_SILENCE_SECONDS = 30.0
"""A stream that sent nothing for so long has ended, though nobody said so. Side A ends streams after 3 s and
says so; this is for when the word was lost. A publisher may show a still picture every few seconds."""

STREAM_LOOKS = round(STREAM_SILENCE_SECONDS / VOTE_SECONDS)

RATE_DEADBAND = 0.05
"""Changes of the bitrate below this share are not worth telling the encoder."""

RAISE_NS = 2_000_000_000
"""Between two raises of the bitrate. Lowering is at once; a VP8 encoder pays each change with a keyframe."""

ENDS = {
    "said": "its publisher has ended",
    "restart": "side A has started anew",
    "link": "nothing comes from side A",
    "silence": "nothing came of it",
}
"""Why streams end, as a fixed word and for people."""

MAX_PAST = 64
"""Names of streams that were there and are gone, so that a viewer is told to come again."""

log = logging.getLogger("medferry.rtc")


class Subscriber(Protocol):
    """Someone whom encoded pictures and sound of one stream are sent to. Calls come on the loop."""

    def picture(self, picture: CodedPicture) -> None:
        """A picture of the profile subscribed to."""

    def sound(self, sound: CodedSound) -> None:
        """A sound packet."""

    def vote(self, now_ns: int) -> int | None:
        """Bits per second that its path can take; None: no opinion."""


@dataclass(slots=True)
class Branch:
    """One profile in use: its encoder and its subscribers."""

    thread: EncodeThread
    subscribers: list[Subscriber] = field(default_factory=list)
    changed_ns: int = 0

    def publish(self, picture: CodedPicture) -> None:
        """Hand a picture to all."""
        for subscriber in tuple(self.subscribers):
            subscriber.picture(picture)

    def follow_votes(self, now_ns: int) -> None:
        """Tell the encoder what its subscribers can take."""
        votes = [vote for item in self.subscribers if (vote := item.vote(now_ns)) is not None]
        target = agree(votes)
        if target is None or abs(target / self.thread.bitrate - 1) <= RATE_DEADBAND:
            return
        if target < self.thread.bitrate or now_ns - self.changed_ns >= RAISE_NS:
            self.thread.set_bitrate(target)
            self.changed_ns = now_ns


@dataclass(slots=True)
class SoundBranch:
    """One Opus encoder and its subscribers."""

    thread: SoundThread
    subscribers: list[Subscriber] = field(default_factory=list)

    def publish(self, sound: CodedSound) -> None:
        """Hand a packet to all."""
        for subscriber in tuple(self.subscribers):
            subscriber.sound(sound)


@dataclass(slots=True)
class Stream:
    """One stream as side B knows it. It outlives its publisher while someone watches."""

    name: str
    epoch: int = 0
    """Of its publisher."""
    quiet_looks: int = 0
    """Looks since something came of it."""
    last: Shown | None = None
    """The last picture, while no encoder has it."""
    timeline: Timeline = field(default_factory=Timeline)
    kinds: set[StreamKind] = field(default_factory=set)
    rate: float = 0.0
    width: int = 0
    height: int = 0
    pictures: int = 0
    sounds: int = 0
    received: dict[StreamKind, int] = field(default_factory=dict)
    """Frames of this epoch, of kinds whose start was seen: `StreamStopped.frames` is held against them."""
    missing: int = 0
    """Frames that entered the link and did not come out of it."""
    over_budget: int = 0
    last_picture_ns: int = 0
    fps: float = 0.0
    branches: dict[VideoProfile, Branch] = field(default_factory=dict)
    sound_branches: dict[int, SoundBranch] = field(default_factory=dict)

    @property
    def live(self) -> bool:
        """Whether its publisher is there."""
        return bool(self.kinds)

    @property
    def idle(self) -> bool:
        """Whether nobody publishes and nobody watches."""
        return not self.kinds and not self.branches and not self.sound_branches

    def frozen(self, now_ns: int) -> bool:
        """Whether its picture stands still though it is live."""
        return StreamKind.VIDEO in self.kinds and now_ns - self.last_picture_ns > FREEZE_NS

    def take_shown(self) -> Shown | None:
        """The last picture, on a canvas that may be given away; None where there is none to show."""
        if StreamKind.VIDEO not in self.kinds:
            return None
        for branch in self.branches.values():
            shown = branch.thread.shown
            return shown.copy() if shown else None
        last, self.last = self.last, None
        return last

    def keep(self, arrival: Arrival, frame: VideoFrame, timeline_ns: int, now_ns: int) -> None:
        """Keep a picture that nobody watches now, in place of the one before."""
        picture: Picture | None = wrap(arrival, frame)
        if picture is None:
            canvas = self.last.canvas if self.last else None
            if not isinstance(canvas, Canvas) or not canvas.fits(frame):
                canvas = Canvas(frame.width, frame.height)
            canvas.draw(frame)
            picture = canvas
        self.last = Shown(picture, timeline_ns, now_ns)

    def end(self, *kinds: StreamKind) -> None:
        """Its publisher sends nothing more of these kinds."""
        self.kinds.difference_update(kinds)
        if StreamKind.VIDEO not in self.kinds:
            self.last = None

    def took(self, kind: StreamKind) -> None:
        """Count a frame of a kind whose start was seen."""
        if kind in self.received:
            self.received[kind] += 1

    def saw_picture(self, frame: VideoFrame, now_ns: int) -> None:
        """Count a picture."""
        self.kinds.add(StreamKind.VIDEO)
        if self.last_picture_ns and now_ns > self.last_picture_ns:
            rate = 1e9 / (now_ns - self.last_picture_ns)
            self.fps += (min(rate, 240.0) - self.fps) / 16
        self.pictures += 1
        self.width, self.height = frame.width, frame.height
        self.last_picture_ns = now_ns


class Hub:
    """All streams of one sink."""

    def __init__(
        self, metrics: Metrics, *, max_streams: int, max_pixels_per_second: int, max_frame_rate: float = 60.0
    ) -> None:
        self.streams: dict[str, Stream] = {}
        self.metrics = metrics
        self.past: dict[str, None] = {}
        """Names of streams that are gone, the latest last."""
        self.refused = 0
        """Records of streams beyond the limit."""
        self.stale = 0
        """Records of a publisher that another has followed."""
        self.appeared: Callable[[Stream], None] = lambda _: None
        """Called when a stream has a publisher that had none."""
        self._max_streams = max_streams
        self._budget = PixelBudget(max_pixels_per_second, max_frame_rate)
        self._source_epoch = -1
        self._quiet_looks = 0
        self._closing: set[asyncio.Task[None]] = set()
        self._failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def __repr__(self) -> str:
        return f"<Hub streams={sorted(self.streams)}>"

    def deliver(self, arrival: Arrival) -> None:
        """Take one record off the link. Buffers in it are copied before this returns."""
        record = arrival.record
        self._quiet_looks = 0
        match record:
            case VideoFrame():
                self._video(arrival, record)
            case AudioFrame():
                self._audio(record)
            case StreamStarted():
                if (stream := self._stream(record.stream, record.kind, record.epoch)) is not None:
                    stream.rate = record.frame_rate_milli / 1000 or stream.rate
                    stream.received[record.kind] = 0
            case StreamStopped(stream=name) if name in self.streams:
                stream = self.streams[name]
                if record.epoch >= stream.epoch:
                    self._compare(stream, record)
                    self._end([stream], "said", record.kind)
            case _:
                pass

    def heard_source(self, epoch: int) -> None:
        """The run of side A that the next record is of. A new one knows nothing of the streams before."""
        if epoch == self._source_epoch:
            return
        self._source_epoch = epoch
        for stream in self.streams.values():
            stream.epoch = 0
            stream.received.clear()
        self._end(self._live(), "restart", *StreamKind)

    def _compare(self, stream: Stream, stop: StreamStopped) -> None:
        """Say how many frames entered the link and never came: the link itself knows only of fragments."""
        received = stream.received.pop(stop.kind, None)
        if received is None or stop.epoch != stream.epoch or received >= stop.frames:
            return
        missing = stop.frames - received
        stream.missing += missing
        kind = stop.kind.name.lower()
        self.metrics.count("media_missing", "Frames that side A sent and that never came", missing, kind=kind)
        text = "stream %s: %d of %d %s frames that side A sent never came"
        extra = {"event": "media_missing"}
        log.warning(text, stream.name, missing, stop.frames, kind, extra=extra)

    def _live(self) -> list[Stream]:
        return [stream for stream in self.streams.values() if stream.live]

    def _stream(self, name: str, kind: StreamKind, epoch: int) -> Stream | None:
        """The stream that a record belongs to; None where it is not to be used."""
        stream = self.streams.get(name)
        if stream is not None and epoch < stream.epoch:
            self.stale += 1
            return None
        if stream is None or not stream.live:
            # Those that only viewers hold on to are as many as there are sessions, and take no one's place.
            if len(self._live()) >= self._max_streams:
                self.refused += 1
                return None
            stream = self.streams.setdefault(name, Stream(name))
        if epoch > stream.epoch:
            stream.end(*StreamKind)
            stream.epoch = epoch
            stream.received.clear()
        new = not stream.live
        stream.kinds.add(kind)
        stream.quiet_looks = 0
        if new:
            self.appeared(stream)
        return stream

    def _end(self, streams: Iterable[Stream], why: str, *kinds: StreamKind) -> None:
        """These kinds of live streams have ended; `why` is a key of `ENDS`."""
        for stream in streams:
            was_live = stream.live
            stream.end(*kinds)
            if was_live and not stream.live:
                self.metrics.count("stream_ends", "Streams that are not live any more, by why", why=why)
                text = "stream %s is not live: %s"
                log.info(text, stream.name, ENDS[why], extra={"event": "stream_end", "why": why})
        self._forget_idle()

    def look(self) -> None:
        """See who was silent for too long. To be called every `VOTE_SECONDS`."""
        self._quiet_looks += 1
        live = self._live()
        for stream in live:
            stream.quiet_looks += 1
        quiet = [stream for stream in live if stream.quiet_looks > STREAM_LOOKS]
        if live and self._quiet_looks > LINK_LOOKS:
            self._end(live, "link", *StreamKind)
        elif quiet:
            self._end(quiet, "silence", *StreamKind)

    def _forget_idle(self) -> None:
        for name in [name for name, stream in self.streams.items() if stream.idle]:
            del self.streams[name]
            self.past.pop(name, None)
            self.past[name] = None
        for name in list(self.past)[: max(0, len(self.past) - MAX_PAST)]:
            del self.past[name]

    def _video(self, arrival: Arrival, frame: VideoFrame) -> None:
        stream = self._stream(frame.stream, StreamKind.VIDEO, frame.epoch)
        if stream is None:
            return
        now_ns = time.monotonic_ns()
        stream.saw_picture(frame, now_ns)
        stream.took(StreamKind.VIDEO)
        latency = self.metrics.latency
        latency("receive", stream.name).record_ns(frame.decoded_ns - frame.captured_ns)
        latency("handover", stream.name).record_ns(arrival.entered_ns - frame.decoded_ns)
        latency("link", stream.name).record_ns(arrival.left_ns - arrival.entered_ns)
        timeline_ns = stream.timeline.at(frame.epoch, frame.media_ns, frame.captured_ns)
        if not stream.branches:
            stream.keep(arrival, frame, timeline_ns, now_ns)
        for profile, branch in stream.branches.items():
            if self._pays(stream, profile, frame.width * frame.height, now_ns):
                branch.thread.offer(arrival, frame, timeline_ns)
            else:
                stream.over_budget += 1
                self.metrics.count("media_over_budget", "Pictures left out: they came too fast")

    def _pays(self, stream: Stream, profile: VideoProfile, pixels: int, now_ns: int) -> bool:
        """Whether a picture may be encoded now."""
        key = (stream.name, profile)
        admitted = self._budget.reserve(key, pixels, stream.rate)
        return admitted and self._budget.spend(key, pixels, now_ns)

    def _audio(self, frame: AudioFrame) -> None:
        stream = self._stream(frame.stream, StreamKind.AUDIO, frame.epoch)
        if stream is None:
            return
        stream.sounds += 1
        stream.took(StreamKind.AUDIO)
        timeline_ns = stream.timeline.at(frame.epoch, frame.media_ns, frame.captured_ns)
        if stream.sound_branches:
            own = dataclasses.replace(frame, samples=bytes(frame.samples))
            for branch in stream.sound_branches.values():
                branch.thread.offer(own, timeline_ns)

    def adopt(self, stream: Stream) -> Stream:
        """The stream of this name as it is now: it may have gone, or come anew, while a viewer connected."""
        return self.streams.setdefault(stream.name, stream)

    def subscribe(self, stream: Stream, profile: VideoProfile, subscriber: Subscriber) -> EncodeThread:
        """Send `subscriber` the stream's pictures; the first is a keyframe, made at once."""
        branch = stream.branches.get(profile)
        if branch is None:
            thread = EncodeThread(
                stream.name,
                profile,
                stream.rate,
                lambda picture: self._publish(stream, profile, picture),
                self._failed,
            )
            shown = stream.take_shown()
            if shown is not None:
                thread.show(shown)
            branch = stream.branches[profile] = Branch(thread)
            self._budget.enter((stream.name, profile))
        branch.subscribers.append(subscriber)
        branch.thread.request_keyframe()
        return branch.thread

    def _publish(self, stream: Stream, profile: VideoProfile, picture: CodedPicture) -> None:
        if picture.times is not None:
            waited = picture.encoded_ns - picture.times.left_ns
            self.metrics.latency("encode", stream.name).record_ns(waited)
        if (branch := stream.branches.get(profile)) is not None:
            branch.publish(picture)

    def sent(self, stream: Stream, picture: CodedPicture, now_ns: int) -> None:
        """A subscriber has sent the last byte of a picture."""
        if picture.times is not None:
            self.metrics.latency("send", stream.name).record_ns(now_ns - picture.encoded_ns)
            self.metrics.latency("total", stream.name).record_ns(now_ns - picture.times.captured_ns)

    def subscribe_sound(self, stream: Stream, bitrate: int, subscriber: Subscriber) -> None:
        """Send `subscriber` the stream's sound."""
        branch = stream.sound_branches.get(bitrate)
        if branch is None:
            thread = SoundThread(
                stream.name, bitrate, lambda sound: self._publish_sound(stream, bitrate, sound), self._failed
            )
            branch = stream.sound_branches[bitrate] = SoundBranch(thread)
        branch.subscribers.append(subscriber)

    @staticmethod
    def _publish_sound(stream: Stream, bitrate: int, sound: CodedSound) -> None:
        if (branch := stream.sound_branches.get(bitrate)) is not None:
            branch.publish(sound)

    def unsubscribe(self, stream: Stream, subscriber: Subscriber) -> None:
        """Send it nothing more. Encoders that serve nobody now are ended."""
        idle: list[EncodeThread | SoundThread] = []
        for profile, branch in list(stream.branches.items()):
            if _without(branch.subscribers, subscriber):
                last = stream.take_shown() if len(stream.branches) == 1 else None
                idle.append(stream.branches.pop(profile).thread)
                self._budget.leave((stream.name, profile))
                stream.last = last
        for bitrate, sound_branch in list(stream.sound_branches.items()):
            if _without(sound_branch.subscribers, subscriber):
                idle.append(stream.sound_branches.pop(bitrate).thread)
        for thread in idle:
            task = asyncio.get_running_loop().create_task(thread.close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)
        self._forget_idle()

    def _failed(self, error: BaseException) -> None:
        if not self._failure.done():
            self._failure.set_exception(error)

    async def watch(self) -> None:
        """Follow the votes, until an encoder fails: then raise its error, which is ours.

        Raises:
            Exception: What ended an encoder's thread.
        """
        while True:
            done, _ = await asyncio.wait({self._failure}, timeout=VOTE_SECONDS)
            if done:
                self._failure.result()
            self.look()
            now_ns = time.monotonic_ns()
            for stream in self.streams.values():
                for branch in stream.branches.values():
                    branch.follow_votes(now_ns)

    async def close(self) -> None:
        """End all encoders; returns when their threads have ended."""
        for stream in self.streams.values():
            threads: list[EncodeThread | SoundThread] = [item.thread for item in stream.branches.values()]
            threads += [item.thread for item in stream.sound_branches.values()]
            for thread in threads:
                await thread.close()
            stream.branches.clear()
            stream.sound_branches.clear()
        while self._closing:
            await asyncio.wait(self._closing)
        self._failure.cancel()

    def figures(self, *, brief: bool = False) -> dict[str, Status]:
        """Each stream's condition, by name; `brief`: with tallies of latency instead of quantiles."""
        now_ns = time.monotonic_ns()
        latencies = self.metrics.tallies if brief else self.metrics.latencies
        return {
            name: {**self._figures(stream, now_ns), "latency": latencies(name)}
            for name, stream in sorted(self.streams.items())
        }

    def _figures(self, stream: Stream, now_ns: int) -> Status:
        threads = [branch.thread for branch in stream.branches.values()]
        return {
            "live": stream.live,
            "frozen": stream.frozen(now_ns),
            "video": StreamKind.VIDEO in stream.kinds,
            "audio": StreamKind.AUDIO in stream.kinds,
            "width": stream.width,
            "height": stream.height,
            "fps": round(stream.fps, 1) if not stream.frozen(now_ns) else 0.0,
            "pictures": stream.pictures,
            "sounds": stream.sounds,
            "missing": stream.missing,
            "receivers": sum(len(branch.subscribers) for branch in stream.branches.values()),
            "encoders": [
                {
                    "codec": thread.profile.codec,
                    "bitrate": thread.bitrate,
                    "slices": thread.slices,
                    "encoded": thread.encoded,
                    "keyframes": thread.keyframes,
                    "keyframe_requests": thread.gate.requests,
                    "replaced": thread.replaced,
                    "again": thread.again,
                    "faults": thread.faults,
                }
                for thread in threads
            ],
            "over_budget": stream.over_budget,
            "sound_dropped": sum(branch.thread.dropped for branch in stream.sound_branches.values()),
        }


def _without(subscribers: list[Subscriber], subscriber: Subscriber) -> bool:
    """Take `subscriber` out; whether nobody is left."""
    if subscriber in subscribers:
        subscribers.remove(subscriber)
    return not subscribers
