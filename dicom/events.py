"""What the upper layer tells the user of an association (PS3.8 §7: indications and confirmations).

Never here: how any of it comes about (association.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from dicom.associate import AssociateRequest
from dicom.negotiation import Agreement
from dicom.pdu import Fragments


@dataclass(frozen=True, slots=True)
class Requested:
    """A-ASSOCIATE indication: answer with `accept` or `reject`."""

    request: AssociateRequest


@dataclass(frozen=True, slots=True)
class Accepted:
    """A-ASSOCIATE confirmation: the association is there."""

    agreement: Agreement


@dataclass(frozen=True, slots=True)
class Rejected:
    """A-ASSOCIATE confirmation: the peer refused (PS3.8 Table 9-21)."""

    result: int
    source: int
    reason: int


@dataclass(frozen=True, slots=True)
class ReleaseRequested:
    """A-RELEASE indication: answer with `release_response`."""


@dataclass(frozen=True, slots=True)
class Released:
    """A-RELEASE confirmation: the association ended in order."""


@dataclass(frozen=True, slots=True)
class Aborted:
    """The association ended out of order: by the peer, by us, or because the connection was lost."""

    source: int
    reason: int
    detail: str


Event: TypeAlias = Requested | Accepted | Rejected | Fragments | ReleaseRequested | Released | Aborted
