"""Reads stamps off a stream's packets, as cheaply as it can be done: pictures are decoded, never copied.

    RtpPacket ─▶ VideoJitter ─▶ Picture ─▶ thread: decode, read the stamp in place ─▶ Sighting

A receiver that shares the machine with what it measures slows it down. So it may be told to decode only one
of so many keyframe intervals: what it does decode is decoded whole, so no picture is measured by halves, and
all others are still put together and counted.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import av
import numpy as np

from relay.errors import PeerError
from rtc.bench_report import Sighting
from rtc.decode import VideoDecoder
from rtc.depayload import PAYLOADS
from rtc.jitter import Picture, VideoJitter, VideoOutput
from rtc.packets import RtpPacket
from rtc.settings import VideoCodec
from rtc.stamp import read

MAX_PENDING = 12
"""Pictures that wait for the decoder; beyond, they are given up as a relay's receiver would."""


@dataclass(frozen=True, slots=True)
class Unread:
    """A picture whose stamp could not be read. `broken`: it could not be decoded either."""

    serial: int
    broken: bool


Look = tuple[Sighting, tuple[int, int]] | Unread
"""What came of a picture: a sighting and the picture's pixels, or why not."""


def look(frame: av.VideoFrame, origin: Picture, seen_ns: int) -> Look:
    """Read the stamp in a decoder's own memory."""
    plane = frame.planes[0]
    lines = np.frombuffer(memoryview(plane), np.uint8).reshape(-1, plane.line_size)
    stamp = read(lines[: frame.height, : frame.width])
    if stamp is None:
        return Unread(origin.serial, broken=False)
    sighting = Sighting(
        counter=stamp.counter,
        painted_us=stamp.time_us,
        seen_us=seen_ns // 1000,
        timestamp=origin.timestamp,
    )
    return sighting, (frame.width, frame.height)


class StampThread:
    """Decodes one stream in order, one picture out for each one in, and hands looks back to the loop."""

    def __init__(self, codec: VideoCodec, deliver: Callable[[list[Look]], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._deliver = deliver
        self._payload = PAYLOADS[codec]
        self._decoder = VideoDecoder(codec)
        self._inbox: queue.SimpleQueue[Picture | None] = queue.SimpleQueue()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=f"stamps {codec}", daemon=True)
        self._thread.start()

    def submit(self, picture: Picture) -> bool:
        """Queue a picture; False where too many wait and it was dropped."""
        if self._inbox.qsize() >= MAX_PENDING:
            return False
        self._inbox.put(picture)
        return True

    def close(self) -> None:
        """Tell the thread to end; what it still sees is dropped."""
        self._closed = True
        self._inbox.put(None)

    def _run(self) -> None:
        while (picture := self._inbox.get()) is not None and not self._closed:
            looks = self._looks(picture)
            try:
                self._loop.call_soon_threadsafe(self._hand_over, looks)
            except RuntimeError:
                # The loop has ended, and with it everyone who counts.
                return

    def _looks(self, picture: Picture) -> list[Look]:
        try:
            coded = self._payload.picture(picture.payloads)
            if coded is None:
                return []
            frames = self._decoder.decode(coded, picture.serial)
        except PeerError:
            return [Unread(picture.serial, broken=True)]
        seen_ns = time.monotonic_ns()
        return [look(frame, picture, seen_ns) for frame in frames]

    def _hand_over(self, looks: list[Look]) -> None:
        if not self._closed:
            self._deliver(looks)


class Sightings:
    """What one receiver sees of a stream. `feedback` sends NACKs and keyframe requests."""

    def __init__(
        self, codec: VideoCodec, feedback: Callable[[VideoOutput, int], None], *, every: int = 1
    ) -> None:
        """`every`: of so many keyframe intervals one is decoded, the first; 1: all."""
        self.seen: list[Sighting] = []
        self.unreadable = 0
        """Pictures without a stamp that could be believed."""
        self.received_bytes = 0
        self.size = (0, 0)
        """Pixels of the last picture."""
        self.whole_ns: list[int] = []
        """When each picture was put together, decoded or not; CLOCK_MONOTONIC."""
        self._feedback = feedback
        self._every = every
        self._intervals = 0
        payload = PAYLOADS[codec]
        self._jitter = VideoJitter(starts=payload.starts, is_keyframe=payload.is_keyframe, trusting=True)
        self._thread = StampThread(codec, self._looked)
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._ssrc = 0

    def receive(self, packet: RtpPacket) -> None:
        """Take one packet."""
        self._ssrc = packet.ssrc
        self.received_bytes += len(packet.payload)
        self._act(self._jitter.receive(packet, packet.arrival_ns))

    def _due(self) -> None:
        self._act(self._jitter.due(time.monotonic_ns()))

    def _act(self, outputs: Iterable[VideoOutput]) -> None:
        for output in outputs:
            if not isinstance(output, Picture):
                self._feedback(output, self._ssrc)
            elif self._wanted(output) and not self._thread.submit(output):
                self._act(self._jitter.decoder_failed(output.serial, time.monotonic_ns()))
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        deadline = self._jitter.deadline
        if deadline is not None:
            self._timer = self._loop.call_later(max(deadline - time.monotonic_ns(), 0) / 1e9, self._due)

    def _wanted(self, picture: Picture) -> bool:
        """Count a picture; whether it is to be decoded."""
        self.whole_ns.append(time.monotonic_ns())
        if self._every == 1:
            return True
        self._intervals += picture.keyframe
        return self._intervals % self._every == 1

    def _looked(self, looks: list[Look]) -> None:
        for found in looks:
            if not isinstance(found, Unread):
                sighting, self.size = found
                self.seen.append(sighting)
            elif found.broken:
                self._act(self._jitter.decoder_failed(found.serial, time.monotonic_ns()))
            else:
                self.unreadable += 1

    def close(self) -> None:
        """Take and decode nothing more."""
        if self._timer is not None:
            self._timer.cancel()
        self._thread.close()
