"""Decoding off the event loop: one thread a stream, a bounded inbox, outcomes handed back to the loop.

    submit ─▶ inbox (MAX_PENDING) ─▶ thread: depayload, decode ─▶ loop: deliver(outcomes)

A thread that falls behind refuses what is new, and its owner asks for a keyframe. Closing tells the thread to
end and waits for nothing.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from relay.errors import PeerError
from relay.records import Buffer
from rtc.decode import OpusDecoder, VideoDecoder, check_size, plain, visible_planes
from rtc.depayload import PAYLOADS, Size
from rtc.jitter import Picture, Silence, Sound
from rtc.placement import give_way

MAX_PENDING = 12
"""Pictures, or packets of sound, that wait for a decoder. One that is later than this never catches up."""

REFUSALS = frozenset({"size", "budget", "profile", "format"})
"""Reasons that lie in what the stream is, not in damage to it."""

MAX_IN_DECODER = 32
"""Pictures that a decoder may keep back to put them in order: H.264 allows 16."""


@dataclass(frozen=True, slots=True)
class DecodedPicture:
    """Planes without padding, 8 bits 4:2:0; the RTP timestamp and arrival of what they were decoded from."""

    width: int
    height: int
    planes: tuple[Buffer, Buffer, Buffer]
    timestamp: int
    arrival_ns: int
    decoded_ns: int
    refreshed: bool = False
    """It was decoded from a keyframe."""


@dataclass(frozen=True, slots=True)
class DecodedSound:
    """Interleaved signed 16-bit PCM. `timestamp` is None where it was made up for what was lost."""

    samples: bytes
    timestamp: int | None
    arrival_ns: int
    decoded_ns: int


@dataclass(frozen=True, slots=True)
class Fault:
    """A picture or packet that could not be decoded. `reason` is a fixed word, `detail` is for people."""

    reason: str
    detail: str
    refused: bool = False
    """The stream is not one that the lane carries; a new keyframe of the same kind would not help."""
    serial: int = 0
    """Of the picture (`Picture.serial`)."""


VideoOutcome = DecodedPicture | Fault
AudioOutcome = DecodedSound | Fault

Item = TypeVar("Item")
Outcome = TypeVar("Outcome")


class _Thread(Generic[Item, Outcome]):
    """A thread with a bounded inbox; `work` turns one item into outcomes."""

    def __init__(self, name: str, deliver: Callable[[list[Outcome]], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._deliver = deliver
        self._inbox: queue.SimpleQueue[Item | None] = queue.SimpleQueue()
        self._closed = False
        self.dropped = 0
        """Items refused because the inbox was full."""
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def pending(self) -> int:
        """Items that wait; never more than `MAX_PENDING`."""
        return self._inbox.qsize()

    def submit(self, item: Item) -> bool:
        """Queue an item; False where the inbox is full and the item was dropped."""
        if self._inbox.qsize() >= MAX_PENDING:
            self.dropped += 1
            return False
        self._inbox.put(item)
        return True

    def close(self) -> None:
        """Tell the thread to end. What it still delivers is dropped."""
        self._closed = True
        self._inbox.put(None)

    def work(self, item: Item) -> list[Outcome]:
        """What comes of one item. Runs on the thread."""
        raise NotImplementedError

    def _run(self) -> None:
        give_way()
        while (item := self._inbox.get()) is not None and not self._closed:
            outcomes = self.work(item)
            if not outcomes:
                continue
            try:
                self._loop.call_soon_threadsafe(self._hand_over, outcomes)
            except RuntimeError:
                # The loop has ended, and with it everyone who could use a picture.
                return

    def _hand_over(self, outcomes: list[Outcome]) -> None:
        if not self._closed:
            self._deliver(outcomes)


class VideoThread(_Thread[Picture, VideoOutcome]):
    """Decodes one video stream."""

    def __init__(
        self,
        codec: str,
        deliver: Callable[[list[VideoOutcome]], None],
        admit: Callable[[Size], None] = check_size,
        parameter_sets: bytes = b"",
        pace: Callable[[int], None] = lambda _: None,
    ) -> None:
        """`admit` raises PeerError for a picture of a size that must not be decoded, `pace` for one that
        arrived, at the given time, too soon after others."""
        self._payload = PAYLOADS[codec]
        self._decoder = VideoDecoder(codec, parameter_sets)
        self._admit = admit
        self._pace = pace
        self._given: dict[int, Picture] = {}
        self._number = 0
        self._refused: Fault | None = None
        """Why the stream's present size or profile is not decoded, until it declares another."""
        super().__init__(f"decode {codec}", deliver)

    def work(self, item: Picture) -> list[VideoOutcome]:
        """Depayload and decode one picture."""
        try:
            return list(self._decode(item))
        except PeerError as error:
            fault = Fault(error.reason, str(error), error.reason in REFUSALS, item.serial)
            if fault.refused:
                self._refused = fault
            return [fault]

    def _decode(self, item: Picture) -> Iterator[VideoOutcome]:
        coded = self._payload.picture(item.payloads)
        if coded is None:
            return
        if coded.size is not None:
            self._admit(coded.size)
            self._refused = None
        if self._refused is not None:
            yield self._refused
            return
        self._pace(item.arrival_ns)
        self._number += 1
        self._given[self._number] = item
        if len(self._given) > MAX_IN_DECODER:
            del self._given[next(iter(self._given))]
        for frame in self._decoder.decode(coded, self._number):
            origin = self._given.pop(frame.pts if frame.pts is not None else self._number, item)
            # Cropping is the decoder's business, so the size is known for sure only now.
            self._admit(Size(width=frame.width, height=frame.height))
            bare = plain(frame)
            planes = visible_planes(bare)
            now_ns = time.monotonic_ns()
            yield DecodedPicture(
                bare.width,
                bare.height,
                planes,
                origin.timestamp,
                origin.arrival_ns,
                now_ns,
                origin.keyframe,
            )


class AudioThread(_Thread[Sound | Silence, AudioOutcome]):
    """Decodes one stream of Opus."""

    def __init__(self, deliver: Callable[[list[AudioOutcome]], None]) -> None:
        self._decoder = OpusDecoder()
        super().__init__("decode opus", deliver)

    def work(self, item: Sound | Silence) -> list[AudioOutcome]:
        """Decode one packet, or make up for lost ones."""
        if isinstance(item, Silence):
            now_ns = time.monotonic_ns()
            made_up = [self._decoder.conceal() for _ in range(item.packets)]
            return [DecodedSound(samples, None, now_ns, now_ns) for samples in made_up if samples]
        try:
            samples = self._decoder.decode(item.payload)
        except PeerError as error:
            return [Fault(error.reason, str(error))]
        if not samples:
            return []
        return [DecodedSound(samples, item.timestamp, item.arrival_ns, time.monotonic_ns())]
