"""A-ASSOCIATE: reading what pynetdicom writes, answering what it understands, limits on strangers."""

from __future__ import annotations

import struct
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.uid import UID
from pynetdicom.pdu import A_ASSOCIATE_AC, A_ASSOCIATE_RQ

from dicom import associate, negotiation
from dicom.associate import AssociateError, decode_accept, decode_request
from dicom.negotiation import Rejection
from dicom.part10 import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME
from tests.dicom.associations import (
    BOTH,
    CT,
    EXPLICIT,
    IMPLICIT,
    JPEG,
    MR,
    VERIFICATION,
    Contexts,
    accept,
    extended,
    identity,
    operations,
    request,
    role,
)


def body(pdu: bytes) -> bytes:
    return pdu[6:]


def answer(
    contexts: Contexts = BOTH,
    *extra: object,
    storage: frozenset[str] = frozenset({CT, MR}),
    syntaxes: frozenset[str] = frozenset({IMPLICIT, EXPLICIT}),
) -> A_ASSOCIATE_AC:
    """Our answer as pynetdicom reads it."""
    proposed = decode_request(body(request(contexts, extra=extra)))
    pdu, _ = negotiation.accept(proposed, storage.__contains__, syntaxes.__contains__, 65536)
    read = A_ASSOCIATE_AC()
    read.decode(pdu)
    return read


def results(pdu: A_ASSOCIATE_AC) -> list[tuple[int, int, str]]:
    return [
        (item.context_id or 0, item.result or 0, str(item.transfer_syntax))
        for item in pdu.presentation_context
    ]


def test_a_request_is_read_as_pynetdicom_reads_it() -> None:
    extra = [operations(5, 7), role(CT, True, True), identity(), extended(MR)]
    raw = request(((VERIFICATION, [IMPLICIT]), (CT, [JPEG, EXPLICIT]), (MR, [IMPLICIT])), extra=extra)
    read = A_ASSOCIATE_RQ()
    read.decode(raw)
    ours = decode_request(body(raw))
    assert ours.calling_ae_title == read.calling_ae_title.strip() == "SENDER"
    assert ours.called_ae_title == read.called_ae_title.strip() == "MEDFERRY"
    assert ours.application_context == read.application_context_name
    assert [(each.id, each.abstract_syntax, list(each.transfer_syntaxes)) for each in ours.contexts] == [
        (each.context_id, each.abstract_syntax, each.transfer_syntax) for each in read.presentation_context
    ]
    user = read.user_information
    assert user is not None
    assert ours.user.max_length == user.maximum_length == 16384
    assert ours.user.operations == (5, 7)
    assert ours.user.roles == {CT: (True, True)}


@pytest.mark.parametrize(
    ("raw", "title"),
    [
        (b"CT1             ", "CT1"),
        (b"   CT1          ", "CT1"),
        (b"CT1\0\0\0\0\0\0\0\0\0\0\0\0\0", "CT1"),
        (b"CT1 \0           ", "CT1"),
        (b"SIXTEEN-LETTERS!", "SIXTEEN-LETTERS!"),
        (b"A B             ", "A B"),
        (b"                ", ""),
        (b"\xd6\xd0\x1b[2J          ", "???[2J"),
    ],
)
def test_titles_are_read_however_they_are_padded_and_are_fit_to_print(raw: bytes, title: str) -> None:
    pdu = request()
    assert len(raw) == 16
    assert decode_request(body(pdu[:26] + raw + pdu[42:])).calling_ae_title == title


def test_the_peers_first_acceptable_transfer_syntax_is_taken() -> None:
    contexts: Contexts = (
        (CT, [JPEG, IMPLICIT, EXPLICIT]),
        (CT, [EXPLICIT, IMPLICIT]),
        (CT, [JPEG]),
        ("1.2.3", [IMPLICIT]),
        (VERIFICATION, [EXPLICIT]),
    )
    got = results(answer(contexts))
    assert [(number, result) for number, result, _ in got] == [(1, 0), (3, 0), (5, 4), (7, 3), (9, 0)]
    assert [got[0][2], got[1][2], got[4][2]] == [IMPLICIT, EXPLICIT, EXPLICIT]


