"""Senders that misbehave, through the running product: each is answered for, and the next one is served."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from perf.client import Client
from tests.archive import Archive, Made, made
from tests.dicom.datasets import CT, DEFLATED, EXPLICIT, deflate, element, head, names, nested
from tests.hostile.test_faults import eventually, store
from tests.peers import free_port
from tests.product import Product, running, studies

PATIENT = b"Geheim^Wort "
SENDER = "SECRETCT"


class Relay:
    """A product and the archive behind it."""

    def __init__(self, product: Product, archive: Archive, address: tuple[str, int]) -> None:
        self.product = product
        self.archive = archive
        self.address = address

    def command(self, *arguments: str) -> str:
        """A ``medferry`` command on this relay's state."""
        return self.product.command(*arguments, "--state", str(self.product.state))

    def quarantined(self, side: str = "source") -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = json.loads(self.command("quarantine", "ls", "--json", "--side", side))
        return rows


@pytest.fixture(scope="module")
def relay(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Relay]:
    """One for all these tests: none of them may leave it worse than it was."""
    port = free_port()
    directory = tmp_path_factory.mktemp("relay")
    with Archive() as pacs:
        config = studies(listen=f"127.0.0.1:{port}", destinations={"pacs": pacs.destination})
        with running(config, directory) as product:
            yield Relay(product, pacs, ("127.0.0.1", port))


# ---- twenty that misbehave ------------------------------------------------------------------------------


