"""The upper layer's machine: pynetdicom's table row by row, PDUs cut anywhere, faults, deadlines."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pynetdicom.fsm import ACTIONS, TRANSITION_TABLE

from dicom import negotiation
from dicom.association import PDU_SLACK, Association, Limits, LocalError
from dicom.events import Aborted, Accepted, Event, Rejected, Released, ReleaseRequested, Requested
from dicom.negotiation import Rejection
from dicom.pdu import AbortReason, Fragments
from tests.dicom.associations import (
    ABORT,
    BOTH,
    CT,
    EXPLICIT,
    IMPLICIT,
    REJECT,
    RELEASE_RP,
    RELEASE_RQ,
    VERIFICATION,
    abort,
    accept,
    data_pdu,
    echo_message,
    pdv,
    rejection,
    request,
    store_command,
    store_message,
)

LIMITS = Limits(
    max_pdu=16384, request_seconds=10, closing_seconds=2, release_seconds=5, pdu_seconds=20, idle_seconds=60
)
PROPOSAL = negotiation.propose([(VERIFICATION, IMPLICIT), (CT, EXPLICIT)])
REQUEST = negotiation.request("US", "THEM", PROPOSAL, 16384)
ACCEPT = accept([(1, 0, IMPLICIT), (3, 0, EXPLICIT)])
MESSAGE = data_pdu(pdv(3, 3, store_command()))


def anything(uid: str) -> bool:
    return True


def drain(association: Association) -> list[Event]:
    """All events there are, views turned to bytes so that they outlive the buffer."""
    events: list[Event] = []
    while (event := association.next_event()) is not None:
        events.append(event)
    return events


def feed(association: Association, data: bytes, now: float = 0.0) -> list[Event]:
    association.receive(memoryview(data), now)
    return drain(association)


def established(limits: Limits = LIMITS, *, contexts: object = BOTH) -> Association:
    """An acceptor in Sta6 that accepted Verification in 1 and CT in 3."""
    association = Association.acceptor(limits, 0.0)
    [event] = feed(association, request())
    assert isinstance(event, Requested)
    pdu, agreement = negotiation.accept(event.request, anything, anything, limits.max_pdu)
    association.accept(pdu, agreement, 0.0)
    assert b"".join(association.take_output()) == pdu
    assert association.established
    return association


def requestor(limits: Limits = LIMITS) -> Association:
    association = Association.requestor(limits, REQUEST, PROPOSAL, 0.0)
    assert association.take_output() == [REQUEST]
    return association


# ---- PS3.8 Table 9-10 --------------------------------------------------------------------------------------

PDUS = {
    "Evt3": ACCEPT,
    "Evt4": REJECT,
    "Evt6": request(),
    "Evt10": MESSAGE,
    "Evt12": RELEASE_RQ,
    "Evt13": RELEASE_RP,
    "Evt16": ABORT,
    "Evt19": bytes.fromhex("0900 00000004 00000000"),
}
"""A PDU for each event that one causes."""

UNEXPECTED = 2

EFFECTS: dict[str, tuple[bytes | None, type[object] | None]] = {
    "AE-3": (b"", Accepted),
    "AE-4": (b"", Rejected),
    "AE-6": (b"", Requested),
    "AE-7": (b"\x02", None),
    "AE-8": (b"\x03", None),
    "DT-1": (b"", None),
    "DT-2": (b"", Fragments),
    "AR-1": (RELEASE_RQ, None),
    "AR-2": (b"", ReleaseRequested),
    "AR-3": (b"", Released),
    "AR-4": (RELEASE_RP, None),
    "AR-5": (b"", None),
    "AR-6": (b"", Fragments),
    "AR-7": (b"", None),
    "AR-8": (b"", ReleaseRequested),
    "AR-9": (RELEASE_RP, None),
    "AR-10": (b"", Released),
    "AA-1": (abort(0, 0), Aborted),
    "AA-2": (b"", None),
    "AA-3": (b"", Aborted),
    "AA-4": (b"", Aborted),
    "AA-5": (b"", None),
    "AA-6": (b"", None),
    "AA-7": (b"\x07\0\0\0\0\x04\0\0\x02", None),
    "AA-8": (b"\x07\0\0\0\0\x04\0\0\x02", Aborted),
}
"""What PS3.8 Tables 9-6 to 9-9 have each action send (its beginning) and tell the user."""

REACHED_OTHERWISE = {("Evt1", "Sta1"), ("Evt2", "Sta4"), ("Evt5", "Sta1")} | {
    # We connect before there is a machine: Sta4 lasts no time.
    ("Evt15", "Sta4"),
    ("Evt17", "Sta4"),
}

ROWS = sorted(set(TRANSITION_TABLE) - REACHED_OTHERWISE)


def in_state(state: str, *, as_requestor: bool) -> Association:
    association = established()
    association._is_requestor = as_requestor
    association._proposal = PROPOSAL
    association.state = state
    return association


def cause(association: Association, event: str) -> None:
    """Make `event` happen."""
    if event in PDUS:
        association.receive(memoryview(PDUS[event]), 1.0)
    elif event == "Evt7":
        agreement = association.agreement
        assert agreement is not None
        association.accept(b"\x02", agreement, 1.0)
    elif event == "Evt8":
        association.reject(Rejection.FULL, 1.0)
    elif event == "Evt9":
        association.sending(1.0)
    elif event == "Evt11":
        association.release(1.0)
    elif event == "Evt14":
        association.release_response(1.0)
    elif event == "Evt15":
        association.abort("enough", 1.0)
    elif event == "Evt17":
        association.connection_lost(1.0)
    elif event == "Evt18":
        association._artim = 0.5
        association.expired(1.0)


@pytest.mark.parametrize("as_requestor", [True, False], ids=["requestor", "acceptor"])
@pytest.mark.parametrize(("event", "state"), ROWS)
def test_each_row_of_the_standards_table(event: str, state: str, as_requestor: bool) -> None:
    action = TRANSITION_TABLE[event, state]
    association = in_state(state, as_requestor=as_requestor)
    cause(association, event)
    told = [type(each) for each in drain(association)]
    following = ACTIONS[action][2]
    if action == "AR-8":
        following = "Sta9" if as_requestor else "Sta10"
    elif action == "AE-6":
        following = "Sta3"
    assert association.state == following
    sent = b"".join(association.take_output())
    output, indication = EFFECTS[action]
    if (event, state) == ("Evt18", "Sta2"):
        # Nobody asked yet, but the log should say why the connection ends.
        indication = Aborted
    assert output is not None
    assert sent.startswith(output) if output else not sent
    assert told == ([indication] if indication else [])


USER_EVENTS = ["Evt7", "Evt8", "Evt9", "Evt11", "Evt14"]


NOT_ALLOWED = sorted(
    {(event, f"Sta{number}") for event in USER_EVENTS for number in range(1, 14)} - set(TRANSITION_TABLE)
)


@pytest.mark.parametrize(("event", "state"), NOT_ALLOWED)
def test_what_the_table_does_not_allow_us_is_our_error(event: str, state: str) -> None:
    association = in_state(state, as_requestor=False)
    with pytest.raises(LocalError):
        cause(association, event)


@pytest.mark.parametrize("state", ["Sta1", "Sta2", "Sta13"])
def test_an_abort_without_an_association_closes_the_connection(state: str) -> None:
    association = in_state(state, as_requestor=False)
    association.abort("enough", 1.0)
    assert association.over
    assert association.take_output() == []


def test_late_pdus_are_answered_with_one_abort_however_many_come() -> None:
    association = established()
    association.state = "Sta13"
    feed(association, request() * 50)
    assert association.take_output() == [abort(2, UNEXPECTED)]


# ---- PDUs cut anywhere -------------------------------------------------------------------------------------


def conversation(association: Association, chunks: Iterable[bytes]) -> list[object]:
    """What an acceptor hears of `chunks`, with fragments of one message joined."""
    heard: list[object] = []
    for chunk in chunks:
        association.receive(memoryview(chunk), 0.0)
        while (event := association.next_event()) is not None:
            if isinstance(event, Requested):
                pdu, agreement = negotiation.accept(event.request, anything, anything, 16384)
                association.accept(pdu, agreement, 0.0)
                heard.append(event.request)
            elif isinstance(event, ReleaseRequested):
                association.release_response(0.0)
                heard.append("release")
            elif isinstance(event, Fragments):
                data = b"".join(event.parts)
                key = (event.context_id, event.is_command)
                if heard and isinstance(heard[-1], list) and heard[-1][0] == key and not heard[-1][1]:
                    heard[-1][1], heard[-1][2] = event.last, heard[-1][2] + data
                else:
                    heard.append([key, event.last, data])
            else:
                heard.append(event)
    return heard


DATA_SET = bytes(range(256)) * 20
STREAM = (
    request()
    + echo_message()
    + store_message(DATA_SET, fragment=1000)
    + data_pdu(pdv(3, 1, store_command()[:10]), pdv(3, 3, store_command()[10:]), pdv(3, 0, b"ab"))
    + data_pdu(pdv(3, 0, b""), pdv(3, 0, b"cd"))
    + data_pdu(pdv(3, 2, b""))
    + RELEASE_RQ
)
HEARD = conversation(Association.acceptor(LIMITS, 0.0), [STREAM])


def test_a_conversation_is_heard() -> None:
    said = [(each[0], each[1], each[2]) for each in HEARD if isinstance(each, list)]
    assert said[1:3] == [((3, True), True, store_command()), ((3, False), True, DATA_SET)]
    assert said[3:] == [((3, True), True, store_command()), ((3, False), True, b"abcd")]
    assert HEARD[-1] == "release"


@pytest.mark.parametrize("size", [1, 2, 5, 6, 7, 11, 12, 13, 999, 1012])
def test_it_is_heard_alike_in_pieces_of_any_size(size: int) -> None:
    chunks = [STREAM[start : start + size] for start in range(0, len(STREAM), size)]
    assert conversation(Association.acceptor(LIMITS, 0.0), chunks) == HEARD


@given(st.lists(st.integers(1, len(STREAM)), max_size=20))
def test_it_is_heard_alike_wherever_it_is_cut(cuts: list[int]) -> None:
    edges = [0, *sorted(set(cuts)), len(STREAM)]
    chunks = [STREAM[a:b] for a, b in itertools.pairwise(edges) if a < b]
    assert conversation(Association.acceptor(LIMITS, 0.0), chunks) == HEARD


def test_fragments_are_views_of_what_was_received() -> None:
    association = established()
    buffer = bytearray(store_message(b"x" * 5000))
    association.receive(memoryview(buffer), 0.0)
    command = association.next_event()
    data = association.next_event()
    assert isinstance(command, Fragments) and isinstance(data, Fragments)
    assert all(part.obj is buffer for part in data.parts)
    assert sum(map(len, data.parts)) == 5000 and data.last


def test_one_read_of_many_pdus_is_one_batch() -> None:
    association = established()
    feed(association, data_pdu(pdv(3, 3, store_command())))
    [event] = feed(association, b"".join(data_pdu(pdv(3, 0, b"x" * 100)) for _ in range(50)))
    assert isinstance(event, Fragments)
    assert len(event.parts) == 50 and not event.last


def test_what_is_held_is_heard_later_from_a_copy() -> None:
    association = established()
    buffer = bytearray(echo_message(1) + echo_message(2))
    association.receive(memoryview(buffer), 0.0)
    assert association.next_event() is not None
    assert association.unread
    association.hold()
    buffer[:] = bytes(len(buffer))
    with pytest.raises(LocalError):
        association.receive(memoryview(b"more"), 0.0)
    [second] = drain(association)
    assert isinstance(second, Fragments)
    assert b"".join(second.parts) == echo_message(2)[12:]
    assert not association.unread


# ---- faults ------------------------------------------------------------------------------------------------

INVALID, UNRECOGNISED_PDU = AbortReason.INVALID_PARAMETER, AbortReason.UNRECOGNISED_PDU

FAULTS: dict[str, tuple[bytes, AbortReason]] = {
    "a P-DATA-TF of 4 GiB": (b"\x04\0\xff\xff\xff\xff", INVALID),
    "a P-DATA-TF over the maximum": (b"\x04\0" + (16384 + PDU_SLACK + 1).to_bytes(4, "big"), INVALID),
    "a P-DATA-TF without PDV": (b"\x04\0\0\0\0\0", INVALID),
    "a P-DATA-TF too short for a PDV": (b"\x04\0\0\0\0\x05", INVALID),
    "a release of 4 GiB": (b"\x05\0\xff\xff\xff\xff", INVALID),
    "a release of 5 bytes": (b"\x05\0\0\0\0\x05", INVALID),
    "an abort of 4 GiB": (b"\x07\0\xff\xff\xff\xff", INVALID),
    "PDU type 0": (b"\0\0\0\0\0\x04", UNRECOGNISED_PDU),
    "PDU type 8": (b"\x08\0\0\0\0\x04", UNRECOGNISED_PDU),
    "HTTP": (b"GET / HTTP/1.1\r\n", UNRECOGNISED_PDU),
    "TLS": (bytes.fromhex("160301020001"), UNRECOGNISED_PDU),
    "a PDV of length 0": (data_pdu(b"\0\0\0\0\x03\x03"), INVALID),
    "a PDV of length 1": (data_pdu(b"\0\0\0\x01\x03\x03"), INVALID),
    "a PDV longer than its PDU": (data_pdu(b"\0\0\0\x09\x03\x03abc"), INVALID),
    "a PDV of 4 GiB": (data_pdu(b"\xff\xff\xff\xff\x03\x03abc"), INVALID),
    "bytes left over in a PDU": (data_pdu(pdv(3, 3, b"ab"), b"\0\0\0"), INVALID),
    "a context that was not accepted": (data_pdu(pdv(5, 3, b"ab")), INVALID),
    "an even context": (data_pdu(pdv(2, 3, b"ab")), INVALID),
}


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("one_by_one", [False, True], ids=["whole", "byte by byte"])
def test_a_fault_of_an_established_peer_is_answered_with_its_reason(name: str, one_by_one: bool) -> None:
    data, reason = FAULTS[name]
    association = established()
    chunks = [data[i : i + 1] for i in range(len(data))] if one_by_one else [data + b"trailing" * 10]
    events = [event for chunk in chunks for event in feed(association, chunk)]
    assert events[-1:] == [Aborted(2, reason.value, events[-1].detail)]  # type: ignore[union-attr]
    assert association.take_output() == [abort(2, reason.value)]
    assert association.state == "Sta13"


BEFORE_ASSOCIATION = {
    "4 GiB of A-ASSOCIATE-RQ": b"\x01\0\xff\xff\xff\xff",
    "an A-ASSOCIATE-RQ over the limit": b"\x01\0\0\x04\0\x01",
    "an A-ASSOCIATE-RQ too short": b"\x01\0\0\0\0\x43" + bytes(67),
    "4 GiB of P-DATA-TF": b"\x04\0\xff\xff\xff\xff",
    "a P-DATA-TF": MESSAGE,
    "a release": RELEASE_RQ,
    "an A-ASSOCIATE-AC": ACCEPT,
    "HTTP": b"GET / HTTP/1.1\r\n\r\n",
    "an item that is cut short": request()[:2] + (75).to_bytes(4, "big") + request()[6:81],
}


@pytest.mark.parametrize("name", BEFORE_ASSOCIATION)
def test_before_an_association_a_fault_ends_it_at_once(name: str) -> None:
    association = Association.acceptor(LIMITS, 0.0)
    events = feed(association, BEFORE_ASSOCIATION[name])
    assert [type(event) for event in events] == [Aborted]
    # PS3.8 Table 9-10, Sta2: AA-1 has the service user as source, and then the reason is not significant.
    assert association.take_output() == [abort(0, 0)]
    assert association.state == "Sta13"


def test_an_abort_before_the_association_closes_the_connection() -> None:
    association = Association.acceptor(LIMITS, 0.0)
    assert feed(association, ABORT) == []
    assert association.over and association.take_output() == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda raw: raw[:6] + b"\0\2" + raw[8:], (1, 2, 2)),
        (lambda raw: raw.replace(b"1.2.840.10008.3.1.1.1", b"1.2.840.10008.3.1.1.2"), (1, 1, 2)),
    ],
    ids=["protocol version", "application context"],
)
def test_what_the_upper_layer_does_not_support_is_rejected(change, expected) -> None:  # type: ignore[no-untyped-def]
    association = Association.acceptor(LIMITS, 0.0)
    assert feed(association, change(request())) == []
    assert association.take_output() == [rejection(*expected)]
    assert association.state == "Sta13"


def test_only_the_lowest_bit_of_the_protocol_version_counts() -> None:
    raw = request()
    [event] = feed(Association.acceptor(LIMITS, 0.0), raw[:6] + b"\0\3" + raw[8:])
    assert isinstance(event, Requested)


def test_senders_that_do_not_count_headers_are_heard() -> None:
    association = established()
    [event] = feed(association, data_pdu(pdv(3, 1, b"x" * (16384 + PDU_SLACK - 6))))
    assert isinstance(event, Fragments)


def test_a_requestor_hears_the_answer() -> None:
    association = requestor()
    [event] = feed(association, accept([(1, 3, IMPLICIT), (3, 0, EXPLICIT)], max_length=32768))
    assert isinstance(event, Accepted)
    assert list(event.agreement.contexts) == [3]
    assert event.agreement.refused == {(VERIFICATION, IMPLICIT): 3}
    assert event.agreement.max_length == 32768
    assert association.established


@pytest.mark.parametrize(
    "answer",
    [
        accept([(1, 0, IMPLICIT), (3, 0, IMPLICIT)]),
        accept([(5, 0, IMPLICIT)]),
        accept([(3, 0, EXPLICIT), (3, 0, EXPLICIT)]),
        accept([(3, 9, EXPLICIT)]),
        ACCEPT[:2] + (70).to_bytes(4, "big") + ACCEPT[6:76],
    ],
    ids=["other transfer syntax", "not proposed", "twice", "unknown result", "cut short"],
)
def test_an_answer_that_makes_no_sense_aborts(answer: bytes) -> None:
    association = requestor()
    [event] = feed(association, answer)
    assert isinstance(event, Aborted)
    assert association.take_output() == [abort(2, INVALID.value)]


def test_a_requestor_hears_a_rejection() -> None:
    association = requestor()
    assert feed(association, rejection(2, 3, 2)) == [Rejected(2, 3, 2)]
    assert association.over


def test_release_collision_ends_in_order_on_both_sides() -> None:
    ours, theirs = requestor(), established()
    feed(ours, ACCEPT)
    ours.release(1.0)
    theirs.release(1.0)
    assert [ours.take_output(), theirs.take_output()] == [[RELEASE_RQ], [RELEASE_RQ]]
    assert feed(ours, RELEASE_RQ) == [ReleaseRequested()]
    assert feed(theirs, RELEASE_RQ) == [ReleaseRequested()]
    ours.release_response(1.0)
    assert ours.take_output() == [RELEASE_RP]
    assert feed(theirs, RELEASE_RP) == [Released()]
    theirs.release_response(1.0)
    assert theirs.take_output() == [RELEASE_RP]
    assert feed(ours, RELEASE_RP) == [Released()]
    assert ours.over
    assert theirs.state == "Sta13"


# ---- time --------------------------------------------------------------------------------------------------


def test_silence_before_the_request_ends_the_connection() -> None:
    association = Association.acceptor(LIMITS, 100.0)
    assert association.deadline() == 110.0
    feed(association, request()[:20], 109.0)
    assert association.deadline() == 110.0, "half a request must not win time"
    association.expired(109.9)
    assert not association.over
    association.expired(110.0)
    assert [type(event) for event in drain(association)] == [Aborted]
    assert association.over


def test_half_a_pdu_has_its_own_deadline_that_trickling_does_not_move() -> None:
    association = established()
    whole = data_pdu(pdv(3, 1, b"x" * 50))
    for second in range(10, 29):
        feed(association, whole[second - 10 : second - 9], float(second))
    assert association.deadline() == 10.0 + LIMITS.pdu_seconds
    association.expired(30.0)
    [event] = [each for each in drain(association) if isinstance(each, Aborted)]
    assert event.source == 2
    assert association.take_output() == [abort(2, 0)]


def test_each_pdu_has_its_own_time() -> None:
    association = established()
    whole = data_pdu(pdv(3, 1, b"x" * 50))
    feed(association, whole + whole[:10], 10.0)
    assert association.deadline() == 30.0
    feed(association, whole[10:] + whole[:10], 25.0)
    assert association.deadline() == 45.0
    feed(association, whole[10:], 26.0)
    assert association.deadline() == 26.0 + LIMITS.idle_seconds


def test_an_idle_association_is_aborted_and_one_that_we_kept_waiting_is_not() -> None:
    association = established()
    association.resumed(50.0)
    association.expired(60.0)
    assert association.established
    association.sending(55.0)
    assert association.deadline() == 115.0
    association.expired(115.0)
    assert association.take_output() == [abort(0, 0)]
    assert association.deadline() == 117.0
    association.expired(117.0)
    assert association.over


def test_a_request_and_a_release_wait_only_so_long() -> None:
    association = requestor()
    assert association.deadline() == 10.0
    association.expired(10.0)
    assert [type(event) for event in drain(association)] == [Aborted]
    association = established()
    association.release(20.0)
    assert association.deadline() == 25.0
    association.expired(25.0)
    assert [type(event) for event in drain(association)] == [Aborted]
    assert not association.over
    association.expired(27.0)
    assert association.over


# ---- anything at all ---------------------------------------------------------------------------------------

PIECES = st.one_of(
    st.binary(max_size=200),
    st.sampled_from(
        [
            request(),
            ACCEPT,
            REJECT,
            RELEASE_RQ,
            RELEASE_RP,
            ABORT,
            MESSAGE,
            echo_message(),
            b"\x04\0\0\0\0\x07",
        ]
    ),
    st.builds(
        lambda kind, length, body: bytes((kind, 0)) + length.to_bytes(4, "big") + body,
        st.integers(0, 9),
        st.integers(0, 2**32 - 1) | st.integers(0, 100),
        st.binary(max_size=100),
    ),
)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(["new", "established", "requestor"]), st.lists(PIECES, max_size=12))
def test_nothing_that_a_peer_sends_raises_or_accumulates(kind: str, pieces: list[bytes]) -> None:
    make = {"new": lambda: Association.acceptor(LIMITS, 0.0), "established": established}
    association = make.get(kind, requestor)()
    for piece in pieces:
        for event in feed(association, piece):
            if isinstance(event, Requested):
                association.accept(*negotiation.accept(event.request, anything, anything, 16384), 0.0)
            elif isinstance(event, ReleaseRequested):
                association.release_response(0.0)
        assert len(association._reader._kept) <= 256 * 1024
        assert not association.unread
    assert sum(map(len, association.take_output())) < 2000
    association.connection_lost(1.0)
    drain(association)
    assert association.over


def test_repr_tells_the_state() -> None:
    assert repr(established()) == "<Association acceptor Sta6>"
    assert repr(requestor()) == "<Association requestor Sta5>"
