"""The DICOM upper layer as a value machine: bytes in, events out; commands in, bytes out (PS3.8 §9.2).

    receive(bytes, now)          ─▶ ┌─────────────┐ ─▶ next_event(): Requested, Fragments, Aborted, …
    accept() release() abort() … ─▶ │ Association │ ─▶ take_output(): PDUs to send
    expired(now)                 ─▶ └─────────────┘ ─▶ deadline(); over: the connection is to be closed

Which action follows an event in a state, and which state follows an action, is looked up in pynetdicom's
tables, so conformance to PS3.8 Table 9-10 stays pynetdicom's; only what an action does is here (`_ACTIONS`).
One difference is meant: where the standard sends an A-ABORT for every PDU that comes too late (AA-7), ours
sends it once, since a peer that reads nothing and sends on would make us queue without bound.

Time is injected: `deadline` says when `expired` is to be called. A PDU that was begun must be whole in time,
whatever the state, so half a PDU never holds a place.

Never here: sockets, clocks, how PDUs are cut from a stream (pdu.py), what a message means.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from pynetdicom.fsm import ACTIONS as STANDARD_ACTIONS
from pynetdicom.fsm import TRANSITION_TABLE
from pynetdicom.presentation import PresentationContext

from dicom.associate import (
    MAX_ASSOCIATE_BYTES,
    MIN_ASSOCIATE_BYTES,
    AssociateError,
    decode_accept,
    decode_request,
)
from dicom.events import Aborted, Accepted, Event, Rejected, Released, ReleaseRequested, Requested
from dicom.negotiation import Agreement, Rejection, agree, unsupported
from dicom.pdata import PDV_OVERHEAD
from dicom.pdu import (
    RELEASE_RP,
    RELEASE_RQ,
    AbortReason,
    Fragments,
    Pdu,
    PduError,
    PduReader,
    PduType,
    Treatment,
    abort_pdu,
    reject_pdu,
)

PDU_SLACK = 12
"""Bytes by which a P-DATA-TF may exceed our maximum length: some senders do not count its own headers."""

_PDU_EVENTS = {
    PduType.ASSOCIATE_RQ: "Evt6",
    PduType.ASSOCIATE_AC: "Evt3",
    PduType.ASSOCIATE_RJ: "Evt4",
    PduType.DATA: "Evt10",
    PduType.RELEASE_RQ: "Evt12",
    PduType.RELEASE_RP: "Evt13",
    PduType.ABORT: "Evt16",
}
"""PDU type to event of PS3.8 Table 9-10."""

_LENGTHS: dict[int, tuple[int, int]] = {
    PduType.ASSOCIATE_RQ: (MIN_ASSOCIATE_BYTES, MAX_ASSOCIATE_BYTES),
    PduType.ASSOCIATE_AC: (MIN_ASSOCIATE_BYTES, MAX_ASSOCIATE_BYTES),
    PduType.ASSOCIATE_RJ: (4, 4),
    PduType.RELEASE_RQ: (4, 4),
    PduType.RELEASE_RP: (4, 4),
    PduType.ABORT: (4, 4),
}
"""Least and most bytes after the header. That of a P-DATA-TF is negotiated: `Limits.max_pdu`."""

_READ_WHOLE = frozenset({"AE-3", "AE-4", "AE-6", "AA-3"})
"""Actions that need the PDU's body; of all others the header says enough."""

_DATA_ACTIONS = frozenset({"DT-2", "AR-6"})
"""Actions that give data to the user."""


class LocalError(Exception):
    """We asked for what the state does not allow (PS3.8 Table 9-10 has no entry): our fault, not a peer's."""


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


