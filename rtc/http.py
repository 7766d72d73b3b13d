"""What WHIP and WHEP have in common as HTTP services (RFC 9725 §4, on aiohttp).

Bearer tokens, CORS, problem answers (RFC 9457), entity tags of ICE sessions, Link headers of ICE servers, and
trickle-ice-sdpfrag bodies (RFC 8840 §9). What is said over HTTP names the problem and what to do about it,
never anything of other streams or of this machine.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import ssl
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from aiohttp import web

from relay.errors import PeerError
from relay.web import MALFORMED
from rtc.ice import IceSettings
from rtc.offer import MAX_LINE_CHARS, MAX_SDP_BYTES, attributes
from rtc.settings import ANY_STREAM, IceServer, WebRtcSettings, split_ice_url, split_ports

SDP_TYPE = "application/sdp"
FRAGMENT_TYPE = "application/trickle-ice-sdpfrag"

RETRY = {"Retry-After": "10"}
"""Seconds, said where there is no room now."""

BODY_SECONDS = 5.0
"""For the body of a request: a few kilobytes. Who sends it slower keeps a place from others."""

EXPOSED = "Location, ETag, Link, Accept-Patch, Retry-After, WWW-Authenticate"
"""Headers that a page of another origin may read."""

ALLOWED = "Authorization, Content-Type, If-Match"
"""Headers that a page of another origin may send."""

PREFLIGHT_SECONDS = "600"


class Problem(web.HTTPException):
    """An answer that is no success, as application/problem+json (RFC 9457)."""

    def __init__(self, status: int, detail: str, headers: Mapping[str, str] | None = None) -> None:
        self.status_code = status
        title = web.Response(status=status).reason
        body = json.dumps({"title": title, "status": status, "detail": detail})
        super().__init__(headers=headers, text=body, content_type="application/problem+json")


def check_token(request: web.Request, settings: WebRtcSettings, stream: str) -> None:
    """Let the request pass if its bearer token opens `stream` (RFC 6750 §2.1).

    Raises:
        Problem: 401 without a token or with one that opens nothing, 403 with another stream's (§3.1).
    """
    if not settings.tokens:
        return
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not token:
        raise Problem(
            401,
            "send the stream's token as Authorization: Bearer",
            {"WWW-Authenticate": 'Bearer realm="media"'},
        )
    # Bytes that are no UTF-8 come as surrogates; they are part of a wrong token like any others.
    given = token.strip().encode(errors="surrogateescape")
    opened = {name for name, item in settings.tokens.items() if hmac.compare_digest(item.encode(), given)}
    if not opened:
        raise Problem(
            401,
            "this token opens nothing here",
            {"WWW-Authenticate": 'Bearer realm="media", error="invalid_token"'},
        )
    if not opened & {stream, ANY_STREAM}:
        raise Problem(
            403,
            "this token opens another stream",
            {"WWW-Authenticate": 'Bearer realm="media", error="insufficient_scope"'},
        )


def cross_origin(settings: WebRtcSettings) -> Callable[[web.Request, web.StreamResponse], Awaitable[None]]:
    """A hook for ``on_response_prepare`` that adds the CORS headers for allowed origins."""

    async def add(request: web.Request, response: web.StreamResponse) -> None:
        origin = request.headers.get("Origin")
        if origin is None or not ("*" in settings.origins or origin in settings.origins):
            return
        response.headers["Access-Control-Allow-Origin"] = "*" if "*" in settings.origins else origin
        response.headers["Access-Control-Expose-Headers"] = EXPOSED
        response.headers["Vary"] = "Origin"

    return add


def preflight(methods: str, accept_post: str | None = None) -> web.Response:
    """The answer to OPTIONS: for a CORS preflight, and to tell what a POST may carry (RFC 9725 §4.2)."""
    headers = {
        "Allow": methods,
        "Access-Control-Allow-Methods": methods,
        "Access-Control-Allow-Headers": ALLOWED,
        "Access-Control-Max-Age": PREFLIGHT_SECONDS,
    }
    if accept_post is not None:
        headers["Accept-Post"] = accept_post
    return web.Response(status=204, headers=headers)


async def read_body(request: web.Request, content_type: str) -> str:
    """The body of a request as text.

    Raises:
        Problem: 415 for another content type, 413 for too much, 408 for too slow, 400 for what is
            broken or not UTF-8.
    """
    if request.content_type != content_type:
        raise Problem(415, f"send {content_type}", {"Accept-Post": content_type, "Accept": content_type})
    raw = b""
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while len(raw) <= MAX_SDP_BYTES and (more := await request.content.read(MAX_SDP_BYTES + 1)):
                raw += more
    except TimeoutError:
        what = f"the body did not come within {BODY_SECONDS:.0f} s"
        raise Problem(408, what, {"Connection": "close"}) from None
    except (*MALFORMED, ConnectionError):
        # Whoever is gone does not get the answer.
        raise Problem(400, "the body is broken off or badly encoded", {"Connection": "close"}) from None
    if len(raw) > MAX_SDP_BYTES:
        raise Problem(413, f"the body has more than {MAX_SDP_BYTES} bytes")
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise Problem(400, "the body is not UTF-8") from None


def check_accept(request: web.Request) -> None:
    """Refuse a client that would not take an SDP answer.

    Raises:
        Problem: 406.
    """
    accepted = request.headers.get("Accept", "*/*")
    offers = [item.split(";")[0].strip().lower() for item in accepted.split(",")]
    if not {"*/*", "application/*", SDP_TYPE} & set(offers):
        raise Problem(406, f"the answer is {SDP_TYPE}")


def link_headers(servers: Sequence[IceServer]) -> list[str]:
    """One Link header for each URL of each ICE server (RFC 9725 §4.6)."""
    links = []
    for server in servers:
        for url in server.urls:
            link = f'<{url}>; rel="ice-server"'
            if server.username is not None and server.credential is not None:
                user, credential = (_quoted(text) for text in (server.username, server.credential))
                link += f'; username="{user}"; credential="{credential}"; credential-type="password"'
            links.append(link)
    return links


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')


@dataclass(frozen=True, slots=True, kw_only=True)
class Fragment:
    """A trickle-ice-sdpfrag: candidates for a session, or the wish to restart ICE."""

    ufrag: str
    password: str
    candidates: tuple[str, ...]
    """Without ``candidate:``."""


def read_fragment(text: str) -> Fragment:
    """Read a trickle-ice-sdpfrag (RFC 8840 §9).

    Raises:
        PeerError: It is malformed or names no ICE session.
    """
    lines: list[tuple[str, str]] = []
    for line in text.replace("\r\n", "\n").strip("\n").split("\n"):
        if len(line) < 3 or line[1] != "=" or len(line) > MAX_LINE_CHARS:
            raise PeerError("sdp", "the fragment has a line that is not x=value")
        lines.append((line[0], line[2:].rstrip()))
    given = attributes(lines)
    if not given.get("ice-ufrag") or not given.get("ice-pwd"):
        raise PeerError("sdp", "the fragment has no ice-ufrag and ice-pwd")
    return Fragment(
        ufrag=given["ice-ufrag"][0],
        password=given["ice-pwd"][0],
        candidates=tuple(given.get("candidate", [])),
    )


def check_if_match(request: web.Request, tag: str) -> None:
    """A PATCH names the ICE session it is for by its entity tag, or by ``*`` (RFC 9725 §4.3.1).

    Raises:
        Problem: 428 without If-Match, 412 for another session.
    """
    named = {item.strip() for item in request.headers.get("If-Match", "").split(",")} - {""}
    if not named:
        raise Problem(428, "send If-Match with the ETag of the session")
    if not named & {tag, "*"}:
        raise Problem(412, "If-Match names another ICE session")


def ice_settings(settings: WebRtcSettings, *, lab: bool) -> IceSettings:
    """The settings of a WHIP or WHEP table as those of its ICE sessions."""
    stun = turn = None
    user = credential = None
    transport, tls = "udp", False
    for server in settings.ice_servers:
        for url in server.urls:
            parts = split_ice_url(url)
            if parts.scheme == "stun" and stun is None:
                stun = parts.host, parts.port
            elif parts.scheme != "stun" and turn is None:
                turn = parts.host, parts.port
                user, credential, tls = server.username, server.credential, parts.scheme == "turns"
                transport = parts.transport
    return IceSettings(
        addresses=settings.addresses,
        ports=split_ports(settings.udp_ports) if settings.udp_ports else None,
        loopback=lab,
        stun=stun,
        turn=turn,
        turn_tls=tls,
        turn_transport=transport,
        turn_username=user,
        turn_password=credential,
    )


def tls_context(certificate: str, key: str) -> ssl.SSLContext:
    """TLS 1.2 or newer for a listener. The paths are those that the worker may read (`Side.file`)."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(certificate, key)
    return context
