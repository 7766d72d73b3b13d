"""One WebRTC viewer: what of its offer is taken, its peer, and its sending end.

A viewer gets one video and one sound section at most; whatever else it offers is declined. It subscribes once
DTLS is done, and gets a keyframe at once.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

from relay.errors import PeerError
from relay.worker import Status
from rtc.encode import VideoProfile
from rtc.encode_thread import CodedPicture, EncodeThread
from rtc.fanout import Hub, Stream
from rtc.feedback import ViewerRate
from rtc.ice import IceSettings
from rtc.offer import FEEDBACK, AnswerMedia, Codec, Offer, OfferedMedia
from rtc.outlet import SendingEnd
from rtc.peer import Peer, PeerState
from rtc.sender import ABS_SEND_TIME, MID, PLAYOUT_DELAY, Extensions, RtpStream
from rtc.settings import AUDIO_CLOCK, VIDEO_CLOCK, WhepSettings
from rtc.sound_thread import CodedSound

SYNC_DELAY_MS = 200
"""With sound, a receiver may hold pictures back for so long to play them with their sound; without, not."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What is sent in one media section."""

    codec: Codec
    rtx: Codec | None = None


def _wanted(media: OfferedMedia, kind: str) -> bool:
    return media.kind == kind and not media.rejected and media.direction in ("recvonly", "sendrecv")


def _fits(codec: Codec, name: str) -> bool:
    if codec.name != name or codec.clock != VIDEO_CLOCK:
        return False
    # Constrained baseline is what every H.264 decoder reads, so a baseline payload type is right for it.
    profile = codec.fmtp.get("profile-level-id", "42e01f").lower()
    return name != "h264" or (codec.fmtp.get("packetization-mode") == "1" and profile.startswith("42"))


def choose_video(media: OfferedMedia, preference: Sequence[str]) -> Choice | None:
    """The first codec of `preference` that is offered, with its retransmission format."""
    for name in preference:
        candidates = [codec for codec in media.codecs if _fits(codec, name)]
        # Of H.264's payload types, constrained baseline (42e0) is the exact one.
        candidates.sort(
            key=lambda codec: not codec.fmtp.get("profile-level-id", "42e0").lower().startswith("42e0")
        )
        for codec in candidates:
            apt = str(codec.payload_type)
            rtx = next((c for c in media.codecs if c.name == "rtx" and c.fmtp.get("apt") == apt), None)
            return Choice(codec, rtx)
    return None


def choose_sound(media: OfferedMedia) -> Choice | None:
    """Opus, where it is offered."""
    fits = (codec for codec in media.codecs if codec.name == "opus" and codec.clock == AUDIO_CLOCK)
    codec = next(fits, None)
    return None if codec is None else Choice(codec)


def _understood(codec: Codec) -> Codec:
    keys = ("packetization-mode", "profile-level-id", "level-asymmetry-allowed", "apt")
    return Codec(
        payload_type=codec.payload_type,
        name=codec.name,
        clock=codec.clock,
        channels=codec.channels,
        fmtp={key: value for key, value in codec.fmtp.items() if key in keys},
        feedback=tuple(item for item in codec.feedback if item in FEEDBACK),
    )


