"""SDP files as FFmpeg and GStreamer write them, and WebRTC offers: read, or refused with a reason."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.errors import ConfigError, PeerError
from rtc.http import read_fragment
from rtc.offer import AnswerMedia, Codec, Transport, read_offer, write_answer
from rtc.sdp import Flow, read_sdp
from tests.rtc.test_whip import OFFER

FFMPEG = """SDP:
v=0
o=- 0 0 IN IP4 127.0.0.1
s=No Name
c=IN IP4 127.0.0.1
t=0 0
a=tool:libavformat 61.7.100
m=video 5004 RTP/AVP 96
b=AS:2000
a=rtpmap:96 H264/90000
a=fmtp:96 packetization-mode=1; sprop-parameter-sets=Z0IAHpWoKA9puAgICBA=,aM4G4g==; profile-level-id=42001E
m=audio 5006 RTP/AVP 97
b=AS:96
a=rtpmap:97 opus/48000/2
a=fmtp:97 sprop-stereo=1
"""

GSTREAMER = """v=0
o=- 1 1 IN IP6 ::1
s=session
c=IN IP6 ::1
t=0 0
m=video 5004 RTP/AVPF 98
a=rtpmap:98 VP8/90000
a=rtcp-mux
"""


def test_ffmpeg() -> None:
    video, audio = read_sdp(FFMPEG, "a.sdp")
    assert (video.kind, video.codec, video.host, video.port) == ("video", "h264", "127.0.0.1", 5004)
    assert (video.payload_type, video.rtcp_port) == (96, 5005)
    assert video.parameter_sets.startswith(b"\0\0\0\1\x67\x42")
    assert (audio.kind, audio.codec, audio.port, audio.payload_type) == ("audio", "opus", 5006, 97)


def test_gstreamer() -> None:
    assert read_sdp(GSTREAMER, "b.sdp") == [
        Flow(kind="video", codec="vp8", host="::1", port=5004, rtcp_port=None, payload_type=98)
    ]


UNUSABLE = {
    "nothing": "",
    "no video": FFMPEG.replace("m=video", "m=text"),
    "two videos": GSTREAMER + "m=video 6000 RTP/AVP 98\na=rtpmap:98 VP8/90000\n",
    "another codec": FFMPEG.replace("H264", "H265"),
    "encrypted": FFMPEG.replace("RTP/AVP 96", "RTP/SAVP 96"),
    "odd port": FFMPEG.replace("5004", "65535"),
    "names": FFMPEG.replace("c=IN IP4 127.0.0.1", "c=IN IP4 camera.example"),
    "parameter sets": FFMPEG.replace("Z0IAHpWoKA9puAgICBA=", "!!"),
    "mode 2": FFMPEG.replace("packetization-mode=1", "packetization-mode=2"),
    "cut short": FFMPEG.replace("m=video 5004 RTP/AVP 96", "m=video"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_unusable_files_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"a\.sdp: "):
        read_sdp(UNUSABLE[name], "a.sdp")


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_damaged_descriptions_never_surprise(data: st.DataObject) -> None:
    text = data.draw(st.sampled_from([OFFER, FFMPEG, GSTREAMER]))
    lines = text.splitlines()
    for _ in range(data.draw(st.integers(1, 4))):
        index = data.draw(st.integers(0, len(lines) - 1))
        lines[index] = lines[index][: data.draw(st.integers(0, 12))] + data.draw(st.text(max_size=8))
    damaged = "\r\n".join(lines)
    for read in (read_offer, read_fragment, lambda text: read_sdp(text, "x")):
        try:
            read(damaged)
        except (PeerError, ConfigError):
            continue


def test_an_answer_mirrors_the_offer() -> None:
    offer = read_offer(OFFER)
    transport = Transport(
        ufrag="u" * 4,
        password="p" * 22,
        fingerprint="AB:CD",
        setup="active",
        candidates=("1 1 udp 1 192.0.2.1 9 typ host",),
        cname="c",
    )
    codec = Codec(payload_type=96, name="h264", clock=90_000, fmtp={"packetization-mode": "1"})
    text = write_answer(offer, [AnswerMedia(codecs=(codec,), direction="recvonly")], transport)
    lines = text.split("\r\n")
    assert "a=group:BUNDLE 0" in lines
    assert "a=rtpmap:96 H264/90000" in lines
    assert "a=candidate:1 1 udp 1 192.0.2.1 9 typ host" in lines
    assert "a=recvonly" in lines
    refused = write_answer(offer, [AnswerMedia()], transport).split("\r\n")
    assert "m=video 0 UDP/TLS/RTP/SAVPF 96" in refused
