"""PDUs: their reader, and the short ones as they are written (PS3.8 §9.3).

    ┌ type u8 │ 00 │ length u32 │ body … ┐
    P-DATA-TF body:  ┬ PDV: length u32 │ context id u8 │ control u8 │ fragment … ┬ PDV … ┬

The reader takes a stream in pieces of any size. As soon as a header is there it asks its `judge` what is to
become of the PDU, which knows the state and the limits, so a length of 4 GiB costs six bytes. A PDU to be
read whole, and a header cut in two, are kept until they are whole (at most `MAX_ASSOCIATE_BYTES`); fragments
of data never are: they leave as views of what `receive` was given, in batches.

Never here: I/O, states, what a message means.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass
from enum import Enum, auto
from struct import Struct

from dicom.negotiation import Rejection
from dicom.pdata import COMMAND, LAST, P_DATA, PDV_OVERHEAD

_HEADER = Struct(">BxL")
_PDV = Struct(">LBB")
_SHORT = Struct(">BxLxBBB")


class PduType:
    """The first octet of a PDU."""

    ASSOCIATE_RQ = 1
    ASSOCIATE_AC = 2
    ASSOCIATE_RJ = 3
    DATA = P_DATA
    RELEASE_RQ = 5
    RELEASE_RP = 6
    ABORT = 7


class AbortReason(Enum):
    """The reason of an A-ABORT by the provider (PS3.8 Table 9-26)."""

    NOT_SPECIFIED = 0
    UNRECOGNISED_PDU = 1
    UNEXPECTED_PDU = 2
    UNRECOGNISED_PARAMETER = 4
    UNEXPECTED_PARAMETER = 5
    INVALID_PARAMETER = 6


class PduError(Exception):
    """The peer sent what is no PDU, or not one we take. `association.py` turns it into an A-ABORT."""

    def __init__(self, reason: AbortReason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


RELEASE_RQ = _SHORT.pack(PduType.RELEASE_RQ, 4, 0, 0, 0)
RELEASE_RP = _SHORT.pack(PduType.RELEASE_RP, 4, 0, 0, 0)


def abort_pdu(source: int, reason: AbortReason) -> bytes:
    """An A-ABORT (PS3.8 §9.3.8). `source` is 0 for the user, 2 for the provider."""
    return _SHORT.pack(PduType.ABORT, 4, 0, source, reason.value)


def reject_pdu(rejection: Rejection) -> bytes:
    """An A-ASSOCIATE-RJ (PS3.8 §9.3.4)."""
    return _SHORT.pack(PduType.ASSOCIATE_RJ, 4, *rejection.value)


class Treatment(Enum):
    """What becomes of a PDU whose header was read."""

    WHOLE = auto()
    """Its body is collected: a `Pdu` when it is whole."""
    DATA = auto()
    """A P-DATA-TF: `Fragments` as they come."""
    SKIP = auto()
    """A `Pdu` without body at once; the body is passed over as it comes."""


@dataclass(frozen=True, slots=True)
class Pdu:
    """Any PDU but a P-DATA-TF that was let in."""

    kind: int
    body: bytes = b""


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


class PduReader:
    """Cuts a stream into PDUs. `contexts` are the presentation context ids that fragments may come in."""

    def __init__(self, judge: Callable[[int, int], Treatment]) -> None:
        self._judge = judge
        self.contexts: Container[int] = ()
        self.begun = 0
        """PDUs of which anything was read."""
        self._view = memoryview(b"")
        self._position = 0
        self._kept = bytearray()
        self._kind = 0
        self._treatment = Treatment.WHOLE
        self._pdu_left = 0
        self._pdv_left = -1
        self._context_id = 0
        self._control = 0
        self._parts: list[memoryview] = []
        self._deaf = False

    @property
    def unread(self) -> bool:
        """Whether bytes that were received are not used up."""
        return self._position < len(self._view)

    @property
    def within_pdu(self) -> bool:
        """Whether a PDU was begun and is not whole."""
        return bool(self._kept or self._pdu_left)

    def receive(self, data: memoryview) -> None:
        """Take bytes; what was received before must be used up."""
        self._view = data
        self._position = 0

    def hold(self) -> None:
        """Keep a copy of what is not used up, so that the buffer given to `receive` may be reused."""
        self._view = memoryview(bytes(self._view[self._position :]))
        self._position = 0

    def stop(self) -> None:
        """Pass over everything from now on."""
        self._deaf = True
        self._parts = []
        self._pdv_left = -1

    def next(self) -> Pdu | Fragments | None:
        """What comes next; None when the bytes are used up.

        Raises:
            PduError: The stream cannot be read on; call `stop`.
        """
        view = self._view
        end = len(view)
        while self._position < end or self._pdv_left == 0:
            if self._deaf:
                self._position = end
                return None
            found: Pdu | Fragments | None
            if self._pdu_left == 0:
                # What was collected comes before whatever else the next PDU brings.
                if self._parts and view[self._position] != P_DATA:
                    return self._collected(last=False)
                found = self._begin_pdu()
            elif self._treatment is Treatment.SKIP:
                self._pdu_left -= self._advance(self._pdu_left)
                continue
            elif self._treatment is Treatment.WHOLE:
                found = self._whole()
            elif self._pdv_left < 0:
                found = self._begin_pdv()
            else:
                found = self._fragment()
            if found is not None:
                return found
        return self._collected(last=False) if self._parts else None

    def _advance(self, most: int) -> int:
        step = min(most, len(self._view) - self._position)
        self._position += step
        return step

    def _take(self, size: int) -> bytes | None:
        """The next `size` bytes, across calls of `receive`; None while there are fewer."""
        start = self._position
        if not self._kept and len(self._view) - start >= size:
            self._position = start + size
            return bytes(self._view[start : start + size])
        self._advance(size - len(self._kept))
        self._kept += self._view[start : self._position]
        if len(self._kept) < size:
            return None
        taken = bytes(self._kept)
        self._kept = bytearray()
        return taken

    def _begin_pdu(self) -> Pdu | None:
        self.begun += not self._kept
        header = self._take(_HEADER.size)
        if header is None:
            return None
        self._kind, length = _HEADER.unpack(header)
        self._treatment = self._judge(self._kind, length)
        self._pdu_left = length
        return Pdu(self._kind) if self._treatment is Treatment.SKIP else None

    def _whole(self) -> Pdu | None:
        body = self._take(self._pdu_left)
        if body is None:
            return None
        self._pdu_left = 0
        return Pdu(self._kind, body)

    def _begin_pdv(self) -> Fragments | None:
        """Read a PDV's header. What was collected before comes out where it is of something else."""
        if self._pdu_left < PDV_OVERHEAD:
            raise PduError(AbortReason.INVALID_PARAMETER, "a PDV's header does not fit its PDU")
        header = self._take(PDV_OVERHEAD)
        if header is None:
            return None
        length, context_id, control = _PDV.unpack(header)
        self._pdu_left -= PDV_OVERHEAD
        if length < 2 or length - 2 > self._pdu_left:
            raise PduError(AbortReason.INVALID_PARAMETER, f"a PDV of {length} bytes does not fit its PDU")
        if context_id not in self.contexts:
            raise PduError(
                AbortReason.INVALID_PARAMETER, f"presentation context {context_id} was not accepted"
            )
        before = None
        if self._parts and (context_id != self._context_id or (control ^ self._control) & COMMAND):
            before = self._collected(last=False)
        self._context_id, self._control, self._pdv_left = context_id, control, length - 2
        # An empty fragment may be the last of all: no further byte would bring it out.
        return self._fragment() if before is None and self._pdv_left == 0 else before

    def _fragment(self) -> Fragments | None:
        """Collect what is there of a fragment; all that was collected where it ends a message's part."""
        start = self._position
        if step := self._advance(self._pdv_left):
            self._parts.append(self._view[start : self._position])
            self._pdu_left -= step
            self._pdv_left -= step
        if self._pdv_left:
            return None
        self._pdv_left = -1
        return self._collected(last=True) if self._control & LAST else None

    def _collected(self, *, last: bool) -> Fragments:
        parts, self._parts = self._parts, []
        return Fragments(self._context_id, bool(self._control & COMMAND), last, parts)
