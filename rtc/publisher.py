"""One WebRTC publisher: what of its offer is taken, its peer, and the tracks of its stream.

A publisher sends one video and one sound section at most; whatever else it offers is declined. Its end ends
the stream.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from relay.errors import PeerError
from relay.records import StopReason
from rtc import packets
from rtc.clock import SenderClock
from rtc.ice import IceSettings
from rtc.offer import DIRECTIONS, FEEDBACK, AnswerMedia, Codec, Offer, OfferedMedia
from rtc.peer import Peer, PeerEnd, PeerState
from rtc.publication import Publication
from rtc.settings import AUDIO_CLOCK, VIDEO_CLOCK, WhipSettings
from rtc.track import AudioTrack, Track, VideoTrack

REPORT_SECONDS = 1.0
"""Between two receiver reports of a session, each with the bitrate that it may use."""

FIRST_REPORT_SECONDS = 0.1
"""The same until all media have begun: browsers believe a first REMB within two seconds, and start high."""

H264_PROFILES = frozenset({"42", "4d", "64"})
"""profile_idc of baseline, main and high, as profile-level-id writes them (RFC 6184 §8.1)."""

H264_LEVEL = "33"
"""Level 5.1, what we decode; said where the offer allows levels to differ by direction."""

STOP_REASONS = {
    PeerEnd.CLOSED: StopReason.ENDED,
    PeerEnd.LEFT: StopReason.ENDED,
    PeerEnd.LOST: StopReason.LOST,
    PeerEnd.FAILED: StopReason.LOST,
}

log = logging.getLogger("medferry.rtc")


def _is_opus(codec: Codec) -> bool:
    return codec.name == "opus" and codec.clock == AUDIO_CLOCK


def _is_h264(codec: Codec) -> bool:
    return (
        codec.name == "h264"
        and codec.clock == VIDEO_CLOCK
        and codec.fmtp.get("packetization-mode", "0") in ("0", "1")
        and codec.fmtp.get("profile-level-id", "42e01f")[:2].lower() in H264_PROFILES
    )


def _is_vp8(codec: Codec) -> bool:
    return codec.name == "vp8" and codec.clock == VIDEO_CLOCK


ACCEPTS: dict[str, Callable[[Codec], bool]] = {"h264": _is_h264, "vp8": _is_vp8, "opus": _is_opus}


def _fmtp(codec: Codec) -> Mapping[str, str]:
    """What the answer says about a codec's parameters."""
    if codec.name == "h264":
        profile = codec.fmtp.get("profile-level-id", "42e01f")
        asymmetric = codec.fmtp.get("level-asymmetry-allowed") == "1"
        return {
            "level-asymmetry-allowed": "1" if asymmetric else "0",
            "packetization-mode": codec.fmtp.get("packetization-mode", "0"),
            "profile-level-id": profile[:4] + H264_LEVEL if asymmetric else profile,
        }
    if codec.name == "opus":
        return {"minptime": "10", "useinbandfec": "1", "stereo": "1"}
    return codec.fmtp


def choose(media: OfferedMedia, wanted: Iterable[str]) -> tuple[Codec, ...]:
    """The codec of a media section that we take, and its retransmissions (RFC 4588); empty for none.

    Args:
        media: A section of the offer.
        wanted: Codec names, the most wanted first.
    """
    sends = DIRECTIONS[media.direction] in ("recvonly", "sendrecv")
    if media.rejected or not sends or not media.protocol.startswith("UDP/TLS/RTP/SAVP"):
        return ()
    for name in wanted:
        # H.264 in single NAL units (mode 0) is a last resort: it limits a slice to a packet.
        fitting = sorted(
            filter(ACCEPTS[name], media.codecs),
            key=lambda codec: name == "h264" and codec.fmtp.get("packetization-mode", "0") == "0",
        )
        if fitting:
            chosen = _answered(fitting[0])
            again = [codec for codec in media.codecs if _repeats(codec, chosen)]
            return (chosen, *map(_answered, again[:1]))
    return ()


def _repeats(codec: Codec, chosen: Codec) -> bool:
    return codec.name == "rtx" and codec.fmtp.get("apt") == str(chosen.payload_type)


def _answered(codec: Codec) -> Codec:
    return Codec(
        payload_type=codec.payload_type,
        name=codec.name,
        clock=codec.clock,
        channels=codec.channels,
        fmtp=_fmtp(codec),
        feedback=tuple(item for item in codec.feedback if item in FEEDBACK),
    )


def plan(offer: Offer, video: Iterable[str]) -> list[AnswerMedia]:
    """What to answer: the first section of video and the first of sound that we can take.

    Raises:
        PeerError: ``codec``: there is nothing to take.
    """
    wanted: dict[str, Iterable[str]] = {"video": tuple(video), "audio": ("opus",)}
    answers = []
    for media in offer.media:
        codecs = choose(media, wanted[media.kind]) if media.kind in wanted else ()
        if codecs:
            del wanted[media.kind]
        answers.append(AnswerMedia(codecs=codecs, direction="recvonly" if codecs else "inactive"))
    if not any(answer.codecs for answer in answers):
        raise PeerError("codec", "offer H.264 (baseline, main, high) or VP8 to send, and Opus for sound")
    return answers


