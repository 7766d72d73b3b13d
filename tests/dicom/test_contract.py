"""What we rely on inside pynetdicom 3.0.4: fails when an upgrade moves it; our bytes against its."""

from __future__ import annotations

import io
from typing import Any

import pynetdicom
import pytest
from pydicom.uid import UID
from pynetdicom import fsm, pdu_primitives
from pynetdicom.dimse_messages import C_ECHO_RQ, C_ECHO_RSP, C_STORE_RQ, C_STORE_RSP, DIMSEMessage
from pynetdicom.dimse_primitives import C_ECHO, C_STORE
from pynetdicom.pdu import A_ABORT_RQ, A_ASSOCIATE_RJ, A_RELEASE_RP, A_RELEASE_RQ, P_DATA_TF
from pynetdicom.pdu_primitives import P_DATA
from pynetdicom.presentation import PresentationContext, negotiate_as_acceptor, negotiate_as_requestor

from dicom import association, dimse, pdata, pdu
from dicom.dimse import Command
from dicom.negotiation import Rejection
from dicom.pdu import AbortReason
from tests.dicom.associations import CT, EXPLICIT, IMPLICIT, INSTANCE, VERIFICATION, role


def test_the_version_is_the_one_that_was_read() -> None:
    assert pynetdicom.__version__ == "3.0.4"


# ---- the state machine -------------------------------------------------------------------------------------


def test_each_action_of_the_standard_is_done_or_is_data() -> None:
    data = {"DT-1", "DT-2", "AR-6", "AR-7"}
    assert set(association._ACTIONS) | data == set(fsm.ACTIONS)
    assert set(fsm.TRANSITION_TABLE.values()) <= set(fsm.ACTIONS)


def test_only_two_actions_choose_a_state() -> None:
    choices = {name: action[2] for name, action in fsm.ACTIONS.items() if not isinstance(action[2], str)}
    assert choices == {"AE-6": ("Sta3", "Sta13"), "AR-8": ("Sta9", "Sta10")}


def test_every_pdu_is_answered_for_in_every_state_with_a_connection() -> None:
    states = {f"Sta{number}" for number in range(2, 14)} - {"Sta4"}
    for event in ("Evt3", "Evt4", "Evt6", "Evt10", "Evt12", "Evt13", "Evt16", "Evt19"):
        assert {state for each, state in fsm.TRANSITION_TABLE if each == event} == states
    assert {state for each, state in fsm.TRANSITION_TABLE if each == "Evt17"} == states | {"Sta4"}


# ---- control PDUs ------------------------------------------------------------------------------------------


def test_releases_are_pynetdicoms() -> None:
    release = pdu_primitives.A_RELEASE()
    assert A_RELEASE_RQ(release).encode() == pdu.RELEASE_RQ
    assert A_RELEASE_RP(release).encode() == pdu.RELEASE_RP


@pytest.mark.parametrize("reason", list(AbortReason))
def test_aborts_of_the_provider_are_pynetdicoms(reason: AbortReason) -> None:
    primitive = pdu_primitives.A_P_ABORT()
    primitive.provider_reason = reason.value
    assert A_ABORT_RQ(primitive).encode() == pdu.abort_pdu(2, reason)


def test_the_users_abort_is_pynetdicoms() -> None:
    primitive = pdu_primitives.A_ABORT()
    primitive.abort_source = 0
    assert A_ABORT_RQ(primitive).encode() == pdu.abort_pdu(0, AbortReason.NOT_SPECIFIED)


@pytest.mark.parametrize("rejection", list(Rejection))
def test_rejections_are_pynetdicoms(rejection: Rejection) -> None:
    primitive = pdu_primitives.A_ASSOCIATE()
    primitive.result, primitive.result_source, primitive.diagnostic = rejection.value
    assert A_ASSOCIATE_RJ(primitive).encode() == pdu.reject_pdu(rejection)


# ---- negotiation -------------------------------------------------------------------------------------------


def context(number: int, abstract: str, *transfers: str) -> PresentationContext:
    made = PresentationContext()
    made.context_id = number
    made.abstract_syntax = UID(abstract)
    for each in transfers:
        made.add_transfer_syntax(each)
    return made