class Association:
    """One side of one association. Make it with `acceptor` or `requestor`."""

    def __init__(self, limits: Limits, now: float) -> None:
        self.limits = limits
        self.state = "Sta1"
        self.agreement: Agreement | None = None
        self._is_requestor = False
        self._proposal: list[PresentationContext] = []
        self._events: deque[Event] = deque()
        self._output: list[bytes] = []
        self._reader = PduReader(self._judge)
        # What the next action is about.
        self._body = b""
        self._pdu = b""
        self._source = 0
        self._reason = AbortReason.NOT_SPECIFIED
        self._detail = ""
        # Time.
        self._now = now
        self._artim: float | None = None
        self._active = now
        self._pdus_seen = 0
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
        self._pdu = request_pdu
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
        return self._reader.unread

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
        if self._reader.unread:
            raise LocalError("receive() before the last bytes were used up")
        self._reader.receive(data)
        self._now = self._active = now

    def hold(self) -> None:
        """Keep a copy of what is not used up, so that the buffer given to `receive` may be reused."""
        self._reader.hold()

    def next_event(self) -> Event | None:
        """The next event, or None when more bytes are needed. Nothing that a peer sends raises."""
        while not self._events:
            try:
                found = self._reader.next()
                if isinstance(found, Fragments):
                    return found
                if found is None:
                    self._mark_progress()
                    return None
                self._take(found)
            except PduError as error:
                self._fault(error.reason, str(error))
            except AssociateError as error:
                self._fault(AbortReason.INVALID_PARAMETER, str(error))
        return self._events.popleft()

    def _judge(self, kind: int, length: int) -> Treatment:
        """What becomes of a PDU, by state and limits; `PduReader` asks when it has read the header."""
        event = _PDU_EVENTS.get(kind)
        if event is None:
            raise PduError(AbortReason.UNRECOGNISED_PDU, f"a PDU of unknown type 0x{kind:02X}")
        action = TRANSITION_TABLE.get((event, self.state))
        if kind == PduType.DATA:
            if action not in _DATA_ACTIONS:
                return Treatment.SKIP
            if not PDV_OVERHEAD <= length <= self.limits.max_pdu + PDU_SLACK:
                raise PduError(AbortReason.INVALID_PARAMETER, f"a P-DATA-TF of {length} bytes")
            return Treatment.DATA
        least, most = _LENGTHS[kind]
        if not least <= length <= most:
            raise PduError(AbortReason.INVALID_PARAMETER, f"a PDU of type {kind} with {length} bytes")
        return Treatment.WHOLE if action in _READ_WHOLE else Treatment.SKIP

    def _take(self, pdu: Pdu) -> None:
        self._body = pdu.body
        self._reason = AbortReason.UNEXPECTED_PDU
        self._detail = f"a PDU of type {pdu.kind} came in {self.state}"
        self._step(_PDU_EVENTS[pdu.kind])

    def _fault(self, reason: AbortReason, detail: str) -> None:
        """The peer sent an invalid PDU: what follows it in the stream means nothing."""
        self._reader.stop()
        self._reason, self._detail = reason, detail
        self._step("Evt19")

    def connection_lost(self, now: float) -> None:
        """The peer closed the connection, or it broke. `next_event` says what that ended."""
        self._now = now
        self._reader.stop()
        if self.state != "Sta1":
            self._step("Evt17")

    # ---- commands ----------------------------------------------------------------------------------------

    def accept(self, pdu: bytes, agreement: Agreement, now: float) -> None:
        """Answer `Requested` with the A-ASSOCIATE-AC `pdu`, which says what `agreement` holds."""
        self._now, self._pdu = now, pdu
        self._step("Evt7")
        self._agree(agreement)

    def _agree(self, agreement: Agreement) -> None:
        self.agreement = agreement
        self._reader.contexts = agreement.contexts

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
        """Abort; `next_event` confirms it, unless the association had ended: then only the connection does.

        `source` is 0 for the association's user, 2 for this layer.
        """
        self._now = now
        self._reader.stop()
        self._source, self._reason, self._detail = source, reason, detail
        if self.ended or self.state == "Sta2":
            # No association that could be aborted (PS3.8 Table 9-10): only the connection is left to end.
            self._close()
            if not self.ended:
                self._events.append(Aborted(source, reason.value, detail))
            self.state = "Sta1"
        else:
            self._step("Evt15")

    def take_output(self) -> list[bytes]:
        """The control PDUs to send now, in order, before any P-DATA-TF written later."""
        output, self._output = self._output, []
        return output

    # ---- time --------------------------------------------------------------------------------------------

    def _mark_progress(self) -> None:
        """After the bytes are used up: note since when a PDU has been incomplete."""
        if not self._reader.within_pdu:
            self._pdu_since = None
        elif self._pdu_since is None or self._reader.begun != self._pdus_seen:
            self._pdu_since = self._now
        self._pdus_seen = self._reader.begun

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
        self._reader.stop()
        if self.state in ("Sta2", "Sta13"):
            if self.state == "Sta2":
                self._events.append(Aborted(0, 0, "no whole A-ASSOCIATE-RQ came in time"))
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
        self._close()
        self._events.append(event)

    def _ae_1(self) -> int:
        return 0

    def _ae_2(self) -> int:
        self._send(self._pdu)
        self._start_timer(self.limits.request_seconds)
        return 0

    def _ae_3(self) -> int:
        self._artim = None
        agreement = agree(decode_accept(self._body), self._proposal)
        self._agree(agreement)
        self._events.append(Accepted(agreement))
        return 0

    def _ae_4(self) -> int:
        self._end(Rejected(*self._body[1:4]))
        return 0

    def _ae_5(self) -> int:
        self._start_timer(self.limits.request_seconds)
        return 0

    def _ae_6(self) -> int:
        request = decode_request(self._body)
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
        reason = self._reason if self._source == 2 else AbortReason.NOT_SPECIFIED
        self._send(abort_pdu(self._source, reason))
        self._reader.stop()
        self._events.append(Aborted(self._source, reason.value, self._detail))
        self._start_timer(self.limits.closing_seconds)
        return 0

    def _close(self) -> int:
        self._artim = None
        self._reader.stop()
        return 0

    def _aa_3(self) -> int:
        source, reason = self._body[2:4]
        self._end(Aborted(source, reason, "the peer aborted"))
        return 0

    def _aa_4(self) -> int:
        self._end(Aborted(2, 0, "the connection was lost"))
        return 0

    def _ignore(self) -> int:
        return 0

    def _aa_7(self) -> int:
        self._send(abort_pdu(2, self._reason))
        self._reader.stop()
        return 0

    def _aa_8(self) -> int:
        self._send(abort_pdu(2, self._reason))
        self._reader.stop()
        self._events.append(Aborted(2, self._reason.value, self._detail))
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
