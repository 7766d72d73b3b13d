"""Side A's intake: from a C-STORE into custody.

    C-STORE-RQ ─▶ check_command ─▶ part ◀─ data set as it arrives
                                    │
                     last PDV ─▶ examine ─▶ check_object ─▶ commit (fsync) ─▶ 0x0000
                                    │             │
                                    └── refused ──┴─▶ quarantine ─▶ status that says why

Success is answered only once the object is durable. What is refused waits in quarantine for a person and the
sender is told; what cannot be taken for want of room is answered with 0xA700 and nothing of it is kept, since
the sender still has it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from dicom import part10
from dicom.dimse import Status
from dicom.faults import Refused
from dicom.scp import Peer, Rejection, StoreFailed, StoreRequest
from dicom.screen import Rules, check_command, check_object
from dicom.screen import Store as Announced
from dicom.spooling import Examiner
from relay.errors import SpoolError, SpoolFull
from relay.metrics import Metrics
from relay.spool import Facts, Part, Spool

TURNED_AWAY_SECONDS = 60.0
"""How long a refusal is complained about, should nothing be stored meanwhile: senders come back by then."""

_ADVICE = {
    "full-objects": "the spool is full (objects); see why they do not go on",
    "full-bytes": "the spool is full (bytes); see why objects do not go on",
    "full-disk": "the spool is full (disk); free space on its file system",
    "full-quarantine": "what is wrong with their objects has no place; release or drop some from quarantine",
    "disk": "the disk takes no object; see the source's log",
}
"""What turns senders away through no fault of theirs, and what to do about it."""

log = logging.getLogger(__name__)


class Intake:
    """The SCP's handler: one for all associations of a lane."""

    def __init__(self, spool: Spool, rules: Rules, examiner: Examiner, metrics: Metrics) -> None:
        self.spool = spool
        self.rules = rules
        self.examiner = examiner
        self.metrics = metrics
        self.stored = 0
        self.refused: dict[str, int] = {}
        self._turned_away = ""
        """Why a sender was refused last though it did nothing wrong; empty once an object was stored."""
        self._turned_away_until = 0.0

    def admit(self, peer: Peer) -> Rejection | None:
        """Refuse a new association, as transient, while there is no room for an object."""
        try:
            self.spool.admit()
        except SpoolFull as full:
            self.count_refusal(_cause(full))
            self.turn_away(_cause(full))
            return Rejection.FULL
        return None

    def begin(self, request: StoreRequest) -> Reception | int:
        """Begin to receive an object, or the status that refuses it."""
        announced = Announced(
            sop_class=request.sop_class,
            sop_instance=request.sop_instance,
            abstract_syntax=request.abstract_syntax,
            transfer_syntax=request.transfer_syntax,
        )
        refusal = check_command(self.rules, announced)
        if refusal is not None:
            self.count_refusal(refusal.reason)
            log.warning("%s: C-STORE refused: %s", request.peer, refusal)
            return refusal.status
        header = part10.header(request.sop_class, request.sop_instance, request.transfer_syntax)
        try:
            part = self.spool.begin(header)
        except SpoolError as error:
            self.count_refusal(_cause(error))
            self.turn_away(_cause(error))
            log.error("%s: C-STORE refused: %s", request.peer, error)
            return Status.OUT_OF_RESOURCES
        return Reception(self, part, announced, request.peer)

    def turn_away(self, cause: str) -> None:
        """Remember that a sender was refused for want of room, not for what the object is (`_ADVICE`)."""
        if cause in _ADVICE:
            self._turned_away = cause
            self._turned_away_until = time.monotonic() + TURNED_AWAY_SECONDS

    def take_in(self) -> None:
        """Count an object in custody: whatever was in the way is not any more."""
        self.stored += 1
        self._turned_away = ""

    def complaints(self) -> list[str]:
        """Why senders are refused though they do nothing wrong, if they are."""
        bound = self.spool.full
        cause = f"full-{bound}" if bound is not None else self._turned_away
        if not cause or (bound is None and time.monotonic() >= self._turned_away_until):
            return []
        return [f"senders are refused: {_ADVICE[cause]}"]

    def count_refusal(self, reason: str) -> None:
        """Count one refused object or association by its fixed word."""
        self.refused[reason] = self.refused.get(reason, 0) + 1
        self.metrics.count("refused", "Objects and associations refused", reason=reason)