class Viewer:
    """A WHEP session. Implements `peer.PeerHandler`, `sessions.Session` and `fanout.Subscriber`."""

    def __init__(
        self,
        stream: Stream,
        hub: Hub,
        settings: WhepSettings,
        ice: IceSettings,
        on_end: Callable[[Viewer], None],
    ) -> None:
        self.id = secrets.token_urlsafe(18)
        self.tag = f'"{secrets.token_hex(8)}"'
        self.stream = stream
        self.peer = Peer(ice, self)
        self.codec = ""
        self.end: SendingEnd | None = None
        self._hub = hub
        self._settings = settings
        self._on_end = on_end
        self._thread: EncodeThread | None = None
        self._video: RtpStream | None = None
        self._sound: RtpStream | None = None

    def __repr__(self) -> str:
        return f"<Viewer of {self.stream.name} {self.codec} {self.peer.state.value}>"

    @property
    def stream_name(self) -> str:
        """The stream that it watches."""
        return self.stream.name

    async def close(self) -> None:
        """See `sessions.Session`."""
        await self.peer.close()

    async def answer(self, offer: Offer) -> str:
        """The SDP answer; the session connects from then on.

        Raises:
            PeerError: ``codec`` where nothing that is offered can be sent; else a malformed candidate.
            MedferryError: No socket could be opened.
        """
        stream_id = secrets.token_hex(8)
        has_sound = any(_wanted(media, "audio") and choose_sound(media) for media in offer.media)
        answers = [self._answer_media(media, stream_id, has_sound=has_sound) for media in offer.media]
        if self._video is None and self._sound is None:
            raise PeerError("codec", "the offer has no section that receives H.264 (mode 1), VP8 or Opus")
        return await self.peer.answer(offer, answers)

    def _answer_media(self, media: OfferedMedia, stream_id: str, *, has_sound: bool) -> AnswerMedia:
        if _wanted(media, "video") and self._video is None:
            choice = choose_video(media, self._settings.codecs)
            if choice is not None:
                return self._answer_video(media, choice, stream_id, has_sound=has_sound)
        if _wanted(media, "audio") and self._sound is None:
            choice = choose_sound(media)
            if choice is not None:
                return self._answer_sound(media, choice, stream_id)
        return AnswerMedia()

    def _answer_video(
        self, media: OfferedMedia, choice: Choice, stream_id: str, *, has_sound: bool
    ) -> AnswerMedia:
        ids = _extension_ids(media.extensions, (ABS_SEND_TIME, PLAYOUT_DELAY, MID))
        self.codec = choice.codec.name
        video = self._video = RtpStream(
            payload_type=choice.codec.payload_type,
            rate=VIDEO_CLOCK,
            cname=self.peer.cname,
            extensions=Extensions(ids, media.mid, SYNC_DELAY_MS if has_sound else 0),
            rtx_payload_type=choice.rtx.payload_type if choice.rtx else None,
        )
        return AnswerMedia(
            codecs=tuple(_understood(codec) for codec in (choice.codec, choice.rtx) if codec is not None),
            direction="sendonly",
            extensions=ids,
            ssrc=video.ssrc,
            rtx_ssrc=video.rtx_ssrc,
            stream_id=stream_id,
        )

    def _answer_sound(self, media: OfferedMedia, choice: Choice, stream_id: str) -> AnswerMedia:
        ids = _extension_ids(media.extensions, (ABS_SEND_TIME, MID))
        sound = self._sound = RtpStream(
            payload_type=choice.codec.payload_type,
            rate=AUDIO_CLOCK,
            cname=self.peer.cname,
            extensions=Extensions(ids, media.mid),
        )
        return AnswerMedia(
            codecs=(_understood(choice.codec),),
            direction="sendonly",
            extensions=ids,
            ssrc=sound.ssrc,
            stream_id=stream_id,
        )

    def peer_changed(self, state: PeerState) -> None:
        """See `peer.PeerHandler`."""
        if state is PeerState.CONNECTED:
            self._begin()
        elif state is PeerState.ENDED:
            if self.end is not None:
                self._hub.unsubscribe(self.stream, self)
                self.end.close()
            self._on_end(self)

    def _begin(self) -> None:
        settings, stream = self._settings, self._hub.adopt(self.stream)
        self.stream = stream
        self.end = SendingEnd(
            timeline=stream.timeline,
            video=self._video,
            sound=self._sound,
            rate=ViewerRate(settings.min_bitrate, settings.bitrate),
            send_rtp=self.peer.send_rtp,
            send_rtcp=self.peer.send_rtcp,
            want_keyframe=self._want_keyframe,
            sent=lambda picture, now_ns: self._hub.sent(stream, picture, now_ns),
        )
        if self._video is not None:
            codec = cast("Literal['h264', 'vp8']", self.codec)
            profile = VideoProfile(codec=codec, bitrate=settings.bitrate)
            self._thread = self._hub.subscribe(stream, profile, self)
        if self._sound is not None:
            self._hub.subscribe_sound(stream, settings.audio_bitrate, self)

    def _want_keyframe(self) -> None:
        if self._thread is not None:
            self._thread.request_keyframe()

    def rtp_received(self, packet: bytes, arrival_ns: int) -> None:
        """Viewers send nothing; what comes is left aside."""

    def rtcp_received(self, packet: bytes, arrival_ns: int) -> None:
        """See `peer.PeerHandler`."""
        if self.end is not None:
            self.end.rtcp_received(packet, arrival_ns)

    def picture(self, picture: CodedPicture) -> None:
        """See `fanout.Subscriber`."""
        if self.end is not None:
            self.end.picture(picture)

    def sound(self, sound: CodedSound) -> None:
        """See `fanout.Subscriber`."""
        if self.end is not None:
            self.end.sound(sound)

    def vote(self, now_ns: int) -> int | None:
        """See `fanout.Subscriber`."""
        return None if self.end is None else self.end.rate.value(now_ns)

    def figures(self) -> Status:
        """For status; no address of the viewer."""
        end = self.end
        rtt_ns = self.peer.rtt_ns
        return {
            "stream": self.stream.name,
            "codec": self.codec,
            "state": self.peer.state.value,
            "rtt_ms": None if rtt_ns is None else round(rtt_ns / 1e6, 2),
            "packets": self._video.packets if self._video else 0,
            "resent": self._video.resent if self._video else 0,
            "resends_refused": self._video.resends_refused if self._video else 0,
            "resends_held_back": end.held_back if end else 0,
            "nacks": end.feedback.nacks if end else 0,
            "keyframe_requests": end.feedback.keyframes if end else 0,
            "malformed": end.feedback.malformed if end else 0,
            "loss": round(end.feedback.loss, 3) if end else 0.0,
            "dropped": end.pacer.dropped_pictures if end else 0,
            "sound_dropped": end.pacer.dropped_sounds if end else 0,
            "unsent": end.unsent if end else 0,
            "dropped_sends": self.peer.dropped_sends,
            "refused": self.peer.refused,
        }


def _extension_ids(offered: Mapping[str, int], known: Sequence[str]) -> dict[str, int]:
    return {uri: offered[uri] for uri in known if 0 < offered.get(uri, 0) < 15}
