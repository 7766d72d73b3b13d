"""The storage SCU's end of an association, on the event loop.

    associate() ─▶ Requestor ─▶ store(), store(), …, echo() ─▶ release() or abort()

One operation at a time. A command and the beginning of its data set leave in one system call, data PDUs are
read from the file between their headers, and no more than a batch is in memory whatever the object's size.
Every wait has a limit: for the association's answer, for the peer to take bytes, for its response.

Errors are `PeerError`s whose `reason` tells them apart: ``unreachable``, ``timeout``, ``rejected``,
``rejected-transient``, ``aborted``, ``protocol``.

Never here: what to send, and when to try again (delivery.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Sequence

from dicom import dimse, negotiation, pdata
from dicom.association import Association, Limits
from dicom.dimse import Command, CommandField
from dicom.events import Aborted, Accepted, Rejected, Released, ReleaseRequested
from dicom.messages import MessageError, MessageReader
from dicom.negotiation import VERIFICATION, Agreement
from dicom.pdata import DataBatch
from dicom.pdu import Fragments
from relay.errors import PeerError, os_reason
from relay.records import Buffer
from relay.spool_files import MAX_GATHER
from relay.spool_reading import Reading

BATCH_BYTES = 640 * 1024
"""Bytes of data set read and written at a time: what one association takes of memory. The commonest CT, 512 ×
512 words and a header, is one batch in PDUs of 1 to 128 KiB."""

RECEIVE_BYTES = 16 * 1024
"""Bytes read at a time: responses have about 250."""

OUR_MAX_PDU = 16 * 1024
"""Bytes of the longest P-DATA-TF we take: only responses come."""

RELEASE_SECONDS = 5.0
"""From our A-RELEASE-RQ to its answer; then the connection is closed all the same."""

Context = tuple[str, str]

_REFUSALS = {
    1: "rejected-by-user",
    2: "no-reason",
    3: "sop-class-not-accepted",
    4: "transfer-syntax-not-accepted",
}
"""Result of a presentation context (PS3.8 Table 9-18) as a fixed word."""

_REJECTIONS = {
    (1, 1): "no reason given",
    (1, 2): "the application context is not supported",
    (1, 3): "our AE title is not recognised there",
    (1, 7): "its AE title is not the one we call",
    (2, 1): "no reason given",
    (2, 2): "the protocol version is not supported",
    (3, 1): "it is congested",
    (3, 2): "it serves as many associations as it can",
}
"""Source and reason of a rejection (PS3.8 Table 9-21), for people."""

_clock = time.monotonic


async def associate(
    host: str,
    port: int,
    *,
    calling_ae_title: str,
    called_ae_title: str,
    contexts: Sequence[Context],
    association_seconds: float = 30.0,
    progress_seconds: float = 60.0,
) -> Requestor:
    """Open an association that proposes `contexts` (abstract and transfer syntax), each on its own.

    Args:
        association_seconds: For the connection and the answer together.
        progress_seconds: For the peer to take any bytes, and to respond once it has all of a message.

    Raises:
        PeerError: There is no association; the reason says whether it may come to one later.
    """
    loop = asyncio.get_running_loop()
    where = f"{called_ae_title} at {host}:{port}"
    sock: socket.socket | None = None
    try:
        async with asyncio.timeout(association_seconds):
            sock = await _connect(loop, host, port)
            requestor = Requestor(sock, where, progress_seconds)
            sock = None
            try:
                await requestor._negotiate(calling_ae_title, called_ae_title, contexts)
            except BaseException:
                requestor.abort()
                raise
            return requestor
    except TimeoutError:
        raise PeerError("timeout", f"{where} did not answer within {association_seconds:.0f} s") from None
    except OSError as error:
        raise PeerError("unreachable", f"{where} cannot be reached: {os_reason(error)}") from None
    finally:
        if sock is not None:
            sock.close()


async def _connect(loop: asyncio.AbstractEventLoop, host: str, port: int) -> socket.socket:
    """A connected TCP socket without Nagle's algorithm; the last error when no address answers."""
    failure: OSError = OSError(f"{host} has no address")
    for family, kind, protocol, _, address in await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        sock = socket.socket(family, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, protocol)
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            await loop.sock_connect(sock, address)
        except OSError as error:
            failure = error
            sock.close()
        except BaseException:
            sock.close()
            raise
        else:
            return sock
    raise failure


