"""One accepted connection on the event loop: socket ⇄ association ⇄ messages ⇄ storage handler.

    bytes ─▶ Association ─▶ MessageReader ─▶ C-ECHO: answered at once
                                          ─▶ C-STORE: begin, write …, finish ─▶ answered when finish() is done

All connections of a server are read into its one buffer. While an answer is awaited, or the peer does not
take our answers, nothing more is read: what came already (one buffer at most) is held, and TCP tells the
peer. So pipelined requests queue at the sender.

Never here: decisions about who may in (scp.py) or what is stored (storage.py).
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from typing import TYPE_CHECKING, cast

from dicom import dimse, negotiation, pdata
from dicom.associate import AssociateRequest
from dicom.association import Association
from dicom.dimse import Command, CommandField, Status
from dicom.events import Aborted, Event, ReleaseRequested, Requested
from dicom.messages import MessageError, MessageReader
from dicom.negotiation import VERIFICATION, AcceptedContext
from dicom.pdu import Fragments
from dicom.policy import plain_address
from dicom.storage import Peer, Store, StoreFailed, StoreRequest

if TYPE_CHECKING:
    from dicom.scp import Server

MAX_UNSENT_BYTES = 64 * 1024
"""Answers that a peer has not taken; above it no further request of its is read. An answer has about 250."""

EVENTS_PER_TURN = 64
"""Events of one connection acted on before others get their turn: a read may hold thousands of echoes."""

log = logging.getLogger(__name__)

_clock = time.monotonic


class _Ours:
    """Around the handler's code: what it raises, but for `StoreFailed`, is our fault and ends the server."""

    def __init__(self, server: Server) -> None:
        self._server = server

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, where: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, StoreFailed):
            self._server.fault(error)


