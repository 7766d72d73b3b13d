"""A receiving archive in the test's own process (pynetdicom's SCP), and objects made to be sent to it.

    with Archive() as pacs:
        ... send made(1, 200_000) through a relay whose destination is pacs.address ...
        pacs.wait({1's uid}, seconds=10)
        assert pacs.received[uid] == [sha256 of the data set]

`Archive.answer` decides the status of each C-STORE, so that a test can have an archive that is full, or
broken for one object only. Nothing received is kept but its hash and what it was said to be.
"""

from __future__ import annotations

import hashlib
import io
import random
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from pynetdicom import AE, evt
from pynetdicom.dimse_primitives import C_STORE
from pynetdicom.events import Event
from pynetdicom.presentation import AllStoragePresentationContexts
from pynetdicom.transport import ThreadedAssociationServer

from tests.dicom.datasets import CT, DEFLATED, EXPLICIT, IMPLICIT, JPEG, element, fragments, names
from tests.peers import free_port

SYNTAXES = (IMPLICIT, EXPLICIT, JPEG, DEFLATED)
"""What the archive takes, if nothing else is asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """An object made for a test: a CT image of no patient."""

    uid: str
    data: bytes
    sop_class: str = CT
    syntax: str = EXPLICIT

    @property
    def sha256(self) -> str:
        """Of the data set's bytes."""
        return hashlib.sha256(self.data).hexdigest()


def made(number: int, size: int = 1000, *, patient: bytes = b"Nobody^Known ", syntax: str = EXPLICIT) -> Made:
    """The object of this number: about `size` bytes, mostly noise where pixels would be."""
    uid = f"2.25.77{number:012d}"
    even = max(size // 2 * 2, 2)
    noise = random.Random(number).randbytes(even)
    patient += b" " * (len(patient) & 1)
    head = names(syntax, CT, uid) + element(0x00100010, "PN", patient, syntax)
    pixels = fragments(noise) if syntax == JPEG else element(0x7FE00010, "OW", noise, syntax)
    return Made(uid=uid, data=head + pixels, syntax=syntax)


@dataclass(slots=True, kw_only=True)
class Arrived:
    """One C-STORE as the archive saw it."""

    uid: str
    sha256: str
    status: int
    calling: str
    at: float


@dataclass(slots=True)
class Archive:
    """A storage SCP on loopback; a context manager. Counts what it answered with success in `received`."""

    answer: Callable[[str], int] = lambda uid: 0x0000
    port: int = 0
    syntaxes: Sequence[str] = SYNTAXES
    maximum_associations: int = 16
    received: dict[str, list[str]] = field(default_factory=dict)
    """SHA-256 of each data set taken, by SOP Instance UID."""
    arrivals: list[Arrived] = field(default_factory=list)
    associations: int = 0
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _server: ThreadedAssociationServer | None = None

    def __post_init__(self) -> None:
        self.port = self.port or free_port()

    @property
    def address(self) -> str:
        """``host:port`` as a configuration writes it."""
        return f"127.0.0.1:{self.port}"

    @property
    def destination(self) -> tuple[str, str]:
        """AE title and address, as `tests.product.studies` takes them."""
        return "PACS", self.address

    def __enter__(self) -> Archive:
        entity = AE("PACS")
        entity.maximum_associations = self.maximum_associations
        entity.maximum_pdu_size = 0
        # A peer that was killed is noticed by its reset; no test waits for these.
        entity.network_timeout = entity.dimse_timeout = entity.acse_timeout = 60
        for context in AllStoragePresentationContexts:
            entity.add_supported_context(str(context.abstract_syntax), list(self.syntaxes))
        entity.add_supported_context("1.2.840.10008.1.1")
        handlers: list[Any] = [(evt.EVT_C_STORE, self._stored), (evt.EVT_ACCEPTED, self._accepted)]
        self._server = entity.start_server(("127.0.0.1", self.port), block=False, evt_handlers=handlers)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        # The entity's own shutdown aborts its associations too, as the end of a process would.
        self._server.ae.shutdown()

    def _accepted(self, event: Event) -> None:
        self.associations += 1

    def _stored(self, event: Event) -> int:
        request = event.request
        assert isinstance(request, C_STORE) and isinstance(request.DataSet, io.BytesIO)
        uid = str(request.AffectedSOPInstanceUID)
        sha256 = hashlib.sha256(request.DataSet.getbuffer()).hexdigest()
        status = self.answer(uid)
        calling = str(event.assoc.requestor.ae_title).strip()
        with self._changed:
            self.arrivals.append(
                Arrived(uid=uid, sha256=sha256, status=status, calling=calling, at=time.monotonic())
            )
            if status == 0:
                self.received.setdefault(uid, []).append(sha256)
            self._changed.notify_all()
        return status

    def wait(self, uids: Collection[str], seconds: float) -> None:
        """Return once every one of `uids` was taken.

        Raises:
            AssertionError: Some are not there after `seconds`.
        """
        wanted = set(uids)
        with self._changed:
            self._changed.wait_for(lambda: wanted <= self.received.keys(), seconds)
            missing = wanted - self.received.keys()
        assert not missing, f"{len(missing)} of {len(wanted)} objects did not arrive in {seconds:.0f} s"

    def wait_arrivals(self, count: int, seconds: float) -> None:
        """Return once `count` C-STOREs were answered, whatever the answer; AssertionError if they are not."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.arrivals) >= count, seconds), (
                f"{len(self.arrivals)} of {count} attempts in {seconds:.0f} s"
            )