def test_the_answer_says_who_we_are_and_nothing_else() -> None:
    user = answer().user_information
    assert user is not None
    assert user.maximum_length == 65536
    assert user.implementation_class_uid == IMPLEMENTATION_CLASS_UID
    assert user.implementation_version_name == IMPLEMENTATION_VERSION_NAME
    assert user.async_ops_window is None and user.user_identity is None
    assert not user.role_selection and not user.ext_neg


def test_the_answer_repeats_the_titles_as_they_came() -> None:
    raw = request()
    raw = raw[:10] + b"MEDFERRY\0\0\0\0\0\0\0\0" + b"  SENDER        " + bytes(range(32)) + raw[74:]
    pdu, _ = negotiation.accept(decode_request(body(raw)), lambda _: True, lambda _: True, 65536)
    assert pdu[10:74] == raw[10:74]
    assert len(pdu) == 6 + struct.unpack_from(">L", pdu, 2)[0]


@pytest.mark.parametrize("proposed", [(0, 0), (1, 1), (5, 7)])
def test_a_window_that_is_proposed_is_always_answered(proposed: tuple[int, int]) -> None:
    user = answer(BOTH, operations(*proposed)).user_information
    assert user is not None and user.async_ops_window is not None
    window = user.async_ops_window
    assert (window.max_operations_invoked, window.max_operations_performed) == (1, 1)


@pytest.mark.parametrize(
    ("scu", "scp", "result"), [(True, False, 0), (True, True, 0), (False, True, 1)], ids=str
)
def test_a_requestor_may_send_but_not_be_sent_to(scu: bool, scp: bool, result: int) -> None:
    pdu = answer(((CT, [IMPLICIT]),), role(CT, scu, scp))
    assert [each[1] for each in results(pdu)] == [result]
    if result == 0:
        assert pdu.user_information is not None
        selection = pdu.user_information.role_selection[UID(CT)]
        assert (selection.scu_role, selection.scp_role) == (True, False)


def test_user_identity_and_extended_negotiation_are_passed_over() -> None:
    pdu = answer(BOTH, identity(), extended(CT))
    assert [each[1] for each in results(pdu)] == [0, 0]


@pytest.mark.parametrize("uid", ["", "1.2.840.10008.5.1.4.1.1.2 x", "x" * 64, "../../etc/passwd", "1" * 65])
def test_an_abstract_syntax_that_is_no_uid_is_refused_and_the_rest_accepted(uid: str) -> None:
    raw = request(((MR, [IMPLICIT]), (CT, [IMPLICIT])))
    item = b"\x30\0" + struct.pack(">H", len(MR)) + MR.encode()
    assert raw.count(item) == 1
    start = raw.index(item)
    changed = b"\x30\0" + struct.pack(">H", len(uid)) + uid.encode()
    grown = len(changed) - len(item)
    context = start - 8
    raw = raw[:start] + changed + raw[start + len(item) :]
    size = struct.unpack_from(">H", raw, context + 2)[0] + grown
    raw = raw[: context + 2] + struct.pack(">H", size) + raw[context + 4 :]
    pdu, agreement = negotiation.accept(decode_request(body(raw)), lambda _: True, lambda _: True, 65536)
    assert list(agreement.contexts) == [3]
    read = A_ASSOCIATE_AC()
    read.decode(pdu)
    assert [each[:2] for each in results(read)] == [(1, 3), (3, 0)]


def test_128_contexts_with_60_transfer_syntaxes_each() -> None:
    syntaxes = [f"1.2.840.10008.1.2.4.{n}" for n in range(200, 259)]
    contexts = [(f"1.2.840.10008.5.1.4.1.1.{n}", [*syntaxes, EXPLICIT]) for n in range(1, 129)]
    raw = request(contexts)
    assert len(raw) < associate.MAX_ASSOCIATE_BYTES
    began = time.perf_counter()
    proposed = decode_request(body(raw))
    pdu, agreement = negotiation.accept(proposed, lambda _: True, frozenset({EXPLICIT}).__contains__, 65536)
    took = time.perf_counter() - began
    assert len(agreement.contexts) == 128
    assert {each.transfer_syntax for each in agreement.contexts.values()} == {EXPLICIT}
    assert len(pdu) < 10_000
    assert took < 0.5, "it runs on the loop of all other associations"


