"""A-ASSOCIATE: what a peer proposes and what is answered (PS3.8 §9.3.2 to §9.3.4, PS3.7 Annex D).

    RQ/AC ┌ version u16 │ 00 00 │ called 16 │ calling 16 │ 32 × 00 ┬ item ┬ item ┬ …
    item  ┌ type u8 │ 00 │ length u16 │ value: sub-items of the same shape, or a UID, or numbers

Requests and answers are read into values by a walker with a limit on everything, since they come before
anybody is known: one of 128 contexts with 30 transfer syntaxes each takes about 5 ms, where building
pynetdicom's objects for all of it takes 150. Which contexts are accepted and in which role is decided by
pynetdicom (`negotiate_as_acceptor`, `negotiate_as_requestor`), whose classes also encode what is sent.

Never here: I/O, states, who may associate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from struct import Struct
from typing import Any

from pynetdicom.pdu import A_ASSOCIATE_AC, A_ASSOCIATE_RQ
from pynetdicom.pdu_primitives import (
    A_ASSOCIATE,
    AsynchronousOperationsWindowNegotiation,
    ImplementationClassUIDNotification,
    ImplementationVersionNameNotification,
    MaximumLengthNotification,
)
from pynetdicom.presentation import PresentationContext, negotiate_as_acceptor, negotiate_as_requestor

from dicom.part10 import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME
from dicom.pdata import MIN_PDU_LENGTH
from relay.errors import PeerError
from relay.records import is_uid

APPLICATION_CONTEXT = "1.2.840.10008.3.1.1.1"
VERIFICATION = "1.2.840.10008.1.1"
IMPLICIT_LITTLE = "1.2.840.10008.1.2"

MAX_ASSOCIATE_BYTES = 256 * 1024
"""Bytes of an A-ASSOCIATE-RQ or -AC: twice what 128 contexts with 30 transfer syntaxes each take."""

MIN_ASSOCIATE_BYTES = 68
"""Bytes of the fixed fields."""

MAX_CONTEXTS = 128
"""Presentation contexts: the odd numbers of an octet (PS3.8 §9.3.2.2)."""

MAX_TRANSFER_SYNTAXES = 128
"""Of one context. The standard has defined about 60 in all."""

MAX_USER_ITEMS = 1024
"""Sub-items of the user information: a role and two extended negotiations for each class, and some more."""

MAX_VERSION_NAME_CHARS = 16
"""PS3.7 §D.3.3.2.4."""

_FIXED = Struct(">HH16s16s")
_ITEM = Struct(">BxH")
_PAIR = Struct(">HH")
_LENGTH = Struct(">L")

Acceptable = Callable[[str], bool]


TRANSIENT: int = 2
"""The result of an A-ASSOCIATE-RJ that may be different another time."""


class Rejection(Enum):
    """Why an association is refused: result, source, reason (PS3.8 Table 9-21)."""

    NO_REASON = (1, 1, 1)
    APPLICATION_CONTEXT = (1, 1, 2)
    CALLING_AE_TITLE = (1, 1, 3)
    CALLED_AE_TITLE = (1, 1, 7)
    PROTOCOL_VERSION = (1, 2, 2)
    BUSY = (2, 3, 1)
    """Temporary congestion: we are about to stop."""
    FULL = (2, 3, 2)
    """Local limit exceeded: associations, or room in the spool."""

    @property
    def transient(self) -> bool:
        """Whether the peer is invited to try again."""
        return bool(self.value[0] == TRANSIENT)


REJECTION_TEXTS: dict[tuple[int, int], str] = {
    (1, 1): "no reason given",
    (1, 2): "it does not support the application context",
    (1, 3): "it does not know our AE title",
    (1, 7): "it does not go by the AE title we called it",
    (2, 1): "no reason given",
    (2, 2): "it does not support our protocol version",
    (3, 1): "temporary congestion",
    (3, 2): "its limit of associations is reached",
}
"""What a peer's source and reason mean, seen from the one it rejects."""


class AssociateError(PeerError):
    """An A-ASSOCIATE PDU is malformed. `code` is the A-ABORT reason (PS3.8 §9.3.8)."""

    def __init__(self, detail: str, code: int = 6) -> None:
        super().__init__("associate", detail)
        self.code = code


