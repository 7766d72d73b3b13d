"""The pages that people see: `publish.html` on the source's listener, `view.html` on the sink's.

    GET /              the page of this role
    GET /pages/{name}  its style and scripts

Plain files without a build step, read once, sent with a policy that lets nothing run or load but them. They
speak WHIP and WHEP with the listener they came from, in English or Chinese.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib import resources
from typing import Literal

from aiohttp import web

Role = Literal["source", "sink"]

CONTENT_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript"}

SHARED = ("style.css", "words.js", "page.js", "session.js", "stamp.js")

FILES: dict[Role, tuple[str, ...]] = {
    "source": ("publish.html", "publish.js", "devices.js", "testpicture.js", *SHARED),
    "sink": ("view.html", "view.js", "delay.js", "frames.js", *SHARED),
}
"""Of each role, the page first."""

POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",
        "media-src 'self' blob:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
"""Content-Security-Policy: no inline script, nothing from elsewhere, in nobody's frame."""

PERMISSIONS: dict[Role, str] = {
    "source": "camera=(self), microphone=(self), display-capture=(self), fullscreen=(self)",
    "sink": "camera=(), microphone=(), display-capture=(), fullscreen=(self), autoplay=(self)",
}
"""Permissions-Policy: only the publish page may ask for a camera."""


@dataclass(frozen=True, slots=True)
class Page:
    """One file as it is sent."""

    body: bytes
    content_type: str
    etag: str
    headers: dict[str, str]


def load(role: Role, name: str) -> Page:
    """Read one packaged file."""
    body = resources.files(__name__).joinpath(name).read_bytes()
    headers = {
        # Asked for anew each time, answered by 304: a page never meets scripts of another version.
        "Cache-Control": "no-cache",
        "Content-Security-Policy": POLICY,
        "Permissions-Policy": PERMISSIONS[role],
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }
    kind = CONTENT_TYPES[name.rpartition(".")[2]]
    return Page(body, kind, hashlib.sha256(body).hexdigest()[:32], headers)


def _route(path: str, page: Page) -> web.RouteDef:
    async def send(request: web.Request) -> web.Response:
        known = {tag.value for tag in request.if_none_match or ()}
        if page.etag in known:
            return web.Response(status=304, headers={**page.headers, "ETag": f'"{page.etag}"'})
        response = web.Response(
            body=page.body, content_type=page.content_type, charset="utf-8", headers=page.headers
        )
        response.etag = page.etag
        return response

    return web.get(path, send)


def routes(role: Role) -> list[web.RouteDef]:
    """The routes of one role's page, for the application that serves WHIP or WHEP."""
    files = {name: load(role, name) for name in FILES[role]}
    index, *rest = FILES[role]
    return [_route("/", files[index]), *(_route(f"/pages/{name}", files[name]) for name in rest)]