class Reception:
    """One object on its way into custody."""

    def __init__(self, intake: Intake, part: Part, announced: Announced, peer: Peer) -> None:
        self._intake = intake
        self._part = part
        self._announced = announced
        self._peer = peer
        self._received_ns = time.monotonic_ns()

    def __repr__(self) -> str:
        return f"<Reception {self._part}>"

    def write(self, parts: Sequence[memoryview]) -> None:
        """Append what arrived of the data set.

        Raises:
            StoreFailed: There is no room for more of it.
        """
        with self._answering_fullness():
            self._part.write(parts)

    async def finish(self) -> int:
        """Examine the whole object and take it into custody; the status to answer with."""
        intake = self._intake
        whole_ns = time.monotonic_ns()
        try:
            with self._answering_fullness():
                await self._examine()
                parsed_ns = time.monotonic_ns()
                facts = Facts(
                    data_offset=self._part.data_offset,
                    sop_class=self._announced.sop_class,
                    sop_instance=self._announced.sop_instance,
                    transfer_syntax=self._announced.transfer_syntax,
                    received_ns=self._received_ns,
                    parsed_ns=parsed_ns,
                )
                entry = await intake.spool.commit(self._part, facts)
        except Refused as refusal:
            return self._quarantine(refusal)
        except StoreFailed as failure:
            self._part.abandon()
            return failure.status
        intake.take_in()
        intake.metrics.count("objects_stored", "Objects taken into custody")
        intake.metrics.count("bytes_stored", "Bytes of data sets taken into custody", entry.size)
        intake.metrics.latency("receive").record_ns(whole_ns - self._received_ns)
        intake.metrics.latency("check").record_ns(parsed_ns - whole_ns)
        intake.metrics.latency("spool").record_ns(time.monotonic_ns() - parsed_ns)
        return Status.SUCCESS

    def abandon(self) -> None:
        """The association ended in the middle: nothing was acknowledged, nothing is kept."""
        self._part.abandon()

    async def _examine(self) -> None:
        """Check the object; where its encoding needs edits, go on with a new part that has them.

        Raises:
            Refused: It may not pass.
            SpoolError: There is no room for the new part.
        """
        examiner = self._intake.examiner
        outline = await examiner.examine(self._part, self._announced.transfer_syntax)
        if outline.edits:
            received, self._part = self._part, examiner.normalised(self._intake.spool, self._part, outline)
            received.abandon()
            self._intake.metrics.count("objects_normalised", "Objects whose encoding was put right")
            outline = await examiner.examine(self._part, self._announced.transfer_syntax)
        refusal = check_object(self._announced, outline)
        if refusal is not None:
            raise refusal

    def _quarantine(self, refusal: Refused) -> int:
        part = self._part
        self._intake.count_refusal(refusal.reason)
        log.warning("%s: object %s is in quarantine: %s", self._peer, part.id, refusal)
        try:
            self._intake.spool.quarantine(part, refusal.reason, str(refusal))
        except SpoolError as error:
            log.error("object %s is not kept: %s", part.id, error)
            self._intake.turn_away(_cause(error))
            part.abandon()
            return Status.OUT_OF_RESOURCES
        return refusal.status

    @contextmanager
    def _answering_fullness(self) -> Iterator[None]:
        """Map the spool's errors to the status that the sender gets."""
        try:
            yield
        except SpoolError as error:
            self._intake.count_refusal(_cause(error))
            self._intake.turn_away(_cause(error))
            log.error("%s: object refused: %s", self._peer, error)
            raise StoreFailed(Status.OUT_OF_RESOURCES) from error


def _cause(error: SpoolError) -> str:
    """Why the spool did not take an object, as a fixed word."""
    return f"full-{error.bound}" if isinstance(error, SpoolFull) else "disk"
