"""Side B's delivery: from custody to one destination, the moment an object is there.

A destination has slots, one association each. The first is always there; others come while many objects wait
and the destination takes them, and go when it does not: a device that takes one association at a time, by
refusing or by not answering a second, is served by one. Associations are kept while there is something to
send and released after `release_seconds`, so that such a device is free for others.

What becomes of an object is decided by one table (`verdict`). A destination that is away is tried again with
back-off and jitter, and nothing is lost or held up elsewhere meanwhile.

An object on which the destination fails waits aside, longer each time, and those behind it go on. Only while
others are delivered is that held against the object, and after `MAX_ATTEMPTS` it is parked for an operator; a
destination that fails on different objects is at fault itself and is treated as away. "Out of resources" is
said of the destination, and by some of an object: the same one is tried again after a wait, `BUSY_PATIENCE`
times, and then those behind it too. If one of them is taken it was the object.
"""

from __future__ import annotations

import asyncio
import enum
import heapq
import logging
import os
import random
import time
from collections.abc import Callable
from typing import Any

from dicom import scu
from dicom.associate import MAX_CONTEXTS
from dicom.settings import Destination, DicomSink
from relay.config import split_address
from relay.errors import PeerError, SpoolError
from relay.metrics import Metrics
from relay.spool import Entry, Spool

PEEKED = 256
"""Waiting objects looked at for the contexts to propose."""

PARALLEL_AT = 8
"""Objects waiting per slot at which another association is opened: below it, the cost of opening one is not
earned back."""

PARALLEL_PAUSE_SECONDS = 60.0
"""How long no further association is tried after the destination did not take one."""

PARALLEL_TIMEOUT_SECONDS = 3.0
"""How long a further association may take to be answered; a device that takes one at a time lets it wait."""

MAX_ATTEMPTS = 10
"""Deliveries of one object that the destination may break off or fail, while it takes others, before the
object is parked."""

MAX_ASIDE = 256
"""Objects of one destination that wait aside; at the bound its other objects wait too."""

BUSY_PATIENCE = 3
"""Times that a destination may have no room for an object before those behind it are tried."""

MAX_PROBES = 64
"""Objects tried at a time while a destination has no room, so that no study of them stops everything."""

MAX_PROBED_BYTES = 64 << 20
"""The same bound for their bytes: they are sent for nothing, should the destination be full indeed."""

log = logging.getLogger(__name__)

Context = tuple[str, str]
"""Abstract syntax and transfer syntax."""


class Verdict(enum.Enum):
    """What a status means for an object."""

    DONE = "done"
    BUSY = "busy"
    """The destination has no room for anything: wait, then the same object again."""
    AGAIN = "again"
    """This object failed, another may not."""
    PARK = "park"
    """It will never be taken as it is."""


_VERDICTS: tuple[tuple[int, int, Verdict], ...] = (
    (0x0000, 0x0000, Verdict.DONE),
    (0x0001, 0x0001, Verdict.DONE),  # warning classes, PS3.7 Annex C: stored, with remarks
    (0x0107, 0x0107, Verdict.DONE),
    (0x0116, 0x0116, Verdict.DONE),
    (0xB000, 0xBFFF, Verdict.DONE),
    (0xA700, 0xA7FF, Verdict.BUSY),  # out of resources, PS3.4 §B.2.3
    (0x0110, 0x0110, Verdict.AGAIN),  # processing failure
    (0x0213, 0x0213, Verdict.BUSY),  # resource limitation
)


def verdict(status: int) -> Verdict:
    """What a C-STORE response's status means (PS3.4 §B.2.3, PS3.7 Annex C)."""
    for low, high, what in _VERDICTS:
        if low <= status <= high:
            return what
    return Verdict.PARK


