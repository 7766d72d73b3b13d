"""Offers read and answers written: the SDP of WHIP and WHEP (RFC 8866, RFC 9429), where we always answer.

    offer text ─▶ `read_offer` ─▶ Offer ─▶ (the lane decides) ─▶ AnswerMedia… ─▶ `write_answer` ─▶ answer text

One transport carries everything: the offer must bundle (RFC 9143) and multiplex RTCP (RFC 8858), as WHIP and
WHEP demand. What the lane does not take is answered with port 0.

Pure: text and values. Whatever a peer sends, only `PeerError` comes out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from relay.errors import PeerError

MAX_SDP_BYTES = 65_536
"""A browser's offer with every codec has about 8 KB."""

MAX_SDP_LINES = 2_000
MAX_LINE_CHARS = 2_048
MAX_MEDIA = 8
"""Media sections of one offer: a publisher has two, some with an unused third."""

MAX_CODECS = 64
MAX_SSRCS = 16

DIRECTIONS = {"sendonly": "recvonly", "recvonly": "sendonly", "sendrecv": "sendrecv", "inactive": "inactive"}
"""Each direction of an offer with its counterpart in the answer."""

SETUP_ANSWERS = {"actpass": "active", "active": "passive", "passive": "active"}
"""DTLS roles (RFC 8842 §5.3): what the offer says, what the answer says."""

REGISTERED_NAMES = {"h264": "H264", "vp8": "VP8"}
"""Encoding names as IANA writes them, where that is not lower case."""

FEEDBACK = ("nack", "nack pli", "ccm fir", "goog-remb")
"""RTCP feedback that we send to publishers and understand of viewers, of what is offered."""

FINGERPRINTS = {"sha-256": 95, "sha-384": 143, "sha-512": 191}
"""Hash functions understood, with the characters of a fingerprint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Codec:
    """One payload type: `name` in lower case; `fmtp` and `feedback` as written, keys in lower case."""

    payload_type: int
    name: str
    clock: int
    channels: int = 1
    fmtp: Mapping[str, str] = field(default_factory=dict)
    feedback: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class OfferedMedia:
    """One media section of an offer."""

    kind: str
    mid: str
    protocol: str
    formats: tuple[str, ...]
    direction: str
    rejected: bool
    rtcp_mux: bool
    codecs: tuple[Codec, ...]
    extensions: Mapping[str, int]
    """RTP header extensions: URI to id."""
    ssrcs: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """A whole offer; the transport's parameters are those of the bundle."""

    media: tuple[OfferedMedia, ...]
    ufrag: str
    password: str = field(repr=False)
    fingerprints: tuple[tuple[str, str], ...]
    setup: str
    candidates: tuple[str, ...]
    ice_lite: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerMedia:
    """What we say to one media section. Without codecs it is rejected."""

    codecs: tuple[Codec, ...] = ()
    direction: str = "inactive"
    extensions: Mapping[str, int] = field(default_factory=dict)
    ssrc: int | None = None
    rtx_ssrc: int | None = None
    stream_id: str = "-"
    """First part of msid: media with the same one are played in sync."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Transport:
    """Our end of the bundle's transport. `candidates` as SDP writes them, without ``candidate:``."""

    ufrag: str
    password: str = field(repr=False)
    fingerprint: str
    """SHA-256, as in ``AB:CD:…``."""
    setup: str
    candidates: tuple[str, ...]
    cname: str


def _fault(what: str) -> PeerError:
    return PeerError("sdp", what)


def _number(text: str, low: int, high: int, what: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 10 and low <= int(text) <= high):
        raise _fault(f"SDP: {what} is not a number from {low} to {high}")
    return int(text)


def sections(text: str) -> tuple[list[tuple[str, str]], list[list[tuple[str, str]]]]:
    """Cut SDP into (type, value) pairs: the session's, and those of each media section, ``m=`` first.

    Raises:
        PeerError: It is too large or a line is not ``x=value``.
    """
    if len(text) > MAX_SDP_BYTES:
        raise _fault(f"SDP has more than {MAX_SDP_BYTES} bytes")
    lines = text.replace("\r\n", "\n").rstrip("\n").split("\n")
    if len(lines) > MAX_SDP_LINES:
        raise _fault(f"SDP has more than {MAX_SDP_LINES} lines")
    session: list[tuple[str, str]] = []
    media: list[list[tuple[str, str]]] = []
    for line in lines:
        if len(line) > MAX_LINE_CHARS or len(line) < 2 or line[1] != "=" or not line[0].isalpha():
            raise _fault("SDP has a line that is not x=value, or one that is too long")
        if line[0] == "m":
            media.append([])
        (media[-1] if media else session).append((line[0], line[2:].rstrip()))
    if session[:1] != [("v", "0")]:
        raise _fault("SDP does not begin with v=0")
    if len(media) > MAX_MEDIA:
        raise _fault(f"SDP has more than {MAX_MEDIA} media sections")
    return session, media


