"""The media lane's tables: what is accepted, what is refused, and that nothing secret shows."""

from __future__ import annotations

from typing import Any

import pydantic
import pytest

from rtc.settings import MediaLane, split_ice_url

TLS = {"tls_certificate": "a.pem", "tls_key": "a.key", "tokens": {"room": "0123456789abcdef"}}


def lane(source: dict[str, Any], sink: dict[str, Any] | None = None, *, lab: bool = True) -> MediaLane:
    outgoing = {"rtp": {"address": "127.0.0.1:5006", "plaintext": True}} if sink is None else sink
    return MediaLane.model_validate(
        {"name": "camera", "kind": "media", "lab": lab, "source": source, "sink": outgoing}
    )


def test_it_survives_the_way_to_the_worker() -> None:
    made = lane(
        {
            "rtp": {"listen": "127.0.0.1:5004", "from": ["192.0.2.0/24"], "audio": {"listen": "[::1]:5104"}},
            "sdp": [{"file": "x.sdp", "stream": "x", "from": ["192.0.2.1"]}],
            "rtsp": [{"url": "rtsp://camera.example/1", "stream": "ward"}],
            "whip": {"listen": "127.0.0.1:8081", **TLS},
        }
    )
    assert MediaLane.model_validate(made.model_dump(mode="json")) == made
    names = {(item.name, item.address) for item in made.source.listeners()}
    assert names == {
        ("whip", "127.0.0.1:8081"),
        ("rtp", "127.0.0.1:5004"),
        ("rtp-rtcp", "127.0.0.1:5005"),
        ("rtp-audio", "[::1]:5104"),
        ("rtp-audio-rtcp", "[::1]:5105"),
    }
    assert made.source.files() == ["a.pem", "a.key", "x.sdp"]
    assert made.rtp_stream == "camera"


def test_secrets_do_not_show() -> None:
    server = {"urls": ["turn:192.0.2.1"], "username": "u", "credential": "hidden-credential"}
    made = lane(
        {
            "whip": {"listen": "127.0.0.1:8081", **TLS, "ice_servers": [server]},
            "rtsp": [{"url": "rtsp://u:hidden-password@camera.example/1", "stream": "ward"}],
        }
    )
    assert "hidden" not in repr(made)
    assert "0123456789abcdef" not in repr(made)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no source": ({}, "add one of rtp"),
    "port without room for RTCP": ({"rtp": {"listen": "127.0.0.1:65535"}}, "RTCP"),
    "unknown codec": ({"rtp": {"listen": "127.0.0.1:1", "codec": "av1"}}, "h264"),
    "a token too short": ({"whip": {"listen": "127.0.0.1:1", "tokens": {"a": "short"}}}, "at least 16"),
    "a key without a certificate": ({"whip": {"listen": "127.0.0.1:1", "tls_key": "k"}}, "both"),
    "a port range the wrong way": (
        {"whip": {"listen": "127.0.0.1:1", "udp_ports": "60000-50000"}},
        "low-high",
    ),
    "TURN without a password": (
        {"whip": {"listen": "127.0.0.1:1", "ice_servers": [{"urls": ["turn:192.0.2.1"]}]}},
        "username",
    ),
    **{
        f"no ICE server: {url}": (
            {"whip": {"listen": "127.0.0.1:1", "ice_servers": [{"urls": [url]}]}},
            "stun|host|port",
        )
        for url in ("stun:", "stun:h:nope", "stun:h:0", "stun:h:70000", "stun:h?transport=sctp", "http:h:1")
    },
    "not RTSP": ({"rtsp": [{"url": "http://camera", "stream": "a"}]}, "rtsp://"),
    "not RTSP either": ({"rtsp": [{"url": "rtsp://[::1/", "stream": "a"}]}, "rtsp://"),
    "one name twice": (
        {"rtsp": [{"url": "rtsp://a/1", "stream": "a"}, {"url": "rtsp://a/2", "stream": "a"}]},
        "twice",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    source, text = REFUSED[name]
    with pytest.raises(pydantic.ValidationError, match=text):
        lane(source)


@pytest.mark.parametrize(
    ("url", "parts"),
    [
        ("stun:192.0.2.1", ("stun", "192.0.2.1", 3478, "udp")),
        ("turn:[2001:db8::1]:7?transport=tcp", ("turn", "2001:db8::1", 7, "tcp")),
        ("turn:[2001:db8::1]", ("turn", "2001:db8::1", 3478, "udp")),
        ("turns:turn.example", ("turns", "turn.example", 5349, "tcp")),
        ("turns:turn.example:443?transport=udp", ("turns", "turn.example", 443, "udp")),
    ],
)
def test_ice_urls(url: str, parts: tuple[str, str, int, str]) -> None:
    assert split_ice_url(url) == parts


@pytest.mark.parametrize("name", ["", "a/b.sdp", "/a.sdp", "..", "lock", ".sdp", "a.SDP", "a\n.sdp"])
def test_an_sdp_file_is_none_of_the_workers_own(name: str) -> None:
    sink = {"rtp": {"address": "127.0.0.1:5006", "plaintext": True, "sdp_file": name}}
    with pytest.raises(pydantic.ValidationError, match="write a name, as in camera"):
        lane({"rtp": {"listen": "127.0.0.1:5004", "plaintext": True, "from": ["192.0.2.1"]}}, sink)


NOT_FOR_PATIENTS: dict[str, tuple[dict[str, Any], str]] = {
    "plain HTTP": ({"whip": {"listen": "127.0.0.1:1", "tokens": TLS["tokens"]}}, "tls_certificate"),
    "no tokens": ({"whip": {"listen": "127.0.0.1:1", "tls_certificate": "c", "tls_key": "k"}}, "tokens"),
    "plain RTP unsaid": ({"rtp": {"listen": "127.0.0.1:1", "from": ["192.0.2.1"]}}, "plaintext = true"),
    "anyone's RTP": ({"rtp": {"listen": "127.0.0.1:1", "plaintext": True}}, "from ="),
    "plain RTSP": ({"rtsp": [{"url": "rtsp://a/1", "stream": "a"}]}, "rtsps://"),
}


@pytest.mark.parametrize("name", NOT_FOR_PATIENTS)
def test_outside_of_a_lab_nothing_is_open_by_accident(name: str) -> None:
    source, text = NOT_FOR_PATIENTS[name]
    with pytest.raises(pydantic.ValidationError, match=text):
        lane(source, lab=False)
    lane(source, lab=True)


def test_outside_of_a_lab() -> None:
    allowed = {"listen": "127.0.0.1:5004", "from": ["192.0.2.1"], "plaintext": True}
    lane({"whip": {"listen": "127.0.0.1:1", **TLS}, "rtp": allowed}, lab=False)
