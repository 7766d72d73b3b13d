"""One receiver's sending end: paced packets of its video and sound streams, and its feedback.

    CodedPicture ─▶ pacer ─▶ number ─▶ transmit        RTCP in ─▶ keyframe request, resend, rate

Shared by viewers (SRTP) and plain RTP: they differ in how a packet is transmitted and in nothing else.
"""

from __future__ import annotations

import asyncio
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from aiortc import rtp

from rtc.bucket import Bucket
from rtc.encode_thread import CodedPicture
from rtc.feedback import ViewerRate
from rtc.pacer import BURST_BYTES, Pacer
from rtc.sender import Outgoing, RtpStream
from rtc.sound_thread import CodedSound
from rtc.timeline import Timeline

HEADER_BYTES = 64
"""What a payload is counted more than its own size by the pacer: RTP, extensions, SRTP, UDP, IP."""

REPORT_SECONDS = 1.0
"""Between two sender reports."""

MAX_NACKED = 512
"""Sequence numbers of one NACK that are looked at: a lost keyframe has about a hundred."""

RESEND_SHARE = 0.4
"""Of what the path takes, how much is for packets that were lost. More often than not they were lost because
it was full, and the same once more on top would keep it so. What is held back is asked for again."""

RESEND_SECONDS = 0.2
"""Of that, what may be sent at once."""


class _Ready(NamedTuple):
    stream: RtpStream
    packet: Outgoing
    last_of: CodedPicture | None


@dataclass(slots=True)
class Feedback:
    """What a receiver's RTCP asks for."""

    keyframes: int = 0
    nacks: int = 0
    malformed: int = 0
    loss: float = 0.0


