"""One Opus encoder on a thread of its own: a few records may wait, the oldest is dropped."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import av

from relay.records import AudioFrame
from rtc.clock import SECOND_NS
from rtc.decode import OPUS_RATE
from rtc.encode import OPUS_SAMPLES, OpusEncoder

MAX_WAITING = 5
"""Records that may wait for the encoder, 100 ms of sound. It takes 0.3 ms for each."""

MAX_UNPUBLISHED = 10
"""Packets that the loop has not taken yet, 200 ms of sound; more are dropped."""

PACKET_NS = OPUS_SAMPLES * SECOND_NS // OPUS_RATE

GAP_NS = 60_000_000
"""Sound that comes so much earlier or later than what went before: the packets' times start anew."""


@dataclass(frozen=True, slots=True)
class CodedSound:
    """One Opus packet and when its first sample was."""

    payload: bytes
    timeline_ns: int


class SoundThread:
    """The Opus encoder of one stream."""

    def __init__(
        self,
        name: str,
        bitrate: int,
        publish: Callable[[CodedSound], None],
        failed: Callable[[BaseException], None],
    ) -> None:
        self.bitrate = bitrate
        self.dropped = 0
        self.encoded = 0
        self.faults = 0
        self._publish = publish
        self._failed = failed
        self._loop = asyncio.get_running_loop()
        self._changed = threading.Condition()
        self._waiting: deque[tuple[AudioFrame, int]] = deque()
        self._unpublished = 0
        self._closed = False
        self._encoder: OpusEncoder | None = None
        self._next_ns: int | None = None
        self._stopped = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name=f"opus {name}", daemon=True)
        self._thread.start()

    def offer(self, frame: AudioFrame, timeline_ns: int) -> None:
        """Let a record be encoded; its samples must be its own, not a buffer that is written over."""
        with self._changed:
            if len(self._waiting) >= MAX_WAITING:
                self._waiting.popleft()
                self.dropped += 1
            self._waiting.append((frame, timeline_ns))
            self._changed.notify()

    async def close(self) -> None:
        """End the thread; returns when it has ended."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        await self._stopped.wait()

    def _next(self) -> tuple[AudioFrame, int] | None:
        with self._changed:
            while not self._closed:
                if self._waiting:
                    return self._waiting.popleft()
                self._changed.wait()
        return None

    def _run(self) -> None:
        try:
            while (item := self._next()) is not None:
                for sound in self._encode(*item):
                    self._hand_over(sound)
        except Exception as error:  # noqa: BLE001 - handed to the loop, which ends the worker with it
            self._loop.call_soon_threadsafe(self._failed, error)
        self._loop.call_soon_threadsafe(self._stopped.set)

    def _encode(self, frame: AudioFrame, timeline_ns: int) -> list[CodedSound]:
        encoder = self._encoder
        if encoder is None or not encoder.fits(frame):
            encoder = OpusEncoder(rate=frame.rate, channels=frame.channels, bitrate=self.bitrate)
            self._encoder, self._next_ns = encoder, None
        begins_ns = timeline_ns - encoder.pending_ns
        if self._next_ns is None or abs(begins_ns - self._next_ns) > GAP_NS:
            self._next_ns = begins_ns
        # Steps of exactly one packet, pulled gently to where the records say they are.
        self._next_ns += (begins_ns - self._next_ns) // 64
        try:
            payloads = encoder.encode(frame.samples)
        except av.FFmpegError:
            self.faults += 1
            self._encoder = None
            return []
        found = []
        for payload in payloads:
            found.append(CodedSound(payload, self._next_ns))
            self._next_ns += PACKET_NS
        return found

    def _hand_over(self, sound: CodedSound) -> None:
        with self._changed:
            if self._unpublished >= MAX_UNPUBLISHED:
                self.dropped += 1
                return
            self._unpublished += 1
        self.encoded += 1
        self._loop.call_soon_threadsafe(self._deliver, sound)

    def _deliver(self, sound: CodedSound) -> None:
        with self._changed:
            self._unpublished -= 1
        self._publish(sound)