@pytest.mark.parametrize(
    ("roles", "result", "answered"),
    [
        ({}, 0, []),
        ({UID(CT): (True, False)}, 0, [(True, False)]),
        ({UID(CT): (True, True)}, 0, [(True, False)]),
        ({UID(CT): (False, True)}, 1, [(False, False)]),
    ],
)
def test_an_acceptor_that_only_serves(roles: Any, result: int, answered: list[tuple[bool, bool]]) -> None:
    ours = context(1, CT, EXPLICIT)
    ours.scu_role, ours.scp_role = True, False
    [got], answers = negotiate_as_acceptor([context(5, CT, EXPLICIT)], [ours], roles)
    assert (got.context_id, got.result) == (5, result)
    if result == 0:
        assert [(each.scu_role, each.scp_role) for each in answers] == answered


def test_a_requestors_contexts_are_answered_by_id_and_missing_ones_refused() -> None:
    answer = context(3, CT, EXPLICIT)
    answer.result = 0
    got = negotiate_as_requestor([context(1, VERIFICATION, IMPLICIT), context(3, CT, EXPLICIT)], [answer])
    assert [(each.context_id, each.result) for each in got] == [(1, 2), (3, 0)]
    assert role(CT, True, False).scu_role is True


# ---- DIMSE -------------------------------------------------------------------------------------------------


def encoded(message: Any, primitive: Any, max_length: int = 16384) -> list[list[tuple[int, bytes]]]:
    message.primitive_to_message(primitive)
    return [each.presentation_data_value_list for each in message.encode_msg(3, max_length)]


def command_bytes(message: Any, primitive: Any) -> bytes:
    [[(_, value)], *_] = encoded(message, primitive)
    assert value[0] == pdata.COMMAND | pdata.LAST
    return bytes(value[1:])


INSTANCES = [INSTANCE, "1.2.3", "1.2.34", "1." + "2" * 62]


@pytest.mark.parametrize("instance", INSTANCES)
@pytest.mark.parametrize("message_id", [1, 255, 65535])
def test_c_store_rq_is_pynetdicoms(instance: str, message_id: int) -> None:
    primitive = C_STORE()
    primitive.MessageID = message_id
    primitive.AffectedSOPClassUID = UID(CT)
    primitive.AffectedSOPInstanceUID = UID(instance)
    primitive.Priority = 0
    primitive.DataSet = io.BytesIO(b"data")
    assert dimse.store_request(message_id, CT, instance) == command_bytes(C_STORE_RQ(), primitive)


@pytest.mark.parametrize("instance", INSTANCES)
@pytest.mark.parametrize("status", [0x0000, 0xA700, 0xC001, 0x0117])
def test_c_store_rsp_says_what_pynetdicoms_says(instance: str, status: int) -> None:
    primitive = C_STORE()
    primitive.MessageIDBeingRespondedTo = 9
    primitive.AffectedSOPClassUID = UID(CT)
    primitive.AffectedSOPInstanceUID = UID(instance)
    primitive.Status = status
    ours = dimse.response(Command(0x0001, 9, True, CT, instance), status)
    assert ours == command_bytes(C_STORE_RSP(), primitive)


def test_c_echo_is_pynetdicoms() -> None:
    primitive = C_ECHO()
    primitive.AffectedSOPClassUID = UID(VERIFICATION)
    primitive.MessageID = 4
    assert dimse.echo_request(4, VERIFICATION) == command_bytes(C_ECHO_RQ(), primitive)
    primitive = C_ECHO()
    primitive.AffectedSOPClassUID = UID(VERIFICATION)
    primitive.MessageIDBeingRespondedTo = 4
    primitive.Status = 0
    request = Command(0x0030, 4, False, VERIFICATION)
    assert dimse.response(request, 0) == command_bytes(C_ECHO_RSP(), primitive)


@pytest.mark.parametrize("max_length", [16, 17, 50, 100, 16384])
def test_our_pdus_are_read_by_pynetdicom(max_length: int) -> None:
    raw = pdata.command(3, dimse.store_request(7, CT, INSTANCE), max_length)
    raw += pdata.header(3, 0, 5) + b"first" + pdata.header(3, pdata.LAST, 4) + b"last"
    message = DIMSEMessage()
    done = False
    while raw:
        size = 6 + int.from_bytes(raw[2:6], "big")
        assert size - 6 <= max(max_length, 11)
        read = P_DATA_TF()
        read.decode(raw[:size])
        primitive = read.to_primitive()
        assert isinstance(primitive, P_DATA)
        done = message.decode_msg(primitive)
        raw = raw[size:]
    assert done
    store: Any = message.message_to_primitive()
    assert (store.MessageID, store.AffectedSOPInstanceUID) == (7, INSTANCE)
    assert store.DataSet.getvalue() == b"firstlast"
