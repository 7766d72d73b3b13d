"""Opens the sockets that lanes listen on, each in its side's network namespace.

The supervisor opens them, since ports below 1024 and namespaces need privilege, and keeps them, so that a
connection made while a source restarts waits in the backlog instead of being refused.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from relay.config import Listener, split_address
from relay.confine import NETNS_DIRECTORY, enter_netns
from relay.errors import MedferryError

T = TypeVar("T")

BACKLOG = 1024
"""Connections that may wait while a source restarts, or is busy. The kernel caps it (net.core.somaxconn).
Whoever serves such a socket and listens again passes the same number."""

UDP_BUFFER = 4 << 20
"""Bytes of buffer asked for on UDP, each way that is used: a keyframe burst at 1080p and a scheduling delay
on top."""


def in_netns(name: str | None, action: Callable[[], T]) -> T:
    """Do `action` in the network namespace `name`, on a thread of its own, and return what it returned.

    Raises:
        OSError: The namespace cannot be entered. Whatever `action` raises comes out as well.
    """
    if name is None:
        return action()

    def run() -> T:
        enter_netns(name)
        return action()

    # A namespace belongs to a thread: this one ends with the action, so nothing has to be put back.
    with ThreadPoolExecutor(1, f"netns {name}") as thread:
        return thread.submit(run).result()


def _open(listener: Listener) -> list[socket.socket]:
    host, port = split_address(listener.address)
    opened: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(host, port, type=listener.type, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, address in dict.fromkeys(found):
            sock = socket.socket(family, kind, protocol)
            opened.append(sock)
            if listener.kind == "tcp":
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            else:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, UDP_BUFFER)
            if family == socket.AF_INET6 and len(found) > 1:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind(address)
            if listener.kind == "tcp":
                sock.listen(BACKLOG)
    except OSError:
        for sock in opened:
            sock.close()
        raise
    return opened


def open_listener(listener: Listener, netns: str | None) -> list[socket.socket]:
    """The bound (TCP: listening) sockets of `listener`; a host name may stand for several addresses.

    Raises:
        MedferryError: It cannot be opened; the message says what to do.
    """
    try:
        return in_netns(netns, lambda: _open(listener))
    except OSError as error:
        where = f" in network namespace {netns!r}" if netns else ""
        advice = "check that the address is this machine's and that nobody else listens there"
        if netns is not None and not os.path.exists(f"{NETNS_DIRECTORY}/{netns}"):
            advice = f"create the namespace first: ip netns add {netns}"
        elif isinstance(error, PermissionError):
            advice = "ports below 1024 and namespaces need root: run as root or choose a higher port"
        reason = error.strerror or str(error)
        raise MedferryError(f"cannot listen on {listener.address}{where}: {reason}: {advice}") from None
