"""The mailbox before the link: of each stream the newest picture, and a little sound, never more.

    put ─▶ [ stream: notices │ sound (MAX_AUDIO, oldest dropped) │ picture (newest wins) ] … ─▶ take, in turn

Live media must never queue: when the link is slow, what is late is replaced, so that after any stall the
delay is what it was before. Notices (a stream started, stopped) are kept and go before the media they
announce. Streams take turns, so that one cannot starve the others.

For one event loop; no thread may call in. Records only: no I/O, no clock.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field

from relay.records import AudioFrame, Record, StreamKind, StreamStarted, StreamStopped, VideoFrame

MAX_AUDIO = 6
"""Audio frames of one stream: 120 ms of 20 ms frames."""

MAX_NOTICES = 8
"""Notices of one stream that wait: two epochs' starts and stops. Older pairs are void and go first."""

MAX_STREAMS = 256
"""Streams that may have something waiting. Sources admit far fewer."""


@dataclass(slots=True)
class MailboxCounters:
    """What came out, and what was replaced or refused."""

    taken: int = 0
    pictures_replaced: int = 0
    audio_dropped: int = 0
    refused: int = 0
    """Records of a stream beyond `MAX_STREAMS`."""


@dataclass(slots=True)
class _Slot:
    notices: deque[StreamStarted | StreamStopped] = field(default_factory=lambda: deque(maxlen=MAX_NOTICES))
    sound: deque[AudioFrame] = field(default_factory=lambda: deque(maxlen=MAX_AUDIO))
    picture: VideoFrame | None = None

    @property
    def fill(self) -> int:
        return len(self.notices) + len(self.sound) + (self.picture is not None)


class Mailbox:
    """Between the decoders of a source and its outlet."""

    def __init__(self) -> None:
        self._slots: dict[str, _Slot] = {}
        self._waiting: deque[str] = deque()
        """Streams with something to take, in turn."""
        self._filled = asyncio.Event()
        self._idle = asyncio.Event()
        """Set while the taker waits for more: all that it took before is sent."""
        self.counters = MailboxCounters()

    def __repr__(self) -> str:
        return f"<Mailbox {self.fill} records of {len(self._slots)} streams>"

    @property
    def fill(self) -> int:
        """Records that wait."""
        return sum(slot.fill for slot in self._slots.values())

    def put(self, record: VideoFrame | AudioFrame | StreamStarted | StreamStopped) -> bool:
        """Leave a record; it replaces or pushes out what is older. False if it was refused.

        A stop voids the media of its stream and kind that was not taken yet.
        """
        slot = self._slots.get(record.stream)
        if slot is None:
            if len(self._slots) >= MAX_STREAMS:
                self.counters.refused += 1
                return False
            slot = self._slots[record.stream] = _Slot()
        if not slot.fill:
            self._waiting.append(record.stream)
        if isinstance(record, VideoFrame):
            self.counters.pictures_replaced += slot.picture is not None
            slot.picture = record
        elif isinstance(record, AudioFrame):
            self.counters.audio_dropped += len(slot.sound) == MAX_AUDIO
            slot.sound.append(record)
        else:
            if isinstance(record, StreamStopped):
                self._void(slot, record.kind)
            slot.notices.append(record)
        self._filled.set()
        return True

    def _void(self, slot: _Slot, kind: StreamKind) -> None:
        """Drop what waits of a stream that has stopped: it would follow its own end."""
        if kind is StreamKind.VIDEO:
            self.counters.pictures_replaced += slot.picture is not None
            slot.picture = None
        else:
            self.counters.audio_dropped += len(slot.sound)
            slot.sound.clear()

    async def drained(self) -> None:
        """Until nothing waits and the taker has come back for more."""
        while self._waiting or not self._idle.is_set():
            self._idle.clear()
            await self._idle.wait()

    async def take(self) -> list[Record]:
        """What waits of the stream whose turn it is, in the order to send it; waits for something."""
        while not self._waiting:
            self._filled.clear()
            self._idle.set()
            await self._filled.wait()
        self._idle.clear()
        stream = self._waiting.popleft()
        slot = self._slots.pop(stream)
        picture = [] if slot.picture is None else [slot.picture]
        self.counters.taken += slot.fill
        return [*slot.notices, *slot.sound, *picture]
