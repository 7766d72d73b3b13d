"""The one-machine link's two ends: an Outlet and an Inlet on half-shut SEQPACKET sockets, and on trays.

`make_pairs` makes the sockets that the supervisor keeps and hands out; `ValveOutlet` runs in the source,
`ValveInlet` in the sink, and `valve.py` moves what is between. Sockets outlive the processes on either side
of them, so a fragment that was sent waits in the kernel while a valve or a sink is restarted.
"""

from __future__ import annotations

import asyncio
import logging
import select
import socket
import time
from collections.abc import Awaitable
from dataclasses import dataclass

from relay import wire
from relay.errors import WireError
from relay.link import SILENCE_SECONDS, Arrival, Deliver
from relay.records import Record, VideoFrame
from relay.valve import takes, untaken, waiting

log = logging.getLogger(__name__)

SOCKET_BUFFER = 4 << 20
"""Bytes that each of the two sockets may hold: three raw 720p pictures, so that a picture is written in one
go, and little enough that a full link is noticed within milliseconds. Without root the kernel may give less
(net.core.wmem_max), which costs speed only."""

SO_SNDBUFFORCE = 32
"""asm-generic/socket.h: beyond net.core.wmem_max, for root."""

REFUSAL_LOG_SECONDS = 1.0
"""Between two lines about refused fragments: a source in the wrong hands must not fill B's disk with them."""

FRAGMENTS_PER_TURN = 16
"""Fragments handled before other tasks of the process get their turn; one, where it lay in the tray."""


@dataclass(frozen=True, slots=True)
class Pairs:
    """The four ends of a link, in the order a fragment passes them."""

    source_end: socket.socket
    valve_in: socket.socket
    valve_out: socket.socket
    sink_end: socket.socket

    def renewed(self) -> Pairs:
        """These pairs, each one that its outer process shut on purpose replaced by a new one.

        A process in the wrong hands can end its own end for good. What was in that pair is lost.
        """
        source_end, valve_in, valve_out, sink_end = (
            self.source_end,
            self.valve_in,
            self.valve_out,
            self.sink_end,
        )
        if _hung_up(valve_in):
            source_end.close()
            valve_in.close()
            source_end, valve_in = _half_shut_pair()
        if _hung_up(valve_out):
            valve_out.close()
            sink_end.close()
            valve_out, sink_end = _half_shut_pair()
        return Pairs(source_end, valve_in, valve_out, sink_end)

    def close(self) -> None:
        """Close all four; what is still in them is lost."""
        for end in (self.source_end, self.valve_in, self.valve_out, self.sink_end):
            end.close()


def _half_shut_pair() -> tuple[socket.socket, socket.socket]:
    writer, reader = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in (writer, reader):
        # The kernel doubles what it is asked for.
        try:
            end.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, SOCKET_BUFFER // 2)
        except PermissionError:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER // 2)
    writer.shutdown(socket.SHUT_RD)
    reader.shutdown(socket.SHUT_WR)
    return writer, reader


def _hung_up(valve_end: socket.socket) -> bool:
    """Whether the process at the other end has shut the one direction that was open, and nothing waits."""
    poll = select.poll()
    poll.register(valve_end, 0)
    return any(events & select.POLLHUP for _, events in poll.poll(0)) and not waiting(valve_end)


def make_pairs() -> Pairs:
    """Two SEQPACKET pairs, each shut for one direction by both of its ends."""
    source_end, valve_in = _half_shut_pair()
    valve_out, sink_end = _half_shut_pair()
    return Pairs(source_end, valve_in, valve_out, sink_end)


class ValveOutlet:
    """The source's end. Implements `link.Outlet`."""

    def __init__(self, sock: socket.socket, encoder: wire.Encoder, tray: memoryview | None = None) -> None:
        """`tray`: to write to, where the link has trays."""
        sock.setblocking(False)
        self._socket = sock
        self._encoder = encoder
        self._tray = tray
        self._turn = asyncio.Lock()
        self._memory = memoryview(bytearray(wire.MAX_FRAGMENT))
        """Of the one fragment that is being sent."""
        self._unsent: tuple[memoryview | bytes, int] | None = None
        """A message, and the bytes of its fragment."""
        self.fragments = 0
        self.bytes = 0
        self.waits = 0

    def __repr__(self) -> str:
        return f"<ValveOutlet {self._encoder} fragments={self.fragments} congested={self.congested}>"

    @property
    def congested(self) -> bool:
        """Whether a send would have to wait (now, or because another send is waiting)."""
        return self._turn.locked()

    async def send(self, *records: Record) -> None:
        """See `link.Outlet.send`."""
        async with self._turn:
            if self._unsent is not None:
                # A cancelled send left a numbered fragment behind; skipping it would look like a loss to B.
                await self._send_message(*self._unsent)
            if self._tray is not None and any(isinstance(record, VideoFrame) for record in records):
                await self._until_taken()
            for fragment in self._encoder.encode_into(self._memory, records, time.monotonic_ns, self._tray):
                size = len(fragment)
                await self._send_message(
                    wire.TICKET.pack(size) if size > wire.MAX_FRAGMENT else fragment, size
                )

    async def _send_message(self, message: memoryview | bytes, size: int) -> None:
        self._unsent = message, size
        while True:
            try:
                self._socket.send(message)
                break
            except BlockingIOError:
                self.waits += 1
                await _until_ready(self._socket.fileno(), writable=True)
        self._unsent = None
        self.fragments += 1
        self.bytes += size

    async def _until_taken(self) -> None:
        """Until the valve has taken everything, and with it what lies in the tray."""
        if not untaken(self._socket):
            return
        self.waits += 1
        with takes(self._socket) as events:
            while untaken(self._socket):
                await _until_ready(events.fileno(), writable=False)
                if any(event & select.EPOLLHUP for _, event in events.poll(0)):
                    raise BrokenPipeError("the link is shut")


