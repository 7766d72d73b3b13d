"""What a source or a sink runs in: one process, one side of one lane, one uvloop.

The supervisor starts ``python -m relay.worker`` and writes a `Bootstrap` to its standard input: settings, the
lane's key, the epoch, and the numbers of inherited descriptors. The worker confines itself (`confine.py`),
drops to its side's uid and runs the lane kind's coroutine with a `SourceSide` or `SinkSide`. It reports to
the supervisor on one pipe, as JSON lines: ready, statistics each second. Nothing comes from the supervisor
but signals: SIGTERM drains.

A worker whose main coroutine ends, ends as a process; the supervisor decides about a restart.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from relay.config import LaneSettings
from relay.link import Inlet, Outlet
from relay.metrics import Metrics

Status = dict[str, Any]
"""JSON-able figures of a side, for `medferry status`. Never patient data, never a peer's free text."""


@dataclass(slots=True, kw_only=True)
class Side:
    """What either side gets from the relay, and the two things it owes: `ready()` and `status`."""

    relay_name: str
    lane: LaneSettings
    epoch: int
    """Rises with each start of this side. Never reused, so it may serve in unique identifiers."""
    state: str
    """This side's own directory, as a path that this process can use."""
    sockets: dict[str, list[socket.socket]]
    """Listening sockets (TCP) and bound sockets (UDP) by `config.Listener.name`; non-blocking."""
    metrics: Metrics
    log: logging.Logger
    draining: asyncio.Event
    """Set by SIGTERM: finish what was accepted, refuse what is new, then return."""
    drain_seconds: float
    """After `draining` is set the process is ended by the supervisor at the latest after this."""
    status: Callable[[], Status] = field(default=dict)
    """Set by the lane kind: called each second for the side's figures."""
    ready: Callable[[], None] = field(default=lambda: None)
    """To be called once, when the side listens and can work."""


@dataclass(slots=True, kw_only=True)
class SourceSide(Side):
    """Side A's half: what it sends on `outlet` is the only thing that ever leaves it."""

    outlet: Outlet


@dataclass(slots=True, kw_only=True)
class SinkSide(Side):
    """Side B's half: `inlet` is the only thing it ever learns of side A."""

    inlet: Inlet
