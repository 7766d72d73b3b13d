"""Command sets and messages: tables, cuts, noise. Equality with pynetdicom's bytes is in test_contract.py."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicom import dimse
from dicom.dimse import MAX_COMMAND_BYTES, Command, CommandError, CommandField, Status
from dicom.messages import MessageError, MessageReader
from dicom.pdu import AbortReason, Fragments
from tests.dicom.associations import CT, INSTANCE, VERIFICATION, command_set, echo_command, store_command, u16

STORE = Command(0x0001, 7, True, CT, INSTANCE)


def test_a_store_request_is_read() -> None:
    assert dimse.parse(store_command(7)) == STORE
    assert dimse.parse(dimse.store_request(7, CT, INSTANCE)) == STORE


def test_an_echo_request_is_read() -> None:
    expected = Command(CommandField.C_ECHO_RQ, 3, False, VERIFICATION)
    assert dimse.parse(echo_command(3)) == dimse.parse(dimse.echo_request(3, VERIFICATION)) == expected


@pytest.mark.parametrize("field", [0x0001, 0x0010, 0x0020, 0x0021, 0x0030, 0x0100, 0x0110, 0x0120, 0x0130])
def test_a_response_answers_its_request(field: int) -> None:
    raw = dimse.response(Command(field, 515, True, CT, INSTANCE), 0xA700)
    read = dimse.parse(raw)
    assert read == Command(field | 0x8000, 515, False, CT, INSTANCE, 0xA700)
    assert read.is_response and not STORE.is_response
    assert len(raw) == 12 + struct.unpack_from("<L", raw, 8)[0]
    assert len(raw) % 2 == 0


def test_what_is_no_uid_is_not_repeated() -> None:
    raw = dimse.response(Command(1, 1, True, "../../etc/passwd", "1.02"), 0)
    assert dimse.parse(raw) == Command(0x8001, 1, False)


@pytest.mark.parametrize(
    ("sent", "read"),
    [(b"1.2.3\0", "1.2.3"), (b"1.2.3 ", "1.2.3"), (b"1.2.3", "1.2.3"), (b" 1.2.3\0\0", "1.2.3"), (b"", "")],
)
def test_padding_is_taken_off_whatever_it_is(sent: bytes, read: str) -> None:
    raw = command_set((0x0002, sent), (0x0100, u16(1)), (0x0110, u16(1)), (0x0800, u16(1)))
    assert dimse.parse(raw).sop_class == read


def test_order_and_unknown_elements_do_not_matter() -> None:
    raw = command_set(
        (0x0800, u16(0)), (0x5010, b"x" * 10), (0x0110, u16(9)), (0x0100, u16(1)), (0x0001, b"\1\0\0\0")
    )
    assert dimse.parse(raw) == Command(1, 9, True)


GOOD = [(0x0100, u16(1)), (0x0110, u16(1)), (0x0800, u16(1))]

MALFORMED: dict[str, bytes] = {
    "nothing": b"",
    "no field": command_set(*GOOD[1:]),
    "no message id": command_set(GOOD[0], GOOD[2]),
    "no data set type": command_set(*GOOD[:2]),
    "a number of 4 bytes": command_set((0x0100, b"\1\0\0\0"), *GOOD[1:]),
    "an element twice": command_set(*GOOD, GOOD[0]),
    "another group": command_set(*GOOD) + struct.pack("<HHL", 8, 0x18, 0),
    "a length over the end": command_set(*GOOD)[:-2],
    "a length of 4 GiB": command_set(*GOOD) + struct.pack("<HHL", 0, 0x1000, 0xFFFFFFFF),
    "a header cut short": command_set(*GOOD) + b"\0\0\0\x10\0\0\0",
    "a UID of 65 characters": command_set(*GOOD, (0x1000, b"1" * 65)),
    "a response without status": command_set((0x0100, u16(0x8001)), (0x0120, u16(1)), (0x0800, u16(0x0101))),
    "a response to nothing": command_set((0x0100, u16(0x8001)), (0x0800, u16(0x0101)), (0x0900, u16(0))),
    "a big-endian command": struct.pack(">HHLL", 0, 0, 4, 10) + struct.pack(">HHLH", 0, 0x100, 2, 1),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_command_is_refused_by_name(name: str) -> None:
    with pytest.raises(CommandError):
        dimse.parse(MALFORMED[name])


@given(st.binary(max_size=300))
def test_only_the_named_error_escapes(noise: bytes) -> None:
    try:
        dimse.parse(noise)
    except CommandError:
        pass


@given(st.integers(0, 150), st.binary(min_size=1, max_size=6))
def test_only_the_named_error_escapes_from_a_changed_command(where: int, change: bytes) -> None:
    raw = bytearray(store_command())
    where %= len(raw)
    raw[where : where + len(change)] = change
    try:
        command = dimse.parse(bytes(raw))
    except CommandError:
        return
    assert len(command.sop_class) <= 64 and len(command.sop_instance) <= 64
    dimse.parse(dimse.response(command, Status.SUCCESS))


# ---- messages ----------------------------------------------------------------------------------------------


def fragments(data: bytes, *, command: bool = True, last: bool = True, context_id: int = 3) -> Fragments:
    return Fragments(context_id, command, last, [memoryview(data)] if data else [])


def test_a_command_in_pieces_then_its_data_set() -> None:
    reader = MessageReader()
    raw = store_command(7)
    assert reader.between_messages
    assert reader.receive(fragments(raw[:10], last=False)) is None
    assert not reader.between_messages
    assert reader.receive(fragments(b"", last=False)) is None
    assert reader.receive(fragments(raw[10:])) == STORE
    assert reader.in_data_set and repr(reader) == "<MessageReader in data set>"
    part = fragments(b"abc", command=False, last=False)
    assert reader.receive(part) is part
    reader.receive(fragments(b"", command=False))
    assert reader.between_messages and repr(reader) == "<MessageReader in command, 0 bytes>"
    assert isinstance(reader.receive(fragments(echo_command())), Command)
    assert reader.between_messages


SEQUENCES: dict[str, tuple[list[Fragments], int, AbortReason]] = {
    "a data set without a command": (
        [fragments(b"abc", command=False)],
        2,
        AbortReason.UNEXPECTED_PARAMETER,
    ),
    "a data set after a command without one": (
        [fragments(echo_command()), fragments(b"abc", command=False)],
        2,
        AbortReason.UNEXPECTED_PARAMETER,
    ),
    "a command within a data set": (
        [fragments(store_command()), fragments(store_command())],
        2,
        AbortReason.UNEXPECTED_PARAMETER,
    ),
    "a data set in another context": (
        [fragments(store_command()), fragments(b"abc", command=False, context_id=5)],
        2,
        AbortReason.UNEXPECTED_PARAMETER,
    ),
    "a command in two contexts": (
        [fragments(store_command()[:8], last=False), fragments(store_command()[8:], context_id=5)],
        2,
        AbortReason.UNEXPECTED_PARAMETER,
    ),
    "a command that is none": ([fragments(b"abc")], 0, AbortReason.NOT_SPECIFIED),
    "a command without end": (
        [fragments(b"x" * 60_000, last=False), fragments(b"x" * 6_000, last=False)],
        2,
        AbortReason.INVALID_PARAMETER,
    ),
}


@pytest.mark.parametrize("name", SEQUENCES)
def test_what_is_no_message_aborts_with_its_reason(name: str) -> None:
    received, source, code = SEQUENCES[name]
    reader = MessageReader()
    for each in received[:-1]:
        reader.receive(each)
    with pytest.raises(MessageError) as caught:
        reader.receive(received[-1])
    assert (caught.value.source, caught.value.code) == (source, code)
    assert len(reader._command) <= MAX_COMMAND_BYTES


def test_a_command_set_may_be_as_long_as_the_limit() -> None:
    head = command_set(*GOOD)
    filler = MAX_COMMAND_BYTES - len(head) - 8
    raw = head + struct.pack("<HHL", 0, 0x5010, filler) + b"x" * filler
    assert isinstance(MessageReader().receive(fragments(raw)), Command)