@dataclass(frozen=True, slots=True)
class _Unfinished:
    """A fragment that stays on the link: what is to be waited for, and its records behind that."""

    waiting: Awaitable[None]
    rest: list[Arrival]


class ValveInlet:
    """The sink's end. Implements `link.Inlet`."""

    def __init__(self, sock: socket.socket, decoder: wire.Decoder, tray: memoryview | None = None) -> None:
        """`tray`: to read from, where the link has trays."""
        sock.setblocking(False)
        self._socket = sock
        self._tray = tray
        self.decoder = decoder
        self._heard = time.monotonic()
        self._delivering = False
        """Whether a delivery is waited for: until it is over nothing is read, and nothing can be heard."""
        self._log_again_at = 0.0
        self._taken = bytearray(1)
        self._hangup = select.poll()
        self._hangup.register(sock, select.POLLRDHUP)

    def __repr__(self) -> str:
        return f"<ValveInlet {self.decoder} silent={self.silent}>"

    @property
    def epoch(self) -> int:
        """See `link.Inlet.epoch`."""
        return self.decoder.epoch

    @property
    def silent(self) -> bool:
        """Whether nothing at all came for `SILENCE_SECONDS` while this end was listening."""
        return not self._delivering and time.monotonic() - self._heard > SILENCE_SECONDS

    async def pump(self, deliver: Deliver) -> None:
        """See `link.Inlet.pump`."""
        loop = asyncio.get_running_loop()
        while True:
            turn: asyncio.Future[_Unfinished | None] = loop.create_future()
            loop.add_reader(self._socket.fileno(), self._readable, deliver, turn)
            try:
                unfinished = await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    _drop(turn.result())
                raise
            finally:
                loop.remove_reader(self._socket.fileno())
            if unfinished is None:
                return
            self._delivering = True
            try:
                await unfinished.waiting
                for arrival in unfinished.rest:
                    further = deliver(arrival)
                    if further is not None:
                        await further
            finally:
                self._delivering = False
                self._heard = time.monotonic()
            self._socket.recv_into(self._taken)

    def _readable(self, deliver: Deliver, turn: asyncio.Future[_Unfinished | None]) -> None:
        """Take what is there, as far as nobody has to wait; `turn` ends there, or with None where A ended."""
        try:
            for _ in range(FRAGMENTS_PER_TURN):
                if turn.done() or self._receive(deliver, turn):
                    return
        except BlockingIOError:
            return
        except Exception as error:  # noqa: BLE001 - handed to whoever pumps
            turn.set_exception(error)

    def _receive(self, deliver: Deliver, turn: asyncio.Future[_Unfinished | None]) -> bool:
        """Deliver one fragment's records, and take it off the link. Whether that was enough for one turn."""
        buffer = self.decoder.room()
        size = self._socket.recv_into(buffer, 0, socket.MSG_PEEK)
        if size == 0 and self._hangup.poll(0):
            turn.set_result(None)
            return True
        fragment, own = buffer[:size], False
        if self._tray is not None and size == wire.TICKET.size:
            fragment, own = self.decoder.taken_out(self._tray, fragment), True
        now = time.monotonic_ns()
        self._heard = now / 1e9
        try:
            arrivals = self.decoder.decode(fragment, now, own=own)
        except WireError as error:
            self._tell(error)
            arrivals = []
        for number, arrival in enumerate(arrivals, 1):
            waiting = deliver(arrival)
            if waiting is not None:
                turn.set_result(_Unfinished(waiting, arrivals[number:]))
                return True
        self._socket.recv_into(self._taken)
        return own

    def _tell(self, error: WireError) -> None:
        if self._heard >= self._log_again_at:
            self._log_again_at = self._heard + REFUSAL_LOG_SECONDS
            # Its words, since the error's own frames hold the memory of a record of 25 MB.
            log.warning("fragment refused: %s; refused so far: %s", str(error), self.decoder.counters.refused)


def _drop(unfinished: _Unfinished | None) -> None:
    """Nobody will wait any more; the fragment comes again."""
    if unfinished is not None and asyncio.iscoroutine(unfinished.waiting):
        unfinished.waiting.close()


async def _until_ready(fd: int, *, writable: bool) -> None:
    """Until something can be written to `fd`, or else read from it."""
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()

    def wake() -> None:
        if not ready.done():
            ready.set_result(None)

    add, remove = (loop.add_writer, loop.remove_writer) if writable else (loop.add_reader, loop.remove_reader)
    add(fd, wake)
    try:
        await ready
    finally:
        remove(fd)
