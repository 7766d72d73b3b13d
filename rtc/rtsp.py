"""RTSP pull (RFC 7826, 2326): a camera that is asked for its stream, through FFmpeg's client.

    connect ─▶ demux ─▶ decode ─▶ copy ─▶ loop: pictures ─────────────────▶ publication   (a thread a camera)
       │                                     └─ sound ─▶ Trickle, 20 ms each ─┘
       └─ fault, end, silence, refusal ─▶ wait (1, 2, 4 … 30 s) ─▶ connect

FFmpeg ends the protocol and reorders its packets; what leaves the thread are decoded pictures and PCM,
checked like everyone else's. Addresses may hold a password and are never logged.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import av
from av.codec.context import Flags

from relay.errors import PeerError
from relay.records import MAX_DIMENSION, StopReason
from rtc.decode import MAX_PICTURE_PIXELS, OPUS_RATE, plain, visible_planes
from rtc.decode_thread import REFUSALS, DecodedPicture, DecodedSound, Fault
from rtc.depayload import Size
from rtc.faults import FaultLog
from rtc.publication import AUDIO_BYTES, FAULTS_ABOUT, Publication, Stage
from rtc.settings import RtspSettings

OPEN_SECONDS = 5.0
"""For connecting and the description of the streams, and again for looking at their first packets."""

ANALYSIS_SECONDS = 2.0
"""Of media looked at before the first picture. A camera that announces sound and sends none costs this."""

SILENCE_SECONDS = 3.0
"""Without a packet for so long, the camera is gone."""

FIRST_WAIT = 1.0
LONGEST_WAIT = 30.0
"""Seconds between two attempts; they double in between."""

MAX_UNHANDED = 8
"""Decoded pictures and sounds that the loop has not taken yet. More are dropped: the loop is behind."""

MAX_PARTS = 16
"""Parts of 20 ms that a `Trickle` holds: the longest packet of sound in use is 256 ms (AAC at 8 kHz)."""

PART_SAMPLES = OPUS_RATE // 50
"""Of one channel in 20 ms."""

PART_NS = 20_000_000

PART_SECONDS = 0.018
"""Between two parts. A tenth faster than they play, so that what waits becomes less by itself."""

VIDEO_CODECS = frozenset({"h264", "vp8"})

AUDIO_CODECS = frozenset({"aac", "opus", "libopus", "pcm_alaw", "pcm_mulaw"})
"""Sound that is carried; of a camera with any other, the pictures are."""

FAULTS: tuple[tuple[type[Exception], str], ...] = (
    (av.error.HTTPUnauthorizedError, "it refuses the user or the password: correct them in url"),
    (av.error.HTTPForbiddenError, "it forbids this stream to the user: allow it in the camera"),
    (av.error.HTTPNotFoundError, "it has no such stream: correct the path in url"),
)
"""What cameras answer, and what to do."""

log = logging.getLogger("medferry.rtc")


class _Puller:
    """The thread of one connection to a camera."""

    def __init__(self, settings: RtspSettings, owner: RtspPull) -> None:
        self._settings = settings
        self._owner = owner
        self._loop = asyncio.get_running_loop()
        self._stopping = threading.Event()
        self._resampler: tuple[tuple[str, str, int], av.AudioResampler] | None = None
        """With the format, layout and rate that it is made for."""
        self._room = threading.BoundedSemaphore(MAX_UNHANDED)
        self._connected = False
        self._heard = time.monotonic()
        """When the connection began or the last packet came, in seconds."""
        self.ended: asyncio.Future[str] = self._loop.create_future()
        """Set to why the connection ended; an exception is a fault of ours."""
        threading.Thread(target=self._run, name="rtsp", daemon=True).start()

    def stop(self) -> None:
        """Ask the thread to end; it does so at the next packet or timeout."""
        self._stopping.set()

    def end(self, why: str) -> None:
        """Give the connection up."""
        self.stop()
        self._finish(why)

    def _run(self) -> None:
        try:
            self._pull()
        except PeerError as error:
            self._call(self._finish, str(error))
        except (av.FFmpegError, OSError) as error:
            self._call(self._finish, self._words(error))
        except Exception as error:  # noqa: BLE001 - handed to the loop, which ends the worker with it
            self._call(self._fail, error)
        else:
            self._call(self._finish, "it ended the stream")

    def _words(self, error: av.FFmpegError | OSError) -> str:
        """Of a fault of FFmpeg's; never the address, which some of its errors carry."""
        # What FFmpeg makes of its interruption depends on what it was doing: the time tells for sure.
        waited = time.monotonic() - self._heard
        if self._connected and waited >= SILENCE_SECONDS:
            return f"silent for {SILENCE_SECONDS:.0f} s"
        if not self._connected and waited >= OPEN_SECONDS:
            return f"it does not answer within {OPEN_SECONDS:.0f} s"
        known = (text for kind, text in FAULTS if isinstance(error, kind))
        return next(known, error.strerror or "no connection")

    def _finish(self, why: str) -> None:
        if not self.ended.done():
            self.ended.set_result(why)

    def _fail(self, error: Exception) -> None:
        if not self.ended.done():
            self.ended.set_exception(error)

    def _call(self, function: Callable[..., None], *arguments: object) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:
            # The loop has ended: there is nobody to tell.
            self._stopping.set()

    def _open(self) -> Any:
        options = {
            "rtsp_transport": self._settings.transport,
            "allowed_media_types": "video+audio",
            "fflags": "nobuffer",
            "max_delay": "100000",
            "analyzeduration": str(int(ANALYSIS_SECONDS * 1e6)),
            "max_pixels": str(MAX_PICTURE_PIXELS + 2 * 16 * MAX_DIMENSION),
        }
        return av.open(self._settings.url, options=options, timeout=(OPEN_SECONDS, SILENCE_SECONDS))

    def _pull(self) -> None:
        with self._open() as camera:
            self._connected = True
            self._heard = time.monotonic()
            for packet in camera.demux(self._streams(camera)):
                if self._stopping.is_set():
                    return
                arrival_ns = time.monotonic_ns()
                self._heard = arrival_ns / 1e9
                for outcome, seconds in self._decode(packet, arrival_ns):
                    self._hand_over(outcome, seconds)

    def _streams(self, camera: Any) -> list[Any]:
        """The streams that are carried, ready to be decoded.

        Raises:
            PeerError: There is no video, or none that is carried.
        """
        streams: list[Any] = []
        for video in camera.streams.video[:1]:
            context = video.codec_context
            if context is None or context.name not in VIDEO_CODECS:
                name = context.name if context is not None else "a codec unknown here"
                raise PeerError("codec", f"it sends {name}: set it to H.264")
            context.thread_type = "NONE"
            context.thread_count = 1
            context.flags |= Flags.low_delay
            context.options = {"max_pixels": str(MAX_PICTURE_PIXELS + 2 * 16 * MAX_DIMENSION)}
            streams.append(video)
        if not streams:
            raise PeerError("codec", "it sends no video: correct the path in url")
        for audio in camera.streams.audio[:1] if self._settings.audio else []:
            context = audio.codec_context
            if context is not None and context.name in AUDIO_CODECS:
                streams.append(audio)
        return streams

    def _decode(
        self, packet: Any, arrival_ns: int
    ) -> Iterator[tuple[DecodedPicture | DecodedSound | Fault, float]]:
        """What comes of a packet, each with its time on the camera's clock in seconds.

        Raises:
            PeerError: The stream is not one that is carried.
        """
        try:
            for frame in packet.decode():
                if isinstance(frame, av.VideoFrame):
                    self._owner.admit(Size(width=frame.width, height=frame.height))
                    bare = plain(frame)
                    planes = visible_planes(bare)
                    now_ns = time.monotonic_ns()
                    picture = DecodedPicture(bare.width, bare.height, planes, 0, arrival_ns, now_ns)
                    yield picture, frame.time or 0.0
                elif isinstance(frame, av.AudioFrame):
                    parts = self._resampled(frame)
                    if parts:
                        samples = b"".join(part.to_ndarray().tobytes() for part in parts)
                        sound = DecodedSound(samples, 0, arrival_ns, time.monotonic_ns())
                        yield sound, parts[0].time or 0.0
        except PeerError as error:
            if error.reason in REFUSALS:
                raise
            yield Fault(error.reason, str(error)), 0.0
        except av.FFmpegError as error:
            yield Fault("decode", f"cannot be decoded: {error.strerror}"), 0.0

    def _resampled(self, frame: av.AudioFrame) -> list[av.AudioFrame]:
        """The PCM that records carry, cut into parts of 20 ms. Cameras may change the format on the way."""
        made_for = (frame.format.name, frame.layout.name, frame.sample_rate)
        if self._resampler is None or self._resampler[0] != made_for:
            self._resampler = made_for, av.AudioResampler("s16", "stereo", OPUS_RATE, PART_SAMPLES)
        return self._resampler[1].resample(frame)

    def _hand_over(self, outcome: DecodedPicture | DecodedSound | Fault, seconds: float) -> None:
        if not self._room.acquire(blocking=False):
            self._owner.dropped += 1
            return
        self._call(self._taken, outcome, seconds)

    def _taken(self, outcome: DecodedPicture | DecodedSound | Fault, seconds: float) -> None:
        self._room.release()
        if self._stopping.is_set():
            return
        try:
            self._owner.take(outcome, seconds)
        except PeerError as error:
            self.end(str(error))