ITEM = struct.Struct(">BxH")


def with_items(*items: bytes) -> bytes:
    return bytes(request()[6:74]) + b"".join(items)


def item(kind: int, value: bytes) -> bytes:
    return ITEM.pack(kind, len(value)) + value


@pytest.mark.parametrize(
    "raw",
    [
        with_items(b"\x10"),
        with_items(b"\x10\0\0\x05abcd"),
        with_items(item(0x20, b"\1\0\0")),
        with_items(item(0x20, b"\2\0\0\0")),
        with_items(item(0x20, b"\1\0\0\0"), item(0x20, b"\1\0\0\0")),
        with_items(item(0x20, b"\1\0\0\0" + b"\x40\0\0\0" * 200)),
        with_items(item(0x50, item(0x51, b"\0\0\1"))),
        with_items(item(0x50, item(0x51, b"\0\0\0\x0f"))),
        with_items(item(0x50, item(0x53, b"\0\0\1"))),
        with_items(item(0x50, item(0x54, b"\0"))),
        with_items(item(0x50, item(0x54, b"\0\x091.2\1\0"))),
        with_items(item(0x50, item(0x59, b"") * 1025)),
        with_items(*[item(0x99, b"")] * 3000),
    ],
)
def test_a_malformed_request_is_refused_by_name(raw: bytes) -> None:
    with pytest.raises(AssociateError):
        decode_request(raw)


def test_items_nobody_knows_are_passed_over() -> None:
    raw = body(request()) + item(0x99, b"abc")
    assert [each.abstract_syntax for each in decode_request(raw).contexts] == [VERIFICATION, CT]


@given(st.binary(max_size=400))
def test_only_the_named_error_escapes_from_noise(noise: bytes) -> None:
    for decode in (decode_request, decode_accept):
        try:
            decode(request()[6:74] + noise)
        except AssociateError:
            pass


@given(st.integers(0, 400), st.binary(min_size=1, max_size=4))
def test_only_the_named_error_escapes_from_a_changed_request(where: int, change: bytes) -> None:
    raw = bytearray(body(request(extra=[operations(1, 1), role(CT, True, False), identity()])))
    where %= len(raw)
    raw[where : where + len(change)] = change
    try:
        proposed = decode_request(bytes(raw))
    except AssociateError:
        return
    pdu, _ = negotiation.accept(proposed, lambda _: True, lambda _: True, 65536)
    A_ASSOCIATE_AC().decode(pdu)


def test_our_request_is_read_by_pynetdicom() -> None:
    contexts = [(VERIFICATION, IMPLICIT), (CT, EXPLICIT), (CT, JPEG)]
    raw = negotiation.request("US", "THEM", negotiation.propose(contexts), 16384)
    read = A_ASSOCIATE_RQ()
    read.decode(raw)
    assert (read.calling_ae_title.strip(), read.called_ae_title.strip()) == ("US", "THEM")
    assert [
        (each.context_id, each.abstract_syntax, *each.transfer_syntax) for each in read.presentation_context
    ] == [(2 * number + 1, *pair) for number, pair in enumerate(contexts)]
    assert read.user_information is not None
    assert read.user_information.implementation_class_uid == IMPLEMENTATION_CLASS_UID
    assert read.user_information.async_ops_window is None


@pytest.mark.parametrize("count", [0, 129])
def test_an_association_proposes_1_to_128_contexts(count: int) -> None:
    with pytest.raises(ValueError, match="1 to 128"):
        negotiation.propose([(CT, EXPLICIT)] * count)


def test_contexts_left_unanswered_are_refused() -> None:
    proposal = negotiation.propose([(VERIFICATION, IMPLICIT), (CT, EXPLICIT)])
    agreement = negotiation.agree(decode_accept(body(accept([(3, 0, EXPLICIT)]))), proposal)
    assert list(agreement.contexts) == [3]
    assert agreement.refused == {(VERIFICATION, IMPLICIT): 2}


@pytest.mark.parametrize("rejection", list(Rejection))
def test_rejections_are_of_the_standards_table(rejection: Rejection) -> None:
    result, source, reason = rejection.value
    assert result in (1, 2)
    assert reason in {1: (1, 2, 3, 7), 2: (1, 2), 3: (1, 2)}[source]
