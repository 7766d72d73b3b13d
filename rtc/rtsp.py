"""RTSP pull (RFC 7826, 2326): a camera that is asked for its stream, through FFmpeg's client.

    connect ─▶ demux ─▶ decode ─▶ copy ─▶ loop: publication          (one thread a camera)
       └─ fault, end, silence ─▶ wait (1, 2, 4 … 30 s) ─▶ connect

FFmpeg ends the protocol and reorders its packets; what leaves the thread are decoded pictures and PCM,
checked like everyone else's. Addresses may hold a password and are never logged.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Iterator
from typing import Any

import av
from av.codec.context import Flags

from relay.errors import PeerError
from relay.records import StopReason
from rtc.decode import OPUS_CHANNELS, OPUS_RATE, plain, visible_planes
from rtc.decode_thread import DecodedPicture, DecodedSound, Fault
from rtc.depayload import Size
from rtc.publication import Publication, Stage
from rtc.settings import RtspSettings

OPEN_SECONDS = 5.0
"""For connecting and for the description of the streams."""

SILENCE_SECONDS = 3.0
"""Without a packet for so long, the camera is gone."""

FIRST_WAIT = 1.0
LONGEST_WAIT = 30.0
"""Seconds between two attempts; they double in between."""

MAX_UNHANDED = 4
"""Decoded pictures and sounds that the loop has not taken yet. More are dropped: the loop is behind."""

VIDEO_CODECS = frozenset({"h264", "vp8"})

log = logging.getLogger("medferry.rtc")


class _Puller:
    """The thread of one connection to a camera."""

    def __init__(self, settings: RtspSettings, owner: RtspPull) -> None:
        self._settings = settings
        self._owner = owner
        self._loop = asyncio.get_running_loop()
        self._stopping = threading.Event()
        self._resampler = av.AudioResampler("s16", "stereo", OPUS_RATE)
        self._room = threading.BoundedSemaphore(MAX_UNHANDED)
        self.ended: asyncio.Future[str] = self._loop.create_future()
        """Set to why the connection ended."""
        threading.Thread(target=self._run, name="rtsp", daemon=True).start()

    def stop(self) -> None:
        """Ask the thread to end; it does so at the next packet or timeout."""
        self._stopping.set()

    def _run(self) -> None:
        why = "ended"
        try:
            self._pull()
        except PeerError as error:
            why = str(error)
        except av.FFmpegError as error:
            why = error.strerror or "FFmpeg fault"
        except OSError as error:
            why = error.strerror or "no connection"
        self._call(self._finish, why)

    def _finish(self, why: str) -> None:
        if not self.ended.done():
            self.ended.set_result(why)

    def _call(self, function: Any, *arguments: object) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:
            # The loop has ended: there is nobody to tell.
            self._stopping.set()

    def _pull(self) -> None:
        options = {"rtsp_transport": self._settings.transport, "fflags": "nobuffer", "max_delay": "100000"}
        with av.open(self._settings.url, options=options, timeout=(OPEN_SECONDS, SILENCE_SECONDS)) as camera:
            streams: list[Any] = []
            for video in camera.streams.video[:1]:
                if video.codec_context.name not in VIDEO_CODECS:
                    raise PeerError("codec", f"the camera sends {video.codec_context.name}: set it to H.264")
                video.thread_type = "NONE"
                video.codec_context.thread_count = 1
                video.codec_context.flags |= Flags.low_delay
                streams.append(video)
            if not streams:
                raise PeerError("codec", "the camera sends no video")
            if self._settings.audio:
                streams += camera.streams.audio[:1]
            for packet in camera.demux(streams):
                if self._stopping.is_set():
                    return
                arrival_ns = time.monotonic_ns()
                for outcome in self._decode(packet, arrival_ns):
                    self._hand_over(outcome, packet)

    def _decode(self, packet: Any, arrival_ns: int) -> Iterator[DecodedPicture | DecodedSound | Fault]:
        try:
            frames = packet.decode()
            for frame in frames:
                if isinstance(frame, av.VideoFrame):
                    self._owner.admit(Size(width=frame.width, height=frame.height))
                    bare = plain(frame)
                    planes = visible_planes(bare)
                    now_ns = time.monotonic_ns()
                    yield DecodedPicture(bare.width, bare.height, planes, frame.pts or 0, arrival_ns, now_ns)
                elif isinstance(frame, av.AudioFrame):
                    for part in self._resampler.resample(frame):
                        samples = part.to_ndarray().tobytes()[: part.samples * 2 * OPUS_CHANNELS]
                        yield DecodedSound(samples, frame.pts or 0, arrival_ns, time.monotonic_ns())
        except PeerError as error:
            yield Fault(error.reason, str(error), refused=True)
        except av.FFmpegError as error:
            yield Fault("decode", f"cannot be decoded: {error.strerror}")

    def _hand_over(self, outcome: DecodedPicture | DecodedSound | Fault, packet: Any) -> None:
        if not self._room.acquire(blocking=False):
            return
        seconds = float(packet.pts * packet.time_base) if packet.pts is not None else 0.0
        self._call(self._taken, outcome, seconds)

    def _taken(self, outcome: DecodedPicture | DecodedSound | Fault, seconds: float) -> None:
        self._room.release()
        if not self._stopping.is_set():
            self._owner.take(outcome, seconds)


class RtspPull:
    """One camera."""

    def __init__(self, stage: Stage, settings: RtspSettings) -> None:
        self.name = settings.stream
        self._stage = stage
        self._settings = settings
        self._publication: Publication | None = None
        self._zero_ns = 0
        self.attempts = 0
        self.last_end = ""

    def __repr__(self) -> str:
        return f"<RtspPull {self.name} {'live' if self._publication else 'waiting'}>"

    async def run(self) -> None:
        """Pull until cancelled, connecting anew whenever the connection ends."""
        wait = FIRST_WAIT
        while True:
            self.attempts += 1
            puller = _Puller(self._settings, self)
            try:
                self.last_end = await puller.ended
            finally:
                puller.stop()
                was_live = self._publication is not None
                self._stop(StopReason.LOST if puller.ended.done() else StopReason.DRAINED)
            wait = FIRST_WAIT if was_live else min(2 * wait, LONGEST_WAIT)
            log.warning(
                "stream %s: camera: %s: again in %.0f s",
                self.name,
                self.last_end,
                wait,
                extra={"event": "rtsp"},
            )
            await asyncio.sleep(wait)

    def admit(self, size: Size) -> None:
        """Called on the thread.

        Raises:
            PeerError: The size is refused.
        """
        publication = self._publication
        if publication is not None:
            publication.admit(size)

    def take(self, outcome: DecodedPicture | DecodedSound | Fault, seconds: float) -> None:
        """What the thread decoded; `seconds` is its time on the camera's clock."""
        if isinstance(outcome, Fault):
            if self._publication is not None:
                self._publication.fault(outcome.reason)
            return
        publication = self._publication or self._open(outcome.arrival_ns, seconds)
        if publication is None:
            return
        media_ns = max(self._zero_ns + int(seconds * 1e9), 0)
        if isinstance(outcome, DecodedPicture):
            publication.picture(outcome, media_ns)
        else:
            publication.sound(outcome, media_ns)

    def _open(self, arrival_ns: int, seconds: float) -> Publication | None:
        try:
            self._publication = self._stage.open(self.name)
        except PeerError as error:
            self.last_end = str(error)
            return None
        self._zero_ns = arrival_ns - int(seconds * 1e9)
        return self._publication

    def _stop(self, reason: StopReason) -> None:
        if self._publication is not None:
            self._publication.stop(reason)
            self._publication = None

    def status(self) -> dict[str, Any]:
        """Figures of the connection."""
        return {"rtsp": {"attempts": self.attempts, "last_end": self.last_end}}
