"""Side A of a DICOM lane: storage SCP, custody, forwarder.

association ─▶ scp.py ─▶ intake.py ─▶ spool ─▶ forward.py ─▶ link
"""

from __future__ import annotations

import asyncio
from typing import Any

from dicom import scp
from dicom.forward import DOUBT_BYTES, LINK, Forwarder
from dicom.intake import Intake
from dicom.screen import Rules
from dicom.settings import DicomSource
from dicom.spooling import SWEEP_SECONDS, Examiner, complaints, figures, open_spool
from relay.process import within
from relay.spool import Spool
from relay.worker import SourceSide

JOURNAL_BYTES = 32 << 20
"""Of side A's journal: what may be in memory at a time, while its files are being synced."""

DRAIN_SHARE = 0.6
"""Of the drain time, what associations may still use; the rest is for what they left to be forwarded."""


def _policy(settings: DicomSource) -> scp.Policy:
    return scp.Policy(
        ae_title=settings.ae_title,
        accept=tuple(scp.AcceptRule(rule.ae_title, rule.from_) for rule in settings.accept),
        max_associations=settings.max_associations,
        max_associations_per_address=settings.max_associations_per_address,
        max_pdu=settings.max_pdu,
        idle_seconds=settings.idle_seconds,
    )


def _complaints(spool: Spool, intake: Intake) -> list[str]:
    """What an operator should look at."""
    found = [*intake.complaints(), *complaints(spool, [LINK])]
    unreadable = spool.stats().parked[LINK]
    if unreadable:
        found.append(
            f"{unreadable} objects cannot be read and were not sent; "
            "see medferry spool ls --side source --only parked"
        )
    return found


async def sweeps(spool: Spool) -> None:
    """Remove what retention no longer keeps, until cancelled."""
    while True:
        await asyncio.sleep(SWEEP_SECONDS)
        await spool.sweep()


async def run(side: SourceSide) -> None:
    """Serve the lane's source until it has drained; `relay.lanes`."""
    settings = side.lane.source
    assert isinstance(settings, DicomSource)
    rules = Rules(
        private_classes=frozenset(settings.private_sop_classes),
        private_syntaxes=frozenset(settings.private_transfer_syntaxes),
    )
    spool = await open_spool(
        side.state,
        settings.spool,
        destinations=[LINK],
        max_object_bytes=settings.max_object_bytes,
        journal_bytes=JOURNAL_BYTES,
    )
    if side.link_is_new:
        again = await spool.doubt(LINK, DOUBT_BYTES)
        if again:
            side.log.info("the link is new: %d objects that may not have crossed are sent again", again)
    intake = Intake(spool, rules, Examiner(side.state, settings.max_object_bytes), side.metrics)
    forwarder = Forwarder(spool, side.outlet, side.metrics)
    server = await scp.serve(side.sockets["dicom"], intake, _policy(settings), rules)

    def status() -> dict[str, Any]:
        stats = spool.stats()
        for name, value in (("objects", stats.undelivered_objects), ("bytes", stats.undelivered_bytes)):
            side.metrics.gauge(f"spool_waiting_{name}", f"Waiting for the link: {name}", value)
        return {
            **figures(spool),
            "stored": intake.stored,
            "sent": forwarder.sent,
            "refused": dict(intake.refused),
            "associations": server.stats(),
            "latency": side.metrics.latencies(),
            "complaints": _complaints(spool, intake),
        }

    side.status = status
    side.ready()
    async with asyncio.TaskGroup() as tasks:
        running = [
            tasks.create_task(forwarder.run(), name="forwarder"),
            tasks.create_task(forwarder.manifests(), name="manifests"),
            tasks.create_task(sweeps(spool), name="sweeps"),
            tasks.create_task(spool.failed(), name="spool"),
            tasks.create_task(server.failed(), name="server"),
        ]
        await side.draining.wait()
        await server.drain(side.drain_seconds * DRAIN_SHARE)
        await within(side.drain_seconds * (1 - DRAIN_SHARE), forwarder.idle())
        waiting = spool.stats().waiting[LINK]
        if waiting:
            side.log.info("the drain is over: %d objects cross at the next start", waiting)
        for task in running:
            task.cancel()
    await spool.close()