class Publisher:
    """A WHIP session. Implements `peer.PeerHandler` and `sessions.Session`."""

    def __init__(
        self,
        publication: Publication,
        settings: WhipSettings,
        ice: IceSettings,
        on_end: Callable[[Publisher], None],
    ) -> None:
        self.id = secrets.token_urlsafe(16)
        self.tag = f'"{secrets.token_hex(8)}"'
        """Entity tag of the ICE session (RFC 9725 §4.3.1)."""
        self.publication = publication
        self.peer = Peer(ice, self)
        self.tracks: dict[int, Track] = {}
        """By payload type."""
        self.unknown = 0
        """Packets of no payload type of the answer, or malformed."""
        self._settings = settings
        self._repeats: dict[int, int] = {}
        """Payload type of retransmissions to that of what they repeat."""
        self._on_end = on_end
        self._reporter: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<Publisher of {self.publication.name} {self.peer!r}>"

    @property
    def stream_name(self) -> str:
        """The stream that it publishes."""
        return self.publication.name

    async def answer(self, offer: Offer) -> str:
        """The answer to a publisher's offer.

        Raises:
            PeerError: The offer has nothing for us.
            MedferryError: No socket could be opened.
        """
        answers = plan(offer, self._settings.codecs)
        text = await self.peer.answer(offer, answers)
        sender = SenderClock()
        for answer in answers:
            if answer.codecs:
                self._add_track(answer.codecs, sender)
        return text

    def _add_track(self, codecs: tuple[Codec, ...], sender: SenderClock) -> None:
        codec, *repeats = codecs
        track: Track
        if codec.name == "opus":
            track = AudioTrack(self.publication, sender=sender, send=self.peer.send_rtcp)
        else:
            track = VideoTrack(
                self.publication, codec=codec.name, sender=sender, send=self.peer.send_rtcp, trusting=True
            )
        self.tracks[codec.payload_type] = track
        for item in repeats:
            self._repeats[item.payload_type] = codec.payload_type

    def rtp_received(self, packet: bytes, arrival_ns: int) -> None:
        """A packet of a publisher: to the track of its payload type."""
        parsed = packets.parse_rtp(packet, arrival_ns)
        if parsed is None:
            self.unknown += 1
            return
        original = self._repeats.get(parsed.payload_type)
        if original is not None:
            ssrc = self.tracks[original].ssrc
            parsed = packets.unwrap_rtx(parsed, ssrc, original) if ssrc is not None else None
            if parsed is None:
                return
        track = self.tracks.get(parsed.payload_type)
        if track is None:
            self.unknown += 1
            return
        track.receive(parsed)

    def rtcp_received(self, packet: bytes, arrival_ns: int) -> None:
        """Sender reports set the clocks; a goodbye lets another SSRC follow."""
        for report in packets.parse_rtcp(packet, arrival_ns) or ():
            for track in self.tracks.values():
                if isinstance(report, packets.SenderReport):
                    track.report(report)
                elif track.ssrc in report.ssrcs:
                    track.goodbye()

    def peer_changed(self, state: PeerState) -> None:
        """Connected: begin to report. Ended: stop the stream."""
        if state is PeerState.CONNECTED:
            log.info("stream %s: publisher connected", self.stream_name, extra={"event": "whip_connected"})
            self._reporter = asyncio.create_task(self._report(), name="whip reports")
        elif state is PeerState.ENDED:
            self._stop()
            self._on_end(self)

    def _stop(self, reason: StopReason | None = None) -> None:
        if self._reporter is not None:
            self._reporter.cancel()
        for track in self.tracks.values():
            track.close()
        self.publication.stop(reason or STOP_REASONS[self.peer.ended or PeerEnd.CLOSED])

    async def close(self, reason: StopReason = StopReason.ENDED) -> None:
        """End the session and the stream."""
        self._stop(reason)
        await self.peer.close()

    async def _report(self) -> None:
        """Receiver reports, and the bitrate that the publisher may use, at once and then each second."""
        while True:
            now_ns = time.monotonic_ns()
            for track in self.tracks.values():
                self._report_track(track, now_ns)
            known = all(track.ssrc is not None for track in self.tracks.values())
            await asyncio.sleep(REPORT_SECONDS if known else FIRST_REPORT_SECONDS)

    def _report_track(self, track: Track, now_ns: int) -> None:
        block = track.report_block(now_ns)
        message = packets.receiver_report(track.own_ssrc, self.peer.cname, [block] if block else [])
        if isinstance(track, VideoTrack):
            track.set_rtt(self.peer.rtt_ns)
            if track.ssrc is not None:
                message += packets.max_bitrate(track.own_ssrc, track.ssrc, self._settings.max_bitrate)
        self.peer.send_rtcp(message)

    def status(self) -> dict[str, Any]:
        """Figures of the session's tracks and transport."""
        rtt_ns = self.peer.rtt_ns
        found: dict[str, Any] = {
            "audio" if isinstance(track, AudioTrack) else "video": track.status()
            for track in self.tracks.values()
        }
        found["transport"] = {
            "state": self.peer.state.value,
            "rtt_ms": None if rtt_ns is None else round(rtt_ns / 1e6, 2),
            "refused": self.peer.refused,
            "dropped_sends": self.peer.dropped_sends,
            "unauthentic": self.peer.unauthentic,
            "unknown": self.unknown,
        }
        return found
