"""What a storage SCP asks of whoever uses it: may this peer in, may this object in, here are its bytes.

    admit(peer) ─▶ begin(request) ─▶ write(parts) … write(parts) ─▶ finish() ─▶ status
                                                └──────────────────▶ abandon()

Never here: I/O, PDUs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from dicom.negotiation import Rejection
from relay.errors import MedferryError


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """Who is at the other end of one association. Titles are printable ASCII."""

    address: str
    """IP address, without port."""
    calling_ae_title: str
    called_ae_title: str
    number: int
    """Of the association, since the server began."""

    def __str__(self) -> str:
        return f"{self.calling_ae_title} at {self.address} (association {self.number})"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreRequest:
    """A C-STORE-RQ, before its data set. The UIDs may be anything of at most 64 characters.

    `abstract_syntax` and `transfer_syntax` are the accepted presentation context's, so they are sound.
    """

    peer: Peer
    abstract_syntax: str
    transfer_syntax: str
    sop_class: str
    sop_instance: str


class StoreFailed(MedferryError):
    """An object cannot be taken after all; `status` answers its C-STORE, and the association goes on."""

    def __init__(self, status: int) -> None:
        super().__init__(f"the object is refused with status 0x{status:04X}")
        self.status = status


class Store(Protocol):
    """One object on its way in. After `finish` or `abandon` it is not used again."""

    def write(self, parts: Sequence[memoryview]) -> None:
        """Take the next bytes of the data set, in order. The views are valid only during the call.

        Raises:
            StoreFailed: The rest is read and dropped, `abandon` is called, then the status answered.
        """

    async def finish(self) -> int:
        """The data set is whole: the status that answers the C-STORE.

        It may take its time: other associations go on, this one waits. It is never cancelled.
        """

    def abandon(self) -> None:
        """The data set will not be whole: the association ended in its middle, or `write` failed."""


class StoreHandler(Protocol):
    """Decides about associations and objects; one for all associations of a server."""

    def admit(self, peer: Peer) -> Rejection | None:
        """Whether the association may begin, after the server's own rules and limits."""

    def begin(self, request: StoreRequest) -> Store | int:
        """Begin to take an object, or the status that refuses it; its data set is then read and dropped."""
