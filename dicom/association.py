"""The DICOM upper layer as a value machine: bytes in, events out; commands in, bytes out (PS3.8 §9.2, §9.3).

    receive(bytes, now)          ─▶ ┌─────────────┐ ─▶ next_event(): Requested, Fragments, Aborted, …
    accept() release() abort() … ─▶ │ Association │ ─▶ take_output(): PDUs to send
    expired(now)                 ─▶ └─────────────┘ ─▶ deadline(); over: the connection is to be closed

Which action follows an event in a state, and which state follows an action, is looked up in pynetdicom's
tables, so conformance to PS3.8 Table 9-10 stays pynetdicom's; only what an action does is here (`_ACTIONS`).
One difference is meant: where the standard sends an A-ABORT for every PDU that comes too late (AA-7), ours
sends it once, since a peer that reads nothing and sends on would make us queue without bound.

A PDU's length is judged when its header is there and in the state we are in, so a length of 4 GiB costs six
bytes. Control PDUs and headers cut in two are kept (at most `MAX_ASSOCIATE_BYTES`); fragments of data never
are: they leave as views of what `receive` was given, in batches. Time is injected: `deadline` says when
`expired` is to be called, and a PDU that was begun must be complete in time, whatever state it belongs to.

Never here: sockets, clocks, what a message means.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from struct import Struct
from typing import TypeAlias

from pynetdicom.fsm import ACTIONS as STANDARD_ACTIONS
from pynetdicom.fsm import TRANSITION_TABLE
from pynetdicom.presentation import PresentationContext

from dicom.negotiation import (
    MAX_ASSOCIATE_BYTES,
    MIN_ASSOCIATE_BYTES,
    Agreement,
    AssociateError,
    AssociateRequest,
    Rejection,
    decode_accept,
    decode_request,
    unsupported,
)
from dicom.pdata import COMMAND, LAST, PDV_OVERHEAD

PDU_SLACK = 12
"""Bytes by which a P-DATA-TF may exceed our maximum length: some senders do not count its own headers."""

_HEADER = Struct(">BxL")
_PDV = Struct(">LBB")
_CONTROL = Struct(">BxLxBBB")
_RELEASE = Struct(">BxL4x")

RELEASE_RQ = _RELEASE.pack(5, 4)
RELEASE_RP = _RELEASE.pack(6, 4)

_P_DATA = 4
_PDU_EVENTS = {1: "Evt6", 2: "Evt3", 3: "Evt4", 4: "Evt10", 5: "Evt12", 6: "Evt13", 7: "Evt16"}
"""PDU type to event of PS3.8 Table 9-10."""

_LENGTHS: dict[int, tuple[int, int]] = {
    1: (MIN_ASSOCIATE_BYTES, MAX_ASSOCIATE_BYTES),
    2: (MIN_ASSOCIATE_BYTES, MAX_ASSOCIATE_BYTES),
    3: (4, 4),
    5: (4, 4),
    6: (4, 4),
    7: (4, 4),
}
"""Least and most bytes after the header, by PDU type. P-DATA-TF: see `Limits.max_pdu`."""

_READ_WHOLE = frozenset({"AE-3", "AE-4", "AE-6", "AA-2", "AA-3"})
"""Actions that need the PDU's body. For all others the header says enough and the body is passed over."""


class AbortReason(Enum):
    """The reason of an A-ABORT from the provider (PS3.8 Table 9-26)."""

    NOT_SPECIFIED = 0
    UNRECOGNISED_PDU = 1
    UNEXPECTED_PDU = 2
    UNRECOGNISED_PARAMETER = 4
    UNEXPECTED_PARAMETER = 5
    INVALID_PARAMETER = 6


class LocalError(Exception):
    """We asked for what the state does not allow (PS3.8 Table 9-10 has no entry): our fault, not a peer's."""