class Requestor:
    """An association that we asked for; made by `associate`."""

    def __init__(self, sock: socket.socket, where: str, progress_seconds: float) -> None:
        self._socket = sock
        self._where = where
        self._progress_seconds = progress_seconds
        self._association: Association
        self._agreement: Agreement
        self._limit: int
        """Bytes of the longest PDU to this peer."""
        self._proposed: frozenset[Context] = frozenset()
        self._ids: dict[Context, int] = {}
        self._messages = MessageReader()
        self._buffer = memoryview(bytearray(RECEIVE_BYTES))
        self._batch: DataBatch | None = None
        self._answer: asyncio.Future[Command | None] | None = None
        self._wake_writer = _nothing
        self._failure: PeerError | None = None
        self._message_id = 0
        self._closed = False

    def __repr__(self) -> str:
        return f"<Requestor {self._where} {'closed' if self._closed else self._association.state}>"

    @property
    def ended(self) -> bool:
        """Whether the association is over, by whoever's will."""
        return self._closed or not self._association.established

    def proposed(self, context: Context) -> bool:
        """Whether `context` was among those proposed."""
        return context in self._proposed

    def accepts(self, context: Context) -> bool:
        """Whether the peer accepted `context`."""
        return context in self._ids

    def refusal(self, context: Context) -> str:
        """Why a proposed `context` was not accepted, as a fixed word."""
        return _REFUSALS.get(self._agreement.refused.get(context, 2), "no-reason")

    async def store(
        self,
        *,
        sop_class: str,
        sop_instance: str,
        transfer_syntax: str,
        fd: int,
        offset: int,
        size: int,
        last: bool = True,
    ) -> int:
        """Send `size` bytes of data set from `offset` of the file `fd`; the C-STORE response's status.

        `last` says that nobody reads the file after us (`relay.spool_reading`).

        Raises:
            PeerError: The association is over; whether the peer has the object is not known.
            OSError: The file cannot be read; the association is aborted.
        """
        context_id = self._ids[sop_class, transfer_syntax]
        message_id = self._next_message_id()
        request = dimse.store_request(message_id, sop_class, sop_instance)
        command = pdata.command(context_id, request, self._limit)
        answer = self._expect()
        try:
            reading = Reading(fd, offset, last=last)
            await self._send_message(context_id, command, reading, size)
            response = await self._response(answer)
        except BaseException:
            self.abort()
            raise
        return self._status(response, CommandField.C_STORE_RSP, message_id)

    async def echo(self) -> int:
        """C-ECHO: the response's status. Verification must be among the accepted contexts."""
        context_id = next(id for (abstract, _), id in self._ids.items() if abstract == VERIFICATION)
        message_id = self._next_message_id()
        answer = self._expect()
        try:
            self._association.sending(_clock())
            command = pdata.command(context_id, dimse.echo_request(message_id, VERIFICATION), self._limit)
            await self._write([command])
            response = await self._response(answer)
        except BaseException:
            self.abort()
            raise
        return self._status(response, CommandField.C_ECHO_RSP, message_id)

    async def release(self) -> None:
        """End the association in order; never raises for what the peer does meanwhile."""
        if self.ended:
            self._close()
            return
        answer = self._expect()
        try:
            async with asyncio.timeout(RELEASE_SECONDS):
                self._association.release(_clock())
                await self._write(self._association.take_output())
                await answer
        except (PeerError, TimeoutError):
            # It is the end either way.
            self.abort()
        finally:
            self._close()

    def abort(self) -> None:
        """End the association now. The A-ABORT is sent as far as the socket takes it."""
        if self._closed:
            return
        if not self._association.over:
            self._association.abort("the association's user gives up", _clock())
            with contextlib.suppress(OSError):
                self._socket.send(b"".join(self._association.take_output()))
        self._close()

    # ---- inside ------------------------------------------------------------------------------------------

    async def _negotiate(self, calling: str, called: str, contexts: Sequence[Context]) -> None:
        proposal = negotiation.propose(contexts)
        request = negotiation.request(calling, called, proposal, OUR_MAX_PDU)
        limits = Limits(max_pdu=OUR_MAX_PDU)
        self._association = Association.requestor(limits, request, proposal, _clock())
        self._proposed = frozenset(contexts)
        answer = self._expect()
        asyncio.get_running_loop().add_reader(self._socket.fileno(), self._readable)
        await self._write(self._association.take_output())
        await answer
        self._limit = pdata.effective_length(self._agreement.max_length)
        self._ids = {
            (context.abstract_syntax, context.transfer_syntax): id
            for id, context in self._agreement.contexts.items()
        }

    def _next_message_id(self) -> int:
        self._message_id = self._message_id % 0xFFFF + 1
        return self._message_id

    def _expect(self) -> asyncio.Future[Command | None]:
        if self._failure is not None:
            raise self._failure
        self._answer = asyncio.get_running_loop().create_future()
        # A writer that fails at the same time raises what this would have said.
        self._answer.add_done_callback(lambda done: done.cancelled() or done.exception())
        return self._answer

    async def _response(self, answer: asyncio.Future[Command | None]) -> Command:
        try:
            async with asyncio.timeout(self._progress_seconds):
                response = await answer
        except TimeoutError:
            message = f"{self._where} did not respond within {self._progress_seconds:.0f} s"
            raise PeerError("timeout", message) from None
        if response is None:
            raise PeerError("protocol", f"{self._where} ended the association instead of responding")
        return response

    def _status(self, response: Command, expected: CommandField, message_id: int) -> int:
        if response.field != expected or response.message_id != message_id:
            self.abort()
            raise PeerError("protocol", f"{self._where} answered something that was not asked")
        return response.status

    async def _send_message(self, context_id: int, command: bytes, reading: Reading, size: int) -> None:
        """Write the command and the data set, a batch of PDUs at a time."""
        if self._batch is None:
            self._batch = DataBatch(self._limit, BATCH_BYTES, MAX_GATHER)
        batch = self._batch
        self._association.sending(_clock())
        out: list[Buffer] = [command]
        left = size
        while left:
            wanted = min(batch.capacity, left)
            count = reading.read_into(batch.gaps(wanted))
            if count < wanted:
                raise OSError(f"the file ends {left - count} bytes early")
            left -= count
            out.append(batch.pdus(context_id, count, last=not left))
            await self._write(out)
            out = []

    async def _write(self, buffers: Sequence[Buffer]) -> None:
        """Write all of `buffers`; when it returns they may be reused."""
        waiting = [memoryview(buffer) for buffer in buffers]
        first = 0
        while first < len(waiting):
            if self._failure is not None:
                raise self._failure
            try:
                count = self._socket.sendmsg(waiting[first : first + MAX_GATHER])
            except BlockingIOError:
                await self._writable()
                continue
            except OSError as error:
                message = f"{self._where} closed the connection: {os_reason(error)}"
                raise PeerError("aborted", message) from None
            while first < len(waiting) and count >= len(waiting[first]):
                count -= len(waiting[first])
                first += 1
            if count:
                waiting[first] = waiting[first][count:]

    async def _writable(self) -> None:
        loop = asyncio.get_running_loop()
        ready: asyncio.Future[None] = loop.create_future()

        def wake() -> None:
            if not ready.done():
                ready.set_result(None)

        loop.add_writer(self._socket.fileno(), wake)
        self._wake_writer = wake
        try:
            async with asyncio.timeout(self._progress_seconds):
                await ready
        except TimeoutError:
            message = f"{self._where} took no bytes for {self._progress_seconds:.0f} s"
            raise PeerError("timeout", message) from None
        finally:
            self._wake_writer = _nothing
            if not self._closed:
                loop.remove_writer(self._socket.fileno())

    def _readable(self) -> None:
        try:
            count = self._socket.recv_into(self._buffer)
        except BlockingIOError:
            return
        except OSError as error:
            self._fail(PeerError("aborted", f"{self._where} closed the connection: {os_reason(error)}"))
            self._close()
            return
        if count:
            # A responder with Nagle's algorithm waits for this acknowledgement before its next small write.
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
            self._association.receive(self._buffer[:count], _clock())
        else:
            self._association.connection_lost(_clock())
        while (event := self._association.next_event()) is not None:
            self._take(event)
        self._flush()

    def _take(self, event: object) -> None:
        match event:
            case Accepted(agreement=agreement):
                self._agreement = agreement
                self._answered(None)
            case Rejected(result=result, source=source, reason=reason):
                why = _REJECTIONS.get((source, reason), f"source {source}, reason {reason}")
                word = "rejected-transient" if result == 2 else "rejected"
                self._fail(PeerError(word, f"{self._where} rejected the association: {why}"))
            case Fragments():
                try:
                    message = self._messages.receive(event)
                except MessageError as error:
                    self._association.abort(str(error), _clock(), source=error.source, reason=error.code)
                    return
                if isinstance(message, Command):
                    self._answered(message)
            case ReleaseRequested():
                # An acceptor that wants to end; there is nothing of ours under way that it would answer.
                self._association.release_response(_clock())
                self._fail(PeerError("released", f"{self._where} asked to end the association"))
            case Released():
                self._answered(None)
            case Aborted(detail=detail):
                self._fail(PeerError("aborted", f"{self._where}: {detail}"))

    def _flush(self) -> None:
        output = b"".join(self._association.take_output())
        if output and not self._closed:
            # Control PDUs of some bytes on a connection that is about to end: what is not taken is not owed.
            with contextlib.suppress(OSError):
                self._socket.send(output)
        if self._association.over or self._failure is not None:
            self._close()

    def _answered(self, message: Command | None) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(message)
            self._answer = None

    def _fail(self, error: PeerError) -> None:
        if self._failure is None:
            self._failure = error
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error)
            self._answer = None

    def _close(self) -> None:
        if self._closed:
            return
        self._closed = True
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._socket.fileno())
        loop.remove_writer(self._socket.fileno())
        self._socket.close()
        self._fail(PeerError("closed", f"the association with {self._where} is over"))
        self._wake_writer()


def _nothing() -> None:
    """There is no writer to wake."""
