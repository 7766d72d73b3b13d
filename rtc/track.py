"""One RTP stream from its packets to its publication: what WHIP and plain RTP share.

    packet ─▶ SSRC lock ─▶ RTX ─▶ statistics ─▶ jitter ─▶ decoder thread ─▶ clock ─▶ publication
                                                └─▶ NACK, keyframe request ─▶ send

A track takes one SSRC. Another one replaces it only after the first was silent: whoever floods a session with
new sources is counted and ignored.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from aiortc.rtp import RtcpReceiverInfo

from rtc import packets
from rtc.clock import SECOND_NS, SenderClock, StreamClock
from rtc.decode import OPUS_CHANNELS
from rtc.decode_thread import (
    AudioOutcome,
    AudioThread,
    DecodedPicture,
    DecodedSound,
    VideoOutcome,
    VideoThread,
)
from rtc.depayload import PAYLOADS
from rtc.jitter import AudioJitter, AudioOutput, KeyframeRequest, Nack, Picture, VideoJitter, VideoOutput
from rtc.packets import RtpPacket, SenderReport
from rtc.publication import Publication
from rtc.reception import Reception
from rtc.settings import AUDIO_CLOCK, VIDEO_CLOCK

SSRC_SILENCE_NS = SECOND_NS
"""A source that was silent for so long may be replaced by another."""

Send = Callable[[bytes], object]
"""Sends one RTCP packet to the stream's sender; does nothing where there is no way to it."""


class Track:
    """What video and audio have in common."""

    def __init__(self, publication: Publication, clock: StreamClock, send: Send) -> None:
        self.publication = publication
        self.own_ssrc = secrets.randbits(32) or 1
        """Of our reports."""
        self.ssrc: int | None = None
        self.foreign = 0
        """Packets of other SSRCs, ignored."""
        self._send = send
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._reception = Reception(rate=clock.rate)
        self._timer: asyncio.TimerHandle | None = None
        self._heard_ns = 0
        self._closed = False

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.publication.name} ssrc={self.ssrc}>"

    def receive(self, packet: RtpPacket) -> None:
        """Take a packet of this track's payload type."""
        if packet.ssrc != self.ssrc and not self._lock(packet):
            return
        self._heard_ns = packet.arrival_ns
        self._reception.receive(packet)
        self._forward(packet)
        self._arm()

    def _lock(self, packet: RtpPacket) -> bool:
        """Whether the track follows this SSRC from now on."""
        if self.ssrc is not None and packet.arrival_ns - self._heard_ns < SSRC_SILENCE_NS:
            self.foreign += 1
            return False
        if self.ssrc is not None:
            self._restart()
        self.ssrc = packet.ssrc
        self._reception = Reception(rate=self._clock.rate)
        return True

    def report(self, report: SenderReport) -> None:
        """Take a sender report; those of other sources are not for this track."""
        if report.ssrc == self.ssrc:
            self._clock.report(report.ntp, report.rtp_timestamp, report.arrival_ns)
            self._reception.report_sent(report)

    def goodbye(self) -> None:
        """The source has ended: another SSRC may follow at once."""
        self._heard_ns = -SSRC_SILENCE_NS

    def report_block(self, now_ns: int) -> RtcpReceiverInfo | None:
        """For the next receiver report; None before the first packet."""
        return None if self.ssrc is None else self._reception.block(self.ssrc, now_ns)

    def status(self) -> dict[str, Any]:
        """Figures of the track."""
        return {
            "received": self._reception.received,
            "lost": max(self._reception.lost, 0),
            "jitter_ms": round(self._reception.jitter_ms, 2),
            "foreign": self.foreign,
        }

    def close(self) -> None:
        """Stop timers and the decoder."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()

    def _forward(self, packet: RtpPacket) -> None:
        raise NotImplementedError

    def _restart(self) -> None:
        raise NotImplementedError

    def _deadline(self) -> int | None:
        raise NotImplementedError

    def _due(self, now_ns: int) -> None:
        raise NotImplementedError

    def _arm(self) -> None:
        """Let the timer ring when the jitter buffer has something to do."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        deadline = self._deadline()
        if deadline is not None and not self._closed:
            seconds = max(deadline - time.monotonic_ns(), 0) / SECOND_NS
            self._timer = self._loop.call_later(seconds, self._ring)

    def _ring(self) -> None:
        self._timer = None
        self._due(time.monotonic_ns())
        self._arm()


