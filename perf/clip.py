"""Stamped pictures that are encoded before the clock starts, and a player that sends them on time.

Encoding live costs a quarter of a core a stream, on the cores that the relay under test needs. So a clip is
encoded once; all streams of all ways send the same. Its stamps hold a picture's number within the clip, and
the player notes when each was sent: a latency is from the sending of a picture's first packet to its being
decoded at the other end. The clip loops. On a keyframe request the player jumps to the next keyframe, so it
recovers from loss as a live encoder does.
"""

from __future__ import annotations

import asyncio
import bisect
import dataclasses
import functools
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from rtc.bench_report import Sighting
from rtc.camera import Camera, Size
from rtc.encode import Canvas, Coded, VideoEncoder, VideoProfile
from rtc.encode_thread import CodedPicture
from rtc.settings import VideoCodec
from rtc.timeline import Timeline

CLIP_SECONDS = 12
"""Longer than any latency that is worth telling from one a whole clip shorter."""

KEYFRAME_SECONDS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Clip:
    """Encoded pictures, number 0 a keyframe."""

    size: Size
    pictures: tuple[Coded, ...]

    def next_keyframe(self, number: int) -> int:
        """The keyframe at `number` or after it, in the loop."""
        later = (at for at in range(number, len(self.pictures)) if self.pictures[at].keyframe)
        return next(later, 0)


@functools.lru_cache(maxsize=2)
def clip(codec: VideoCodec, width: int, height: int, rate: int, bitrate: int) -> Clip:
    """Paint and encode a clip: about a second of work at 720p30. The last ones made are kept."""
    size = Size(width=width, height=height, rate=rate)
    profile = VideoProfile(codec=codec, bitrate=bitrate, keyframe_seconds=KEYFRAME_SECONDS)
    encoder = VideoEncoder(profile, width, height, rate)
    camera, canvas = Camera(size), Canvas(width, height)
    pictures = []
    for number in range(CLIP_SECONDS * rate):
        canvas.draw(camera.picture(number))
        pictures.append(encoder.encode(canvas, number * 1_000_000_000 // rate, keyframe=number == 0))
    return Clip(size=size, pictures=tuple(pictures))


@dataclass(slots=True)
class Player:
    """Sends a clip, evenly, for as long as `run` runs."""

    clip: Clip
    timeline: Timeline = field(default_factory=Timeline)
    sent_us: list[int] = field(default_factory=list)
    """When each picture was sent, by its ordinal: rising."""
    numbers: list[int] = field(default_factory=list)
    """Its number within the clip, by its ordinal."""
    keyframe_requests: int = 0
    _sendings: dict[int, list[int]] = field(default_factory=dict)
    """Ordinals by number: a picture is sent once in each turn of the loop."""
    _wanted: bool = False

    def want_keyframe(self) -> None:
        """Go on with a keyframe."""
        self.keyframe_requests += 1
        self._wanted = True

    async def run(self, publish: Callable[[CodedPicture], None], phase: float = 0.0) -> None:
        """Send until cancelled. `phase`, 0 to 1 of a picture's interval: cameras do not tick together."""
        loop = asyncio.get_running_loop()
        rate = self.clip.size.rate
        started = loop.time() + phase / rate
        number, turn = 0, 0
        while True:
            await asyncio.sleep(max(started + turn / rate - loop.time(), 0))
            if self._wanted:
                self._wanted = False
                number = self.clip.next_keyframe(number)
            self._send(number, publish)
            number = (number + 1) % len(self.clip.pictures)
            # What was missed while the process did not run is left out, as a camera would.
            turn = max(turn + 1, int((loop.time() - started) * rate))

    def _send(self, number: int, publish: Callable[[CodedPicture], None]) -> None:
        now_ns = time.monotonic_ns()
        self._sendings.setdefault(number, []).append(len(self.sent_us))
        self.sent_us.append(now_ns // 1000)
        self.numbers.append(number)
        size = self.clip.size
        publish(
            CodedPicture(
                coded=self.clip.pictures[number],
                timeline_ns=self.timeline.at(0, now_ns, now_ns),
                width=size.width,
                height=size.height,
                encoded_ns=now_ns,
                times=None,
            )
        )

    def resolve(self, sightings: Iterable[Sighting]) -> list[Sighting]:
        """Sightings whose counter is the ordinal, and whose time is that of sending, instead of the clip's.

        Of the turns in which a picture was sent, it is the last one before it was seen.
        """
        found = []
        for sighting in sightings:
            ordinals = self._sendings.get(sighting.counter, [])
            at = bisect.bisect_right(ordinals, sighting.seen_us, key=self.sent_us.__getitem__)
            if at:
                ordinal = ordinals[at - 1]
                found.append(dataclasses.replace(sighting, counter=ordinal, painted_us=self.sent_us[ordinal]))
        return found

    def sent_within(self, start_us: int, end_us: int) -> range:
        """Ordinals of what was sent from `start_us` until before `end_us`."""
        return range(bisect.bisect_left(self.sent_us, start_us), bisect.bisect_left(self.sent_us, end_us))
