"""Side B of a DICOM lane: receipt, custody, storage SCU.

link ─▶ receipt.py ─▶ spool ─▶ delivery.py, one per destination ─▶ scu.py ─▶ association
"""

from __future__ import annotations

import asyncio
from typing import Any

from dicom.delivery import Delivery
from dicom.receipt import Receipt
from dicom.settings import DicomSink
from dicom.source import sweeps
from dicom.spooling import Examiner, complaints, figures, open_spool
from relay.process import within
from relay.spool import Spool
from relay.worker import SinkSide


async def run(side: SinkSide) -> None:
    """Serve the lane's sink until the link has ended and what could be delivered is; `relay.lanes`."""
    settings = side.lane.sink
    assert isinstance(settings, DicomSink)
    spool = await open_spool(
        side.state,
        settings.spool,
        destinations=[destination.name for destination in settings.destination],
        max_object_bytes=settings.max_object_bytes,
        resumable=True,
    )
    receipt = Receipt(spool, Examiner(side.state, settings.max_object_bytes), side.metrics)
    deliveries = [
        Delivery(destination, settings, spool, side.metrics, receipt.room.set)
        for destination in settings.destination
    ]

    def status() -> dict[str, Any]:
        stats = spool.stats()
        for name, waiting in stats.waiting.items():
            side.metrics.gauge(
                "deliveries_waiting", "Objects waiting, by destination", waiting, destination=name
            )
        return {
            **figures(spool),
            "received": receipt.received,
            "duplicates": receipt.duplicates,
            "refused": dict(receipt.refused),
            "missing": len(receipt.missing),
            "destination": {delivery.destination.name: delivery.figures() for delivery in deliveries},
            "latency": side.metrics.latencies(),
            "complaints": _complaints(spool, receipt, deliveries),
        }

    side.status = status
    side.ready()
    async with asyncio.TaskGroup() as tasks:
        running = [
            tasks.create_task(spool.failed(), name="spool"),
            tasks.create_task(sweeps(spool), name="sweeps"),
            *(tasks.create_task(item.run(), name=item.destination.name) for item in deliveries),
        ]
        pump = tasks.create_task(side.inlet.pump(receipt.deliver), name="pump")
        await asyncio.wait([pump])
        # The link has ended: deliver what waits, as far as destinations are there.
        drained = asyncio.gather(*(item.idle() for item in deliveries))
        await within(side.drain_seconds, drained)
        waiting = sum(spool.stats().waiting.values())
        if waiting:
            side.log.info("the drain is over: %d deliveries go on at the next start", waiting)
        for task in running:
            task.cancel()
    await spool.close()


def _complaints(spool: Spool, receipt: Receipt, deliveries: list[Delivery]) -> list[str]:
    """What an operator should look at."""
    found = complaints(spool, [delivery.destination.name for delivery in deliveries])
    if receipt.missing:
        found.append(f"{len(receipt.missing)} objects were sent by side A and never arrived")
    if receipt.full:
        found.append("the sink's spool is full and the link waits")
    for delivery in deliveries:
        found += delivery.complaints()
    return found
