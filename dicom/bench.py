"""`medferry bench dicom`: a running lane measured from outside, from the modality's C-STORE to the PACS.

    associations of ours ─▶ the lane's source ═ link ═ its sink ─▶ a storage SCP of ours

Objects that nobody has seen go in on side A, each once the one before it was answered, as modalities send
them. The storage SCP listens where the lane delivers, in the PACS's place. Both ends are in this process, so
that one clock serves both, and their own work is in the figures.

What waits for the destination and is not ours is refused with a status that makes the lane try again later:
nothing of anybody else's is taken.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from pydicom.uid import ExplicitVRLittleEndian

from dicom import scp, scu
from dicom.bench_objects import UID_ROOT, Image, Spec, image, new_uid_block, uid
from dicom.dimse import Status
from dicom.screen import Rules
from relay.config import Listener, split_address
from relay.errors import MedferryError
from relay.listeners import open_listener
from relay.metrics import Latency
from relay.process import within

ARRIVE_SECONDS = 30.0
"""After the last answer, for what is in custody to be delivered. What comes later is called missing."""

ANYWHERE = ("0.0.0.0/0", "::/0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What is sent. `source` is where the lane's source listens, `sink` the address of its destination."""

    source: str
    sink: str
    calling_ae_title: str = "BENCH"
    called_ae_title: str = "MEDFERRY"
    receiver_ae_title: str = "PACS"
    """AE title of the destination whose place the benchmark takes."""
    seconds: float = 10.0
    side: int = 512
    """Rows and columns of a picture with 16 bits a pixel: 512 make a CT of 0.5 MB."""
    associations: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """One measurement. Rates are from the first C-STORE to the last object that arrived."""

    objects: int
    """Answered with success."""
    missing: int
    """Of those, what did not arrive within `ARRIVE_SECONDS`."""
    object_bytes: int
    seconds: float
    objects_per_second: float
    megabytes_per_second: float
    answer: dict[str, float] = field(repr=False)
    """From the first byte of a C-STORE to its answer, in milliseconds; see `Latency.summary`."""
    delivery: dict[str, float] = field(repr=False)
    """From the first byte of a C-STORE to the object's last byte at the receiver, likewise."""

    def as_json(self) -> dict[str, Any]:
        """All figures, JSON-able."""
        return asdict(self)


class _Names:
    """SOP instances that nobody has seen, one after the other."""

    def __init__(self) -> None:
        self._first = self._next = new_uid_block()

    def next(self) -> str:
        """The next one, all of one length."""
        self._next += 1
        return uid(self._next - 1)

    def __contains__(self, sop_instance: str) -> bool:
        number = sop_instance.removeprefix(UID_ROOT)
        return number.isdecimal() and self._first <= int(number) < self._next


class _Receiver:
    """The storage SCP in the PACS's place: counts and forgets what is ours. A `scp.StoreHandler`."""

    def __init__(self, ours: _Names) -> None:
        self._ours = ours
        self.delivery = Latency()
        self.sent_ns: dict[str, int] = {}
        """When each object that has not arrived was begun, by SOP instance."""
        self.last_ns = 0
        self.others = 0
        """C-STOREs of objects that are not ours: somebody else uses the lane."""
        self.progress = asyncio.Event()

    def admit(self, peer: scp.Peer) -> None:
        """Everybody may come in."""

    def begin(self, request: scp.StoreRequest) -> _Arrival | int:
        """Take what is ours; let the lane keep what is not."""
        if request.sop_instance not in self._ours:
            self.others += 1
            return Status.OUT_OF_RESOURCES
        return _Arrival(self, request.sop_instance)

    def arrived(self, sop_instance: str) -> None:
        """The last byte of an object is here."""
        began = self.sent_ns.pop(sop_instance, None)
        if began is None:
            # A second time: the lane did not get our first answer.
            return
        self.last_ns = time.monotonic_ns()
        self.delivery.record_ns(self.last_ns - began)
        self.progress.set()

    async def all_arrived(self) -> None:
        """Wait until nothing is on its way."""
        while self.sent_ns:
            self.progress.clear()
            await self.progress.wait()


class _Arrival:
    """One object on its way in. A `scp.Store`."""

    def __init__(self, receiver: _Receiver, sop_instance: str) -> None:
        self._receiver = receiver
        self._sop_instance = sop_instance

    def write(self, parts: Sequence[memoryview]) -> None:
        """Nothing is kept."""

    async def finish(self) -> int:
        """It is whole."""
        self._receiver.arrived(self._sop_instance)
        return Status.SUCCESS

    def abandon(self) -> None:
        """It will come again."""


