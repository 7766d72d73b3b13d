"""The head of a file: made anew, read back strictly."""

from __future__ import annotations

import io
import struct

import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicom.faults import Reason, Refused
from dicom.part10 import (
    IMPLEMENTATION_CLASS_UID,
    IMPLEMENTATION_VERSION_NAME,
    MAX_META_BYTES,
    PREAMBLE,
    Header,
    header,
    parse,
)
from relay.records import is_uid
from tests.dicom.datasets import CT, EXPLICIT, INSTANCE, element, head, readable_files

HEAD = header(CT, INSTANCE, EXPLICIT)
UIDS = st.lists(st.integers(0, 10**9), min_size=2, max_size=6).map(lambda parts: ".".join(map(str, parts)))


def with_meta(meta: bytes, said: int | None = None) -> bytes:
    """A head around hand-made group 0002 elements."""
    length = struct.pack("<L", len(meta) if said is None else said)
    return PREAMBLE + b"DICM" + element(0x00020000, "UL", length) + meta


def meta(*extra: bytes, instance: str = INSTANCE) -> bytes:
    def even(text: str) -> bytes:
        return text.encode() + b"\0" * (len(text) & 1)

    return b"".join(
        (
            element(0x00020001, "OB", b"\0\1"),
            element(0x00020002, "UI", even(CT)),
            element(0x00020003, "UI", even(instance)),
            element(0x00020010, "UI", even(EXPLICIT)),
            *extra,
        )
    )


@given(UIDS, UIDS, UIDS)
def test_what_is_written_is_read(sop_class: str, instance: str, syntax: str) -> None:
    raw = header(sop_class, instance, syntax)
    assert parse(raw + b"data") == Header(
        sop_class=sop_class, sop_instance=instance, transfer_syntax=syntax, data_offset=len(raw)
    )
    assert len(raw) % 2 == 0


def test_pydicom_reads_it() -> None:
    ds = pydicom.dcmread(io.BytesIO(HEAD))
    assert ds.preamble == bytes(128)
    found = {each.keyword: each.value for each in ds.file_meta}
    assert found == {
        "FileMetaInformationGroupLength": len(HEAD) - 144,
        "FileMetaInformationVersion": b"\0\1",
        "MediaStorageSOPClassUID": CT,
        "MediaStorageSOPInstanceUID": INSTANCE,
        "TransferSyntaxUID": EXPLICIT,
        "ImplementationClassUID": IMPLEMENTATION_CLASS_UID,
        "ImplementationVersionName": IMPLEMENTATION_VERSION_NAME,
    }


def test_our_names_are_within_the_standards_limits() -> None:
    assert is_uid(IMPLEMENTATION_CLASS_UID)
    assert 1 <= len(IMPLEMENTATION_VERSION_NAME) <= 16


@pytest.mark.parametrize("wrong", ["", "1.2\\3", "../x", "1." + "2" * 63])
def test_no_head_is_written_with_a_uid_that_is_none(wrong: str) -> None:
    for uids in ((wrong, INSTANCE, EXPLICIT), (CT, wrong, EXPLICIT), (CT, INSTANCE, wrong)):
        with pytest.raises(ValueError, match="UIDs"):
            header(*uids)


def test_heads_of_other_writers_are_read() -> None:
    """All that are whole: some samples lack the group length or a UID on purpose."""
    whole = 0
    for name, path in readable_files().items():
        said = pydicom.filereader.read_file_meta_info(path)
        wanted = ("FileMetaInformationGroupLength", "MediaStorageSOPClassUID", "MediaStorageSOPInstanceUID")
        with open(path, "rb") as file:
            raw = file.read()
        if not all(said.get(each) for each in wanted):
            with pytest.raises(Refused):
                parse(raw)
            continue
        found = parse(raw)
        assert found.transfer_syntax == said.TransferSyntaxUID, name
        assert found.sop_instance == said.MediaStorageSOPInstanceUID, name
        whole += 1
    assert whole > 160


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_any_buffer(kind: type[bytes]) -> None:
    assert parse(kind(HEAD)).sop_class == CT


BAD: list[tuple[str, bytes]] = [
    ("nothing", b""),
    ("no mark", bytes(200)),
    ("no group length", PREAMBLE + b"DICM" + meta()),
    ("length too great", with_meta(meta(), said=len(meta()) + 2)),
    ("length too small", with_meta(meta(), said=len(meta()) - 2)),
    ("length within an element", with_meta(meta(), said=4)),
    ("length of 4 GiB", with_meta(meta(), said=0xFFFFFFFF)),
    ("over the limit", with_meta(meta(element(0x00020102, "OB", bytes(MAX_META_BYTES))))),
    ("no instance", with_meta(element(0x00020002, "UI", b"1.2."))),
    ("uid climbs", with_meta(meta(instance="../../secret"))),
    ("uid of 65", with_meta(meta(instance="1." + "2" * 63))),
    ("twice", with_meta(meta(element(0x00020010, "UI", b"1.2.3\0")))),
    ("order", with_meta(meta(element(0x00020005, "UI", b"1.2.3\0")))),
    ("other group", with_meta(meta(element(0x00080005, "CS", b"")))),
    ("value beyond the group", with_meta(meta(head(0x00020102, "OB", 10)))),
    ("long length cut", with_meta(meta(head(0x00020102, "OB", 10)[:8]))),
    ("undefined length", with_meta(meta(head(0x00020102, "SQ", 0xFFFFFFFF)))),
]


@pytest.mark.parametrize("raw", [row[1] for row in BAD], ids=[row[0] for row in BAD])
def test_refusals(raw: bytes) -> None:
    with pytest.raises(Refused) as caught:
        parse(raw)
    assert caught.value.reason == Reason.HEADER


def test_cut_at_every_byte() -> None:
    for size in range(len(HEAD)):
        with pytest.raises(Refused):
            parse(HEAD[:size])


@given(st.data())
def test_only_refused_escapes(data: st.DataObject) -> None:
    raw = bytearray(HEAD)
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(128, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = parse(raw)
    except Refused:
        return
    assert found.data_offset <= len(raw) and is_uid(found.sop_instance)