@dataclass(frozen=True, slots=True)
class ProposedContext:
    """A presentation context as proposed. Its abstract syntax may be anything."""

    id: int
    abstract_syntax: str
    transfer_syntaxes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class AssociateRequest:
    """An A-ASSOCIATE-RQ as read."""

    version: int
    calling_ae_title: str
    called_ae_title: str
    application_context: str
    contexts: tuple[ProposedContext, ...]
    max_length: int
    """Bytes of the longest P-DATA-TF the peer takes; 0 for any."""
    implementation_class: str = ""
    implementation_version: str = ""
    roles: Mapping[str, tuple[bool, bool]] = field(default_factory=dict)
    """SOP class to the roles proposed for the requestor: SCU, SCP."""
    operations: tuple[int, int] | None = None
    """Asynchronous operations proposed: invoked, performed."""
    titles: bytes = b""
    """The fixed fields from the called title on, as an answer repeats them (PS3.8 Table 9-17)."""


@dataclass(frozen=True, slots=True)
class AcceptedContext:
    """A presentation context that was agreed upon."""

    id: int
    abstract_syntax: str
    transfer_syntax: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """What both sides agreed upon, seen from ours."""

    contexts: Mapping[int, AcceptedContext]
    refused: Mapping[tuple[str, str], int]
    """Where we proposed: the result (PS3.8 Table 9-18) of each refused context, by its two syntaxes."""
    max_length: int
    """Bytes of the longest P-DATA-TF that the peer takes; 0 for any."""
    window: int
    """Operations that the requestor may have outstanding; 0 for any number."""
    implementation_class: str = ""
    implementation_version: str = ""


@dataclass(slots=True)
class _UserInformation:
    max_length: int = 0
    implementation_class: str = ""
    implementation_version: str = ""
    roles: dict[str, tuple[bool, bool]] = field(default_factory=dict)
    operations: tuple[int, int] | None = None


# ---- reading -----------------------------------------------------------------------------------------------


def _items(data: bytes, position: int, end: int, limit: int) -> Iterator[tuple[int, int, int]]:
    """Type, start and end of the value of each item."""
    count = 0
    while position < end:
        if position + 4 > end:
            raise AssociateError("an item is cut short")
        kind, length = _ITEM.unpack_from(data, position)
        position += 4
        if length > end - position:
            raise AssociateError("an item is longer than what holds it")
        count += 1
        if count > limit:
            raise AssociateError(f"more than {limit} items in one place")
        yield kind, position, position + length
        position += length


def _text(data: bytes) -> str:
    """Text as people may be shown it: printable ASCII, without padding."""
    text = data.strip(b"\0 ").decode("ascii", "replace")
    return "".join(each if " " <= each <= "~" else "?" for each in text)


def _context(data: bytes, start: int, end: int) -> ProposedContext:
    if end - start < 4:
        raise AssociateError("a presentation context is cut short")
    abstract, syntaxes = "", []
    for kind, first, last in _items(data, start + 4, end, MAX_TRANSFER_SYNTAXES + 1):
        if kind == 0x40:
            syntaxes.append(data[first:last].rstrip(b"\0 ").decode("ascii", "replace"))
        elif kind == 0x30:
            abstract = data[first:last].rstrip(b"\0 ").decode("ascii", "replace")
    return ProposedContext(data[start], abstract, tuple(syntaxes))


def _user_information(data: bytes, start: int, end: int) -> _UserInformation:
    """PS3.7 §D.3.3. Items that are not used here (extended negotiation, user identity) or not known are
    passed over; the standard lets an acceptor leave them unanswered."""
    found = _UserInformation()
    for kind, first, last in _items(data, start, end, MAX_USER_ITEMS):
        size = last - first
        if kind == 0x51:
            if size != 4:
                raise AssociateError("the maximum length is not of four bytes")
            found.max_length = _LENGTH.unpack_from(data, first)[0]
            if 0 < found.max_length < MIN_PDU_LENGTH:
                raise AssociateError(f"a maximum length below {MIN_PDU_LENGTH} bytes carries nothing")
        elif kind == 0x52:
            found.implementation_class = _text(data[first : min(last, first + 65)])[:64]
        elif kind == 0x53:
            if size != 4:
                raise AssociateError("the asynchronous operations window is not of four bytes")
            found.operations = _PAIR.unpack_from(data, first)
        elif kind == 0x54:
            if size < 4 or (length := int.from_bytes(data[first : first + 2], "big")) != size - 4:
                raise AssociateError("a role selection is not as long as it says")
            uid = data[first + 2 : first + 2 + length].rstrip(b"\0 ").decode("ascii", "replace")
            found.roles[uid] = (data[last - 2] == 1, data[last - 1] == 1)
        elif kind == 0x55:
            found.implementation_version = _text(data[first : min(last, first + MAX_VERSION_NAME_CHARS)])
    return found


