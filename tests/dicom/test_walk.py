"""The walk over data sets: what passes, what is refused and why, what is edited."""

from __future__ import annotations

import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import UID
from pynetdicom.dsutils import encode

from dicom.faults import STATUS, Reason, Refused
from dicom.syntaxes import ENCODINGS
from dicom.walk import Outline, WalkLimits, rebuilt, walk
from tests.dicom.datasets import (
    BIG,
    CT,
    EXPLICIT,
    IMPLICIT,
    INSTANCE,
    JPEG,
    UNDEFINED,
    element,
    end_sequence,
    fragments,
    head,
    item,
    measured,
    names,
    nested,
    open_item,
    open_sequence,
    read_back,
    readable_files,
    sequence,
    split_file,
    uid,
)

NATIVE = (IMPLICIT, EXPLICIT, BIG)
PIXELS = 0x7FE00010


def outline_of(data: bytes, syntax: str = EXPLICIT, limits: WalkLimits | None = None) -> Outline:
    with memoryview(data) as view:
        return walk(view, syntax, limits or WalkLimits())


def remade(data: bytes, outline: Outline) -> bytes:
    with memoryview(data) as view:
        return b"".join(rebuilt(view, outline.edits))


class Clock:
    """Moves one second with each look."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


# ---- what passes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("syntax", NATIVE)
def test_names_and_native_pixels(syntax: str) -> None:
    before = names(syntax) + element(0x00280010, "US", b"\0\2", syntax)
    data = before + element(PIXELS, "OW", b"\1\2\3\4", syntax)
    assert outline_of(data, syntax) == Outline(sop_class=CT, sop_instance=INSTANCE, transfer_syntax=syntax)
    assert measured(data, syntax) == (0, 4)


@pytest.mark.parametrize("tag", [0x7FE00008, 0x7FE00009])
def test_float_pixels(tag: int) -> None:
    data = names() + element(tag, "OD" if tag & 1 else "OF", bytes(8)) + element(0xFFFCFFFC, "OB", b"\0\0")
    assert outline_of(data).edits == ()
    assert measured(data) == (0, 4)


def test_encapsulated_pixels() -> None:
    value = fragments(b"\1\2", b"\3\4\5\6", table=bytes(8))
    data = names() + value + element(0xFFFCFFFC, "OB", b"")
    assert outline_of(data, JPEG).edits == ()
    assert measured(data, JPEG) == (0, 4), "fragments are no items, and what follows them is walked"


@pytest.mark.parametrize("syntax", NATIVE)
@pytest.mark.parametrize(
    ("shape", "depth", "elements"),
    [
        (lambda s: sequence(0x0040A730, b"", s), 0, 3),
        (lambda s: open_sequence(0x0040A730, b"", s), 1, 3),
        (lambda s: sequence(0x0040A730, item(b"", s) * 2, s), 1, 5),
        (lambda s: sequence(0x0040A730, item(element(0x00100020, "LO", b"id", s), s), s), 1, 5),
        (lambda s: sequence(0x0040A730, open_item(element(0x00100020, "LO", b"id", s), s), s), 1, 5),
        (lambda s: open_sequence(0x0040A730, item(element(0x00100020, "LO", b"id", s), s), s), 1, 5),
        (lambda s: open_sequence(0x0040A730, open_item(names(s), s), s), 1, 6),
        (lambda s: sequence(0x0040A730, item(sequence(0x0040A730, item(names(s), s), s), s), s), 2, 8),
        (lambda s: open_sequence(0x0040A730, open_item(sequence(0x0040A730, item(b"", s), s), s), s), 2, 6),
        (lambda s: nested(64, s), 64, 2 + 128),
    ],
)
def test_sequences(syntax: str, shape: object, depth: int, elements: int) -> None:
    assert callable(shape)
    data = names(syntax) + shape(syntax) + element(0x00420010, "ST", b"end.", syntax)
    assert measured(data, syntax) == (depth, elements + 1)
    assert outline_of(data, syntax).edits == ()


def test_pixels_of_an_icon_are_not_the_objects_pixels() -> None:
    icon = item(element(PIXELS, "OW", b"\1\2"))
    packed = open_item(fragments(b"\1\2"))
    for inner in (icon, packed):
        before = names() + sequence(0x00880200, inner)
        outline_of(before + fragments(b"\3\4"), JPEG)
        with pytest.raises(Refused) as caught:
            outline_of(before + element(PIXELS, "OW", b"\3\4"), JPEG)
        assert caught.value.reason == Reason.PIXELS


@pytest.mark.parametrize("syntax", [EXPLICIT, BIG])
def test_un_of_undefined_length_holds_implicit_little_endian(syntax: str) -> None:
    inner = open_item(element(0x00100020, "LO", b"id", IMPLICIT), IMPLICIT)
    unknown = open_sequence(0x00991001, inner, syntax, vr="UN")
    data = names(syntax) + unknown + sequence(0x00991002, item(names(syntax), syntax), syntax)
    assert measured(data, syntax) == (1, 2 + 3 + 4)


def test_what_is_of_unknown_kind_and_defined_length_is_opaque() -> None:
    """Bytes that would be refused as a sequence pass as the value of UN, or of a private implicit tag."""
    junk = b"\xff" * 16
    assert measured(names() + element(0x0040A730, "UN", junk)) == (0, 3)
    private = element(0x00090010, "LO", b"me", IMPLICIT) + element(0x00091001, "", junk, IMPLICIT)
    assert measured(names(IMPLICIT) + private, IMPLICIT) == (0, 4)


def test_implicit_private_sequence_of_undefined_length() -> None:
    private = open_sequence(0x00091001, item(element(0x00100020, "", b"id", IMPLICIT), IMPLICIT), IMPLICIT)
    assert measured(names(IMPLICIT) + private, IMPLICIT)[0] == 1


@pytest.mark.parametrize("syntax", sorted(ENCODINGS))
def test_each_transfer_syntax(syntax: str) -> None:
    encoding = ENCODINGS[syntax]
    pixels = fragments(b"\1\2") if encoding.encapsulated else element(PIXELS, "OW", b"\1\2", syntax)
    assert outline_of(names(syntax) + pixels, syntax).edits == ()


def test_a_private_syntax_may_do_either() -> None:
    for pixels in (fragments(b"\1\2"), element(PIXELS, "OW", b"\1\2")):
        assert outline_of(names() + pixels, "1.2.3.4").edits == ()


@pytest.mark.parametrize("padding", [b"", b"\0", b" ", b"\0\0"])
def test_uid_padding(padding: bytes) -> None:
    data = element(0x00080016, "UI", CT.encode() + padding)
    data += element(0x00080018, "UI", INSTANCE.encode() + padding)
    assert outline_of(data).sop_instance == INSTANCE


def test_group_lengths_and_barred_private_groups_pass() -> None:
    data = element(0x00010010, "LO", b"me") + element(0x00080000, "UL", b"\xff" * 4) + names()
    assert measured(data) == (0, 4)


# ---- what is refused ------------------------------------------------------------------------------------

NAME = element(0x00100010, "PN", b"A^B ")
SEQ = 0x0040A730

REFUSALS: list[tuple[str, str, bytes, Reason]] = [
    ("empty", EXPLICIT, b"", Reason.UID),
    ("no class", EXPLICIT, names()[len(element(0x00080016, "UI", uid(CT))) :], Reason.UID),
    ("no instance", EXPLICIT, element(0x00080016, "UI", uid(CT)), Reason.UID),
    ("no names at top", EXPLICIT, sequence(SEQ, item(names())), Reason.UID),
    ("uid of 65", EXPLICIT, names(instance="1." + "2" * 63), Reason.UID),
    ("uid of 65,536", EXPLICIT, names(sop_class="1." + "2" * 65000), Reason.UID),
    ("uid climbs", EXPLICIT, names(instance="../../../etc/passwd"), Reason.UID),
    ("uid climbs by digits", EXPLICIT, names(instance="1.2/../3"), Reason.UID),
    ("uid empty", EXPLICIT, names(instance=""), Reason.UID),
    ("uid of two", EXPLICIT, names(instance="1.2.3\\1.2.4"), Reason.UID),
    ("uid leading zero", EXPLICIT, names(instance="1.02.3"), Reason.UID),
    ("uid inner nul", EXPLICIT, names(instance="1.2\0.3"), Reason.UID),
    ("uid newline", EXPLICIT, names(instance="1.2.3\n"), Reason.UID),
    ("uid not ascii", EXPLICIT, names(instance="1.2.٣"), Reason.UID),
    ("uid is a sequence", EXPLICIT, sequence(0x00080016, b"") + sequence(0x00080018, b""), Reason.UID),
    ("one byte left", EXPLICIT, names() + b"\0", Reason.TRUNCATED),
    ("seven bytes left", EXPLICIT, names() + bytes(7), Reason.TRUNCATED),
    ("zeros left", EXPLICIT, names() + bytes(16), Reason.TAG),
    ("long length cut", EXPLICIT, names() + head(0x00091001, "OB", 0)[:10], Reason.TRUNCATED),
    ("value cut", EXPLICIT, names() + NAME[:-1], Reason.LENGTH),
    ("value cut, long", EXPLICIT, names() + head(0x00091001, "OB", 100) + b"x" * 98, Reason.LENGTH),
    ("value cut, implicit", IMPLICIT, names(IMPLICIT) + head(0x00100010, "", 4, IMPLICIT), Reason.LENGTH),
    ("length near 4 GiB", EXPLICIT, names() + head(0x00091001, "OB", UNDEFINED - 1), Reason.LENGTH),
    ("value beyond its item", EXPLICIT, names() + sequence(SEQ, item(NAME[:-2])) + NAME, Reason.LENGTH),
    ("item beyond its sequence", EXPLICIT, names() + head(SEQ, "SQ", 12) + item(NAME), Reason.LENGTH),
    ("sequence beyond the end", EXPLICIT, names() + head(SEQ, "SQ", 1000) + item(NAME), Reason.LENGTH),
    ("odd number", EXPLICIT, names() + element(0x00280010, "US", b"\1"), Reason.ODD_LENGTH),
    ("odd words", EXPLICIT, names() + element(0x00281201, "OW", b"\1"), Reason.ODD_LENGTH),
    ("no multiple of 4", EXPLICIT, names() + element(0x00091001, "UL", b"\1\2"), Reason.ODD_LENGTH),
    ("no multiple of 8", EXPLICIT, names() + element(0x00091001, "FD", bytes(12)), Reason.ODD_LENGTH),
    (
        "no multiple, implicit",
        IMPLICIT,
        names(IMPLICIT) + head(0x00280010, "", 1, IMPLICIT) + b"x",
        Reason.ODD_LENGTH,
    ),
    ("odd text at its limit", EXPLICIT, names() + element(0x00100010, "PN", b"x" * 65535), Reason.ODD_LENGTH),
    ("order", EXPLICIT, names() + element(0x00100020, "LO", b"") + NAME, Reason.ORDER),
    ("order in an item", EXPLICIT, names() + sequence(SEQ, item(NAME + names())), Reason.ORDER),
    ("twice", EXPLICIT, names() + NAME + NAME, Reason.DUPLICATE),
    ("twice in an item", EXPLICIT, names() + sequence(SEQ, item(NAME + NAME)), Reason.DUPLICATE),
    ("two instances", EXPLICIT, names() + names(instance="1.2.3")[-14:], Reason.DUPLICATE),
    ("command group", EXPLICIT, element(0x00000002, "UI", uid(CT)) + names(), Reason.TAG),
    ("file meta", EXPLICIT, element(0x00020010, "UI", uid(EXPLICIT)) + names(), Reason.TAG),
    (
        "file meta after 0001",
        EXPLICIT,
        element(0x00010010, "LO", b"") + element(0x00020010, "UI", b"") + names(),
        Reason.TAG,
    ),
    (
        "file meta in an item",
        EXPLICIT,
        names() + sequence(SEQ, item(element(0x00020010, "UI", b""))),
        Reason.TAG,
    ),
    ("group FFFF", EXPLICIT, names() + element(0xFFFF0010, "LO", b""), Reason.TAG),
    ("loose item", EXPLICIT, names() + item(), Reason.SEQUENCE),
    ("loose item end", EXPLICIT, names() + head(0xFFFEE00D, "", 0), Reason.SEQUENCE),
    ("loose sequence end", EXPLICIT, names() + end_sequence(), Reason.SEQUENCE),
    (
        "item end in a defined item",
        EXPLICIT,
        names() + sequence(SEQ, item(head(0xFFFEE00D, "", 0))),
        Reason.SEQUENCE,
    ),
    (
        "sequence end in an item",
        EXPLICIT,
        names() + open_sequence(SEQ, open_item(end_sequence())),
        Reason.SEQUENCE,
    ),
    (
        "sequence end in a defined sequence",
        EXPLICIT,
        names() + sequence(SEQ, end_sequence()),
        Reason.SEQUENCE,
    ),
    ("element in a sequence", EXPLICIT, names() + sequence(SEQ, NAME), Reason.SEQUENCE),
    (
        "item end in a sequence",
        EXPLICIT,
        names() + open_sequence(SEQ, head(0xFFFEE00D, "", 0)),
        Reason.SEQUENCE,
    ),
    ("unknown item", EXPLICIT, names() + open_sequence(SEQ, head(0xFFFEE001, "", 0)), Reason.SEQUENCE),
    ("sequence not ended", EXPLICIT, names() + head(SEQ, "SQ", UNDEFINED) + item(NAME), Reason.TRUNCATED),
    (
        "item not ended",
        EXPLICIT,
        names() + head(SEQ, "SQ", UNDEFINED) + head(0xFFFEE000, "", UNDEFINED),
        Reason.TRUNCATED,
    ),
    (
        "item not ended in its sequence",
        EXPLICIT,
        names() + sequence(SEQ, head(0xFFFEE000, "", UNDEFINED) + NAME),
        Reason.TRUNCATED,
    ),
    ("sequence of 4 bytes", EXPLICIT, names() + sequence(SEQ, b"\xfe\xff\0\xe0"), Reason.TRUNCATED),
    ("unknown vr", EXPLICIT, names() + NAME.replace(b"PN", b"ZZ"), Reason.VR),
    ("vr in small letters", EXPLICIT, names() + NAME.replace(b"PN", b"pn"), Reason.VR),
    ("implicit under explicit", EXPLICIT, names(IMPLICIT), Reason.VR),
    ("big under little", EXPLICIT, names(BIG), Reason.LENGTH),
    ("undefined text", EXPLICIT, names() + open_sequence(0x0040A160, b"", vr="UT"), Reason.UNDEFINED_LENGTH),
    ("undefined bytes", EXPLICIT, names() + fragments(tag=0x00091001), Reason.UNDEFINED_LENGTH),
    (
        "undefined text, implicit",
        IMPLICIT,
        names(IMPLICIT) + open_sequence(0x0040A160, b"", IMPLICIT),
        Reason.UNDEFINED_LENGTH,
    ),
    ("fragments in a native syntax", EXPLICIT, names() + fragments(b""), Reason.PIXELS),
    (
        "fragments in implicit",
        IMPLICIT,
        names(IMPLICIT) + open_sequence(PIXELS, item(), IMPLICIT),
        Reason.PIXELS,
    ),
    (
        "fragments of an icon, native",
        EXPLICIT,
        names() + sequence(0x00880200, item(fragments(b""))),
        Reason.PIXELS,
    ),
    ("fragments as UN", JPEG, names() + fragments(b"", vr="UN"), Reason.PIXELS),
    ("native in an encapsulated syntax", JPEG, names() + element(PIXELS, "OB", b"\1\2"), Reason.PIXELS),
    ("no offset table", JPEG, names() + head(PIXELS, "OB", UNDEFINED) + end_sequence(), Reason.PIXELS),
    ("offset table of 2 bytes", JPEG, names() + fragments(b"", table=b"\0\0"), Reason.PIXELS),
    ("odd fragment", JPEG, names() + fragments(b"\1"), Reason.PIXELS),
    (
        "element among fragments",
        JPEG,
        names() + head(PIXELS, "OB", UNDEFINED) + item() + NAME + end_sequence(),
        Reason.PIXELS,
    ),
    (
        "fragment of undefined length",
        JPEG,
        names() + head(PIXELS, "OB", UNDEFINED) + item() + open_item() + end_sequence(),
        Reason.PIXELS,
    ),
    ("end of fragments has a length", JPEG, names() + fragments(b"")[:-4] + b"\2\0\0\0", Reason.PIXELS),
    ("fragments not ended", JPEG, names() + fragments(b"\1\2")[:-8], Reason.TRUNCATED),
    ("fragment cut", JPEG, names() + fragments(b"\1\2")[:-9], Reason.TRUNCATED),
    ("65 deep", EXPLICIT, names() + nested(65), Reason.DEPTH),
]


@pytest.mark.parametrize(
    ("syntax", "data", "reason"), [row[1:] for row in REFUSALS], ids=[row[0] for row in REFUSALS]
)
def test_refusals(syntax: str, data: bytes, reason: Reason) -> None:
    with pytest.raises(Refused) as caught:
        outline_of(data, syntax)
    assert caught.value.reason == reason
    assert caught.value.status == STATUS[reason]


def test_every_reason_has_a_failure_status_of_its_kind() -> None:
    assert set(STATUS) == set(Reason)
    for status in STATUS.values():
        assert status in (0xA700, 0xA900, 0x0117, 0x0122) or status >> 12 == 0xC
        assert status <= 0xFFFF


def test_a_refusal_says_where_and_never_what() -> None:
    secret = b"MARPLE^JANE "
    data = names() + element(0x00100010, "PN", secret) + element(0x00100010, "PN", secret)
    with pytest.raises(Refused) as caught:
        outline_of(data)
    offset = len(data) - 8 - len(secret)
    assert str(caught.value).endswith(f"element (0010,0010) at byte {offset}")
    for said in (str(caught.value), repr(caught.value)):
        assert "MARPLE" not in said
    with pytest.raises(Refused) as caught:
        outline_of(names(instance="MARPLE^JANE"))
    assert "MARPLE" not in str(caught.value)


# ---- limits ---------------------------------------------------------------------------------------------

MANY = names() + b"".join(element(0x00090000 | n, "LO", b"ab") for n in range(1, 99))


@pytest.mark.parametrize(("limit", "passes"), [(100, True), (99, False)])
@pytest.mark.parametrize("data", [MANY, names() + sequence(SEQ, item() * 97)], ids=["elements", "items"])
def test_element_limit(data: bytes, limit: int, passes: bool) -> None:
    if passes:
        assert outline_of(data, limits=WalkLimits(max_elements=limit)).edits == ()
        return
    with pytest.raises(Refused) as caught:
        outline_of(data, limits=WalkLimits(max_elements=limit))
    assert caught.value.reason == Reason.ELEMENTS


@pytest.mark.parametrize(("limit", "passes"), [(10, True), (9, False)])
def test_fragment_limit(limit: int, passes: bool) -> None:
    data = names() + fragments(*[b"\1\2"] * 10)
    if passes:
        assert outline_of(data, JPEG, WalkLimits(max_fragments=limit)).edits == ()
        return
    with pytest.raises(Refused) as caught:
        outline_of(data, JPEG, WalkLimits(max_fragments=limit))
    assert caught.value.reason == Reason.ELEMENTS


def test_depth_limit_is_what_it_says() -> None:
    assert outline_of(names() + nested(3), limits=WalkLimits(max_depth=3)).edits == ()
    with pytest.raises(Refused) as caught:
        outline_of(names() + nested(4), limits=WalkLimits(max_depth=3))
    assert caught.value.reason == Reason.DEPTH


@pytest.mark.parametrize(
    ("data", "syntax"),
    [
        (names() + sequence(SEQ, item() * 50_000), EXPLICIT),
        (names() + fragments(*[b""] * 50_000), JPEG),
    ],
    ids=["items", "fragments"],
)
def test_time_limit(data: bytes, syntax: str) -> None:
    clock = Clock()
    with pytest.raises(Refused) as caught:
        outline_of(data, syntax, WalkLimits(seconds=3.5, clock=clock))
    assert caught.value.reason == Reason.TIME and caught.value.status == 0xA700
    assert clock.now == 5.0


# ---- edits ----------------------------------------------------------------------------------------------


def as_written(*parts: bytes) -> bytes:
    return names() + b"".join(parts)


ODD_NAME = element(0x00100010, "PN", b"A^B")
ODD_UNKNOWN = element(0x00091001, "UN", b"abc")

EDITS: list[tuple[str, str, bytes, bytes]] = [
    ("text", EXPLICIT, as_written(ODD_NAME), as_written(element(0x00100010, "PN", b"A^B "))),
    ("bytes", EXPLICIT, as_written(ODD_UNKNOWN), as_written(element(0x00091001, "UN", b"abc\0"))),
    ("uid", EXPLICIT, names().replace(b"\x1a\0" + CT.encode() + b"\0", b"\x19\0" + CT.encode()), names()),
    (
        "implicit",
        IMPLICIT,
        names(IMPLICIT) + element(0x00100010, "", b"A^B", IMPLICIT),
        names(IMPLICIT) + element(0x00100010, "", b"A^B ", IMPLICIT),
    ),
    (
        "big endian",
        BIG,
        names(BIG) + sequence(SEQ, item(element(0x00100010, "PN", b"A^B", BIG), BIG), BIG),
        names(BIG) + sequence(SEQ, item(element(0x00100010, "PN", b"A^B ", BIG), BIG), BIG),
    ),
    (
        "lengths around it",
        EXPLICIT,
        as_written(sequence(SEQ, item(sequence(SEQ, item(ODD_NAME) + item(ODD_NAME))) + item(ODD_NAME))),
        as_written(sequence(SEQ, item(sequence(SEQ, item(NAME) + item(NAME))) + item(NAME))),
    ),
    (
        "undefined length between",
        EXPLICIT,
        as_written(sequence(SEQ, open_item(open_sequence(SEQ, item(ODD_NAME))))),
        as_written(sequence(SEQ, open_item(open_sequence(SEQ, item(NAME))))),
    ),
    (
        "within UN, within big endian",
        BIG,
        names(BIG)
        + open_sequence(0x00991001, item(element(0x00100010, "", b"A^B", IMPLICIT), IMPLICIT), BIG, vr="UN"),
        names(BIG)
        + open_sequence(0x00991001, item(element(0x00100010, "", b"A^B ", IMPLICIT), IMPLICIT), BIG, vr="UN"),
    ),
    (
        "reserved bytes",
        EXPLICIT,
        as_written(head(0x00091001, "OB", 2, reserved=0x4D5A), b"ab"),
        as_written(head(0x00091001, "OB", 2), b"ab"),
    ),
    (
        "delimiters with a length",
        EXPLICIT,
        as_written(head(SEQ, "SQ", UNDEFINED), open_item(NAME, rest=6), end_sequence(rest=8)),
        as_written(head(SEQ, "SQ", UNDEFINED), open_item(NAME), end_sequence()),
    ),
]


@pytest.mark.parametrize(
    ("syntax", "data", "expected"), [row[1:] for row in EDITS], ids=[row[0] for row in EDITS]
)
def test_edits(syntax: str, data: bytes, expected: bytes) -> None:
    outline = outline_of(data, syntax)
    assert remade(data, outline) == expected
    assert outline.edits == tuple(sorted(outline.edits))
    assert outline_of(expected, syntax).edits == ()


def test_rebuilt_without_edits_is_one_view_of_the_same_bytes() -> None:
    data = names()
    with memoryview(data) as view:
        (piece,) = rebuilt(view, ())
        assert isinstance(piece, memoryview) and piece.obj is data
        piece.release()


# ---- pydicom's files ------------------------------------------------------------------------------------

REFUSED_FILES: dict[str, Reason] = {
    # Their data sets have no SOP Class UID, so no C-STORE can carry them.
    **dict.fromkeys(
        (
            "charset_files/chrSQEncoding.dcm",
            "charset_files/chrSQEncoding1.dcm",
            "test_files/UN_sequence.dcm",
            "test_files/empty_charset_LEI.dcm",
            "test_files/nested_priv_SQ.dcm",
            "test_files/no_meta_group_length.dcm",
            "test_files/priv_SQ.dcm",
        ),
        Reason.UID,
    ),
    # Cut short; pydicom reads what there is.
    "test_files/MR_truncated.dcm": Reason.LENGTH,
    "test_files/rtplan_truncated.dcm": Reason.LENGTH,
    # A directory whose record sequence says too great a length.
    "dicomdirtests/DICOMDIR-nooffset": Reason.LENGTH,
    # Implicit VR under a JPEG transfer syntax.
    "test_files/SC_rgb_jpeg.dcm": Reason.VR,
}


def refusal_of_file(name: str) -> Reason | None:
    directory = Reason.UID if "/DICOMDIR" in name else None  # a medium's index, no object
    return REFUSED_FILES.get(name, directory)


def plain(ds: Dataset) -> dict[int, object]:
    return {int(each.tag): (str(each.VR), each.value) for each in ds}


@pytest.mark.filterwarnings("ignore")
def test_readable_files_pass_as_they_are() -> None:
    files = readable_files()
    assert len(files) > 170
    for name, path in files.items():
        syntax, data = split_file(path)
        expected = refusal_of_file(name)
        if expected is not None:
            with pytest.raises(Refused) as caught:
                outline_of(data, syntax)
            assert caught.value.reason == expected, name
            continue
        outline = outline_of(data, syntax)
        assert outline.sop_instance == pydicom.dcmread(path).SOPInstanceUID, name
        assert outline.edits == (), name


@pytest.mark.filterwarnings("ignore")
def test_readable_files_pass_as_pynetdicom_sends_them() -> None:
    for name, path in readable_files().items():
        ds = pydicom.dcmread(path)
        syntax = UID(ds.file_meta.TransferSyntaxUID)
        data = encode(ds, syntax.is_implicit_VR, syntax.is_little_endian)
        if data is None or refusal_of_file(name) is not None:
            continue
        assert outline_of(data, syntax).edits == (), name


def test_odd_values_arrive_equal() -> None:
    """pydicom reads the padded data set as it reads the odd one."""
    data = as_written(ODD_NAME, sequence(SEQ, item(element(0x0040A160, "UT", b"odd"))))
    outline = outline_of(data)
    assert len(outline.edits) == 6
    assert plain(read_back(remade(data, outline), EXPLICIT)) == plain(read_back(data, EXPLICIT))
