"""What a lane accepts, and whether command, context and data set agree."""

from __future__ import annotations

from dataclasses import replace

import pydicom
import pytest
from pydicom._uid_dict import UID_dictionary
from pydicom.uid import AllTransferSyntaxes
from pynetdicom import StoragePresentationContexts
from pynetdicom.presentation import AllStoragePresentationContexts

from dicom.faults import Reason, Refused
from dicom.screen import (
    RETIRED_STORAGE_CLASSES,
    STORAGE_CLASSES,
    TRANSFER_SYNTAXES,
    Rules,
    Store,
    check_command,
    check_object,
)
from dicom.syntaxes import ENCODINGS, encoding_of
from dicom.walk import Outline
from tests.dicom.datasets import CT, EXPLICIT, INSTANCE, readable_files

GE = "1.2.840.113619.5.2"
PRIVATE_CLASS = "1.3.12.2.1107.5.9.1"
MR = "1.2.840.10008.5.1.4.1.1.4"
FIND = "1.2.840.10008.5.1.4.1.2.1.1"

STORE = Store(sop_class=CT, sop_instance=INSTANCE, abstract_syntax=CT, transfer_syntax=EXPLICIT)
OUTLINE = Outline(sop_class=CT, sop_instance=INSTANCE, transfer_syntax=EXPLICIT)


def test_every_storage_class_of_pynetdicom_passes() -> None:
    for contexts in (AllStoragePresentationContexts, StoragePresentationContexts):
        assert all(Rules().abstract_syntax(str(context.abstract_syntax)) for context in contexts)


def test_retired_classes_are_what_the_dictionary_calls_retired() -> None:
    for uid in RETIRED_STORAGE_CLASSES:
        name, kind, _, retired, _ = UID_dictionary[uid]
        assert kind == "SOP Class" and "Storage" in name and retired == "Retired", uid


@pytest.mark.parametrize(
    "uid",
    [
        "1.2.840.10008.1.1",  # verification
        FIND,
        "1.2.840.10008.1.3.10",  # media storage directory
        "1.2.840.10008.1.20.1",  # storage commitment
        PRIVATE_CLASS,
        "",
    ],
)
def test_what_is_no_storage_class_does_not_pass(uid: str) -> None:
    assert not Rules().abstract_syntax(uid)


def test_transfer_syntaxes_are_those_of_pydicom_that_encode_a_data_set() -> None:
    unstorable = {uid for uid in AllTransferSyntaxes if uid.startswith("1.2.840.10008.1.2.7.")}
    assert {str(uid) for uid in AllTransferSyntaxes} - unstorable <= set(TRANSFER_SYNTAXES)
    for uid in AllTransferSyntaxes:
        if uid in unstorable:
            continue
        found = encoding_of(uid)
        assert found.implicit == uid.is_implicit_VR and found.big_endian != uid.is_little_endian
        referenced = UID_dictionary[uid][0].startswith("JPIP")
        assert found.encapsulated == (uid.is_encapsulated and not referenced), uid
    deflated = {uid for uid in TRANSFER_SYNTAXES if ENCODINGS[uid].deflated}
    assert deflated == {EXPLICIT + ".99", "1.2.840.10008.1.2.4.95", "1.2.840.10008.1.2.4.205"}


def test_private_ones_pass_by_allow_list_alone() -> None:
    rules = Rules(private_classes=frozenset({PRIVATE_CLASS}), private_syntaxes=frozenset({GE}))
    assert rules.abstract_syntax(PRIVATE_CLASS) and not Rules().abstract_syntax(PRIVATE_CLASS)
    assert rules.transfer_syntax(GE) and not Rules().transfer_syntax(GE)
    assert rules.abstract_syntax(CT) and rules.transfer_syntax(EXPLICIT)
    assert not rules.abstract_syntax(PRIVATE_CLASS + ".1")


def test_the_sample_files_classes_pass() -> None:
    for name, path in readable_files().items():
        meta = pydicom.filereader.read_file_meta_info(path)
        if "DICOMDIR" not in name and meta.get("MediaStorageSOPClassUID"):
            assert meta.MediaStorageSOPClassUID in STORAGE_CLASSES, name
        assert Rules().transfer_syntax(meta.TransferSyntaxUID), name


COMMANDS: list[tuple[str, Store, Reason, int]] = [
    ("class unknown", replace(STORE, sop_class="1.2.3", abstract_syntax="1.2.3"), Reason.SOP_CLASS, 0x0122),
    ("class no storage", replace(STORE, sop_class=FIND, abstract_syntax=FIND), Reason.SOP_CLASS, 0x0122),
    ("class no uid", replace(STORE, sop_class="DOE^JOHN"), Reason.SOP_CLASS, 0x0122),
    ("class not the context's", replace(STORE, sop_class=MR), Reason.SOP_CLASS, 0x0122),
    ("syntax unknown", replace(STORE, transfer_syntax="1.2.3"), Reason.TRANSFER_SYNTAX, 0xC020),
    ("syntax private", replace(STORE, transfer_syntax=GE), Reason.TRANSFER_SYNTAX, 0xC020),
    ("instance empty", replace(STORE, sop_instance=""), Reason.INSTANCE, 0x0117),
    ("instance of 65", replace(STORE, sop_instance="1." + "2" * 63), Reason.INSTANCE, 0x0117),
    ("instance climbs", replace(STORE, sop_instance="../../DOE^JOHN"), Reason.INSTANCE, 0x0117),
]


@pytest.mark.parametrize(
    ("store", "reason", "status"), [row[1:] for row in COMMANDS], ids=[row[0] for row in COMMANDS]
)
def test_commands_that_are_refused(store: Store, reason: Reason, status: int) -> None:
    found = check_command(Rules(), store)
    assert isinstance(found, Refused)
    assert (found.reason, found.status) == (reason, status)
    assert "DOE" not in str(found)


@pytest.mark.parametrize(
    "outline",
    [replace(OUTLINE, sop_class=MR), replace(OUTLINE, sop_instance=INSTANCE + ".1")],
    ids=["class", "instance"],
)
def test_a_data_set_that_is_not_what_the_command_said(outline: Outline) -> None:
    found = check_object(STORE, outline)
    assert isinstance(found, Refused)
    assert (found.reason, found.status) == (Reason.MISMATCH, 0xA900)


def test_one_story_passes() -> None:
    assert check_command(Rules(), STORE) is None
    assert check_object(STORE, OUTLINE) is None
