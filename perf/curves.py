"""How the cost of an object grows: with its size, the associations, the contexts, the objects that wait.

Each function returns points as dictionaries with an ``x``, a ``way`` and what was measured there.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from math import isqrt
from pathlib import Path
from typing import Any

from pynetdicom.presentation import StoragePresentationContexts

from dicom.bench_objects import Image, Spec, image, new_uid_block
from perf.arrivals import Arrivals
from perf.client import CT_IMAGE_STORAGE, EXPLICIT_LE, Client, NotUnderstood
from perf.processes import usage
from perf.samples import QUICK, Sample
from perf.steady import quantiles
from perf.transfer import Plan, run
from perf.ways import MEDFERRY_SINK, MEDFERRY_SOURCE, opened
from tests.interop.dicom_peers import storescp
from tests.peers import free_port
from tests.product import running, studies

Point = dict[str, Any]
Progress = Callable[[str], None]

DELIVERY_SECONDS = 120.0
"""For one point's objects to arrive; a destination that comes back is tried again well within it."""

SIZE_BUDGET_BYTES = 200_000_000
MAX_OBJECTS = 200
"""A point of the size curve sends this many objects at most, and about so many bytes, but three at least."""

FILLERS = 4
"""Associations that fill the spool at once, so that group commit can do its work."""

PROBED = 300
"""Objects over which the rates at a depth of the spool are measured, in and out."""


