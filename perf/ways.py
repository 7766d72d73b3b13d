"""The ways from a sender to a receiver that are compared: none in between, Orthanc, pynetdicom, medferry.

Each is a context manager that is given a directory and the receiver, and yields where to send to and which
process to account for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from tests.interop.dicom_peers import PeerFailed, Station, orthanc, plain_relay, storescp
from tests.peers import free_port
from tests.product import Product, ProductFailed, running, studies

WayFailed = (PeerFailed, ProductFailed)
"""A way that cannot be opened here: not installed, or broken."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """Where the sender sends to, and the process in between (its descendants count too)."""

    host: str
    port: int
    ae_title: str
    pid: int
    product: Product | None = None
    """The running relay, where the way is medferry."""


Way = Callable[[Path, Station], AbstractContextManager[Entry]]


@contextlib.contextmanager
def direct(directory: Path, receiver: Station) -> Iterator[Entry]:
    """No relay: the sender sends to the receiver."""
    del directory
    yield Entry(host=receiver.host, port=receiver.port, ae_title=receiver.ae_title, pid=receiver.pid)


@contextlib.contextmanager
def through_orthanc(directory: Path, receiver: Station, nodelay: bool = False) -> Iterator[Entry]:
    """Orthanc with auto-routing as its book teaches."""
    with orthanc(directory, forward_to=receiver, nodelay=nodelay) as station:
        yield Entry(host=station.host, port=station.port, ae_title=station.ae_title, pid=station.pid)


def through_tuned_orthanc(directory: Path, receiver: Station) -> AbstractContextManager[Entry]:
    """The same Orthanc with TCP_NODELAY=1 in its environment, which few know to set."""
    return through_orthanc(directory, receiver, nodelay=True)


@contextlib.contextmanager
def through_pynetdicom(directory: Path, receiver: Station) -> Iterator[Entry]:
    """A plain pynetdicom relay."""
    with plain_relay(directory, forward_to=receiver) as station:
        yield Entry(host=station.host, port=station.port, ae_title=station.ae_title, pid=station.pid)


@contextlib.contextmanager
def through_medferry(directory: Path, receiver: Station) -> Iterator[Entry]:
    """medferry with its three processes a lane and fsync on both custodies."""
    port = free_port()
    config = studies(
        listen=f"127.0.0.1:{port}",
        destinations={"receiver": (receiver.ae_title, receiver.address)},
        source=MEDFERRY_SOURCE,
        sink=MEDFERRY_SINK,
    )
    with running(config, directory, drain=False) as product:
        yield Entry(
            host="127.0.0.1", port=port, ae_title="MEDFERRY", pid=product.process.pid, product=product
        )


MEDFERRY_SOURCE = "max_associations_per_address = 100"
MEDFERRY_SINK = ""
"""Keys beyond the defaults: all senders here share one address. The rest is what a new user gets."""

WAYS: dict[str, Way] = {
    "direct": direct,
    "orthanc": through_orthanc,
    "orthanc-nodelay": through_tuned_orthanc,
    "pynetdicom": through_pynetdicom,
    "medferry": through_medferry,
}


@contextlib.contextmanager
def opened(name: str, directory: Path, *, stock_receiver: bool = False) -> Iterator[tuple[Entry, Station]]:
    """A receiver (DCMTK's storescp, a process an association) and the way `name` to it, both fresh.

    The receiver has TCP_NODELAY=1 in its environment for all ways alike, or else its own answers stall 40 ms
    each and hide what is in between; `stock_receiver` runs it as it comes.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with (
        storescp(directory / "receiver", nodelay=not stock_receiver) as receiver,
        WAYS[name](directory / "way", receiver) as entry,
    ):
        yield entry, receiver