class _Sender:
    """One association, and the one object that it sends under ever new names."""

    def __init__(
        self, options: Options, names: _Names, receiver: _Receiver, answer: Latency, source: Image
    ) -> None:
        self._options = options
        self._names = names
        self._receiver = receiver
        self._answer = answer
        self._image = source
        self.stored = 0

    async def associate(self) -> scu.Requestor:
        """An association that takes the object.

        Raises:
            MedferryError: There is none, or it does not.
        """
        options = self._options
        host, port = split_address(options.source)
        context = (self._image.sop_class, str(ExplicitVRLittleEndian))
        association = await scu.associate(
            host,
            port,
            calling_ae_title=options.calling_ae_title,
            called_ae_title=options.called_ae_title,
            contexts=[context],
        )
        if not association.accepts(context):
            association.abort()
            raise MedferryError(f"{options.called_ae_title} at {options.source} takes no CT images")
        return association

    async def send(self, association: scu.Requestor, until: float) -> None:
        """Store objects until `until` (of `time.monotonic`).

        Raises:
            MedferryError: The association ended, or an object was refused.
        """
        with _in_memory(self._image.data) as fd:
            while time.monotonic() < until:
                await self._store(association, fd)
        await association.release()

    async def _store(self, association: scu.Requestor, fd: int) -> None:
        name = self._names.next()
        os.pwrite(fd, name.encode(), self._image.uid_at)
        began = time.monotonic_ns()
        self._receiver.sent_ns[name] = began
        status = await association.store(
            sop_class=self._image.sop_class,
            sop_instance=name,
            transfer_syntax=ExplicitVRLittleEndian,
            fd=fd,
            offset=0,
            size=len(self._image.data),
            last=False,
        )
        if status != Status.SUCCESS:
            raise MedferryError(
                f"{self._options.source} refused an object with status 0x{status:04X}: see the source's log"
            )
        self._answer.record_ns(time.monotonic_ns() - began)
        self.stored += 1


async def bench_dicom(options: Options) -> Report:
    """Store objects into a lane for `options.seconds`, receive what it delivers, and measure.

    Raises:
        MedferryError: An address cannot be used, the lane refused something, or nothing arrived.
    """
    names, answer = _Names(), Latency()
    receiver = _Receiver(names)
    source = image(Spec(name="bench", count=1, side=options.side))
    listener = Listener(name="dicom", address=options.sink, kind="tcp")
    policy = scp.Policy(
        ae_title=options.receiver_ae_title, accept=(scp.AcceptRule("*", ANYWHERE),), max_associations=256
    )
    async with contextlib.AsyncExitStack() as opened:
        sockets = open_listener(listener, None)
        server = await scp.serve(sockets, receiver, policy, Rules())
        opened.push_async_callback(server.closed)
        opened.callback(server.close)
        senders = [_Sender(options, names, receiver, answer, source) for _ in range(options.associations)]
        associations = []
        for sender in senders:
            association = await sender.associate()
            opened.callback(association.abort)
            associations.append(association)
        began = time.monotonic()
        until = began + options.seconds
        await asyncio.gather(*map(_Sender.send, senders, associations, itertools.repeat(until)))
        await within(ARRIVE_SECONDS, receiver.all_arrived())
    objects = sum(sender.stored for sender in senders)
    arrived = receiver.delivery.count
    if receiver.others or not arrived:
        raise MedferryError(_in_vain(options, server.rejected, receiver.others))
    seconds = receiver.last_ns / 1e9 - began
    rate = arrived / seconds
    return Report(
        objects=objects,
        missing=objects - arrived,
        object_bytes=len(source.data),
        seconds=round(seconds, 3),
        objects_per_second=round(rate, 1),
        megabytes_per_second=round(rate * len(source.data) / 1e6, 1),
        answer=answer.summary(),
        delivery=receiver.delivery.summary(),
    )


@contextlib.contextmanager
def _in_memory(data: bytearray) -> Iterator[int]:
    """A file that has `data`, on no disk."""
    fd = os.memfd_create("object", os.MFD_CLOEXEC)
    try:
        os.pwrite(fd, data, 0)
        yield fd
    finally:
        os.close(fd)


def _in_vain(options: Options, rejected: Counter[str], others: int) -> str:
    """Why there are no figures."""
    where = f"{options.receiver_ae_title} at {options.sink}"
    if others:
        return f"objects of others wait for {where}; none was taken: measure a lane that nobody uses"
    if rejected:
        reasons = ", ".join(rejected)
        return f"associations with {where} were rejected ({reasons}): use the destination's own AE title"
    return (
        f"nothing came to {where}: check that a destination of the lane at {options.source} has that address"
    )


ROWS: tuple[tuple[str, str], ...] = (
    ("objects", "{objects} of {object_bytes} bytes"),
    ("missing", "{missing}"),
    ("objects a second", "{objects_per_second:.1f}"),
    ("MB a second", "{megabytes_per_second:.1f}"),
    ("answered", "p50 {answer[p50_ms]:.1f}, p99 {answer[p99_ms]:.1f}, max {answer[max_ms]:.1f} ms"),
    ("delivered", "p50 {delivery[p50_ms]:.1f}, p99 {delivery[p99_ms]:.1f}, max {delivery[max_ms]:.1f} ms"),
)
"""Label and format of each line that people read."""


def lines(report: Report) -> list[tuple[str, str]]:
    """Label and figure of each line, for a table."""
    figures = asdict(report)
    return [(label, pattern.format(**figures)) for label, pattern in ROWS]
