"""DIMSE command sets: group 0000, implicit VR little endian (PS3.7 §6.3.1, Annex E).

    ┌ (0000,0000) group length ┬ element ┬ element ┬ …   element: group u16 │ element u16 │ length u32 │ value

A command is read strictly where an error would matter (lengths, the fields its kind must have) and
generously where senders are sloppy (padding, order, elements nobody knows). Reading and writing cost about
10 µs; pynetdicom's own take 300 to 700 µs, and `tests/dicom/test_contract.py` holds the bytes against them.

Never here: I/O, presentation contexts, what a status means.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from struct import Struct

from relay.errors import PeerError
from relay.records import MAX_UID_CHARS, is_uid

MAX_COMMAND_BYTES = 64 * 1024
"""Bytes of one command set. The largest in use, an N-GET-RQ with a long attribute list, has a few KiB."""

NO_DATA_SET = 0x0101
"""(0000,0800) Command Data Set Type when no data set follows; any other value says that one does."""

DATA_SET = 0x0001

RESPONSE = 0x8000
"""The bit of (0000,0100) Command Field that makes it a response."""


class CommandField(IntEnum):
    """The values of (0000,0100) that are told apart here (PS3.7 §E.1)."""

    C_STORE_RQ = 0x0001
    C_ECHO_RQ = 0x0030
    C_CANCEL_RQ = 0x0FFF
    C_STORE_RSP = 0x8001
    C_ECHO_RSP = 0x8030


class Status(IntEnum):
    """Statuses that we answer with (PS3.7 Annex C, PS3.4 §B.2.3); which fault has which: `faults.STATUS`."""

    SUCCESS = 0x0000
    INVALID_SOP_INSTANCE = 0x0117
    SOP_CLASS_NOT_SUPPORTED = 0x0122
    UNRECOGNISED_OPERATION = 0x0211
    OUT_OF_RESOURCES = 0xA700
    MISMATCH = 0xA900
    CANNOT_UNDERSTAND = 0xC000
    """The first of a range of 4096."""


class CommandError(PeerError):
    """A command set is malformed. The message holds no value of it."""

    def __init__(self, detail: str) -> None:
        super().__init__("command", detail)


@dataclass(frozen=True, slots=True)
class Command:
    """A command set as read. `message_id` is the one responded to where the command is a response.

    UIDs are as sent, without padding, and may be anything of at most 64 characters; empty where absent.
    """

    field: int
    message_id: int
    has_data_set: bool
    sop_class: str = ""
    sop_instance: str = ""
    status: int = 0

    @property
    def is_response(self) -> bool:
        return bool(self.field & RESPONSE)


_ELEMENT = Struct("<HHL")
_US = Struct("<H")
_GROUP_LENGTH = Struct("<HHLL")

_SOP_CLASS = 0x0002
_FIELD = 0x0100
_MESSAGE_ID = 0x0110
_RESPONDED_TO = 0x0120
_PRIORITY = 0x0700
_DATA_SET_TYPE = 0x0800
_STATUS = 0x0900
_SOP_INSTANCE = 0x1000


def _elements(data: bytes) -> dict[int, bytes]:
    """The values by element number.

    Raises:
        CommandError: A length runs over the end, a group is not 0000, or an element comes twice.
    """
    found: dict[int, bytes] = {}
    position, end = 0, len(data)
    while position < end:
        if position + 8 > end:
            raise CommandError(f"the command set is cut short at byte {position}")
        group, element, length = _ELEMENT.unpack_from(data, position)
        if group != 0 or element in found:
            raise CommandError(f"an element of the command set is out of place at byte {position}")
        position += 8
        if length > end - position:
            raise CommandError(f"an element of the command set is longer than it at byte {position - 8}")
        found[element] = data[position : position + length]
        position += length
    return found


def _number(found: dict[int, bytes], element: int) -> int:
    value = found.get(element)
    if value is None or len(value) != 2:
        raise CommandError(f"the command set has no sound (0000,{element:04X})")
    return int(_US.unpack(value)[0])


def _uid(found: dict[int, bytes], element: int) -> str:
    value = found.get(element, b"").strip(b"\0 ")
    if len(value) > MAX_UID_CHARS:
        raise CommandError(f"(0000,{element:04X}) is over {MAX_UID_CHARS} characters")
    return value.decode("ascii", "replace")


def parse(data: bytes) -> Command:
    """Read a whole command set.

    Raises:
        CommandError: It is malformed, or lacks what every command of its kind must have.
    """
    found = _elements(data)
    field = _number(found, _FIELD)
    responds = field & RESPONSE or field == CommandField.C_CANCEL_RQ
    return Command(
        field,
        _number(found, _RESPONDED_TO if responds else _MESSAGE_ID),
        _number(found, _DATA_SET_TYPE) != NO_DATA_SET,
        _uid(found, _SOP_CLASS),
        _uid(found, _SOP_INSTANCE),
        _number(found, _STATUS) if field & RESPONSE else 0,
    )


def _us(element: int, value: int) -> bytes:
    return _ELEMENT.pack(0, element, 2) + _US.pack(value)


def _ui(element: int, uid: str) -> bytes:
    value = uid.encode("ascii")
    value += b"\0" * (len(value) & 1)
    return _ELEMENT.pack(0, element, len(value)) + value


def _message(*elements: bytes) -> bytes:
    body = b"".join(elements)
    return _GROUP_LENGTH.pack(0, 0, 4, len(body)) + body


def store_request(message_id: int, sop_class: str, sop_instance: str) -> bytes:
    """A C-STORE-RQ of medium priority (PS3.7 §9.3.1.1)."""
    return _message(
        _ui(_SOP_CLASS, sop_class),
        _us(_FIELD, CommandField.C_STORE_RQ),
        _us(_MESSAGE_ID, message_id),
        _us(_PRIORITY, 0),
        _us(_DATA_SET_TYPE, DATA_SET),
        _ui(_SOP_INSTANCE, sop_instance),
    )


def echo_request(message_id: int, sop_class: str) -> bytes:
    """A C-ECHO-RQ (PS3.7 §9.3.5.1)."""
    return _message(
        _ui(_SOP_CLASS, sop_class),
        _us(_FIELD, CommandField.C_ECHO_RQ),
        _us(_MESSAGE_ID, message_id),
        _us(_DATA_SET_TYPE, NO_DATA_SET),
    )


def response(request: Command, status: int) -> bytes:
    """The response to any request: its own UIDs, as far as they are UIDs, and `status`; no data set."""
    return _message(
        _ui(_SOP_CLASS, request.sop_class) if is_uid(request.sop_class) else b"",
        _us(_FIELD, request.field | RESPONSE),
        _us(_RESPONDED_TO, request.message_id),
        _us(_DATA_SET_TYPE, NO_DATA_SET),
        _us(_STATUS, status),
        _ui(_SOP_INSTANCE, request.sop_instance) if is_uid(request.sop_instance) else b"",
    )
