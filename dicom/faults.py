"""Why an object is refused: a closed table of reasons, each with the DIMSE status that says it to the sender.

A `Refused` names the reason by one fixed word (for counters and logs) and explains it in one sentence
that holds a tag and a byte offset, never a value: values are patient data.

Status codes are those of the storage service (PS3.4 §B.2.3) and of C-STORE (PS3.7 §9.1.1.1.9). A fault of
the data set itself answers from the 0xC000 range, "cannot understand", also where a limit is what stopped
us: 0xA700, "out of resources", invites the sender to try again, and a bomb is a bomb the second time too.
"""

from __future__ import annotations

import enum

from dicom.dimse import Status
from relay.errors import PeerError


class Reason(enum.StrEnum):
    """What was wrong, as a counter's label."""

    TRUNCATED = "truncated"
    LENGTH = "length"
    ODD_LENGTH = "odd-length"
    ORDER = "order"
    DUPLICATE = "duplicate"
    TAG = "tag"
    VR = "vr"
    SEQUENCE = "sequence"
    UNDEFINED_LENGTH = "undefined-length"
    PIXELS = "pixels"
    DEFLATE = "deflate"
    UID = "uid"
    HEADER = "header"
    DEPTH = "depth"
    ELEMENTS = "elements"
    INFLATED = "inflated"
    TIME = "time"
    SOP_CLASS = "sop-class"
    TRANSFER_SYNTAX = "transfer-syntax"
    MISMATCH = "mismatch"
    INSTANCE = "instance"


STATUS: dict[Reason, int] = {
    Reason.TRUNCATED: Status.CANNOT_UNDERSTAND | 0x01,
    Reason.LENGTH: Status.CANNOT_UNDERSTAND | 0x02,
    Reason.ODD_LENGTH: Status.CANNOT_UNDERSTAND | 0x03,
    Reason.ORDER: Status.CANNOT_UNDERSTAND | 0x04,
    Reason.DUPLICATE: Status.CANNOT_UNDERSTAND | 0x05,
    Reason.TAG: Status.CANNOT_UNDERSTAND | 0x06,
    Reason.VR: Status.CANNOT_UNDERSTAND | 0x07,
    Reason.SEQUENCE: Status.CANNOT_UNDERSTAND | 0x08,
    Reason.UNDEFINED_LENGTH: Status.CANNOT_UNDERSTAND | 0x09,
    Reason.PIXELS: Status.CANNOT_UNDERSTAND | 0x0A,
    Reason.DEFLATE: Status.CANNOT_UNDERSTAND | 0x0B,
    Reason.UID: Status.CANNOT_UNDERSTAND | 0x0C,
    Reason.HEADER: Status.CANNOT_UNDERSTAND | 0x0D,
    Reason.DEPTH: Status.CANNOT_UNDERSTAND | 0x10,
    Reason.ELEMENTS: Status.CANNOT_UNDERSTAND | 0x11,
    Reason.INFLATED: Status.CANNOT_UNDERSTAND | 0x12,
    Reason.TIME: Status.OUT_OF_RESOURCES,
    Reason.SOP_CLASS: Status.SOP_CLASS_NOT_SUPPORTED,
    Reason.TRANSFER_SYNTAX: Status.CANNOT_UNDERSTAND | 0x20,
    Reason.MISMATCH: Status.MISMATCH,
    Reason.INSTANCE: Status.INVALID_SOP_INSTANCE,
}
"""The status that answers a C-STORE refused for each reason."""


class Refused(PeerError):
    """An object may not pass. `reason` is for counters, the message for people, `status` for the sender."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(reason.value, detail)
        self.status = STATUS[reason]
