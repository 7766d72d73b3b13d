"""What tests say to the upper layer: PDUs encoded by pynetdicom or by hand, never by our own code."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

from pydicom.uid import UID
from pynetdicom.pdu import A_ASSOCIATE_AC, A_ASSOCIATE_RQ
from pynetdicom.pdu_primitives import (
    A_ASSOCIATE,
    AsynchronousOperationsWindowNegotiation,
    ImplementationClassUIDNotification,
    MaximumLengthNotification,
    SCP_SCU_RoleSelectionNegotiation,
    SOPClassExtendedNegotiation,
    UserIdentityNegotiation,
)
from pynetdicom.presentation import PresentationContext

VERIFICATION = "1.2.840.10008.1.1"
CT = "1.2.840.10008.5.1.4.1.1.2"
MR = "1.2.840.10008.5.1.4.1.1.4"
IMPLICIT = "1.2.840.10008.1.2"
EXPLICIT = "1.2.840.10008.1.2.1"
JPEG = "1.2.840.10008.1.2.4.50"
INSTANCE = "2.25.1234567890"

RELEASE_RQ = bytes.fromhex("0500 00000004 00000000")
RELEASE_RP = bytes.fromhex("0600 00000004 00000000")
ABORT = bytes.fromhex("0700 00000004 00000000")
REJECT = bytes.fromhex("0300 00000004 00010103")

Contexts = Sequence[tuple[str, Sequence[str]]]
BOTH: Contexts = ((VERIFICATION, (IMPLICIT,)), (CT, (EXPLICIT, IMPLICIT)))
"""Presentation contexts 1 and 3."""


def abort(source: int, reason: int) -> bytes:
    """An A-ABORT as PS3.8 §9.3.8 draws it."""
    return b"\x07\0\0\0\0\x04\0\0" + bytes((source, reason))


def rejection(result: int, source: int, reason: int) -> bytes:
    """An A-ASSOCIATE-RJ as PS3.8 §9.3.4 draws it."""
    return b"\x03\0\0\0\0\x04\0" + bytes((result, source, reason))


def operations(invoked: int, performed: int) -> AsynchronousOperationsWindowNegotiation:
    item = AsynchronousOperationsWindowNegotiation()
    item.maximum_number_operations_invoked = invoked
    item.maximum_number_operations_performed = performed
    return item


def role(sop_class: str, scu: bool, scp: bool) -> SCP_SCU_RoleSelectionNegotiation:
    item = SCP_SCU_RoleSelectionNegotiation()
    item.sop_class_uid = UID(sop_class)
    item.scu_role, item.scp_role = scu, scp
    return item


def identity(kind: int = 1, response: bool = True) -> UserIdentityNegotiation:
    item = UserIdentityNegotiation()
    item.user_identity_type = kind
    item.positive_response_requested = response
    item.primary_field = b"somebody"
    return item


def extended(sop_class: str) -> SOPClassExtendedNegotiation:
    item = SOPClassExtendedNegotiation()
    item.sop_class_uid = UID(sop_class)
    item.service_class_application_information = b"\x02\x00\x03\x00\x01\x00"
    return item


def _user_items(max_length: int, extra: Sequence[object]) -> list[Any]:
    length = MaximumLengthNotification()
    length.maximum_length_received = max_length
    implementation = ImplementationClassUIDNotification()
    implementation.implementation_class_uid = UID("1.2.3.4")
    return [length, implementation, *extra]


def _primitive(calling: str, called: str, max_length: int, extra: Sequence[object]) -> A_ASSOCIATE:
    primitive = A_ASSOCIATE()
    primitive.application_context_name = UID("1.2.840.10008.3.1.1.1")
    primitive.calling_ae_title = calling
    primitive.called_ae_title = called
    primitive.user_information = _user_items(max_length, extra)
    return primitive


def request(
    contexts: Contexts = BOTH,
    *,
    calling: str = "SENDER",
    called: str = "MEDFERRY",
    max_length: int = 16384,
    extra: Sequence[object] = (),
) -> bytes:
    """An A-ASSOCIATE-RQ, encoded by pynetdicom."""
    proposed = []
    for number, (abstract, transfers) in enumerate(contexts):
        context = PresentationContext()
        context.context_id = 2 * number + 1
        context.abstract_syntax = UID(abstract)
        context._transfer_syntax = [UID(each) for each in transfers]
        proposed.append(context)
    primitive = _primitive(calling, called, max_length, extra)
    primitive.presentation_context_definition_list = proposed
    return bytes(A_ASSOCIATE_RQ(primitive).encode())


def accept(
    results: Sequence[tuple[int, int, str]],
    *,
    max_length: int = 16384,
    extra: Sequence[object] = (),
) -> bytes:
    """An A-ASSOCIATE-AC, encoded by pynetdicom: context id, result, transfer syntax of each."""
    contexts = []
    for number, result, transfer in results:
        context = PresentationContext()
        context.context_id = number
        context._transfer_syntax = [UID(transfer)]
        context.result = result
        contexts.append(context)
    primitive = _primitive("SENDER", "MEDFERRY", max_length, extra)
    primitive.result, primitive.result_source = 0, 1
    primitive.presentation_context_definition_results_list = contexts
    return bytes(A_ASSOCIATE_AC(primitive).encode())


def pdv(context_id: int, control: int, fragment: bytes) -> bytes:
    return struct.pack(">LBB", len(fragment) + 2, context_id, control) + fragment


def data_pdu(*pdvs: bytes) -> bytes:
    body = b"".join(pdvs)
    return struct.pack(">BxL", 4, len(body)) + body


def command_set(*elements: tuple[int, bytes]) -> bytes:
    """A command set in implicit VR little endian; UIDs and texts are to be padded by the caller."""
    body = b"".join(struct.pack("<HHL", 0, tag, len(value)) + value for tag, value in elements)
    return struct.pack("<HHLL", 0, 0, 4, len(body)) + body


def u16(value: int) -> bytes:
    return struct.pack("<H", value)


def uid(text: str) -> bytes:
    return text.encode() + b"\0" * (len(text) % 2)


def store_command(message_id: int = 1, sop_class: str = CT, instance: str = INSTANCE) -> bytes:
    return command_set(
        (0x0002, uid(sop_class)),
        (0x0100, u16(0x0001)),
        (0x0110, u16(message_id)),
        (0x0700, u16(0)),
        (0x0800, u16(1)),
        (0x1000, uid(instance)),
    )


def echo_command(message_id: int = 1) -> bytes:
    return command_set(
        (0x0002, uid(VERIFICATION)),
        (0x0100, u16(0x0030)),
        (0x0110, u16(message_id)),
        (0x0800, u16(0x0101)),
    )


def store_message(data: bytes, *, message_id: int = 1, context_id: int = 3, fragment: int = 16000) -> bytes:
    """A C-STORE-RQ with its data set, in PDUs of one PDV each."""
    out = [data_pdu(pdv(context_id, 3, store_command(message_id)))]
    for start in range(0, max(len(data), 1), fragment):
        piece = data[start : start + fragment]
        last = start + fragment >= len(data)
        out.append(data_pdu(pdv(context_id, 2 if last else 0, piece)))
    return b"".join(out)


def echo_message(message_id: int = 1, context_id: int = 1) -> bytes:
    return data_pdu(pdv(context_id, 3, echo_command(message_id)))