def decode_request(body: bytes) -> AssociateRequest:
    """Read an A-ASSOCIATE-RQ without its six bytes of PDU header.

    Raises:
        AssociateError: It is malformed.
    """
    version, _, called, calling = _FIXED.unpack_from(body)
    contexts: dict[int, ProposedContext] = {}
    application = ""
    user = _UserInformation()
    for kind, start, end in _items(body, MIN_ASSOCIATE_BYTES, len(body), MAX_CONTEXTS + MAX_USER_ITEMS):
        if kind == 0x20:
            context = _context(body, start, end)
            if context.id % 2 == 0 or context.id in contexts:
                raise AssociateError("a presentation context id is even or comes twice")
            contexts[context.id] = context
        elif kind == 0x10:
            application = _text(body[start:end])
        elif kind == 0x50:
            user = _user_information(body, start, end)
    return AssociateRequest(
        version=version,
        calling_ae_title=_text(calling),
        called_ae_title=_text(called),
        application_context=application,
        contexts=tuple(contexts.values()),
        max_length=user.max_length,
        implementation_class=user.implementation_class,
        implementation_version=user.implementation_version,
        roles=user.roles,
        operations=user.operations,
        titles=body[4:MIN_ASSOCIATE_BYTES],
    )


def unsupported(request: AssociateRequest) -> Rejection | None:
    """What the upper layer itself refuses, whoever asks (PS3.8 §9.2.2, AE-6; PS3.7 §A.2.1)."""
    # Only bit 0 is to be tested: it stands for version 1 (PS3.8 Table 9-11).
    if not request.version & 1:
        return Rejection.PROTOCOL_VERSION
    if request.application_context != APPLICATION_CONTEXT:
        return Rejection.APPLICATION_CONTEXT
    return None


# ---- answering ---------------------------------------------------------------------------------------------


def _presentation_context(context_id: int, abstract_syntax: str, transfer_syntax: str) -> PresentationContext:
    context = PresentationContext()
    context.context_id = context_id
    context.abstract_syntax = abstract_syntax
    context.add_transfer_syntax(transfer_syntax)
    return context


def _refused_context(proposed: ProposedContext, result: int) -> PresentationContext:
    """A result for a context; its transfer syntax is not significant but must be there (PS3.8 §9.3.3.2)."""
    context = PresentationContext()
    context.context_id = proposed.id
    context.add_transfer_syntax(IMPLICIT_LITTLE)
    context.result = result
    return context


def _negotiate(
    proposed: ProposedContext, roles: Mapping[str, tuple[bool, bool]], storage: Acceptable, syntax: Acceptable
) -> tuple[PresentationContext, list[Any]]:
    """One context's result and the role selections that answer it.

    The first transfer syntax of the peer's list that is acceptable is taken: it is the one the peer likes
    best, and data passes unchanged.
    """
    abstract = proposed.abstract_syntax
    if not (is_uid(abstract) and (abstract == VERIFICATION or storage(abstract))):
        return _refused_context(proposed, 3), []
    chosen = next((uid for uid in proposed.transfer_syntaxes if is_uid(uid) and syntax(uid)), None)
    if chosen is None:
        return _refused_context(proposed, 4), []
    ours = _presentation_context(1, abstract, chosen)
    # We serve, and never ask: the requestor may be SCU and not SCP.
    ours.scu_role, ours.scp_role = True, False
    theirs = _presentation_context(proposed.id, abstract, chosen)
    asked: Any = roles
    [result], answers = negotiate_as_acceptor([theirs], [ours], asked)
    return result, answers


def _user_items(max_length: int, window: int | None) -> list[Any]:
    """The user information that we send: length, who we are, and the operations window where given."""
    length = MaximumLengthNotification()
    length.maximum_length_received = max_length
    implementation = ImplementationClassUIDNotification()
    implementation.implementation_class_uid = IMPLEMENTATION_CLASS_UID
    version = ImplementationVersionNameNotification()
    version.implementation_version_name = IMPLEMENTATION_VERSION_NAME
    items: list[Any] = [length, implementation, version]
    if window is not None:
        operations = AsynchronousOperationsWindowNegotiation()
        operations.maximum_number_operations_invoked = window
        operations.maximum_number_operations_performed = 1
        items.append(operations)
    return items