def _request(address: tuple[str, int]) -> bytes:
    """The bytes of a sound A-ASSOCIATE-RQ, taken from a client that speaks to a listener of ours."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(5)

        class Recorder(Client):
            def _receive_pdu(self) -> tuple[int, bytes]:
                return 0x02, bytes(68)

        with contextlib.suppress(Exception):
            Recorder(server.getsockname(), "MEDFERRY", [(CT, [EXPLICIT])], "EVIL").socket.close()
        peer, _ = server.accept()
        with peer:
            peer.settimeout(5)
            return peer.recv(65536)


def _associated(address: tuple[str, int]) -> socket.socket:
    return Client(address, "MEDFERRY", [(CT, [EXPLICIT])], "EVIL").socket


def _raw(data: bytes) -> Callable[[tuple[str, int]], socket.socket]:
    def connect(address: tuple[str, int]) -> socket.socket:
        connection = socket.create_connection(address)
        connection.sendall(data)
        return connection

    return connect


def _then(data: bytes) -> Callable[[tuple[str, int]], socket.socket]:
    def connect(address: tuple[str, int]) -> socket.socket:
        connection = _associated(address)
        connection.sendall(data)
        return connection

    return connect


def _half_a_request(address: tuple[str, int]) -> socket.socket:
    return _raw(_request(address)[:50])(address)


def _many_contexts(address: tuple[str, int]) -> socket.socket:
    contexts = [(f"1.2.840.10008.5.1.4.1.1.{number}", [EXPLICIT]) for number in range(1, 129)]
    return Client(address, "MEDFERRY", contexts, "EVIL").socket


def _abort_in_the_middle(address: tuple[str, int]) -> socket.socket:
    client = Client(address, "MEDFERRY", [(CT, [EXPLICIT])], "EVIL")
    start = struct.pack("<HHI", 0, 0x0100, 2) + b"\x01\x00"
    client.socket.sendall(struct.pack(">BxIIBB", 4, len(start) + 6, len(start) + 2, 1, 3) + start)
    client.socket.sendall(b"\x07\x00\x00\x00\x00\x04\x00\x00\x00\x00")
    return client.socket


MISBEHAVIOUR: list[Callable[[tuple[str, int]], socket.socket]] = [
    _raw(b""),
    _raw(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"),
    _raw(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"),
    _raw(b"\x01\x00\xff\xff\xff\xff"),
    _raw(b"\x04\x00\xff\xff\xff\xff" + bytes(1000)),
    _raw(b"\x01"),
    _raw(b"\xff" * 5000),
    _raw(b"\x01\x00\x00\x00\x00\x04\x00\x01\x00\x00"),
    _raw(b"\x05\x00\x00\x00\x00\x04\x00\x00\x00\x00"),
    _raw(b"\x07\x00\x00\x00\x00\x04\x00\x00\x00\x00"),
    _half_a_request,
    _associated,
    _many_contexts,
    _abort_in_the_middle,
    _then(b"\x04"),
    _then(b"\x04\x00\xff\xff\xff\xff"),
    _then(b"\x04\x00\x00\x00\x00\x06\xff\xff\xff\xff\x01\x03"),
    _then(b"\x04\x00\x00\x00\x00\x06\x00\x00\x00\x02\x01\x02"),
    _then(b"\x04\x00\x00\x00\x00\x00"),
    _then(b"\x02\x00\x00\x00\x00\x04\x00\x00\x00\x00"),
]


def test_twenty_that_misbehave_never_stop_the_twenty_first(relay: Relay) -> None:
    assert len(MISBEHAVIOUR) == 20
    obj = made(21)
    with contextlib.ExitStack() as connections:
        for misbehave in MISBEHAVIOUR:
            connections.enter_context(misbehave(relay.address))
        assert store(relay.address, [obj]) == [0]
        relay.archive.wait([obj.uid], 10)
    again = made(22)
    assert store(relay.address, [again]) == [0]
    relay.archive.wait([again.uid], 10)


# ---- data sets that mean harm ---------------------------------------------------------------------------


def _said(instance: str, content: bytes, syntax: str = EXPLICIT) -> Made:
    patient = element(0x00100010, "PN", PATIENT)
    data = names(instance=instance) + patient + content
    return Made(uid=instance, data=deflate(data) if syntax == DEFLATED else data, syntax=syntax)


def _bomb(instance: str) -> Made:
    return _said(instance, element(0x7FE00010, "OW", bytes(200 << 20)), DEFLATED)


MALFORMED: dict[str, tuple[Callable[[str], Made], int]] = {
    "length": (lambda uid: _said(uid, head(0x00100020, "LO", 999)), 0xC002),
    "truncated": (lambda uid: _said(uid, b"\x10\x00\x20"), 0xC001),
    "depth": (lambda uid: _said(uid, nested(300)), 0xC010),
    "order": (lambda uid: _said(uid, names()), 0xC004),
    "mismatch": (lambda uid: Made(uid=uid, data=_said("2.25.9", b"").data), 0xA900),
    "inflated": (_bomb, 0xC012),
}


def test_what_is_malformed_waits_in_quarantine_with_a_reason(relay: Relay) -> None:
    before = relay.archive.received.keys() | set()
    for number, (make, expected) in enumerate(MALFORMED.values()):
        bad = make(f"2.25.500{number}")
        with Client(relay.address, "MEDFERRY", [(CT, [bad.syntax])], SENDER) as client:
            assert hex(client.store(CT, bad.uid, bad.data)) == hex(expected)
    good = made(31)
    assert store(relay.address, [good]) == [0]
    relay.archive.wait([good.uid], 10)
    assert relay.archive.received.keys() - before == {good.uid}

    rows = {row["reason"]: row for row in relay.quarantined()}
    assert rows.keys() == MALFORMED.keys()
    assert all(row["detail"] and "Geheim" not in row["detail"] for row in rows.values())
    shown = json.loads(relay.command("quarantine", "show", rows["depth"]["id"][:8]))
    assert shown["reason"] == "depth" and shown["lane"] == "studies" and shown["side"] == "source"

    # Dropped for good.
    relay.command("quarantine", "drop", rows["depth"]["id"], "--yes")
    assert "depth" not in {row["reason"] for row in relay.quarantined()}
    # Released by side A it is caught by side B, which looks for itself; released there too, it goes on.
    mismatch = rows["mismatch"]["id"]
    relay.command("quarantine", "release", mismatch, "--side", "source")
    eventually(lambda: [row["id"] for row in relay.quarantined("sink")] == [mismatch])
    relay.command("quarantine", "release", mismatch, "--side", "sink")
    announced = f"2.25.500{list(MALFORMED).index('mismatch')}"
    relay.archive.wait([announced], 10)
    assert relay.quarantined("sink") == []


def test_an_object_sent_twice_is_delivered_once(relay: Relay) -> None:
    obj, last = made(41), made(42)
    assert store(relay.address, [obj, obj, last]) == [0, 0, 0]
    assert store(relay.address, [obj]) == [0]
    relay.archive.wait([obj.uid, last.uid], 10)
    final = made(43)
    assert store(relay.address, [final]) == [0]
    relay.archive.wait([final.uid], 10)
    assert relay.archive.received[obj.uid] == [obj.sha256]


def test_a_patients_name_is_nowhere_but_in_the_objects(relay: Relay) -> None:
    """After all of the above, and one more that passes: in no log, status, list or metric."""
    named = made(51, patient=PATIENT)
    assert store(relay.address, [named], SENDER) == [0]
    relay.archive.wait([named.uid], 10)
    said = [
        relay.product.log,
        json.dumps(relay.product.status()),
        relay.command("quarantine", "ls"),
        relay.command("quarantine", "ls", "--json"),
        relay.command("spool", "ls", "--json"),
    ]
    assert all("Geheim" not in each and "Wort" not in each for each in said)
    in_state = [path for path in relay.product.state.rglob("*") if path.is_file()]
    # The journal has for some moments what was just acknowledged; see docs/operations.md.
    files = [path for path in in_state if path.name != "journal"]
    holding = {path.parent.name for path in files if b"Geheim" in path.read_bytes()}
    assert holding <= {"objects", "quarantine"} and "objects" in holding