class Trickle:
    """The parts of long packets of sound, let out one by one: after it come buffers that hold only 100 ms."""

    def __init__(self, let_out: Callable[[DecodedSound, int], None]) -> None:
        """`let_out` takes a part and its media time in nanoseconds."""
        self.dropped = 0
        """Parts pushed out by newer ones."""
        self._let_out = let_out
        self._loop = asyncio.get_running_loop()
        self._parts: deque[tuple[DecodedSound, int]] = deque(maxlen=MAX_PARTS)
        self._due = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"<Trickle {self.fill} of {MAX_PARTS} parts, {self.dropped} dropped>"

    @property
    def fill(self) -> int:
        """Parts that wait."""
        return len(self._parts)

    def put(self, sound: DecodedSound, media_ns: int) -> None:
        """Take whole parts, `media_ns` being of the first; it leaves at once if none waits or just left."""
        for number, at in enumerate(range(0, len(sound.samples), AUDIO_BYTES)):
            part = replace(sound, samples=sound.samples[at : at + AUDIO_BYTES])
            self.dropped += len(self._parts) == MAX_PARTS
            self._parts.append((part, media_ns + number * PART_NS))
        if self._timer is None:
            self._due = max(self._due, self._loop.time())
            self._next()

    def close(self) -> None:
        """Forget what waits."""
        self._parts.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _next(self) -> None:
        """Let out what is due, and come back for the rest."""
        self._timer = None
        while self._parts and self._due <= self._loop.time():
            self._due += PART_SECONDS
            self._let_out(*self._parts.popleft())
        if self._parts:
            self._timer = self._loop.call_at(self._due, self._next)