class VideoTrack(Track):
    """One video stream."""

    def __init__(
        self,
        publication: Publication,
        *,
        codec: str,
        sender: SenderClock,
        send: Send,
        trusting: bool,
        parameter_sets: bytes = b"",
    ) -> None:
        """`trusting`: whether answers to NACKs and keyframe requests are expected from the start."""
        super().__init__(publication, StreamClock(rate=VIDEO_CLOCK, sender=sender), send)
        self.codec = codec
        payload = PAYLOADS[codec]
        self._jitter = VideoJitter(starts=payload.starts, is_keyframe=payload.is_keyframe, trusting=trusting)
        self._thread = VideoThread(codec, self._decoded, publication.admit, parameter_sets, publication.pace)

    def set_rtt(self, rtt_ns: int | None) -> None:
        """The round trip to the sender, as measured elsewhere."""
        if rtt_ns is not None:
            self._jitter.rtt_ns = rtt_ns

    def _forward(self, packet: RtpPacket) -> None:
        self._act(self._jitter.receive(packet, packet.arrival_ns))

    def _restart(self) -> None:
        old = self._jitter
        self._jitter = VideoJitter(
            starts=old.starts,
            is_keyframe=old.is_keyframe,
            trusting=old.trusting,
            rtt_ns=old.rtt_ns,
            tally=old.tally,
        )
        self._clock.restart()

    def _deadline(self) -> int | None:
        return self._jitter.deadline

    def _due(self, now_ns: int) -> None:
        self._act(self._jitter.due(now_ns))

    def _act(self, outputs: Iterable[VideoOutput]) -> None:
        for output in outputs:
            if isinstance(output, Picture):
                if not self._thread.submit(output):
                    self._ask_again(output.serial)
            elif self.ssrc is not None:
                self._request(output, self.ssrc)

    def _request(self, output: Nack | KeyframeRequest, ssrc: int) -> None:
        if isinstance(output, Nack):
            self._send(packets.nack(self.own_ssrc, ssrc, output.lost))
        else:
            self._send(packets.picture_loss(self.own_ssrc, ssrc))

    def _ask_again(self, serial: int) -> None:
        """Pictures were lost behind the jitter buffer: only a keyframe helps."""
        for output in self._jitter.decoder_failed(serial, time.monotonic_ns()):
            if self.ssrc is not None and isinstance(output, Nack | KeyframeRequest):
                self._request(output, self.ssrc)

    def _decoded(self, outcomes: list[VideoOutcome]) -> None:
        for outcome in outcomes:
            if isinstance(outcome, DecodedPicture):
                media_ns = self._clock.time_ns(outcome.timestamp, outcome.arrival_ns)
                self.publication.picture(outcome, media_ns)
                continue
            self.publication.fault(outcome.reason, outcome.detail)
            if not outcome.refused:
                self._ask_again(outcome.serial)
                self._arm()

    def status(self) -> dict[str, Any]:
        """Figures of the track."""
        tally = self._jitter.tally
        return {
            **super().status(),
            "codec": self.codec,
            "held": self._jitter.held,
            "duplicate": tally.duplicate,
            "late": tally.late,
            "given_up": tally.lost,
            "repaired": tally.repaired,
            "nacks": tally.nacks,
            "keyframe_requests": tally.keyframe_requests,
            "skipped": tally.skipped,
            "overflows": tally.overflows,
            "concealed": tally.concealed,
            "decoder_waiting": self._thread.pending,
            "decoder_dropped": self._thread.dropped,
        }

    def close(self) -> None:
        super().close()
        self._thread.close()


class AudioTrack(Track):
    """One stream of Opus."""

    def __init__(self, publication: Publication, *, sender: SenderClock, send: Send) -> None:
        super().__init__(publication, StreamClock(rate=AUDIO_CLOCK, sender=sender), send)
        self._jitter = AudioJitter()
        self._thread = AudioThread(self._decoded)
        self._following: int | None = None
        """The timestamp after the last sound, which made-up sound takes."""

    def _forward(self, packet: RtpPacket) -> None:
        self._act(self._jitter.receive(packet, packet.arrival_ns))

    def _restart(self) -> None:
        self._jitter = AudioJitter(tally=self._jitter.tally)
        self._clock.restart()
        self._following = None

    def _deadline(self) -> int | None:
        return self._jitter.deadline

    def _due(self, now_ns: int) -> None:
        self._act(self._jitter.due(now_ns))

    def _act(self, outputs: Iterable[AudioOutput]) -> None:
        for output in outputs:
            # A full inbox means that the machine is behind: what does not fit is not worth playing later.
            self._thread.submit(output)

    def _decoded(self, outcomes: list[AudioOutcome]) -> None:
        for outcome in outcomes:
            if not isinstance(outcome, DecodedSound):
                self.publication.fault(outcome.reason, outcome.detail)
                continue
            timestamp = self._following if outcome.timestamp is None else outcome.timestamp
            if timestamp is None:
                continue
            ticks = len(outcome.samples) // (2 * OPUS_CHANNELS)
            self._following = (timestamp + ticks) & 0xFFFFFFFF
            sound = replace(outcome, timestamp=timestamp)
            self.publication.sound(sound, self._clock.time_ns(timestamp, outcome.arrival_ns))

    def status(self) -> dict[str, Any]:
        """Figures of the track."""
        tally = self._jitter.tally
        return {
            **super().status(),
            "codec": "opus",
            "held": self._jitter.held,
            "late": tally.late,
            "given_up": tally.lost,
            "concealed": tally.concealed,
            "decoder_waiting": self._thread.pending,
            "decoder_dropped": self._thread.dropped,
        }

    def close(self) -> None:
        super().close()
        self._thread.close()