class _Fault(Exception):
    """The peer sent what it may not. Never leaves this module."""

    def __init__(self, reason: AbortReason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bytes and seconds one association may take."""

    max_pdu: int = 256 * 1024
    """Bytes of the longest P-DATA-TF, as announced."""
    request_seconds: float = 10.0
    """From the connection to a whole A-ASSOCIATE-RQ (ARTIM), and from our own to its answer."""
    closing_seconds: float = 2.0
    """From our last PDU to the peer's closing the connection (ARTIM); then we close it."""
    release_seconds: float = 10.0
    """From our A-RELEASE-RQ to its answer."""
    pdu_seconds: float = 60.0
    """From a PDU's first byte to its last; 256 KiB then need 35 kbit/s."""
    idle_seconds: float = 300.0
    """Without a PDU in either direction."""


@dataclass(frozen=True, slots=True)
class Requested:
    """A-ASSOCIATE indication: answer with `accept` or `reject`."""

    request: AssociateRequest


@dataclass(frozen=True, slots=True)
class Accepted:
    """A-ASSOCIATE confirmation: the association is there."""

    agreement: Agreement


@dataclass(frozen=True, slots=True)
class Rejected:
    """A-ASSOCIATE confirmation: the peer refused (PS3.8 Table 9-21)."""

    result: int
    source: int
    reason: int


@dataclass(slots=True)
class Fragments:
    """P-DATA indication: consecutive fragments of one message.

    `parts` are views of what `receive` was given and valid only until it is given more. `last` says that
    the command, or the data set, is whole with them.
    """

    context_id: int
    is_command: bool
    last: bool
    parts: list[memoryview]


@dataclass(frozen=True, slots=True)
class ReleaseRequested:
    """A-RELEASE indication: answer with `release_response`."""


@dataclass(frozen=True, slots=True)
class Released:
    """A-RELEASE confirmation: the association ended in order."""


@dataclass(frozen=True, slots=True)
class Aborted:
    """The association ended out of order: by the peer, by us, or because the connection was lost."""

    by_peer: bool
    source: int
    reason: int
    detail: str


Event: TypeAlias = Requested | Accepted | Rejected | Fragments | ReleaseRequested | Released | Aborted


def abort_pdu(source: int, reason: int) -> bytes:
    """An A-ABORT (PS3.8 §9.3.8). `source` is 0 for the user, 2 for the provider."""
    return _CONTROL.pack(7, 4, 0, source, reason)


def reject_pdu(rejection: Rejection) -> bytes:
    """An A-ASSOCIATE-RJ (PS3.8 §9.3.4)."""
    return _CONTROL.pack(3, 4, *rejection.value)


class Association:
    """One side of one association. Make it with `acceptor` or `requestor`."""

    def __init__(self, limits: Limits, now: float) -> None:
        self.limits = limits
        self.state = "Sta1"
        self.agreement: Agreement | None = None
        self._is_requestor = False
        self._proposal: list[PresentationContext] = []
        self._request_pdu = b""
        self._events: deque[Event] = deque()
        self._output: list[bytes] = []
        # What the current action is about.
        self._body = b""
        self._pdu = b""
        self._reason = AbortReason.NOT_SPECIFIED
        self._source = 0
        self._detail = ""
        # The reader: where we are in the stream.
        self._view = memoryview(b"")
        self._position = 0
        self._carry = bytearray()
        self._kind = 0
        self._pdu_left = 0
        self._skip = False
        self._deaf = False
        self._pdv_left = -1
        self._context_id = 0
        self._control = 0
        self._parts: list[memoryview] = []
        # Time.
        self._now = now
        self._artim: float | None = None
        self._active = now
        self._pdus = 0
        self._pdus_seen = -1
        self._pdu_since: float | None = None

    @classmethod
    def acceptor(cls, limits: Limits, now: float) -> Association:
        """The side that was connected to."""
        self = cls(limits, now)
        self._step("Evt5")
        return self

    @classmethod
    def requestor(
        cls, limits: Limits, request_pdu: bytes, proposal: list[PresentationContext], now: float
    ) -> Association:
        """The side that has connected: the connection is open, `request_pdu` is the first output."""
        self = cls(limits, now)
        self._is_requestor = True
        self._proposal = proposal
        self._request_pdu = request_pdu
        self._step("Evt1")
        self._step("Evt2")
        return self

    def __repr__(self) -> str:
        role = "requestor" if self._is_requestor else "acceptor"
        return f"<Association {role} {self.state}>"

    @property
    def established(self) -> bool:
        """Whether data may be sent."""
        return self.state == "Sta6"

    @property
    def ended(self) -> bool:
        """Whether there is no association any more, nor will be."""
        return self.state in ("Sta1", "Sta13")

    @property
    def unread(self) -> bool:
        """Whether bytes that were received are not used up."""
        return self._position < len(self._view)

    @property
    def over(self) -> bool:
        """Whether the connection is to be closed, or is closed."""
        return self.state == "Sta1"

    # ---- bytes in ----------------------------------------------------------------------------------------

    def receive(self, data: memoryview, now: float) -> None:
        """Take bytes from the peer; then call `next_event` until it returns None.

        Raises:
            LocalError: Bytes given before are not used up.
        """
        if self.unread:
            raise LocalError("receive() before the last bytes were used up")
        self._view = data
        self._position = 0
        self._now = self._active = now

    def hold(self) -> None:
        """Keep a copy of what is not used up, so that the buffer given to `receive` may be reused."""
        self._view = memoryview(bytes(self._view[self._position :]))
        self._position = 0

    def next_event(self) -> Event | None:
        """The next event, or None when more bytes are needed. Nothing a peer sends raises."""
        while not self._events:
            try:
                event = self._read()
            except _Fault as fault:
                self._deaf = True
                self._parts = []
                self._reason, self._detail = fault.reason, str(fault)
                self._step("Evt19")
                continue
            if event is None:
                self._mark_progress()
            return event
        return self._events.popleft()

    def _read(self) -> Event | None:
        """Read on until there is an event; None when the bytes are used up."""
        view = self._view
        end = len(view)
        while self._position < end:
            if self._deaf:
                self._position = end
            elif self._pdu_left == 0:
                # What was collected comes before whatever else the next PDU brings.
                if self._parts and view[self._position] != _P_DATA and not self._carry:
                    return self._collected(last=False)
                self._begin_pdu()
            elif self._skip:
                step = min(self._pdu_left, end - self._position)
                self._position += step
                self._pdu_left -= step
            elif self._kind != _P_DATA:
                self._control_pdu()
            elif self._pdv_left < 0:
                if (event := self._begin_pdv()) is not None:
                    return event
            else:
                step = min(self._pdv_left, end - self._position)
                self._parts.append(view[self._position : self._position + step])
                self._position += step
                self._pdu_left -= step
                self._pdv_left -= step
                if self._pdv_left == 0 and (event := self._end_pdv()) is not None:
                    return event
            if self._events:
                return self._events.popleft()
        return self._collected(last=False) if self._parts else None

    def _take(self, size: int) -> bytes | None:
        """The next `size` bytes, across calls of `receive`; None while there are fewer."""
        start = self._position
        if not self._carry and len(self._view) - start >= size:
            self._position = start + size
            return bytes(self._view[start : start + size])
        self._position = min(start + size - len(self._carry), len(self._view))
        self._carry += self._view[start : self._position]
        if len(self._carry) < size:
            return None
        taken = bytes(self._carry)
        self._carry = bytearray()
        return taken

    def _begin_pdu(self) -> None:
        header = self._take(_HEADER.size)
        if header is None:
            return
        self._pdus += 1
        kind, length = _HEADER.unpack(header)
        event = _PDU_EVENTS.get(kind)
        if event is None:
            raise _Fault(AbortReason.UNRECOGNISED_PDU, f"a PDU of unknown type 0x{kind:02X}")
        action = TRANSITION_TABLE.get((event, self.state))
        self._kind, self._pdu_left, self._skip = kind, length, False
        if kind == _P_DATA and action in ("DT-2", "AR-6"):
            if not PDV_OVERHEAD <= length <= self.limits.max_pdu + PDU_SLACK:
                raise _Fault(AbortReason.INVALID_PARAMETER, f"a P-DATA-TF of {length} bytes")
            return
        if kind != _P_DATA:
            least, most = _LENGTHS[kind]
            if not least <= length <= most:
                raise _Fault(AbortReason.INVALID_PARAMETER, f"a PDU of type {kind} with {length} bytes")
            if action in _READ_WHOLE or most == 4:
                return
        # Too early or too late: the state says what that means, and the body says nothing more.
        self._skip = True
        self._unexpected(kind)
        self._step(event)

    def _unexpected(self, kind: int) -> None:
        self._reason = AbortReason.UNEXPECTED_PDU
        self._detail = f"a PDU of type {kind} came in {self.state}"

    def _control_pdu(self) -> None:
        body = self._take(self._pdu_left)
        if body is None:
            return
        self._pdu_left = 0
        self._body = body
        self._unexpected(self._kind)
        self._step(_PDU_EVENTS[self._kind])

    def _begin_pdv(self) -> Fragments | None:
        """Read a PDV's header; the fragments before it, where they belong to something else."""
        if self._pdu_left < PDV_OVERHEAD:
            raise _Fault(AbortReason.INVALID_PARAMETER, "a PDV's header does not fit its PDU")
        header = self._take(PDV_OVERHEAD)
        if header is None:
            return None
        length, context_id, control = _PDV.unpack(header)
        self._pdu_left -= PDV_OVERHEAD
        if length < 2 or length - 2 > self._pdu_left:
            raise _Fault(AbortReason.INVALID_PARAMETER, f"a PDV of {length} bytes in a PDU with less")
        if self.agreement is None or context_id not in self.agreement.contexts:
            raise _Fault(AbortReason.INVALID_PARAMETER, f"presentation context {context_id} is not accepted")
        before = None
        if self._parts and (context_id != self._context_id or (control ^ self._control) & COMMAND):
            before = self._collected(last=False)
        self._context_id, self._control, self._pdv_left = context_id, control, length - 2
        if self._pdv_left == 0:
            # An empty fragment may end the buffer: it must be seen without another byte.
            after = self._end_pdv()
            if before is None:
                return after
            if after is not None:
                self._events.append(after)
        return before

    def _end_pdv(self) -> Fragments | None:
        self._pdv_left = -1
        return self._collected(last=True) if self._control & LAST else None

    def _collected(self, *, last: bool) -> Fragments:
        parts, self._parts = self._parts, []
        return Fragments(self._context_id, bool(self._control & COMMAND), last, parts)

    def connection_lost(self, now: float) -> None:
        """The peer closed the connection, or it broke. `next_event` says what that ended."""
        self._now = now
        self._deaf = True
        if self.state != "Sta1":
            self._step("Evt17")

    # ---- commands ----------------------------------------------------------------------------------------

    def accept(self, pdu: bytes, agreement: Agreement, now: float) -> None:
        """Answer `Requested` with the A-ASSOCIATE-AC `pdu`, which says what `agreement` holds."""
        self._now, self._pdu = now, pdu
        self._step("Evt7")
        self.agreement = agreement

    def reject(self, rejection: Rejection, now: float) -> None:
        """Answer `Requested` with an A-ASSOCIATE-RJ."""
        self._now, self._pdu = now, reject_pdu(rejection)
        self._step("Evt8")

    def sending(self, now: float) -> None:
        """Say that P-DATA-TF PDUs are being written (they pass by this machine).

        Raises:
            LocalError: The state does not allow it.
        """
        self._step("Evt9")
        self._now = self._active = now

    def release(self, now: float) -> None:
        """Ask for the association's release."""
        self._now = now
        self._step("Evt11")

    def release_response(self, now: float) -> None:
        """Answer `ReleaseRequested`."""
        self._now = now
        self._step("Evt14")

    def abort(
        self,
        detail: str,
        now: float,
        *,
        source: int = 0,
        reason: AbortReason = AbortReason.NOT_SPECIFIED,
    ) -> None:
        """Abort; `next_event` confirms it. `source` is 0 for the association's user, 2 for this layer."""
        self._now = now
        self._deaf = True
        self._parts = []
        self._source, self._reason, self._detail = source, reason, detail
        if self.state in ("Sta1", "Sta2", "Sta13"):
            # No association that could be aborted (PS3.8 Table 9-10): only the connection is left to end.
            self.state = "Sta1"
            self._end(Aborted(False, source, reason.value, detail))
        else:
            self._step("Evt15")

    def take_output(self) -> list[bytes]:
        """The control PDUs to send now, in order, before any P-DATA-TF written later."""
        output, self._output = self._output, []
        return output

    # ---- time --------------------------------------------------------------------------------------------

    def _mark_progress(self) -> None:
        """After the bytes are used up: note since when a PDU has been incomplete."""
        if not (self._carry or self._pdu_left):
            self._pdu_since = None
        elif self._pdu_since is None or self._pdus != self._pdus_seen:
            self._pdu_since = self._now
        self._pdus_seen = self._pdus

    def resumed(self, now: float) -> None:
        """We did not read for a while of our own accord: that time is not the peer's."""
        self._active = now
        if self._pdu_since is not None:
            self._pdu_since = now

    def deadline(self) -> float | None:
        """When to call `expired`. It may move later without notice; None when nothing is waited for."""
        if self._artim is not None:
            return self._artim
        if self.state != "Sta6":
            return None
        idle = self._active + self.limits.idle_seconds
        if self._pdu_since is None:
            return idle
        return min(idle, self._pdu_since + self.limits.pdu_seconds)

    def expired(self, now: float) -> None:
        """Act on a deadline that has passed; does nothing before it. `next_event` says what it ended."""
        due = self.deadline()
        if due is None or now < due:
            return
        self._now = now
        self._deaf = True
        if self.state in ("Sta2", "Sta13"):
            if self.state == "Sta2":
                self._events.append(Aborted(False, 0, 0, "no whole A-ASSOCIATE-RQ came in time"))
            self._step("Evt18")
        elif self.state == "Sta5":
            self.abort("the association request was not answered in time", now)
        elif self.state != "Sta6":
            self.abort("the release was not answered in time", now)
        elif self._pdu_since is not None and now >= self._pdu_since + self.limits.pdu_seconds:
            self.abort("a PDU was begun and not completed in time", now, source=2)
        else:
            self.abort("nothing came for too long", now)

    # ---- PS3.8 §9.2 --------------------------------------------------------------------------------------

    def _step(self, event: str) -> None:
        """Do what pynetdicom's table says for `event` in this state."""
        action = TRANSITION_TABLE.get((event, self.state))
        if action is None:
            raise LocalError(f"{event} is not allowed in {self.state}")
        if action in ("DT-1", "AR-7"):
            return
        following = STANDARD_ACTIONS[action][2]
        choice = _ACTIONS[action](self)
        self.state = following if isinstance(following, str) else following[choice]

    def _start_timer(self, seconds: float) -> None:
        self._artim = self._now + seconds

    def _send(self, pdu: bytes) -> None:
        self._output.append(pdu)

    def _end(self, event: Event) -> None:
        self._artim = None
        self._deaf = True
        self._events.append(event)

    def _ae_1(self) -> int:
        return 0

    def _ae_2(self) -> int:
        self._send(self._request_pdu)
        self._start_timer(self.limits.request_seconds)
        return 0

    def _ae_3(self) -> int:
        self._artim = None
        try:
            self.agreement = decode_accept(self._body, self._proposal)
        except AssociateError as error:
            raise _Fault(AbortReason(error.code), str(error)) from None
        self._events.append(Accepted(self.agreement))
        return 0

    def _ae_4(self) -> int:
        self._end(Rejected(*self._body[1:4]))
        return 0

    def _ae_5(self) -> int:
        self._start_timer(self.limits.request_seconds)
        return 0

    def _ae_6(self) -> int:
        try:
            request = decode_request(self._body)
        except AssociateError as error:
            raise _Fault(AbortReason(error.code), str(error)) from None
        self._artim = None
        rejection = unsupported(request)
        if rejection is None:
            self._events.append(Requested(request))
            return 0
        self._send(reject_pdu(rejection))
        self._start_timer(self.limits.closing_seconds)
        return 1

    def _ae_7(self) -> int:
        self._send(self._pdu)
        self._active = self._now
        return 0

    def _answer_and_close(self) -> int:
        self._send(self._pdu)
        self._start_timer(self.limits.closing_seconds)
        return 0

    def _ar_1(self) -> int:
        self._send(RELEASE_RQ)
        self._start_timer(self.limits.release_seconds)
        return 0

    def _ar_2(self) -> int:
        self._events.append(ReleaseRequested())
        return 0

    def _ar_3(self) -> int:
        self._end(Released())
        return 0

    def _ar_4(self) -> int:
        self._send(RELEASE_RP)
        self._start_timer(self.limits.closing_seconds)
        return 0

    def _ar_8(self) -> int:
        self._events.append(ReleaseRequested())
        return 0 if self._is_requestor else 1

    def _ar_9(self) -> int:
        self._send(RELEASE_RP)
        self._start_timer(self.limits.release_seconds)
        return 0

    def _ar_10(self) -> int:
        self._events.append(Released())
        return 0

    def _aa_1(self) -> int:
        # A fault before there is an association also comes here, and the standard has the user abort it.
        reason = self._reason.value if self._source == 2 else 0
        self._send(abort_pdu(self._source, reason))
        self._deaf = True
        self._events.append(Aborted(False, self._source, reason, self._detail))
        self._start_timer(self.limits.closing_seconds)
        return 0

    def _close(self) -> int:
        self._artim = None
        self._deaf = True
        return 0

    def _aa_3(self) -> int:
        source, reason = self._body[2:4]
        self._end(Aborted(True, source, reason, "the peer aborted"))
        return 0

    def _aa_4(self) -> int:
        self._end(Aborted(True, 2, 0, "the connection was lost"))
        return 0

    def _ignore(self) -> int:
        return 0

    def _aa_7(self) -> int:
        self._send(abort_pdu(2, self._reason.value))
        self._deaf = True
        return 0

    def _aa_8(self) -> int:
        self._send(abort_pdu(2, self._reason.value))
        self._deaf = True
        self._events.append(Aborted(False, 2, self._reason.value, self._detail))
        self._start_timer(self.limits.closing_seconds)
        return 0


_ACTIONS: dict[str, Callable[[Association], int]] = {
    "AE-1": Association._ae_1,
    "AE-2": Association._ae_2,
    "AE-3": Association._ae_3,
    "AE-4": Association._ae_4,
    "AE-5": Association._ae_5,
    "AE-6": Association._ae_6,
    "AE-7": Association._ae_7,
    "AE-8": Association._answer_and_close,
    "AR-1": Association._ar_1,
    "AR-2": Association._ar_2,
    "AR-3": Association._ar_3,
    "AR-4": Association._ar_4,
    "AR-5": Association._close,
    "AR-8": Association._ar_8,
    "AR-9": Association._ar_9,
    "AR-10": Association._ar_10,
    "AA-1": Association._aa_1,
    "AA-2": Association._close,
    "AA-3": Association._aa_3,
    "AA-4": Association._aa_4,
    "AA-5": Association._close,
    "AA-6": Association._ignore,
    "AA-7": Association._aa_7,
    "AA-8": Association._aa_8,
}
"""What each action does; returns which of two following states it chose, where there are two. DT-1, DT-2,
AR-6 and AR-7 (data out, data in) have no entry: data goes by `sending` and `Fragments`."""
