"""The HTTP server of a side: aiohttp, with bounds on what strangers may hold of it.

    listening sockets ─▶ accept ─┬─ more than `WebLimits.connections`: closed at once, counted
                                 └─▶ TLS ─▶ request ─▶ answer ─▶ request ─▶ …
                                      └── `WebLimits.idle_seconds` for each step ──┘

/metrics, WHIP and WHEP share a process, and so its file descriptors, with DICOM associations and media:
whoever opens connections and sends nothing, or half a request, must not use them up. What is no HTTP is
answered 400 and counted; a trace would tell the operator nothing and push other lines out of the log.

Never here: routes, what a request may do.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from aiohttp import web
from aiohttp.http import HttpProcessingError

from relay.metrics import Metrics

ACCEPTS_PER_TURN = 64
"""Connections of one listener that are accepted before others get their turn."""

PAUSE_SECONDS = 0.5
"""Without accepting, when the process has no file descriptor left for another connection."""

MALFORMED = (HttpProcessingError, web.RequestPayloadError)
"""What aiohttp raises where a request, or its body, is no HTTP."""

log = logging.getLogger("medferry.web")


@dataclass(frozen=True, slots=True, kw_only=True)
class WebLimits:
    """What all clients of one server may take together, and one client of time."""

    connections: int
    """At once, whatever their state; more are closed as they come."""
    idle_seconds: float
    """For TLS; from there, or from the last answer, to the whole head of the next request."""
    shutdown_seconds: float = 1.0
    """For requests that are being answered at the end, and for the rest of one that was refused."""


METRICS_LIMITS = WebLimits(connections=16, idle_seconds=5.0)
"""One or two scrapers, and people who look."""

MEDIA_LIMITS = WebLimits(connections=256, idle_seconds=10.0)
"""WHIP or WHEP: a connection is needed to begin a session, to end it, and for the page; browsers open six."""


class _Connection(web.RequestHandler):
    """aiohttp's connection, which says when it is gone and does not trace a client's mistakes."""

    def __init__(self, server: WebServer, manager: web.Server, **limits: Any) -> None:
        super().__init__(manager, loop=asyncio.get_running_loop(), access_log=cast(Any, None), **limits)
        self._web_server = server
        self.gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_lost(self, exc: BaseException | None) -> None:
        super().connection_lost(exc)
        if not self.gone.done():
            self.gone.set_result(None)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        if isinstance(exc, MALFORMED):
            self._web_server.count_malformed()
        return super().handle_error(request, status, exc, message)

    def log_exception(self, *args: Any, **kw: Any) -> None:
        if not isinstance(kw.get("exc_info"), MALFORMED):
            super().log_exception(*args, **kw)


class WebServer:
    """An aiohttp application on listening sockets, within limits."""

    def __init__(self, name: str, application: web.Application, limits: WebLimits, metrics: Metrics) -> None:
        """`name` is a fixed word that tells this server's figures from another's of the same side."""
        self.name = name
        self.limits = limits
        self.refused = 0
        """Connections closed because there were as many as may be."""
        self._metrics = metrics
        self._runner = web.AppRunner(application, access_log=None, shutdown_timeout=limits.shutdown_seconds)
        self._sockets: list[socket.socket] = []
        self._tls: ssl.SSLContext | None = None
        self._open: set[asyncio.Task[None]] = set()

    def __repr__(self) -> str:
        return f"<WebServer {self.name} connections={len(self._open)} refused={self.refused}>"

    @property
    def connections(self) -> int:
        """How many there are now."""
        return len(self._open)

    async def start(self, sockets: Sequence[socket.socket], tls: ssl.SSLContext | None = None) -> None:
        """Serve on listening, non-blocking sockets. They are closed by `stop`."""
        await self._runner.setup()
        self._sockets, self._tls = list(sockets), tls
        self._gauge()
        for sock in self._sockets:
            self._watch(sock)

    async def stop(self) -> None:
        """Accept no more, let requests be answered for `shutdown_seconds`, close everything."""
        loop = asyncio.get_running_loop()
        sockets, self._sockets = self._sockets, []
        for sock in sockets:
            loop.remove_reader(sock)
            sock.close()
        await self._runner.cleanup()
        for task in self._open:
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)

    def count_malformed(self) -> None:
        """A client sent what is no HTTP."""
        self._metrics.count("http_malformed", "HTTP requests that were malformed", server=self.name)

    def _watch(self, sock: socket.socket) -> None:
        if sock in self._sockets:
            asyncio.get_running_loop().add_reader(sock, self._accept, sock)

    def _accept(self, sock: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        for _ in range(ACCEPTS_PER_TURN):
            try:
                connection, _ = sock.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:
                log.error("%s: no connection can be accepted: %s", self.name, error.strerror)
                loop.remove_reader(sock)
                loop.call_later(PAUSE_SECONDS, self._watch, sock)
                return
            if len(self._open) >= self.limits.connections:
                connection.close()
                self.refused += 1
                self._metrics.count(
                    "http_connections_refused", "HTTP connections beyond the limit", server=self.name
                )
                continue
            connection.setblocking(False)
            task = loop.create_task(self._serve(connection), name=f"{self.name} connection")
            self._open.add(task)
            task.add_done_callback(self._closed)
            self._gauge()

    def _closed(self, task: asyncio.Task[None]) -> None:
        self._open.discard(task)
        self._gauge()

    def _gauge(self) -> None:
        self._metrics.gauge(
            "http_connections", "HTTP connections now", float(len(self._open)), server=self.name
        )

    async def _serve(self, sock: socket.socket) -> None:
        """One connection until it is gone."""
        loop = asyncio.get_running_loop()
        manager = self._runner.server
        assert manager is not None
        connection = _Connection(
            self,
            manager,
            keepalive_timeout=self.limits.idle_seconds,
            lingering_time=self.limits.shutdown_seconds,
        )
        timeouts: dict[str, float] = {}
        if self._tls is not None:
            timeouts = {
                "ssl_handshake_timeout": self.limits.idle_seconds,
                "ssl_shutdown_timeout": self.limits.shutdown_seconds,
            }
        try:
            await loop.connect_accepted_socket(lambda: connection, sock, ssl=self._tls, **timeouts)
        except OSError as error:
            # The client's: it speaks no TLS, or not in time, or was gone already.
            log.debug("%s: a connection did not come to be: %s", self.name, error)
            sock.close()
            return
        await connection.gone
