"""What a receiver report says of one source: loss, jitter, echo of its clock (RFC 3550 §6.4, A.3, A.8).

Pure: packets and times go in, a report block comes out.
"""

from __future__ import annotations

from dataclasses import dataclass

from aiortc.rtp import RtcpReceiverInfo, clamp_packets_lost

from rtc.clock import SECOND_NS, widen
from rtc.packets import RtpPacket, SenderReport


@dataclass(slots=True, kw_only=True)
class Reception:
    """Statistics of one SSRC. `rate` is its RTP clock in hertz."""

    rate: int
    received: int = 0
    _base: int | None = None
    _highest: int = 0
    _jitter: float = 0.0
    _transit: int | None = None
    _expected_before: int = 0
    _received_before: int = 0
    _echo: int = 0
    _echo_ns: int = 0

    def receive(self, packet: RtpPacket) -> None:
        """Count a packet, a retransmitted one as well."""
        self.received += 1
        if self._base is None:
            self._base = self._highest = (1 << 16) + packet.seq
        wide = widen(packet.seq, self._highest, 16)
        if wide <= self._highest and self.received > 1:
            return
        self._highest = wide
        transit = (packet.arrival_ns * self.rate // SECOND_NS - packet.timestamp) & 0xFFFFFFFF
        if self._transit is not None:
            difference = abs(widen(transit, self._transit) - self._transit)
            self._jitter += (difference - self._jitter) / 16
        self._transit = transit

    def report_sent(self, report: SenderReport) -> None:
        """Remember the middle of the NTP time of a sender report, to be echoed."""
        self._echo = report.ntp >> 16 & 0xFFFFFFFF
        self._echo_ns = report.arrival_ns

    @property
    def lost(self) -> int:
        """Packets that did not come, as RFC 3550 counts them: duplicates make up for losses."""
        return 0 if self._base is None else self._highest - self._base + 1 - self.received

    @property
    def jitter_ms(self) -> float:
        """Interarrival jitter."""
        return self._jitter / self.rate * 1000

    def block(self, ssrc: int, now_ns: int) -> RtcpReceiverInfo:
        """The report block for `ssrc`; the fraction lost is that since the block before."""
        expected = 0 if self._base is None else self._highest - self._base + 1
        wanted = expected - self._expected_before
        got = self.received - self._received_before
        self._expected_before, self._received_before = expected, self.received
        lost = wanted - got
        delay = (now_ns - self._echo_ns) * 65536 // SECOND_NS if self._echo else 0
        return RtcpReceiverInfo(
            ssrc=ssrc,
            fraction_lost=min((lost << 8) // wanted, 255) if wanted > 0 and lost > 0 else 0,
            packets_lost=clamp_packets_lost(self.lost),
            highest_sequence=self._highest & 0xFFFFFFFF,
            jitter=int(self._jitter) & 0xFFFFFFFF,
            lsr=self._echo,
            dlsr=min(delay, 0xFFFFFFFF),
        )
