"""One stream on its way to side B: decoded pictures and sound become records in the mailbox.

    DecodedPicture, DecodedSound ─▶ Publication ─▶ VideoFrame, AudioFrame, StreamStarted, StreamStopped

`Stage` is where all publications of a source meet: the mailbox, the epochs, and the admission by number of
streams and by pixels a second, so that one publisher more never takes from those that are there. No picture
gets into the mailbox without admission and payment, whoever decoded it; decoders that can ask before.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from relay.errors import PeerError
from relay.mailbox import Mailbox
from relay.metrics import Metrics
from relay.records import AudioFrame, Record, StopReason, StreamKind, StreamStarted, StreamStopped, VideoFrame
from rtc.bucket import Bucket
from rtc.budget import ASSUMED_RATE, BURST_SECONDS, PixelBudget
from rtc.decode import OPUS_CHANNELS, OPUS_RATE, check_size
from rtc.decode_thread import DecodedPicture, DecodedSound
from rtc.depayload import Size
from rtc.faults import FaultLog

DECODE_SLACK = 2.0
"""Pictures are decoded up to so many times the lane's greatest rate, since what follows refers to them; what
comes faster is not decoded until the next keyframe."""

RATE_WINDOW = 60
"""Pictures over which the rate is measured."""

AUDIO_BYTES = OPUS_RATE // 50 * 2 * OPUS_CHANNELS
"""Bytes of 20 ms: longer packets of sound are cut into frames of this size."""


@dataclass(slots=True, kw_only=True)
class Stage:
    """All publications of one source."""

    mailbox: Mailbox
    metrics: Metrics
    epoch: int
    max_streams: int
    max_frame_rate: float
    budget: PixelBudget
    publications: dict[str, Publication] = field(default_factory=dict)
    entered: Counter[tuple[str, int, StreamKind]] = field(default_factory=Counter)
    """Frames that entered the link, by stream, epoch and kind, of publications that are there."""
    refused: Counter[str] = field(default_factory=Counter)

    def open(self, name: str) -> Publication:
        """Admit a stream.

        Raises:
            PeerError: ``busy`` where the name is taken, ``full`` where the source has no room.
        """
        if name in self.publications:
            self.refused["busy"] += 1
            raise PeerError("busy", f"stream {name!r} is being published already")
        if len(self.publications) >= self.max_streams:
            self.refused["full"] += 1
            raise PeerError("full", f"{self.max_streams} streams are being published; that is the limit")
        if self.budget.held >= self.budget.per_second:
            self.refused["full"] += 1
            raise PeerError("full", "the streams that are there use all of the decoding budget")
        self.epoch = max(self.epoch + 1, int(time.time()))
        publication = self.publications[name] = Publication(name=name, epoch=self.epoch, stage=self)
        self.budget.enter(publication.epoch)
        return publication

    @property
    def pixels_per_second(self) -> float:
        """What is being decoded now."""
        return sum(item.pixels_per_second for item in self.publications.values())

    def tell_faults(self) -> None:
        """Log the faults that were left out so far. To be called each second."""
        for publication in self.publications.values():
            publication.fault_log.flush()

    def admit(self, size: Size) -> None:
        """Refuse a size that the lane does not carry or has no room for, before there is a publication.

        For sources that decode before they publish; may be called on any thread.

        Raises:
            PeerError: ``size`` or ``budget``.
        """
        check_size(size)
        if not self.budget.has_room(size.width * size.height):
            raise _over_budget(size)

    def note_taken(self, records: Iterable[Record]) -> None:
        """These records enter the link now."""
        for record in records:
            if isinstance(record, VideoFrame):
                self.entered[record.stream, record.epoch, StreamKind.VIDEO] += 1
            elif isinstance(record, AudioFrame):
                self.entered[record.stream, record.epoch, StreamKind.AUDIO] += 1


FAULTS_ABOUT = "Media that could not be decoded"


@dataclass(slots=True, kw_only=True)
class Publication:
    """One stream of one publisher. Its epoch is its own; it stops once."""

    name: str
    epoch: int
    stage: Stage
    pictures: int = 0
    sounds: int = 0
    size: Size | None = None
    declared_rate_milli: int = 0
    over_budget: int = 0
    """Pictures that came faster than the lane or the stream's share of the budget allows."""
    faults: Counter[str] = field(default_factory=Counter)
    fault_log: FaultLog = field(init=False)
    stopped: bool = False
    _admitted: Size | None = None
    _decoding: Bucket = field(init=False)
    _started: set[StreamKind] = field(default_factory=set)
    _times: deque[int] = field(default_factory=lambda: deque(maxlen=RATE_WINDOW))

    def __post_init__(self) -> None:
        self.fault_log = FaultLog(self.name)
        self._decoding = Bucket(self.stage.max_frame_rate * DECODE_SLACK, BURST_SECONDS)

    def __repr__(self) -> str:
        state = "stopped" if self.stopped else f"{self.pictures} pictures, {self.sounds} sounds"
        return f"<Publication {self.name} epoch={self.epoch} {state}>"

    @property
    def live(self) -> bool:
        """Whether anything was published yet."""
        return bool(self._started) and not self.stopped

    @property
    def rate(self) -> float:
        """Pictures a second, measured over the last ones; what is assumed before."""
        if len(self._times) < RATE_WINDOW // 4:
            return self.declared_rate_milli / 1000 or ASSUMED_RATE
        span = self._times[-1] - self._times[0]
        return (len(self._times) - 1) * 1e9 / max(span, 1)

    @property
    def pixels_per_second(self) -> float:
        """What this stream costs its decoder; 0 before its size is known."""
        return 0.0 if self.size is None else self.size.width * self.size.height * self.rate

    def admit(self, size: Size) -> None:
        """Refuse a size that the lane does not carry or has no room for. May be called on any thread.

        Raises:
            PeerError: ``size`` or ``budget``.
        """
        check_size(size)
        rate = self.declared_rate_milli / 1000
        if not self.stage.budget.reserve(self.epoch, size.width * size.height, rate):
            raise _over_budget(size)
        self._admitted = size

    def pace(self, arrival_ns: int) -> None:
        """Refuse to decode a picture that comes far too fast. Called on the decoder's thread.

        Raises:
            PeerError: ``rate``.
        """
        if not self._decoding.take(arrival_ns):
            limit = f"{self.stage.max_frame_rate:.0f} pictures a second"
            raise PeerError("rate", f"more than {DECODE_SLACK:.0f} times the lane's {limit}: send fewer")

    def _start(self, kind: StreamKind) -> None:
        if kind not in self._started:
            self._started.add(kind)
            rate = self.declared_rate_milli if kind is StreamKind.VIDEO else 0
            self.stage.mailbox.put(
                StreamStarted(stream=self.name, kind=kind, epoch=self.epoch, frame_rate_milli=rate)
            )

    def picture(self, decoded: DecodedPicture, media_ns: int) -> None:
        """Hand on a picture; `media_ns` as in `relay.records.VideoFrame`."""
        if self.stopped or not self._accepts(decoded):
            return
        self._start(StreamKind.VIDEO)
        self.stage.mailbox.put(
            VideoFrame(
                stream=self.name,
                epoch=self.epoch,
                seq=self.pictures,
                captured_ns=decoded.arrival_ns,
                decoded_ns=decoded.decoded_ns,
                media_ns=media_ns,
                width=decoded.width,
                height=decoded.height,
                planes=decoded.planes,
                refreshed=decoded.refreshed,
            )
        )
        self.pictures += 1
        self.stage.metrics.latency("receive", self.name).record_ns(decoded.decoded_ns - decoded.arrival_ns)

    def _accepts(self, decoded: DecodedPicture) -> bool:
        """Whether the lane carries a picture of this size, now."""
        size = Size(width=decoded.width, height=decoded.height)
        if size != self._admitted:
            try:
                self.admit(size)
            except PeerError as error:
                self.fault(error.reason, str(error))
                return False
        self.size = size
        self._times.append(decoded.arrival_ns)
        # By arrival: pictures that a jitter buffer held and lets go together did not come too fast.
        if not self.stage.budget.spend(self.epoch, size.width * size.height, decoded.arrival_ns):
            self.over_budget += 1
            self.stage.metrics.count("media_over_budget", "Pictures left out: they came too fast")
            return False
        return True

    def sound(self, decoded: DecodedSound, media_ns: int) -> None:
        """Hand on sound, in frames of 20 ms at most; `media_ns` is that of its first sample."""
        if self.stopped:
            return
        self._start(StreamKind.AUDIO)
        for at in range(0, len(decoded.samples), AUDIO_BYTES):
            self.stage.mailbox.put(
                AudioFrame(
                    stream=self.name,
                    epoch=self.epoch,
                    seq=self.sounds,
                    captured_ns=decoded.arrival_ns,
                    decoded_ns=decoded.decoded_ns,
                    media_ns=media_ns + at * 20_000_000 // AUDIO_BYTES,
                    rate=OPUS_RATE,
                    channels=OPUS_CHANNELS,
                    samples=decoded.samples[at : at + AUDIO_BYTES],
                )
            )
            self.sounds += 1

    def status(self) -> dict[str, Any]:
        """Figures of the stream."""
        return {
            "epoch": self.epoch,
            "size": f"{self.size.width}x{self.size.height}" if self.size else None,
            "rate": round(self.rate, 1) if self.pictures else None,
            "pictures": self.pictures,
            "sounds": self.sounds,
            "over_budget": self.over_budget,
            "faults": dict(self.faults),
        }

    def fault(self, reason: str, detail: str = "") -> None:
        """Count and log a picture or packet that could not be used: a fixed word, and a text for people."""
        self.faults[reason] += 1
        self.fault_log.note(reason, detail)
        self.stage.metrics.count("media_faults", FAULTS_ABOUT, reason=reason)

    def stop(self, reason: StopReason) -> None:
        """End the stream: B is told how many frames entered the link, and says how many it missed."""
        if self.stopped:
            return
        self.stopped = True
        self.fault_log.flush()
        self.stage.budget.leave(self.epoch)
        del self.stage.publications[self.name]
        for kind in sorted(self._started):
            frames = self.stage.entered.pop((self.name, self.epoch, kind), 0)
            self.stage.mailbox.put(
                StreamStopped(stream=self.name, kind=kind, epoch=self.epoch, reason=reason, frames=frames)
            )


def _over_budget(size: Size) -> PeerError:
    return PeerError("budget", f"{size.width}x{size.height} is more than the decoding budget has left")
