"""A bounded walk over an encoded data set: is its structure true, and what is it called?

The walk reads headers only and skips each value by its length, so its cost is that of the number of
elements, not of bytes; `data` may map a file of many gigabytes. It does not recurse: nesting is a list.

    data set   ┌ tag 4 │ VR 2 │ length 2 │ value ┐ …     explicit VR, short form   (PS3.5 §7.1.2)
               │ tag 4 │ VR 2 │ 0 2 │ length 4 │ value   explicit VR, long form
               └ tag 4 │ length 4 │ value                implicit VR               (PS3.5 §7.1.3)
    sequence   ┌ FFFE,E000 │ length 4 │ data set ┐ …     ends by its length, or by FFFE,E0DD  (PS3.5 §7.5)
    pixels     ┌ FFFE,E000 │ length 4 │ offset table │ FFFE,E000 │ length 4 │ fragment … │ FFFE,E0DD (§A.4)

What two parsers would read in two ways does not pass: it is refused, or, where there is one sound reading,
the outline lists the *edits* that make it the only one (an odd value padded, reserved bytes zeroed). Nearly
all objects have none, and their bytes cross as they are.

Group lengths (gggg,0000) may stand in a data set and are not believed by anyone (PS3.5 §7.2); they stay.

Never here: values (but for the two UIDs that name the object), I/O, clocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from struct import Struct

from pydicom._dicom_dict import DicomDictionary

from dicom.faults import Reason, Refused
from dicom.syntaxes import encoding_of
from relay.records import MAX_UID_CHARS, Buffer, is_uid

__all__ = ["Edit", "Outline", "Reason", "Refused", "WalkLimits", "rebuilt", "walk"]

Edit = tuple[int, int, bytes]
"""(offset, bytes to remove there, bytes to put in their place)."""

UNDEFINED = 0xFFFFFFFF
ITEM = 0xFFFEE000
ITEM_END = 0xFFFEE00D
SEQUENCE_END = 0xFFFEE0DD
DELIMITERS = 0xFFFE0000
"""Tags from here on are no elements: items and delimiters (group FFFE), and group FFFF, which is barred."""

COMMANDS = 0x0000FFFF
"""Tags up to here are command elements (group 0000)."""

FILE_META = 0x00020000
FILE_META_END = 0x0002FFFF
"""File meta information: in a file's head, never in a data set. The private groups 0001 to 0007, which PS3.5
§7.8 bars, do occur; they mislead no parser and pass."""

SOP_CLASS = 0x00080016
SOP_INSTANCE = 0x00080018
PIXELS = 0x7FE00010

WATCHED = (FILE_META, SOP_CLASS, SOP_INSTANCE, PIXELS)
"""Top-level tags at which the walk looks up, ascending."""

SEQUENCE = -1
"""In place of a mask: this VR holds items, and a length that is not 0 needs a look inside."""
LONG = -2
"""In place of a mask: not in the table at hand."""

SHORT_MASKS: dict[bytes, int] = {
    **dict.fromkeys((b"AE", b"AS", b"CS", b"DA", b"DS", b"DT", b"IS", b"LO", b"LT", b"PN", b"SH", b"ST"), 1),
    **dict.fromkeys((b"TM", b"UI", b"SS", b"US"), 1),
    **dict.fromkeys((b"AT", b"FL", b"SL", b"UL"), 3),
    b"FD": 7,
}
"""VRs with a 16-bit length; which low bits of a length must be zero (PS3.5 §6.2)."""

LONG_MASKS: dict[bytes, int] = {
    **dict.fromkeys((b"OB", b"OW", b"UC", b"UN", b"UR", b"UT"), 1),
    **dict.fromkeys((b"OF", b"OL"), 3),
    **dict.fromkeys((b"OD", b"OV", b"SV", b"UV"), 7),
    b"SQ": SEQUENCE,
}
"""VRs with two reserved bytes and a 32-bit length. A VR in neither table is refused: parsers in the field
disagree on which form an unknown one has, so no two of them would read what follows alike."""

MASKS = SHORT_MASKS | LONG_MASKS

IMPLICIT_VRS: dict[int, bytes] = {
    tag: entry[0].split(" or ")[0].encode() for tag, entry in DicomDictionary.items()
}
IMPLICIT_MASKS: dict[int, int] = {tag: MASKS.get(vr, 1) for tag, vr in IMPLICIT_VRS.items()}
"""The same by tag, for implicit VR. Private and unknown elements are opaque."""

PADS: dict[bytes, bytes] = {
    **dict.fromkeys(
        (b"AE", b"AS", b"CS", b"DA", b"DS", b"DT", b"IS", b"LO", b"LT", b"PN", b"SH", b"ST"), b" "
    ),
    **dict.fromkeys((b"TM", b"UC", b"UR", b"UT"), b" "),
    **dict.fromkeys((b"OB", b"UI", b"UN"), b"\0"),
}
"""What makes an odd value even (PS3.5 §6.2). Numbers are not here: an odd one has lost a byte."""

MAX_SHORT = 0xFFFE
"""The longest even value that a 16-bit length can tell."""

CHECK_EVERY = 4096
"""Headers between two looks at the clock: under 5 ms of work."""

_EXPLICIT = {False: Struct("<HH2sH").unpack_from, True: Struct(">HH2sH").unpack_from}
_HEADER = {False: Struct("<HHL").unpack_from, True: Struct(">HHL").unpack_from}
_LONG = {False: Struct("<L"), True: Struct(">L")}
_SHORT = {False: Struct("<H"), True: Struct(">H")}


def no_clock() -> float:
    """A clock that stands still, for callers who do not limit time."""
    return 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WalkLimits:
    """What a data set may cost. `clock` gives seconds; without one, `seconds` never ends a walk."""

    max_depth: int = 64
    """Sequences within sequences. The deepest standard object nests about ten; pydicom's recursion, which
    receivers share, ends near 249."""
    max_elements: int = 2_000_000
    """Elements and items together, some 2 s of work. A whole-slide image with a functional group for each
    of 50,000 frames stays below."""
    max_fragments: int = 2_000_000
    """Fragments of encapsulated pixels: hours of video with a fragment for each frame."""
    seconds: float = 10.0
    """Time of one walk, so that a crowded machine sheds load instead of falling behind."""
    clock: Callable[[], float] = no_clock


DEFAULT_LIMITS = WalkLimits()


@dataclass(frozen=True, slots=True, kw_only=True)
class Outline:
    """What a walk found out about a data set.

    `edits`, ascending, are what `rebuilt` changes.
    """

    sop_class: str
    sop_instance: str
    transfer_syntax: str
    edits: tuple[Edit, ...] = ()


def _refused(reason: Reason, what: str, tag: int, offset: int) -> Refused:
    return Refused(reason, f"{what}: element ({tag >> 16:04X},{tag & 0xFFFF:04X}) at byte {offset}")


def _misplaced(tag: int, last: int, offset: int) -> Refused:
    """Why `tag` may not follow `last` in a data set."""
    if tag == last:
        return _refused(Reason.DUPLICATE, "an element is there twice", tag, offset)
    if tag in (ITEM, ITEM_END, SEQUENCE_END):
        return _refused(Reason.SEQUENCE, "an item or a delimiter stands loose", tag, offset)
    if tag >= DELIMITERS or tag <= COMMANDS or FILE_META <= tag <= FILE_META_END:
        return _refused(Reason.TAG, "this group may not be in a stored data set", tag, offset)
    return _refused(Reason.ORDER, "tags do not ascend", tag, offset)


def _checkpoint(count: int, limits: WalkLimits, began: float, tag: int, pos: int) -> int:
    """Hold `count` and the time against their limits; return the count at which to look again."""
    if count > limits.max_elements:
        raise _refused(Reason.ELEMENTS, f"the data set has over {limits.max_elements} elements", tag, pos)
    if limits.clock() - began > limits.seconds:
        raise _refused(Reason.TIME, f"checking takes over {limits.seconds:g} s", tag, pos)
    return min(count + CHECK_EVERY, limits.max_elements + 1)


def _fragments(data: memoryview, pos: int, end: int, big: bool, limits: WalkLimits, began: float) -> int:
    """Walk encapsulated pixels from their first item; return where they end (PS3.5 §A.4).

    The first item is the basic offset table: empty, or 32-bit offsets.
    """
    header = _HEADER[big]
    for count in range(limits.max_fragments + 2):
        if pos + 8 > end:
            raise _refused(Reason.TRUNCATED, "pixel data has no end", PIXELS, pos)
        group, element, length = header(data, pos)
        tag = group << 16 | element
        if tag != ITEM:
            if tag != SEQUENCE_END or length:
                raise _refused(Reason.PIXELS, "pixel data holds what is no fragment", PIXELS, pos)
            if not count:
                raise _refused(Reason.PIXELS, "pixel data lacks its offset table", PIXELS, pos)
            return pos + 8
        if length & 1:
            raise _refused(Reason.PIXELS, "a fragment has an odd length", PIXELS, pos)
        if not count and length & 3:
            raise _refused(Reason.PIXELS, "the offset table is not of 32-bit offsets", PIXELS, pos)
        if length > end - pos - 8:
            raise _refused(Reason.TRUNCATED, "a fragment is longer than what holds it", PIXELS, pos)
        pos += 8 + length
        if not count % CHECK_EVERY:
            _checkpoint(0, limits, began, PIXELS, pos)
    raise _refused(Reason.ELEMENTS, f"pixel data has over {limits.max_fragments} fragments", PIXELS, pos)


def _value(data: memoryview, pos: int, implicit: bool, big: bool) -> tuple[int, int]:
    """Where the value of the (walked, so sound) element at `pos` begins and ends."""
    if implicit or bytes(data[pos + 4 : pos + 6]) in LONG_MASKS:
        at = pos + 4 if implicit else pos + 8
        return at + 4, at + 4 + int(_LONG[big].unpack_from(data, at)[0])
    return pos + 8, pos + 8 + int(_SHORT[big].unpack_from(data, pos + 6)[0])


def _uid(data: memoryview, tag: int, pos: int | None, implicit: bool, big: bool) -> str:
    """The UID in the element `tag`, whose header is at `pos`. Trailing NULs and spaces are padding."""
    if pos is None:
        raise Refused(Reason.UID, f"the data set lacks element ({tag >> 16:04X},{tag & 0xFFFF:04X})")
    start, end = _value(data, pos, implicit, big)
    text = "" if end - start > MAX_UID_CHARS + 2 else bytes(data[start:end]).decode("ascii", "replace")
    uid = text.rstrip("\0 ")
    if not is_uid(uid):
        raise _refused(Reason.UID, "the value is no UID of at most 64 characters", tag, pos)
    return uid


def walk(data: memoryview, transfer_syntax: str, limits: WalkLimits = DEFAULT_LIMITS) -> Outline:
    """Check the structure of a data set as C-STORE carries it: no preamble, no group 0002.

    `data` is of format "B"; deflated syntaxes are walked after inflation (`inflate.examine`). One function,
    because a call per element would double its time, and it runs for each object on both sides.

    Raises:
        Refused: The data set is malformed, beyond a limit, or lacks a sound SOP Class or Instance UID.
    """
    encoding = encoding_of(transfer_syntax)
    implicit, big = encoding.implicit, encoding.big_endian
    explicit_header, header, long = _EXPLICIT[big], _HEADER[big], _LONG[big].unpack_from
    short_mask, long_mask, implicit_mask = SHORT_MASKS.get, LONG_MASKS.get, IMPLICIT_MASKS.get
    began = limits.clock()

    # The container we are in: the top-level data set, a sequence (in_items), or an item. `end` is where it
    # ends or, while its length is undefined (open_), where the innermost one of defined length does.
    # `length_at` is where its length stands, 0 if it has none; `grown` is what edits inside it add.
    stack: list[tuple[bool, int, bool, int, int, bool, bool, int, int]] = []
    in_items, open_, end, length_at, grown = False, False, len(data), 0, 0
    last, watch = COMMANDS, FILE_META  # the next tag is above `last`; from `watch` on it needs a look

    noted: dict[int, int] = {}
    in_fragments = False
    edits: list[Edit] = []
    pos = count = 0
    check_at = min(CHECK_EVERY, limits.max_elements + 1)

    while True:
        if pos + 8 > end:  # the container has ended, or lacks its end
            if pos != end:
                raise _refused(Reason.TRUNCATED, "bytes are left over that are no element, after", last, pos)
            if open_:
                raise _refused(Reason.TRUNCATED, "a delimiter is missing, after", last, pos)
            if not stack:
                break
            length, growth, at = pos - length_at - 4 + grown, grown, length_at
            in_items, end, open_, last, watch, implicit, big, length_at, grown = stack.pop()
            header = _HEADER[big]
            if growth:
                grown += growth
                if at:
                    if length >= UNDEFINED:
                        raise _refused(Reason.LENGTH, "a sequence or item is too long to pad", last, pos)
                    edits.append((at, 4, _LONG[big].pack(length)))
            continue

        if in_items:
            group, element, length = header(data, pos)
            tag = group << 16 | element
            if tag == ITEM:
                count += 1
                if count >= check_at:
                    check_at = _checkpoint(count, limits, began, tag, pos)
                stack.append((True, end, open_, last, watch, implicit, big, length_at, grown))
                in_items, open_, last, watch, grown = False, length == UNDEFINED, COMMANDS, FILE_META, 0
                length_at = 0 if open_ else pos + 4
                pos += 8
                if not open_:
                    if length > end - pos:
                        raise _refused(Reason.LENGTH, "an item is longer than what holds it", tag, pos - 8)
                    end = pos + length
            elif tag == SEQUENCE_END and open_:
                if length:
                    edits.append((pos + 4, 4, bytes(4)))
                pos = end = pos + 8
                open_ = False
            else:
                raise _refused(Reason.SEQUENCE, "a sequence holds what is no item", tag, pos)
            continue

        if implicit:
            group, element, length = header(data, pos)
        else:
            group, element, vr, length = explicit_header(data, pos)
        tag = group << 16 | element
        if not last < tag < watch:
            if tag == ITEM_END and open_:
                if data[pos + 4 : pos + 8] != bytes(4):
                    edits.append((pos + 4, 4, bytes(4)))
                pos = end = pos + 8
                open_ = False
                continue
            if not last < tag < DELIMITERS or FILE_META <= tag <= FILE_META_END:
                raise _misplaced(tag, last, pos)
            if stack:
                watch = FILE_META if tag < FILE_META else DELIMITERS
            else:
                noted[tag] = pos
                watch = next((watched for watched in WATCHED if watched > tag), DELIMITERS)
        last = tag
        count += 1
        if count >= check_at:
            check_at = _checkpoint(count, limits, began, tag, pos)

        value = pos + 8
        if implicit:
            mask = implicit_mask(tag, 1)
        else:
            mask = short_mask(vr, LONG)
            if mask == LONG:
                mask = long_mask(vr, LONG)
                if mask == LONG:
                    raise _refused(Reason.VR, "the value representation is unknown", tag, pos)
                if length:  # reserved bytes
                    edits.append((pos + 6, 2, bytes(2)))
                if value + 4 > end:
                    raise _refused(Reason.TRUNCATED, "the length is cut short", tag, pos)
                length = long(data, value)[0]
                value += 4

        if not length & mask:
            pos = value + length
            if pos > end:
                raise _refused(Reason.LENGTH, "a value is longer than what holds it", tag, value)
            continue

        # No plain value of a sound length: a sequence, pixels in fragments, or a fault.
        if length == UNDEFINED:
            if tag == PIXELS:
                if implicit or encoding.encapsulated is False or vr not in (b"OB", b"OW"):
                    raise _refused(Reason.PIXELS, "the transfer syntax has no fragments", tag, pos)
                pos = _fragments(data, value, end, big, limits, began)
                if not stack:
                    in_fragments = True
                continue
            into_implicit = not implicit and vr == b"UN"
            if mask != SEQUENCE and not into_implicit and (not implicit or tag in IMPLICIT_MASKS):
                raise _refused(
                    Reason.UNDEFINED_LENGTH, "only a sequence may be of undefined length", tag, pos
                )
        elif length > end - value:
            raise _refused(Reason.LENGTH, "a value is longer than what holds it", tag, value)
        elif mask != SEQUENCE:
            pad = PADS.get(IMPLICIT_VRS.get(tag, b"UN") if implicit else vr)
            short = not implicit and vr in SHORT_MASKS
            if pad is None or (short and length > MAX_SHORT):
                raise _refused(Reason.ODD_LENGTH, "the length is no multiple of the value's unit", tag, pos)
            width = _SHORT[big] if short else _LONG[big]
            edits.append((value - width.size, width.size, width.pack(length + 1)))
            edits.append((value + length, 0, pad))
            grown += 1
            pos = value + length
            continue
        else:
            into_implicit = False
        depth = len(stack) // 2 + 1
        if depth > limits.max_depth:
            raise _refused(Reason.DEPTH, f"sequences are nested over {limits.max_depth} deep", tag, pos)
        stack.append((False, end, open_, last, watch, implicit, big, length_at, grown))
        in_items, open_, grown = True, length == UNDEFINED, 0
        length_at = 0 if open_ else value - 4
        if not open_:
            end = value + length
        if into_implicit:  # PS3.5 §6.2.2: UN of undefined length holds implicit VR little endian
            implicit, big, header = True, False, _HEADER[False]
        pos = value

    if encoding.encapsulated and PIXELS in noted and not in_fragments:
        raise _refused(Reason.PIXELS, "the transfer syntax needs fragments", PIXELS, noted[PIXELS])
    return Outline(
        sop_class=_uid(data, SOP_CLASS, noted.get(SOP_CLASS), implicit, big),
        sop_instance=_uid(data, SOP_INSTANCE, noted.get(SOP_INSTANCE), implicit, big),
        transfer_syntax=transfer_syntax,
        edits=tuple(sorted(edits)),
    )


def rebuilt(data: memoryview, edits: tuple[Edit, ...]) -> Iterator[Buffer]:
    """The pieces of a data set with its edits done, in order, without a copy of what stays.

    The pieces are views of `data`: release them before whatever `data` maps is closed.
    """
    pos = 0
    for offset, removed, inserted in edits:
        if offset > pos:
            yield data[pos:offset]
        if inserted:
            yield inserted
        pos = offset + removed
    if pos < len(data):
        yield data[pos:]
