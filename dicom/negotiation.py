"""What is agreed upon when an association begins (PS3.8 §7.1, PS3.7 Annex D).

Which contexts are accepted, and in which role, is decided by pynetdicom (`negotiate_as_acceptor`,
`negotiate_as_requestor`), whose classes also encode what is sent. Of a long list of transfer syntaxes it is
shown only the one we would take: the first of the peer's that is acceptable, so that data passes unchanged.

Never here: I/O, states, who may associate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
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

from dicom.associate import MAX_CONTEXTS, AssociateAnswer, AssociateError, AssociateRequest, ContextItem
from dicom.part10 import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME
from dicom.syntaxes import IMPLICIT_LITTLE
from relay.records import is_uid

APPLICATION_CONTEXT = "1.2.840.10008.3.1.1.1"
VERIFICATION = "1.2.840.10008.1.1"

Acceptable = Callable[[str], bool]


class Rejection(Enum):
    """Why an association is refused: result, source, reason (PS3.8 Table 9-21). Result 2 is transient."""

    APPLICATION_CONTEXT = (1, 1, 2)
    CALLING_AE_TITLE = (1, 1, 3)
    CALLED_AE_TITLE = (1, 1, 7)
    PROTOCOL_VERSION = (1, 2, 2)
    BUSY = (2, 3, 1)
    """Temporary congestion: we are about to stop."""
    FULL = (2, 3, 2)
    """Local limit exceeded: associations, or room in the spool."""


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


def _refused_context(proposed: ContextItem, result: int) -> PresentationContext:
    """A result for a context; its transfer syntax is not significant but must be there (PS3.8 §9.3.3.2)."""
    context = PresentationContext()
    context.context_id = proposed.id
    context.add_transfer_syntax(IMPLICIT_LITTLE)
    context.result = result
    return context


def _negotiate(
    proposed: ContextItem, roles: Mapping[str, tuple[bool, bool]], storage: Acceptable, syntax: Acceptable
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


def _user_items(max_length: int) -> list[Any]:
    """What we say of ourselves."""
    length = MaximumLengthNotification()
    length.maximum_length_received = max_length
    implementation = ImplementationClassUIDNotification()
    implementation.implementation_class_uid = IMPLEMENTATION_CLASS_UID
    version = ImplementationVersionNameNotification()
    version.implementation_version_name = IMPLEMENTATION_VERSION_NAME
    return [length, implementation, version]


def _one_operation() -> AsynchronousOperationsWindowNegotiation:
    window = AsynchronousOperationsWindowNegotiation()
    window.maximum_number_operations_invoked = 1
    window.maximum_number_operations_performed = 1
    return window


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
        result, answers = _negotiate(proposed, request.user.roles, storage, syntax)
        results.append(result)
        roles.update((str(answer.sop_class_uid), answer) for answer in answers)
    primitive = A_ASSOCIATE()
    primitive.application_context_name = APPLICATION_CONTEXT
    primitive.calling_ae_title = primitive.called_ae_title = "-"
    primitive.result, primitive.result_source = 0, 1
    primitive.presentation_context_definition_results_list = results
    primitive.user_information = [*_user_items(max_length), *roles.values()]
    if request.user.operations is not None:
        # A window that was proposed and stays unanswered is taken for granted by some requestors.
        primitive.user_information.append(_one_operation())
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
        max_length=request.user.max_length,
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
) -> bytes:
    """A whole A-ASSOCIATE-RQ. No operations window is proposed: some peers drop the connection then."""
    primitive = A_ASSOCIATE()
    primitive.application_context_name = APPLICATION_CONTEXT
    primitive.calling_ae_title = calling_ae_title
    primitive.called_ae_title = called_ae_title
    primitive.presentation_context_definition_list = proposal
    primitive.user_information = _user_items(max_length)
    return bytes(A_ASSOCIATE_RQ(primitive).encode())


def agree(answer: AssociateAnswer, proposal: list[PresentationContext]) -> Agreement:
    """What the peer's `answer` to `proposal` agrees upon.

    Raises:
        AssociateError: It answers what was not proposed.
    """
    offered = {int(context.context_id or 0): str(context.transfer_syntax[0]) for context in proposal}
    answered: list[PresentationContext] = []
    for item in answer.contexts.values():
        if item.id not in offered or item.result > 4:
            raise AssociateError("a presentation context is answered that was not proposed")
        if item.result == 0 and item.transfer_syntaxes != (offered[item.id],):
            raise AssociateError("a presentation context is accepted with another transfer syntax")
        context = _presentation_context(item.id, "", offered[item.id])
        context.result = item.result
        answered.append(context)
    accepted: dict[int, AcceptedContext] = {}
    refused: dict[tuple[str, str], int] = {}
    for context in negotiate_as_requestor(proposal, answered):
        number = int(context.context_id or 0)
        abstract, transfer = str(context.abstract_syntax), offered[number]
        if context.result == 0:
            accepted[number] = AcceptedContext(number, abstract, transfer)
        else:
            refused[abstract, transfer] = int(context.result or 0)
    return Agreement(contexts=accepted, refused=refused, max_length=answer.user.max_length)
