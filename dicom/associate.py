"""A-ASSOCIATE-RQ and -AC as they are read: bytes in, values out (PS3.8 §9.3.2, §9.3.3, PS3.7 Annex D).

    body ┌ version u16 │ 00 00 │ called 16 │ calling 16 │ 32 × 00 ┬ item ┬ item ┬ …
    item ┌ type u8 │ 00 │ length u16 │ value: sub-items of the same shape, or a UID, or numbers

These come before anybody is known, so the walker has a limit on everything: a request of 128 contexts with 30
transfer syntaxes each is read in about 3 ms, where pynetdicom's decoding of it takes 140. Items that nobody
here needs (implementation names, extended negotiation, user identity) or knows are passed over, which the
standard lets an acceptor do without an answer.

Never here: I/O, states, what is accepted (negotiation.py). Writing is pynetdicom's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from struct import Struct

from dicom.pdata import MIN_PDU_LENGTH
from relay.errors import PeerError

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

_FIXED = Struct(">HH16s16s")
_ITEM = Struct(">BxH")
_PAIR = Struct(">HH")
_LENGTH = Struct(">L")


class AssociateError(PeerError):
    """An A-ASSOCIATE PDU is malformed."""

    def __init__(self, detail: str) -> None:
        super().__init__("associate", detail)


@dataclass(frozen=True, slots=True)
class ContextItem:
    """A presentation context as proposed, or the answer to one. What should be a UID may be anything."""

    id: int
    result: int
    """In an answer (PS3.8 Table 9-18)."""
    abstract_syntax: str
    """In a proposal."""
    transfer_syntaxes: tuple[str, ...]


@dataclass(slots=True)
class UserInformation:
    """What either side says of itself, as far as it is of use (PS3.7 §D.3.3)."""

    max_length: int = 0
    """Bytes of the longest P-DATA-TF it takes; 0 for any."""
    roles: dict[str, tuple[bool, bool]] = field(default_factory=dict)
    """SOP class to the roles of the requestor: SCU, SCP."""
    operations: tuple[int, int] | None = None
    """Asynchronous operations: invoked, performed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AssociateRequest:
    """An A-ASSOCIATE-RQ as read. Text is printable ASCII."""

    version: int
    calling_ae_title: str
    called_ae_title: str
    application_context: str
    contexts: tuple[ContextItem, ...]
    user: UserInformation
    titles: bytes
    """The fixed fields from the called title on, as an answer repeats them (PS3.8 Table 9-17)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AssociateAnswer:
    """An A-ASSOCIATE-AC as read."""

    contexts: Mapping[int, ContextItem]
    user: UserInformation


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


def _context(data: bytes, start: int, end: int) -> ContextItem:
    if end - start < 4:
        raise AssociateError("a presentation context is cut short")
    abstract, syntaxes = "", []
    for kind, first, last in _items(data, start + 4, end, MAX_TRANSFER_SYNTAXES + 1):
        if kind == 0x40:
            syntaxes.append(data[first:last].rstrip(b"\0 ").decode("ascii", "replace"))
        elif kind == 0x30:
            abstract = data[first:last].rstrip(b"\0 ").decode("ascii", "replace")
    return ContextItem(data[start], data[start + 2], abstract, tuple(syntaxes))


def _user_information(data: bytes, start: int, end: int) -> UserInformation:
    found = UserInformation()
    for kind, first, last in _items(data, start, end, MAX_USER_ITEMS):
        size = last - first
        if kind == 0x51:
            if size != 4:
                raise AssociateError("the maximum length is not of four bytes")
            found.max_length = _LENGTH.unpack_from(data, first)[0]
            if 0 < found.max_length < MIN_PDU_LENGTH:
                raise AssociateError(f"a maximum length below {MIN_PDU_LENGTH} bytes carries nothing")
        elif kind == 0x53:
            if size != 4:
                raise AssociateError("the asynchronous operations window is not of four bytes")
            found.operations = _PAIR.unpack_from(data, first)
        elif kind == 0x54:
            if size < 4 or (length := int.from_bytes(data[first : first + 2], "big")) != size - 4:
                raise AssociateError("a role selection is not as long as it says")
            uid = data[first + 2 : first + 2 + length].rstrip(b"\0 ").decode("ascii", "replace")
            found.roles[uid] = (data[last - 2] == 1, data[last - 1] == 1)
    return found


def _variable_items(body: bytes, context_type: int) -> tuple[dict[int, ContextItem], str, UserInformation]:
    """The presentation contexts by id, the application context, and the user information."""
    contexts: dict[int, ContextItem] = {}
    application = ""
    user = UserInformation()
    for kind, start, end in _items(body, MIN_ASSOCIATE_BYTES, len(body), MAX_CONTEXTS + MAX_USER_ITEMS):
        if kind == context_type:
            context = _context(body, start, end)
            if context.id % 2 == 0 or context.id in contexts:
                raise AssociateError("a presentation context id is even or comes twice")
            contexts[context.id] = context
        elif kind == 0x10:
            application = _text(body[start:end])
        elif kind == 0x50:
            user = _user_information(body, start, end)
    return contexts, application, user


def decode_request(body: bytes) -> AssociateRequest:
    """Read an A-ASSOCIATE-RQ of at least `MIN_ASSOCIATE_BYTES`, without its PDU header.

    Raises:
        AssociateError: It is malformed.
    """
    version, _, called, calling = _FIXED.unpack_from(body)
    contexts, application, user = _variable_items(body, 0x20)
    return AssociateRequest(
        version=version,
        calling_ae_title=_text(calling),
        called_ae_title=_text(called),
        application_context=application,
        contexts=tuple(contexts.values()),
        user=user,
        titles=body[4:MIN_ASSOCIATE_BYTES],
    )


def decode_accept(body: bytes) -> AssociateAnswer:
    """Read an A-ASSOCIATE-AC of at least `MIN_ASSOCIATE_BYTES`, without its PDU header.

    Raises:
        AssociateError: It is malformed.
    """
    contexts, _, user = _variable_items(body, 0x21)
    return AssociateAnswer(contexts=contexts, user=user)