def attributes(lines: Sequence[tuple[str, str]]) -> dict[str, list[str]]:
    """The ``a=`` lines by name, in order; a flag's value is empty."""
    found: dict[str, list[str]] = {}
    for kind, value in lines:
        if kind == "a":
            name, _, rest = value.partition(":")
            found.setdefault(name, []).append(rest)
    return found


def parse_fmtp(text: str) -> dict[str, str]:
    """``a=1; b=2`` as a mapping, keys in lower case."""
    pairs = (item.strip().partition("=") for item in text.split(";"))
    return {key.lower(): value for key, _, value in pairs if key}


def read_codecs(formats: Sequence[str], given: Mapping[str, list[str]]) -> Iterator[Codec]:
    """The codecs of a media section in its order of preference; formats without rtpmap are left out.

    Raises:
        PeerError: A payload type or a clock rate is out of range.
    """
    maps = dict(item.partition(" ")[::2] for item in given.get("rtpmap", []))
    fmtps = dict(item.partition(" ")[::2] for item in given.get("fmtp", []))
    for form in formats[:MAX_CODECS]:
        payload_type = _number(form, 0, 127, "payload type")
        if form not in maps:
            continue
        name, _, rest = maps[form].strip().partition("/")
        clock, _, channels = rest.partition("/")
        feedback = tuple(
            what
            for target, what in (item.partition(" ")[::2] for item in given.get("rtcp-fb", []))
            if target in ("*", form)
        )
        yield Codec(
            payload_type=payload_type,
            name=name.lower(),
            clock=_number(clock, 1, 1_000_000, "clock rate"),
            channels=_number(channels, 1, 8, "channel count") if channels else 1,
            fmtp=parse_fmtp(fmtps.get(form, "")),
            feedback=feedback,
        )


def _read_extensions(given: Mapping[str, list[str]]) -> dict[str, int]:
    found = {}
    for item in given.get("extmap", []):
        number, _, rest = item.partition(" ")
        uri = rest.split(" ")[0]
        found[uri] = _number(number.partition("/")[0], 1, 255, "header extension id")
    return found


def _read_media(lines: Sequence[tuple[str, str]]) -> OfferedMedia:
    parts = lines[0][1].split()
    if len(parts) < 4:
        raise _fault("SDP: an m= line has fewer than four parts")
    kind, port, protocol, *formats = parts
    given = attributes(lines)
    ssrcs = dict.fromkeys(
        _number(item.partition(" ")[0], 0, 2**32 - 1, "ssrc")
        for item in given.get("ssrc", [])[: 8 * MAX_SSRCS]
    )
    return OfferedMedia(
        kind=kind,
        mid=given.get("mid", [""])[0],
        protocol=protocol,
        formats=tuple(formats),
        direction=next((word for word in DIRECTIONS if word in given), "sendrecv"),
        # Port 0 with bundle-only is a section that waits for the bundle (RFC 9143 §6).
        rejected=_number(port.partition("/")[0], 0, 65535, "port") == 0 and "bundle-only" not in given,
        rtcp_mux="rtcp-mux" in given,
        codecs=tuple(read_codecs(formats, given)) if kind in ("audio", "video") else (),
        extensions=_read_extensions(given),
        ssrcs=tuple(ssrcs)[:MAX_SSRCS],
    )


def _check_bundle(media: Sequence[OfferedMedia], session: Mapping[str, list[str]]) -> None:
    active = [item for item in media if not item.rejected]
    if not active:
        raise _fault("SDP offers no media")
    if len({item.mid for item in media}) != len(media) or (len(media) > 1 and "" in {m.mid for m in media}):
        raise _fault("SDP: media sections need a mid of their own")
    if len(active) > 1:
        groups = [item.split()[1:] for item in session.get("group", []) if item.startswith("BUNDLE")]
        if not any({item.mid for item in active} <= set(group) for group in groups):
            raise _fault("SDP: all media must be in one BUNDLE group (max-bundle)")
    if not all(item.rtcp_mux for item in active if item.kind in ("audio", "video")):
        raise _fault("SDP: RTCP must be multiplexed (a=rtcp-mux)")