def _image_of(size: int) -> Image:
    """An image of about `size` bytes: one CT slice up to 0.5 MB, frames of 512 x 512 above."""
    frame = 512 * 512 * 2
    if size <= frame:
        return image(Spec(name="size", count=1, side=max(isqrt(size // 2), 2)))
    return image(Spec(name="size", count=1, side=512, frames=max(size // frame, 2)))


def _send(client: Client, object_: Image, first: int, count: int) -> list[str]:
    names = []
    for number in range(first, first + count):
        names.append(object_.renew(number))
        status = client.store(object_.sop_class, names[-1], object_.data)
        if status:
            raise NotUnderstood(f"C-STORE status {status:#06x}")
    return names


def by_size(ways: Sequence[str], sizes: Sequence[int], directory: Path, progress: Progress) -> list[Point]:
    """Seconds an object, from the first byte sent to the last object stored, over one association."""
    points = []
    for way in ways:
        for size in sizes:
            progress(f"object size {size:,} B, {way}")
            object_ = _image_of(size)
            contexts = [(object_.sop_class, [EXPLICIT_LE])]
            count = min(max(SIZE_BUDGET_BYTES // len(object_.data), 3), MAX_OBJECTS)
            with (
                opened(way, directory) as (entry, receiver),
                Arrivals(receiver.directory) as arrivals,
                Client((entry.host, entry.port), entry.ae_title, contexts) as client,
            ):
                block = new_uid_block()
                _arrived(arrivals, _send(client, object_, block, 1))
                started = time.monotonic()
                _arrived(arrivals, _send(client, object_, block + 1, count))
                each = (time.monotonic() - started) / count
            points.append({"way": way, "x": len(object_.data), "seconds_each": each, "objects": count})
    return points


def _arrived(arrivals: Arrivals, names: list[str]) -> None:
    if not arrivals.wait(names, DELIVERY_SECONDS):
        missing = len(set(names) - arrivals.times.keys())
        raise TimeoutError(
            f"{missing} of {len(names)} objects were not delivered in {DELIVERY_SECONDS:.0f} s"
        )


def by_associations(
    ways: Sequence[str],
    counts: Sequence[int],
    samples: list[Sample],
    small: Sample,
    directory: Path,
    progress: Progress,
) -> list[Point]:
    """Objects a second in all, when the same set is sent over more associations at once."""
    points = []
    for way in ways:
        for count in counts:
            progress(f"{count} associations, {way}")
            result = run(Plan(way=way, set="ct", associations=count), samples, small, directory)
            point = {"way": way, "x": count, "rate": result.rate, "slowest_share": result.slowest_share}
            points.append(point | ({"failure": result.failure} if result.failure else {}))
    return points


def by_contexts(
    ways: Sequence[str], counts: Sequence[int], directory: Path, progress: Progress
) -> list[Point]:
    """Time to open an association that proposes so many contexts, and the rate of small objects on it."""
    others = [str(c.abstract_syntax) for c in StoragePresentationContexts]
    classes = [CT_IMAGE_STORAGE, *(uid for uid in others if uid != CT_IMAGE_STORAGE)]
    object_ = image(QUICK["small"])
    points = []
    for way in ways:
        with opened(way, directory) as (entry, receiver), Arrivals(receiver.directory) as arrivals:
            for count in counts:
                progress(f"{count} presentation contexts, {way}")
                proposed = [(uid, [EXPLICIT_LE]) for uid in classes[:count]]
                opening = []
                for _ in range(10):
                    started = time.monotonic_ns()
                    with Client((entry.host, entry.port), entry.ae_title, proposed):
                        opening.append(time.monotonic_ns() - started)
                with Client((entry.host, entry.port), entry.ae_title, proposed) as client:
                    block = new_uid_block()
                    _arrived(arrivals, _send(client, object_, block, 1))
                    before = time.monotonic()
                    _arrived(arrivals, _send(client, object_, block + 1, MAX_OBJECTS))
                    rate = MAX_OBJECTS / (time.monotonic() - before)
                points.append({"way": way, "x": count, "rate": rate, "open_ms": quantiles(opening)["p50_ms"]})
    return points


def by_waiting(depths: Sequence[int], directory: Path, progress: Progress) -> list[Point]:
    """medferry with so many objects waiting for a destination that is down: rates in, then out."""
    return [_at_depth(depth, directory / f"depth-{depth}", progress) for depth in depths]


def _at_depth(depth: int, directory: Path, progress: Progress) -> Point:
    listen, port = free_port(), free_port()
    config = studies(
        listen=f"127.0.0.1:{listen}",
        destinations={"receiver": ("PACS", f"127.0.0.1:{port}")},
        source=MEDFERRY_SOURCE,
        sink=MEDFERRY_SINK,
    )
    with running(config, directory / "way", drain=False) as product:
        progress(f"{depth:,} objects waiting: filling")
        _fill(listen, depth)
        spec = Spec(name="waiting", count=1, side=16)
        object_ = image(spec)
        contexts = [(object_.sop_class, [EXPLICIT_LE])]
        with Client(("127.0.0.1", listen), "MEDFERRY", contexts) as client:
            started = time.monotonic()
            _send(client, object_, new_uid_block(), PROBED)
            rate_in = PROBED / (time.monotonic() - started)
        progress(f"{depth:,} objects waiting: delivering")
        (directory / "receiver" / "received").mkdir(parents=True)
        with (
            Arrivals(directory / "receiver" / "received") as arrivals,
            storescp(directory / "receiver", port=port),
        ):
            times = arrivals.first(PROBED, DELIVERY_SECONDS)
        peak = max(item.peak_bytes for item in usage(product.process.pid))
    rate_out = (PROBED - 1) / max((times[-1] - times[0]) / 1e9, 1e-9)
    return {"way": "medferry", "x": depth, "rate_in": rate_in, "rate_out": rate_out, "peak_bytes": peak}


def _fill(port: int, count: int) -> None:
    """Store `count` small objects over a few associations at once."""
    errors: list[Exception] = []

    def fill(share: int) -> None:
        object_ = image(Spec(name="waiting", count=1, side=16))
        try:
            with Client(("127.0.0.1", port), "MEDFERRY", [(object_.sop_class, [EXPLICIT_LE])]) as client:
                _send(client, object_, new_uid_block(), share)
        except (OSError, NotUnderstood) as error:
            errors.append(error)

    shares = [count // FILLERS + (number < count % FILLERS) for number in range(FILLERS)]
    threads = [threading.Thread(target=fill, args=(share,), daemon=True) for share in shares if share]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