class Acceptor(asyncio.BufferedProtocol):
    """The protocol of one connection. Its methods are called by the loop and by the server."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._ours = _Ours(server)
        self._association = Association.acceptor(server.limits, _clock())
        self._messages = MessageReader()
        self._transport: asyncio.Transport
        self._options: socket.socket | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timer_due = 0.0
        self.address = ""
        self._peer: Peer | None = None
        self._max_length = pdata.MIN_PDU_LENGTH
        # The message under way.
        self._command: Command | None = None
        self._store: Store | None = None
        self._status: int = Status.SUCCESS
        self._finishing: asyncio.Task[None] | None = None
        # Why nothing is read.
        self._blocked = False
        self._paused = False
        self._lost = False

    def __repr__(self) -> str:
        return f"<Acceptor {self._peer or self.address} {self._association.state}>"

    @property
    def over(self) -> bool:
        """Whether the connection is closed, or is about to be without further ado."""
        return self._association.over

    # ---- the loop's calls --------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        peername = transport.get_extra_info("peername")
        if peername is None:
            # It closed before it was accepted.
            self._transport.abort()
            return
        self.address = plain_address(peername[0])
        self._transport.set_write_buffer_limits(MAX_UNSENT_BYTES)
        # The loop's own socket object makes a new one for each option, and QUICKACK is set after each read.
        self._options = socket.socket(fileno=os.dup(transport.get_extra_info("socket").fileno()))
        self._options.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._options.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        self._options.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._server.arrived(self)
        self._arm()

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._server.buffer

    def buffer_updated(self, nbytes: int) -> None:
        if self._options is not None:
            # A sender with Nagle's algorithm holds the end of its message until the rest is acknowledged.
            self._options.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        self._association.receive(self._server.buffer[:nbytes], _clock())
        self._work()

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, error: Exception | None) -> None:
        self._lost = True
        if self._timer is not None:
            self._timer.cancel()
        if self._options is not None:
            self._options.close()
        self._association.connection_lost(_clock())
        try:
            self._work()
        finally:
            self._server.lost(self)

    def pause_writing(self) -> None:
        self._blocked = True

    def resume_writing(self) -> None:
        self._blocked = False
        self._resume()

    # ---- the server's calls ------------------------------------------------------------------------------

    def drain(self) -> None:
        """End the association now, or once the message under way is answered."""
        if self._finishing is None and self._messages.between_messages:
            self.end("the server stops")

    def end(self, why: str) -> None:
        """Abort the association; without one, close the connection."""
        self._association.abort(why, _clock())
        self._work()

    # ---- events ------------------------------------------------------------------------------------------

    def _work(self) -> None:
        """Act on what was received, as far as we may go on, then on what that leads to."""
        association = self._association
        turn = 0
        while not (self._finishing or self._blocked or turn == EVENTS_PER_TURN) or association.ended:
            event = association.next_event()
            if event is None:
                break
            self._act(event)
            turn += 1
        else:
            self._pause()
            if turn == EVENTS_PER_TURN:
                asyncio.get_running_loop().call_soon(self._resume)
        output = association.take_output()
        if output and not self._lost:
            self._transport.write(b"".join(output))
            if association.ended:
                self._end_of_output()
        if association.ended:
            if self._finishing is None:
                self._server.ended(self)
            if self._paused and not self._lost:
                # The peer's last bytes are read and dropped, or the close would destroy our answer.
                self._paused = False
                self._transport.resume_reading()
        if self._lost:
            return
        if association.over:
            self._transport.abort()
        else:
            self._arm()

    def _end_of_output(self) -> None:
        """It was our last PDU. A peer that waits for the connection's end need not wait for our timer."""
        if self._transport.can_write_eof():
            try:
                self._transport.write_eof()
            except OSError as error:
                log.debug("%s was gone before we said the end: %s", self.address, error)

    def _pause(self) -> None:
        """What came already waits here, the rest at the sender."""
        if self._association.unread and not self._paused:
            self._association.hold()
            self._paused = True
            self._transport.pause_reading()

    def _resume(self) -> None:
        """Go on with what waited."""
        self._association.resumed(_clock())
        self._work()
        if self._paused and not self._association.unread and not self._lost:
            self._paused = False
            self._transport.resume_reading()

    def _act(self, event: Event) -> None:
        if isinstance(event, Fragments):
            self._fragments(event)
        elif isinstance(event, Requested):
            self._requested(event.request)
        elif isinstance(event, ReleaseRequested):
            self._abandon()
            self._server.released += 1
            log.info("%s released", self._peer)
            self._association.release_response(_clock())
        elif isinstance(event, Aborted):
            self._abandon()
            if self._peer is not None:
                self._server.aborted += 1
            log.warning("%s: association aborted: %s", self._peer or self.address, event.detail)

    def _requested(self, request: AssociateRequest) -> None:
        server = self._server
        rejection = server.decide(self.address, request)
        peer = Peer(
            address=self.address,
            calling_ae_title=request.calling_ae_title,
            called_ae_title=request.called_ae_title,
            number=server.accepted + 1,
        )
        if rejection is None:
            with self._ours:
                rejection = server.handler.admit(peer)
        if rejection is not None:
            name = rejection.name.lower().replace("_", "-")
            server.rejected[name] += 1
            log.warning(
                "%r at %s, calling %r: association rejected: %s",
                request.calling_ae_title,
                self.address,
                request.called_ae_title,
                name,
            )
            self._association.reject(rejection, _clock())
            return
        acceptable = server.acceptable
        pdu, agreement = negotiation.accept(
            request, acceptable.abstract_syntax, acceptable.transfer_syntax, server.limits.max_pdu
        )
        self._peer = peer
        self._max_length = pdata.effective_length(request.user.max_length)
        self._association.accept(pdu, agreement, _clock())
        server.established(self)
        log.info("%s accepted with %d of %d contexts", peer, len(agreement.contexts), len(request.contexts))

    def _fragments(self, fragments: Fragments) -> None:
        try:
            message = self._messages.receive(fragments)
        except MessageError as error:
            self._association.abort(str(error), _clock(), source=error.source, reason=error.code)
            return
        if isinstance(message, Command):
            self._requested_operation(message)
        elif message is not None:
            self._data(message)

    # ---- messages ----------------------------------------------------------------------------------------

    def _requested_operation(self, command: Command) -> None:
        if command.field == CommandField.C_CANCEL_RQ and not command.has_data_set:
            # Nothing that we do can be cancelled; a C-CANCEL is never answered (PS3.7 §9.3.2.3).
            return
        if command.is_response:
            self._association.abort("a response to what was never asked", _clock())
            return
        assert self._association.agreement is not None
        context = self._association.agreement.contexts[self._messages.context_id]
        self._command = command
        self._status = self._begin(command, context)
        if not command.has_data_set:
            self._respond(self._status)

    def _begin(self, command: Command, context: AcceptedContext) -> int:
        """Begin what `command` asks for; the status to answer with, as far as it is known."""
        verifying = context.abstract_syntax == VERIFICATION
        if command.field == CommandField.C_ECHO_RQ and verifying:
            return Status.SUCCESS
        if command.field != CommandField.C_STORE_RQ or verifying:
            return Status.UNRECOGNISED_OPERATION
        if not command.has_data_set:
            return Status.CANNOT_UNDERSTAND
        assert self._peer is not None
        request = StoreRequest(
            peer=self._peer,
            abstract_syntax=context.abstract_syntax,
            transfer_syntax=context.transfer_syntax,
            sop_class=command.sop_class,
            sop_instance=command.sop_instance,
        )
        with self._ours:
            begun = self._server.handler.begin(request)
        if isinstance(begun, int):
            return begun
        self._store = begun
        return Status.SUCCESS

    def _data(self, fragments: Fragments) -> None:
        store = self._store
        if store is not None and fragments.parts:
            try:
                with self._ours:
                    store.write(fragments.parts)
            except StoreFailed as failure:
                self._status = failure.status
                self._abandon()
                store = None
        if not fragments.last:
            return
        if store is None:
            self._respond(self._status)
            return
        self._store = None
        self._finishing = asyncio.get_running_loop().create_task(self._finish(store))

    async def _finish(self, store: Store) -> None:
        """Wait until the object is in custody, or refused, and answer in that very turn of the loop."""
        try:
            with self._ours:
                status = await store.finish()
        finally:
            self._finishing = None
        if self._association.established:
            self._respond(status)
        self._resume()

    def _respond(self, status: int) -> None:
        """Answer the message under way."""
        assert self._command is not None
        now = _clock()
        self._association.sending(now)
        response = dimse.response(self._command, status)
        self._transport.write(pdata.command(self._messages.context_id, response, self._max_length))
        self._command = None
        if self._server.draining:
            self._association.abort("the server stops", now)

    def _abandon(self) -> None:
        """The data set under way will not be whole, or is refused."""
        if self._store is not None:
            store, self._store = self._store, None
            with self._ours:
                store.abandon()

    # ---- time --------------------------------------------------------------------------------------------

    def _arm(self) -> None:
        """See to it that `_expire` runs at the deadline. A deadline that moved later is looked at then."""
        due = self._association.deadline()
        if due is None or (self._timer is not None and self._timer_due <= due):
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_due = due
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(max(due - _clock(), 0.0), self._expire)

    def _expire(self) -> None:
        self._timer = None
        if self._finishing is not None and self._association.established:
            self._association.resumed(_clock())
        self._association.expired(_clock())
        self._work()