class Delivery:
    """One destination. `run` is a task of the sink."""

    def __init__(
        self,
        destination: Destination,
        sink: DicomSink,
        spool: Spool,
        metrics: Metrics,
        delivered: Callable[[], None],
    ) -> None:
        self.destination = destination
        self._sink = sink
        self._spool = spool
        self._feed = spool.feed(destination.name)
        self._metrics = metrics
        self._delivered = delivered
        self._contexts: dict[Context, None] = {}
        self._aside: list[tuple[float, int, Entry]] = []
        self._failures = 0
        self._failed: set[int] = set()
        """Seqs of objects that failed since one was delivered; at most those aside and one of each slot."""
        self._tries: dict[int, int] = {}
        """Failures of objects that are aside or were, by seq, until each is delivered or parked."""
        self._unwanted: list[Entry] = []
        """Objects that found no room since the last wait: in nobody's hands, oldest first."""
        self._busy_rounds = 0
        """Waits in a row for room."""
        self._slots = 0
        self._opening = False
        """A further association is asked for and not answered yet. One at a time: each holds an object."""
        self._no_parallel_until = 0.0
        self._random = random.Random()
        self._progress = asyncio.Event()
        self.delivered = 0
        self.state = "idle"
        self.last_error = ""

    def __repr__(self) -> str:
        return f"<Delivery {self.destination.name} {self.state} slots={self._slots} aside={len(self._aside)}>"

    async def run(self) -> None:
        """Deliver until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            self._slots += 1
            await self._slot(first=True)

    async def idle(self) -> None:
        """Wait until nothing is left to deliver, or the destination is away: a drain waits for no one."""
        while self.state != "away" and self._spool.stats().waiting[self.destination.name] > len(self._aside):
            self._progress.clear()
            await self._progress.wait()

    @property
    def parked(self) -> int:
        """Objects refused for good that wait for an operator."""
        return self._spool.stats().parked.get(self.destination.name, 0)

    def figures(self) -> dict[str, Any]:
        """For status."""
        return {
            "state": self.state,
            "delivered": self.delivered,
            "parked": self.parked,
            "aside": len(self._aside),
            "associations": self._slots,
            "last error": self.last_error or "none",
        }

    def complaints(self) -> list[str]:
        """What an operator should look at."""
        name = self.destination.name
        found = []
        if self.state == "away":
            found.append(f"destination {name} is away ({self.last_error}); objects wait for it")
        if self._aside:
            found.append(
                f"destination {name} fails on {len(self._aside)} objects, which are tried again; see the log"
            )
        if self.parked:
            found.append(
                f"{self.parked} objects for destination {name} are parked: it refused them, or they "
                "cannot be read; see medferry spool ls --only parked"
            )
        return found

    # ---- slots -------------------------------------------------------------------------------------------

    async def _slot(self, *, first: bool) -> None:
        """One association at a time, as long as there is something to send on it. Who starts it counts it."""
        association: scu.Requestor | None = None
        try:
            while True:
                entry = await self._take(association, first)
                if entry is None:
                    if association is not None:
                        await association.release()
                        association = None
                    if not first:
                        return
                    self.state = "idle"
                    continue
                context = (entry.sop_class, entry.transfer_syntax)
                if association is not None and not self._fits(association, entry, context):
                    await association.release()
                    association = None
                if association is None:
                    association = await self._associate(entry, context, first)
                    if not first:
                        self._opening = False
                    if association is None:
                        if not first:
                            return
                        continue
                self._open_another()
                trouble = await self._send(association, entry, context)
                if trouble is not None:
                    if not first:
                        await association.release()
                        return
                    await self._away(trouble)
        finally:
            self._slots -= 1
            if not first:
                self._opening = False
            if association is not None:
                association.abort()

    @staticmethod
    def _fits(association: scu.Requestor, entry: Entry, context: Context) -> bool:
        """Whether `entry` can go on `association`; what is sent again asks anew for a context refused."""
        known = association.accepts(context) or (association.proposed(context) and not entry.attempts)
        return known and not association.ended

    async def _take(self, association: scu.Requestor | None, first: bool) -> Entry | None:
        """The next object, or None when there was none for `release_seconds` on an open association."""
        while True:
            # After a failure something new says whether it was the object's or the destination's.
            doubtful = bool(self._failed or self._unwanted)
            if not doubtful and (entry := self._due_aside()) is not None:
                return entry
            if len(self._aside) < MAX_ASIDE and (entry := self._feed.next_nowait()) is not None:
                return entry
            if (entry := self._due_aside()) is not None:
                return entry
            if self._unwanted:
                self._return_unwanted()
                continue
            wait = self.destination.release_seconds if association is not None or not first else None
            if self._aside:
                due = max(self._aside[0][0] - time.monotonic(), 0.0)
                if wait is not None and due > wait:
                    return None
                await self._wait_for_more(due)
                continue
            try:
                async with asyncio.timeout(wait):
                    return await self._feed.next()
            except TimeoutError:
                return None

    def _due_aside(self) -> Entry | None:
        """The object aside that is to be tried again by now."""
        if self._aside and self._aside[0][0] <= time.monotonic():
            return heapq.heappop(self._aside)[2]
        return None

    async def _wait_for_more(self, seconds: float) -> None:
        """Until something new waits, at most `seconds`; with `MAX_ASIDE` aside nothing new is looked at."""
        try:
            async with asyncio.timeout(seconds):
                if len(self._aside) < MAX_ASIDE:
                    self._feed.put_back(await self._feed.next())
                else:
                    await asyncio.Event().wait()
        except TimeoutError:
            return

    def _open_another(self) -> None:
        waiting = len(self._feed.peek(PARALLEL_AT * self.destination.max_associations))
        if (
            not self._opening
            and self._slots < self.destination.max_associations
            and waiting >= PARALLEL_AT * self._slots
            and time.monotonic() >= self._no_parallel_until
        ):
            self._slots += 1
            self._opening = True
            self._tasks.create_task(self._slot(first=False), name=f"slot {self.destination.name}")

    # ---- one association ---------------------------------------------------------------------------------

    def _proposal(self, needed: Context) -> list[Context]:
        """The contexts to propose: the one needed, what waits, and what was needed lately."""
        waiting = [(entry.sop_class, entry.transfer_syntax) for entry in self._feed.peek(PEEKED)]
        wanted = dict.fromkeys([needed, *waiting, *reversed(self._contexts)])
        proposal = list(wanted)[:MAX_CONTEXTS]
        self._contexts = dict.fromkeys(reversed(proposal))
        return proposal

    async def _associate(self, entry: Entry, context: Context, first: bool) -> scu.Requestor | None:
        """An association for `entry`, which goes back to the feed where there is none to be had."""
        host, port = split_address(self.destination.address)
        timeout = self.destination.timeout_seconds
        try:
            association = await scu.associate(
                host,
                port,
                calling_ae_title=self._sink.ae_title,
                called_ae_title=self.destination.ae_title,
                contexts=self._proposal(context),
                association_seconds=timeout if first else min(timeout, PARALLEL_TIMEOUT_SECONDS),
                progress_seconds=timeout,
            )
        except PeerError as error:
            self._feed.put_back(entry)
            if first:
                await self._away(error)
            else:
                self._no_parallel_until = time.monotonic() + PARALLEL_PAUSE_SECONDS
                log.info("%s: one association less: %s", self.destination.name, error)
            return None
        self._metrics.count("associations", "Associations opened", destination=self.destination.name)
        return association

    async def _away(self, error: PeerError) -> None:
        """Wait before the destination is tried again."""
        self._return_unwanted()
        delay = min(self._sink.max_retry_seconds, self._sink.retry_seconds * 2 ** min(self._failures, 30))
        delay *= self._random.uniform(0.5, 1.0)
        self._failures += 1
        self.state, self.last_error = "away", error.reason
        self._progress.set()
        level = logging.WARNING if self._failures == 1 else logging.INFO
        log.log(level, "%s is away, next try in %.1f s: %s", self.destination.name, delay, error)
        self._metrics.count("retries", "Waits for a destination", destination=self.destination.name)
        await asyncio.sleep(delay)

    async def _send(self, association: scu.Requestor, entry: Entry, context: Context) -> PeerError | None:
        """Send `entry`; why the destination itself should be left alone for a while, if it should."""
        name = self.destination.name
        if not association.accepts(context):
            what = association.refusal(context)
            log.error("%s: object %s is parked: %s of %s", name, entry.id, what, " in ".join(context))
            self._park(entry, what)
            return None
        self.state = "sending"
        began = time.monotonic_ns()
        try:
            status = await self._store(association, entry)
        except (SpoolError, OSError) as error:
            log.error("%s: object %s cannot be read: %s", name, entry.id, error)
            self._park(entry, "unreadable")
            return None
        except PeerError as error:
            self._set_aside(entry, error.reason, str(error))
            return error if len(self._failed) > 1 else None
        what_now = verdict(status)
        if what_now is Verdict.DONE:
            self._done(entry, status, began)
        elif what_now is Verdict.PARK:
            log.error("%s refused object %s for good: status 0x%04X", name, entry.id, status)
            self._park(entry, status)
        elif what_now is Verdict.AGAIN:
            self._set_aside(entry, status, f"status 0x{status:04X}")
        else:
            return self._no_room(entry, status)
        return None

    def _no_room(self, entry: Entry, status: int) -> PeerError | None:
        """The destination says that it has no room: wait, or see whether it has for what is behind."""
        if entry.attempts:
            # It was this object's fault before, as far as anybody can tell.
            self._set_aside(entry, status, f"status 0x{status:04X}")
            return None
        self._unwanted.append(entry)
        probed = sum(each.size for each in self._unwanted)
        if (
            self._busy_rounds >= BUSY_PATIENCE
            and len(self._unwanted) < MAX_PROBES
            and probed < MAX_PROBED_BYTES
            and self._feed.peek(1)
        ):
            return None
        self._busy_rounds += 1
        self._return_unwanted()
        return PeerError("out-of-resources", f"it answers status 0x{status:04X}")

    def _return_unwanted(self) -> None:
        """Nothing is held against the objects that found no room: they come again first, in their order."""
        while self._unwanted:
            self._feed.put_back(self._unwanted.pop())

    async def _store(self, association: scu.Requestor, entry: Entry) -> int:
        fd = self._spool.open_data(entry)
        try:
            return await association.store(
                sop_class=entry.sop_class,
                sop_instance=entry.sop_instance,
                transfer_syntax=entry.transfer_syntax,
                fd=fd,
                offset=entry.data_offset,
                size=entry.size,
                last=len(self._sink.destination) == 1,
            )
        finally:
            os.close(fd)

    # ---- what became of an object ------------------------------------------------------------------------

    def _done(self, entry: Entry, status: int, began: int) -> None:
        now = time.monotonic_ns()
        self._failures = self._busy_rounds = 0
        self._failed.clear()
        self._tries.pop(entry.seq, None)
        self.delivered += 1
        self.last_error = ""
        # There is room, so it was the objects themselves.
        unwanted, self._unwanted = self._unwanted, []
        for each in unwanted:
            self._failed.clear()
            self._set_aside(each, "out-of-resources", "there is no room for it, but for others there is")
        self._failed.clear()
        self._spool.done(entry, self.destination.name, status)
        self._metrics.count("objects_delivered", "Objects delivered", destination=self.destination.name)
        self._metrics.count(
            "bytes_delivered", "Bytes of data sets delivered", entry.size, destination=self.destination.name
        )
        self._metrics.latency("send").record_ns(now - began)
        if entry.parsed_ns:
            self._metrics.latency("custody to delivered").record_ns(now - entry.parsed_ns)
            self._metrics.latency("total").record_ns(now - entry.received_ns)
        self._progress.set()
        self._delivered()

    def _park(self, entry: Entry, status: int | str) -> None:
        self._tries.pop(entry.seq, None)
        self._spool.park(entry, self.destination.name, status)
        self._progress.set()
        self._metrics.count("objects_parked", "Objects refused for good", destination=self.destination.name)

    def _set_aside(self, entry: Entry, status: int | str, why: str) -> None:
        """The destination failed on this object: let others pass, try it again later, park it in the end."""
        name = self.destination.name
        self.last_error = status if isinstance(status, str) else f"status 0x{status:04X}"
        first_since_delivery = not self._failed
        self._failed.add(entry.seq)
        tries = self._tries[entry.seq] = self._tries.get(entry.seq, 0) + 1
        self._progress.set()
        delay = min(self._sink.max_retry_seconds, self._sink.retry_seconds * 2 ** min(tries - 1, 30))
        if first_since_delivery:
            if entry.attempts + 1 >= MAX_ATTEMPTS:
                log.error("%s: object %s is parked after %d tries: %s", name, entry.id, MAX_ATTEMPTS, why)
                self._park(entry, status)
                return
            entry = self._spool.tried(entry, name, status)
        log.warning("%s: object %s failed (try %d), again in %.1f s: %s", name, entry.id, tries, delay, why)
        due = time.monotonic() + delay * self._random.uniform(0.5, 1.0)
        heapq.heappush(self._aside, (due, entry.seq, entry))
