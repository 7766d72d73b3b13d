"""Which objects may pass, and whether command, presentation context and data set tell one story.

    association request ─▶ `Rules.abstract_syntax`, `Rules.transfer_syntax`: what to accept
    C-STORE request     ─▶ `check_command`: before a byte of the data set is read
    data set, walked    ─▶ `check_object`: the data set is the one that the command announced

The checks return None or the `Refused` to act on; they never raise. A private SOP class or transfer syntax
passes only when the lane's configuration names it; nothing is accepted for looking like storage.

Never here: I/O, the structure of a data set (see `walk.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

from pynetdicom.presentation import AllStoragePresentationContexts, NonPatientObjectPresentationContexts

from dicom.faults import Reason, Refused
from dicom.syntaxes import ENCODINGS
from dicom.walk import Outline
from relay.records import is_uid

STANDARD_ROOT = "1.2.840.10008."
_IMAGE = "1.2.840.10008.5.1.4.1.1"

RETIRED_STORAGE_CLASSES = frozenset(
    f"{_IMAGE}.{tail}"
    for tail in (
        "3",  # ultrasound multi-frame, before 1993's
        "5",  # nuclear medicine, before 1993's
        "6",  # ultrasound, before 1993's
        "8",  # standalone overlay
        "9",  # standalone curve
        "9.1",  # waveform, trial
        "10",  # standalone modality LUT
        "11",  # standalone VOI LUT
        "12.3",  # angiographic bi-plane
        "77.1",  # visible light, trial
        "77.2",
        "88.1",  # structured reports, trial
        "88.2",
        "88.3",
        "88.4",
        "129",  # standalone PET curve
    )
) | {
    "1.2.840.10008.5.1.1.27",  # stored print
    "1.2.840.10008.5.1.1.29",  # hardcopy grayscale
    "1.2.840.10008.5.1.1.30",  # hardcopy colour
    "1.2.840.10008.5.1.4.34.1",  # RT beams delivery instruction, trial
}
"""Storage classes that the standard has retired and archives still send on."""

STORAGE_CLASSES: frozenset[str] = RETIRED_STORAGE_CLASSES.union(
    str(context.abstract_syntax)
    for context in (*AllStoragePresentationContexts, *NonPatientObjectPresentationContexts)
)
"""Every SOP class that C-STORE carries by the standard (PS3.4 §B.5 and §GG.3). Media Storage Directory is
not one of them: a DICOMDIR belongs to its medium."""

TRANSFER_SYNTAXES: tuple[str, ...] = tuple(uid for uid in ENCODINGS if uid.startswith(STANDARD_ROOT))
"""Every standard transfer syntax that an object may come in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What one lane accepts: the standard's tables, and what its configuration adds."""

    private_classes: frozenset[str] = frozenset()
    private_syntaxes: frozenset[str] = frozenset()

    def abstract_syntax(self, uid: str) -> bool:
        """Whether a presentation context for storing `uid` may be accepted."""
        return uid in STORAGE_CLASSES or uid in self.private_classes

    def transfer_syntax(self, uid: str) -> bool:
        """Whether objects encoded in `uid` may pass."""
        return uid in TRANSFER_SYNTAXES or uid in self.private_syntaxes


@dataclass(frozen=True, slots=True, kw_only=True)
class Store:
    """A C-STORE request as it came: the command's two UIDs and the presentation context it came in."""

    sop_class: str
    sop_instance: str
    abstract_syntax: str
    transfer_syntax: str


def check_command(rules: Rules, store: Store) -> Refused | None:
    """Whether the data set that `store` announces may be received (PS3.7 §9.1.1, PS3.4 §B.2.3)."""
    if not rules.abstract_syntax(store.sop_class):
        return Refused(Reason.SOP_CLASS, f"SOP class {_shown(store.sop_class)} is not on this lane's list")
    if store.sop_class != store.abstract_syntax:
        return Refused(
            Reason.SOP_CLASS,
            f"the command says SOP class {store.sop_class}, its presentation context "
            f"{_shown(store.abstract_syntax)}",
        )
    if not rules.transfer_syntax(store.transfer_syntax):
        return Refused(
            Reason.TRANSFER_SYNTAX,
            f"transfer syntax {_shown(store.transfer_syntax)} is not on this lane's list",
        )
    if not is_uid(store.sop_instance):
        return Refused(Reason.INSTANCE, "the command's SOP Instance UID is no UID of at most 64 characters")
    return None


def check_object(store: Store, outline: Outline) -> Refused | None:
    """Whether the data set is the object that its command announced (PS3.4 §B.2.3, 0xA900)."""
    if outline.sop_class != store.sop_class:
        return Refused(
            Reason.MISMATCH,
            f"the data set is of SOP class {outline.sop_class}, its command says {store.sop_class}",
        )
    if outline.sop_instance != store.sop_instance:
        return Refused(Reason.MISMATCH, "the data set has another SOP Instance UID than its command")
    return None


def _shown(uid: str) -> str:
    """A UID as a message may show it: what is none could be anything, so it is not repeated."""
    return uid if is_uid(uid) else "(no UID)"