def accept(
    request: AssociateRequest, storage: Acceptable, syntax: Acceptable, max_length: int
) -> tuple[bytes, Agreement]:
    """The A-ASSOCIATE-AC for `request`, whole, and what it agrees upon.

    Args:
        request: What the peer proposed.
        storage: Which abstract syntaxes are taken, beside Verification.
        syntax: Which transfer syntaxes are taken.
        max_length: Bytes of the longest P-DATA-TF that we take.
    """
    results: list[PresentationContext] = []
    roles: dict[str, Any] = {}
    for proposed in request.contexts:
        result, answers = _negotiate(proposed, request.roles, storage, syntax)
        results.append(result)
        roles.update((str(answer.sop_class_uid), answer) for answer in answers)
    primitive = A_ASSOCIATE()
    primitive.application_context_name = APPLICATION_CONTEXT
    primitive.calling_ae_title = primitive.called_ae_title = "-"
    primitive.result, primitive.result_source = 0, 1
    primitive.presentation_context_definition_results_list = results
    # A window that was proposed and stays unanswered is taken for granted by some requestors.
    window = 1 if request.operations is not None else None
    primitive.user_information = [*_user_items(max_length, window), *roles.values()]
    pdu = A_ASSOCIATE_AC(primitive).encode()
    agreement = Agreement(
        contexts={
            proposed.id: AcceptedContext(
                proposed.id, proposed.abstract_syntax, str(result.transfer_syntax[0])
            )
            for proposed, result in zip(request.contexts, results, strict=True)
            if result.result == 0
        },
        refused={},
        max_length=request.max_length,
        window=1,
        implementation_class=request.implementation_class,
        implementation_version=request.implementation_version,
    )
    return pdu[:10] + request.titles + pdu[10 + len(request.titles) :], agreement


# ---- requesting --------------------------------------------------------------------------------------------


def propose(contexts: Sequence[tuple[str, str]]) -> list[PresentationContext]:
    """Contexts to propose, with ids, one for each abstract and transfer syntax."""
    if not 1 <= len(contexts) <= MAX_CONTEXTS:
        raise ValueError(f"{len(contexts)} presentation contexts; an association takes 1 to {MAX_CONTEXTS}")
    return [
        _presentation_context(2 * number + 1, abstract, transfer)
        for number, (abstract, transfer) in enumerate(contexts)
    ]


def request(
    calling_ae_title: str,
    called_ae_title: str,
    proposal: list[PresentationContext],
    max_length: int,
    operations: int = 1,
) -> bytes:
    """A whole A-ASSOCIATE-RQ. The operations window is proposed only above 1: some peers drop the
    connection when the item is there."""
    primitive = A_ASSOCIATE()
    primitive.application_context_name = APPLICATION_CONTEXT
    primitive.calling_ae_title = calling_ae_title
    primitive.called_ae_title = called_ae_title
    primitive.presentation_context_definition_list = proposal
    primitive.user_information = _user_items(max_length, operations if operations > 1 else None)
    return bytes(A_ASSOCIATE_RQ(primitive).encode())


def decode_accept(body: bytes, proposal: list[PresentationContext]) -> Agreement:
    """Read an A-ASSOCIATE-AC without its six bytes of PDU header, as the answer to `proposal`.

    Raises:
        AssociateError: It is malformed.
    """
    answered: dict[int, PresentationContext] = {}
    user = _UserInformation()
    offered = {int(context.context_id or 0): str(context.transfer_syntax[0]) for context in proposal}
    for kind, start, end in _items(body, MIN_ASSOCIATE_BYTES, len(body), MAX_CONTEXTS + MAX_USER_ITEMS):
        if kind == 0x21:
            answer = _context(body, start, end)
            result = body[start + 2]
            if answer.id not in offered or answer.id in answered or result > 4:
                raise AssociateError("a presentation context is answered that was not asked, or twice")
            if result == 0 and answer.transfer_syntaxes != (offered[answer.id],):
                raise AssociateError("a presentation context is accepted with another transfer syntax")
            answered[answer.id] = _presentation_context(answer.id, "", offered[answer.id])
            answered[answer.id].result = result
        elif kind == 0x50:
            user = _user_information(body, start, end)
    accepted: dict[int, AcceptedContext] = {}
    refused: dict[tuple[str, str], int] = {}
    for context in negotiate_as_requestor(proposal, list(answered.values())):
        number = int(context.context_id or 0)
        abstract, transfer = str(context.abstract_syntax), str(offered[number])
        if context.result == 0:
            accepted[number] = AcceptedContext(number, abstract, transfer)
        else:
            refused[abstract, transfer] = int(context.result or 0)
    return Agreement(
        contexts=accepted,
        refused=refused,
        max_length=user.max_length,
        window=user.operations[0] if user.operations else 1,
        implementation_class=user.implementation_class,
        implementation_version=user.implementation_version,
    )
