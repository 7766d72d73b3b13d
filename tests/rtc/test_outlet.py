"""What one receiver's sending end makes of a NACK: no more is sent again than the path has room for."""

from __future__ import annotations

import asyncio

from aiortc import rtp

from rtc.encode import Coded
from rtc.encode_thread import CodedPicture
from rtc.feedback import ViewerRate
from rtc.outlet import MAX_NACKED, RESEND_SECONDS, RESEND_SHARE, SendingEnd
from rtc.sender import MAX_HISTORY, RtpStream
from rtc.timeline import Timeline

SECOND = 1_000_000_000
PAYLOAD = bytes(1100)
SLOW = 1_000_000
"""Bits a second."""


class Receiver:
    """A receiver that has lost everything, and the end that sends to it."""

    def __init__(self, bitrate: int) -> None:
        self.sent: list[bytes] = []
        self.video = RtpStream(payload_type=96, rate=90_000, cname="test")
        self.end = SendingEnd(
            timeline=Timeline(),
            video=self.video,
            sound=None,
            rate=ViewerRate(100_000, bitrate),
            send_rtp=self._take,
            send_rtcp=lambda _: True,
            want_keyframe=lambda: None,
            sent=lambda *_: None,
        )

    def _take(self, packet: bytes) -> bool:
        self.sent.append(packet)
        return True

    async def lose_a_picture(self, packets: int) -> list[int]:
        """Have a keyframe of so many packets sent; their sequence numbers."""
        first = self.video.sequence
        coded = Coded(payloads=[PAYLOAD] * packets, keyframe=True)
        picture = CodedPicture(coded=coded, timeline_ns=0, width=64, height=64, encoded_ns=0, times=None)
        self.end.picture(picture)
        while self.end.pacer.queued_bytes:
            await asyncio.sleep(0.001)
        self.sent.clear()
        return [(first + number) & 0xFFFF for number in range(packets)]

    def nack(self, lost: list[int], now_ns: int) -> int:
        """Ask for packets; how many bytes came."""
        packet = rtp.RtcpRtpfbPacket(fmt=rtp.RTCP_RTPFB_NACK, ssrc=1, media_ssrc=self.video.ssrc, lost=lost)
        before = len(self.sent)
        self.end.rtcp_received(bytes(packet), now_ns)
        return sum(map(len, self.sent[before:]))


async def test_what_is_sent_again_leaves_room_for_what_is_new() -> None:
    receiver = Receiver(SLOW)
    lost = await receiver.lose_a_picture(100)
    at_once = SLOW * RESEND_SHARE / 8 * RESEND_SECONDS
    now_ns = 100 * SECOND
    first = receiver.nack(lost, now_ns)
    assert at_once <= first < at_once + 1200
    assert receiver.end.held_back == 100 - len(receiver.sent)
    assert receiver.nack(lost, now_ns) == 0
    # Asked for each tenth of a second, as receivers do, all of it comes: within its share of the path.
    asked = 0
    while len(receiver.sent) < 100:
        asked += 1
        still = lost[len(receiver.sent) :]
        assert receiver.nack(still, now_ns + asked * SECOND // 10) <= SLOW * RESEND_SHARE / 8 / 10 + 1200
    assert asked <= 26


async def test_a_path_with_room_gets_a_lost_picture_at_once() -> None:
    receiver = Receiver(20_000_000)
    lost = await receiver.lose_a_picture(100)
    receiver.nack(lost, 100 * SECOND)
    assert len(receiver.sent) == 100
    assert receiver.end.held_back == 0


async def test_a_path_that_has_become_slower_gets_less_again() -> None:
    receiver = Receiver(20_000_000)
    lost = await receiver.lose_a_picture(100)
    now_ns = 100 * SECOND
    receiver.end.rate.estimated(SLOW, now_ns)
    assert receiver.nack(lost, now_ns) < SLOW * RESEND_SHARE / 8 * RESEND_SECONDS + 1200
    assert len(receiver.sent) + receiver.end.held_back == 100 <= min(MAX_NACKED, MAX_HISTORY)