def read_offer(text: str) -> Offer:
    """Read a WebRTC offer.

    Raises:
        PeerError: It is malformed, or does not bundle, multiplex RTCP, or name its transport.
    """
    session_lines, media_lines = sections(text)
    session = attributes(session_lines)
    media = tuple(_read_media(lines) for lines in media_lines)
    _check_bundle(media, session)
    # The bundle's transport is described by its first section, or for all of them by the session.
    first = next(i for i, item in enumerate(media) if not item.rejected)
    given = attributes(media_lines[first])

    def one(name: str) -> str:
        return next(iter(given.get(name) or session.get(name) or [""]))

    fingerprints = []
    for item in given.get("fingerprint") or session.get("fingerprint") or []:
        algorithm, _, value = item.partition(" ")
        length = FINGERPRINTS.get(algorithm.lower())
        if length is not None and len(value) == length:
            fingerprints.append((algorithm.lower(), value.upper()))
    ufrag, password, setup = one("ice-ufrag"), one("ice-pwd"), one("setup") or "actpass"
    ice_characters = (ufrag + password).replace("+", "").replace("/", "")
    if not (4 <= len(ufrag) <= 256 and 22 <= len(password) <= 256 and _is_alphanumeric(ice_characters)):
        raise _fault("SDP: ice-ufrag or ice-pwd is missing or malformed (RFC 8839 §5.4)")
    if not fingerprints:
        raise _fault("SDP: no fingerprint with SHA-256, SHA-384 or SHA-512")
    if setup not in SETUP_ANSWERS:
        raise _fault("SDP: a=setup is none of actpass, active, passive")
    return Offer(
        media=media,
        ufrag=ufrag,
        password=password,
        fingerprints=tuple(fingerprints[:4]),
        setup=setup,
        candidates=tuple(given.get("candidate", [])[:64]),
        ice_lite="ice-lite" in session,
    )


def _is_alphanumeric(text: str) -> bool:
    return text.isascii() and text.isalnum()


def _codec_lines(codec: Codec) -> Iterator[str]:
    channels = f"/{codec.channels}" if codec.channels > 1 else ""
    # Names are compared without case (RFC 8866 §6.6), yet not by every reader of SDP.
    name = REGISTERED_NAMES.get(codec.name, codec.name)
    yield f"a=rtpmap:{codec.payload_type} {name}/{codec.clock}{channels}"
    for item in codec.feedback:
        yield f"a=rtcp-fb:{codec.payload_type} {item}"
    if codec.fmtp:
        pairs = ";".join(f"{key}={value}" if value else key for key, value in codec.fmtp.items())
        yield f"a=fmtp:{codec.payload_type} {pairs}"


def _media_lines(offered: OfferedMedia, answer: AnswerMedia, transport: Transport) -> Iterator[str]:
    if not answer.codecs:
        yield f"m={offered.kind} 0 {offered.protocol} {' '.join(offered.formats)}"
        yield "c=IN IP4 0.0.0.0"
        yield "a=inactive"
        if offered.mid:
            yield f"a=mid:{offered.mid}"
        return
    formats = " ".join(str(codec.payload_type) for codec in answer.codecs)
    yield f"m={offered.kind} 9 {offered.protocol} {formats}"
    yield "c=IN IP4 0.0.0.0"
    yield "a=rtcp:9 IN IP4 0.0.0.0"
    if offered.mid:
        yield f"a=mid:{offered.mid}"
    yield f"a={answer.direction}"
    yield "a=rtcp-mux"
    # RFC 9725 §4.4.1 asks for it in answers, too; RFC 8858 §4.3 had it in offers only.
    yield "a=rtcp-mux-only"
    yield "a=rtcp-rsize"
    yield f"a=ice-ufrag:{transport.ufrag}"
    yield f"a=ice-pwd:{transport.password}"
    yield "a=ice-options:trickle"
    yield f"a=fingerprint:sha-256 {transport.fingerprint}"
    yield f"a=setup:{transport.setup}"
    for uri, number in answer.extensions.items():
        yield f"a=extmap:{number} {uri}"
    for codec in answer.codecs:
        yield from _codec_lines(codec)
    if answer.ssrc is not None:
        yield f"a=msid:{answer.stream_id} {offered.kind}"
        if answer.rtx_ssrc is not None:
            yield f"a=ssrc-group:FID {answer.ssrc} {answer.rtx_ssrc}"
        for ssrc in filter(None, (answer.ssrc, answer.rtx_ssrc)):
            yield f"a=ssrc:{ssrc} cname:{transport.cname}"
            yield f"a=ssrc:{ssrc} msid:{answer.stream_id} {offered.kind}"


def write_answer(offer: Offer, answers: Sequence[AnswerMedia], transport: Transport) -> str:
    """The answer: one `AnswerMedia` for each media section of the offer, in its order.

    All candidates are in the first section that is accepted, with end-of-candidates: none will trickle.
    """
    accepted = [item.mid for item, ours in zip(offer.media, answers, strict=True) if ours.codecs]
    lines = ["v=0", f"o=- {_session_id(transport)} 1 IN IP4 0.0.0.0", "s=-", "t=0 0"]
    if all(accepted):
        lines.append("a=group:BUNDLE " + " ".join(accepted))
    lines.append("a=msid-semantic: WMS *")
    told = False
    for offered, answer in zip(offer.media, answers, strict=True):
        lines += _media_lines(offered, answer, transport)
        if answer.codecs and not told:
            lines += [f"a=candidate:{item}" for item in transport.candidates]
            lines.append("a=end-of-candidates")
            told = True
    return "\r\n".join(lines) + "\r\n"


def _session_id(transport: Transport) -> int:
    """A number that is as random as the transport's password, as RFC 9429 §5.2.1 wants it."""
    return int.from_bytes(transport.password.encode()[:7], "big")
