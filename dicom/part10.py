"""The head of a DICOM file (PS3.10 §7.1): made anew for each object, and read back strictly.

    ┌ 128 zero bytes │ DICM │ (0002,0000) group length │ (0002,0001) version │ media storage class,
    │ instance, transfer syntax │ our implementation class UID, version name ┐ data set …

A preamble can hold a program and group 0002 the sender's name, so nothing of a sender's head is kept.

Never here: I/O, the data set (see `walk.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from struct import Struct, pack

from dicom.faults import Reason, Refused
from dicom.walk import LONG_MASKS
from relay.records import MAX_UID_CHARS, Buffer, is_uid

IMPLEMENTATION_CLASS_UID = "2.25.325977308476855155404451877173834172933"
"""Names medferry in associations and files. Under 2.25, so it needs no registered root (PS3.5 §B.2)."""

IMPLEMENTATION_VERSION_NAME = "MEDFERRY_0.1"
"""At most 16 characters (PS3.7 §D.3.3.2)."""

PREAMBLE = bytes(128)
MAGIC = b"DICM"
META_START = len(PREAMBLE) + len(MAGIC)

MAX_META_BYTES = 64 * 1024
"""Bytes of group 0002. Ours has about 250; other writers add names and a private block."""

HEADS_REMEMBERED = 64
"""Kinds of objects (class and transfer syntax) whose heads are not made anew each time."""

_ELEMENT = Struct("<HH2sH")
_LENGTH = Struct("<L")
_GROUP_LENGTH = _ELEMENT.pack(0x0002, 0x0000, b"UL", 4)
_VERSION = pack("<HH2sHL2s", 0x0002, 0x0001, b"OB", 0, 2, b"\0\1")
_WANTED = {0x0002: "sop_class", 0x0003: "sop_instance", 0x0010: "transfer_syntax"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What a file's head says. The data set begins at `data_offset`."""

    sop_class: str
    sop_instance: str
    transfer_syntax: str
    data_offset: int


def _text(element: int, vr: bytes, value: str, pad: bytes) -> bytes:
    raw = value.encode("ascii")
    raw += pad * (len(raw) & 1)
    return _ELEMENT.pack(0x0002, element, vr, len(raw)) + raw


def header(sop_class: str, sop_instance: str, transfer_syntax: str) -> bytes:
    """The bytes that go before a data set to make it a file.

    Raises:
        ValueError: A UID is none. Callers have checked it; writing it would spoil the file.
    """
    if not is_uid(sop_instance):
        raise ValueError("a file head needs three sound UIDs")
    before, after = _around_instance(sop_class, transfer_syntax)
    instance = _text(0x0003, b"UI", sop_instance, b"\0")
    length = _LENGTH.pack(len(before) + len(instance) + len(after))
    return b"".join((PREAMBLE, MAGIC, _GROUP_LENGTH, length, before, instance, after))


@lru_cache(maxsize=HEADS_REMEMBERED)
def _around_instance(sop_class: str, transfer_syntax: str) -> tuple[bytes, bytes]:
    """What stands before and behind the instance's UID, the same for all objects of a kind."""
    if not is_uid(sop_class) or not is_uid(transfer_syntax):
        raise ValueError("a file head needs three sound UIDs")
    before = _VERSION + _text(0x0002, b"UI", sop_class, b"\0")
    after = (
        _text(0x0010, b"UI", transfer_syntax, b"\0"),
        _text(0x0012, b"UI", IMPLEMENTATION_CLASS_UID, b"\0"),
        _text(0x0013, b"SH", IMPLEMENTATION_VERSION_NAME, b" "),
    )
    return before, b"".join(after)


def _bad(what: str, offset: int) -> Refused:
    return Refused(Reason.HEADER, f"the file's head is unsound: {what} at byte {offset}")


def parse(data: Buffer) -> Header:
    """Read a file's head: ours, or any that keeps PS3.10 §7.1. The preamble is not looked at.

    `data` may be the file's beginning or all of it.

    Raises:
        Refused: The head is malformed, cut short, over `MAX_META_BYTES`, or lacks one of the three UIDs.
    """
    if len(data) < META_START + 12 or bytes(data[len(PREAMBLE) : META_START]) != MAGIC:
        raise _bad("no DICM mark", len(PREAMBLE))
    group, element, vr, size = _ELEMENT.unpack_from(data, META_START)
    if (group, element, vr, size) != (0x0002, 0x0000, b"UL", 4):
        raise _bad("no group length", META_START)
    pos = META_START + 12
    end = pos + int(_LENGTH.unpack_from(data, META_START + 8)[0])
    if end - pos > MAX_META_BYTES:
        raise _bad(f"group 0002 is over {MAX_META_BYTES} bytes", META_START)
    if end > len(data):
        raise _bad("group 0002 is cut short", META_START)

    found: dict[str, str] = {}
    last = 0
    while pos < end:
        if pos + 8 > end:
            raise _bad("bytes are left over", pos)
        group, element, vr, size = _ELEMENT.unpack_from(data, pos)
        value = pos + 8
        if group != 0x0002 or element <= last:
            raise _bad("an element is out of place", pos)
        if vr in LONG_MASKS:
            if value + 4 > end:
                raise _bad("a length is cut short", pos)
            size = int(_LENGTH.unpack_from(data, value)[0])
            value += 4
        if size > end - value:
            raise _bad("a value is longer than the group", pos)
        if name := _WANTED.get(element):
            text = bytes(data[value : value + min(size, MAX_UID_CHARS + 2)]).decode("ascii", "replace")
            found[name] = text.rstrip("\0 ")
            if size > MAX_UID_CHARS + 2 or not is_uid(found[name]):
                raise _bad("a UID is none", pos)
        last, pos = element, value + size
    if len(found) != len(_WANTED):
        raise _bad("the class, instance or transfer syntax is missing", end)
    return Header(**found, data_offset=end)