class RtspPull:
    """One camera."""

    def __init__(self, stage: Stage, settings: RtspSettings) -> None:
        self.name = settings.stream
        self._stage = stage
        self._settings = settings
        self._publication: Publication | None = None
        self._trickle: Trickle | None = None
        self._zero_ns = 0
        self._again_at: float | None = None
        """When the next attempt is, on the monotonic clock, in seconds; None while there is a connection."""
        self.attempts = 0
        self.dropped = 0
        """Pictures and sounds that found the loop `MAX_UNHANDED` behind."""
        self.last_end = ""
        self._early_faults = FaultLog(self.name)
        """Of a connection from which nothing could be published yet."""

    def __repr__(self) -> str:
        return f"<RtspPull {self.name} {self._state}>"

    @property
    def _state(self) -> str:
        if self._publication is not None:
            return "live"
        return "connecting" if self._again_at is None else "waiting"

    async def run(self) -> None:
        """Pull until cancelled, connecting anew whenever the connection ends."""
        wait = FIRST_WAIT
        while True:
            was_live = await self._connection()
            wait = FIRST_WAIT if was_live else wait
            log.warning(
                "stream %s: camera: %s: again in %.0f s",
                self.name,
                self.last_end,
                wait,
                extra={"event": "rtsp"},
            )
            self._again_at = time.monotonic() + wait
            await asyncio.sleep(wait)
            self._again_at = None
            wait = min(2 * wait, LONGEST_WAIT)

    async def _connection(self) -> bool:
        """One connection from its start to its end; whether anything came."""
        self.attempts += 1
        puller = _Puller(self._settings, self)
        reason = StopReason.DRAINED
        try:
            self.last_end = await puller.ended
            reason = StopReason.LOST
        finally:
            puller.stop()
            was_live = self._publication is not None
            self._early_faults.flush()
            self._stop(reason)
        return was_live

    def admit(self, size: Size) -> None:
        """Called on the thread.

        Raises:
            PeerError: The size is refused.
        """
        publication = self._publication
        if publication is not None:
            publication.admit(size)
        else:
            self._stage.admit(size)

    def take(self, outcome: DecodedPicture | DecodedSound | Fault, seconds: float) -> None:
        """What the thread decoded; `seconds` is its time on the camera's clock.

        Raises:
            PeerError: The source has no room for the stream.
        """
        if isinstance(outcome, Fault):
            if self._publication is not None:
                self._publication.fault(outcome.reason, outcome.detail)
            else:
                self._early_faults.note(outcome.reason, outcome.detail)
                self._stage.metrics.count("media_faults", FAULTS_ABOUT, reason=outcome.reason)
            return
        publication = self._publication or self._open(outcome.arrival_ns, seconds)
        media_ns = max(self._zero_ns + int(seconds * 1e9), 0)
        if isinstance(outcome, DecodedPicture):
            publication.picture(outcome, media_ns)
        elif self._trickle is not None:
            self._trickle.put(outcome, media_ns)

    def _open(self, arrival_ns: int, seconds: float) -> Publication:
        publication = self._publication = self._stage.open(self.name)
        self._trickle = Trickle(publication.sound)
        self._zero_ns = arrival_ns - int(seconds * 1e9)
        log.info("stream %s: camera: live", self.name, extra={"event": "rtsp"})
        return publication

    def _stop(self, reason: StopReason) -> None:
        if self._trickle is not None:
            self._trickle.close()
            self._trickle = None
        if self._publication is not None:
            self._publication.stop(reason)
            self._publication = None

    def status(self) -> dict[str, Any]:
        """Figures of the connection."""
        again = None if self._again_at is None else round(max(self._again_at - time.monotonic(), 0.0), 1)
        return {
            "rtsp": {
                "state": self._state,
                "attempts": self.attempts,
                "last_end": self.last_end,
                "again_in_seconds": again,
                "dropped": self.dropped,
                "sound_waiting": self._trickle.fill if self._trickle is not None else 0,
                "sound_dropped": self._trickle.dropped if self._trickle is not None else 0,
            }
        }