class SendingEnd:
    """Sends one stream to one receiver. Lives on the loop."""

    def __init__(
        self,
        *,
        timeline: Timeline,
        video: RtpStream | None,
        sound: RtpStream | None,
        rate: ViewerRate,
        send_rtp: Callable[[bytes], bool],
        send_rtcp: Callable[[bytes], bool],
        want_keyframe: Callable[[], None],
        sent: Callable[[CodedPicture, int], None],
        burst: int = BURST_BYTES,
    ) -> None:
        """`burst`: bytes that may leave at once (see `pacer.py`)."""
        self.video_stream, self.sound_stream = video, sound
        self.rate = rate
        self.pacer: Pacer[_Ready] = Pacer(burst=burst)
        self.feedback = Feedback()
        self.unsent = 0
        """Packets that the socket did not take."""
        self.started = False
        """Whether a keyframe was sent: before it nothing can be decoded."""
        self.held_back = 0
        """Packets that were asked for again and not sent, since the path had no room."""
        self._resends = Bucket(rate.ceiling * RESEND_SHARE / 8, RESEND_SECONDS)
        self._timeline = timeline
        self._send_rtp, self._send_rtcp = send_rtp, send_rtcp
        self._want_keyframe = want_keyframe
        self._sent = sent
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._reporting: asyncio.TimerHandle | None = None
        self._reported: set[int] = set()

    def __repr__(self) -> str:
        return f"<SendingEnd started={self.started} queued={self.pacer.queued_bytes}>"

    def picture(self, picture: CodedPicture) -> None:
        """Queue a picture and send what may go at once. Until a keyframe comes, pictures are left out."""
        stream = self.video_stream
        if stream is None or not (self.started or picture.coded.keyframe):
            return
        outgoing = stream.outgoing(picture.coded.payloads, picture.timeline_ns, mark_last=True)
        ready = [
            (len(item.payload) + HEADER_BYTES, _Ready(stream, item, picture if item.marker else None))
            for item in outgoing
        ]
        self.started = self.pacer.add_picture(ready)
        if not self.started:
            # What follows refers to the picture that was dropped.
            self._want_keyframe()
            return
        self._pump()
        self._report_first(stream)

    def sound(self, sound: CodedSound) -> None:
        """Send a sound packet, before any picture that waits."""
        stream = self.sound_stream
        if stream is None:
            return
        for item in stream.outgoing([sound.payload], sound.timeline_ns, mark_last=False):
            self.pacer.add_sound(len(item.payload) + HEADER_BYTES, _Ready(stream, item, None))
        self._pump()
        self._report_first(stream)

    def _pump(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        wall_ns = time.time_ns()
        for stream, packet, last_of in self.pacer.take(time.monotonic_ns()):
            self.unsent += not self._send_rtp(stream.number(packet, wall_ns))
            if last_of is not None:
                self._sent(last_of, time.monotonic_ns())
        wait_ns = self.pacer.wait_ns()
        if wait_ns is not None:
            self._timer = self._loop.call_later(wait_ns / 1e9, self._pump)

    def _report_first(self, stream: RtpStream) -> None:
        """With the first packet goes a report: lips are in sync from the start."""
        if stream.ssrc in self._reported:
            return
        self._reported.add(stream.ssrc)
        self._report(stream)
        if self._reporting is None:
            self._reporting = self._loop.call_later(REPORT_SECONDS, self._report_all)

    def _report(self, stream: RtpStream) -> None:
        self._send_rtcp(stream.report(self._timeline, time.monotonic_ns(), time.time_ns()))

    def _report_all(self) -> None:
        for stream in (self.video_stream, self.sound_stream):
            if stream is not None and stream.ssrc in self._reported:
                self._report(stream)
        self._reporting = self._loop.call_later(REPORT_SECONDS, self._report_all)

    def rtcp_received(self, data: bytes, now_ns: int) -> None:
        """Act on a compound RTCP packet of the receiver. A malformed one is counted and left aside."""
        try:
            packets = rtp.RtcpPacket.parse(data)
        except (ValueError, IndexError, struct.error):
            self.feedback.malformed += 1
            return
        for packet in packets:
            match packet:
                case rtp.RtcpRrPacket(reports=reports) | rtp.RtcpSrPacket(reports=reports):
                    self._reports_received(reports)
                case rtp.RtcpRtpfbPacket(fmt=rtp.RTCP_RTPFB_NACK, media_ssrc=ssrc, lost=lost):
                    self._nack_received(ssrc, lost, now_ns)
                case rtp.RtcpPsfbPacket(fmt=rtp.RTCP_PSFB_PLI | rtp.RTCP_PSFB_FIR):
                    self.feedback.keyframes += 1
                    self._want_keyframe()
                case rtp.RtcpPsfbPacket(fmt=rtp.RTCP_PSFB_APP, fci=fci):
                    self._estimate_received(fci, now_ns)
                case _:
                    pass

    def _reports_received(self, reports: list[rtp.RtcpReceiverInfo]) -> None:
        for report in reports:
            if self.video_stream is not None and report.ssrc == self.video_stream.ssrc:
                self.feedback.loss = report.fraction_lost / 256
                self.rate.lost(self.feedback.loss)

    def _nack_received(self, ssrc: int, lost: list[int], now_ns: int) -> None:
        wall_ns = time.time_ns()
        self._resends.change(self.rate.value(now_ns) * RESEND_SHARE / 8)
        for stream in (self.video_stream, self.sound_stream):
            if stream is None or stream.ssrc != ssrc:
                continue
            for sequence in lost[:MAX_NACKED]:
                self.feedback.nacks += 1
                if not self._resends.has(now_ns):
                    self.held_back += 1
                    continue
                packet = stream.resend(sequence & 0xFFFF, now_ns, wall_ns)
                if packet is not None:
                    self._resends.take(now_ns, len(packet))
                    self.unsent += not self._send_rtp(packet)

    def _estimate_received(self, fci: bytes, now_ns: int) -> None:
        try:
            estimate, ssrcs = rtp.unpack_remb_fci(fci)
        except (ValueError, struct.error, IndexError):
            self.feedback.malformed += 1
            return
        if self.video_stream is not None and self.video_stream.ssrc in ssrcs:
            self.rate.estimated(estimate, now_ns)
            self.pacer.limit(estimate)

    def close(self) -> None:
        """Say goodbye and send nothing more."""
        for timer in (self._timer, self._reporting):
            if timer is not None:
                timer.cancel()
        for stream in (self.video_stream, self.sound_stream):
            if stream is not None:
                self._send_rtcp(stream.goodbye())
        self.video_stream = self.sound_stream = None
