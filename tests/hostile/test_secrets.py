"""What side B may not know of side A, and what nobody may read of a patient: looked for in all there is.

The sink's process is searched whole: command line, environment, open files, memory. So are its directory,
its log and its metrics, and what the destination received.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pydicom
import pytest
from pynetdicom import AE

from relay.supervisor import ask
from tests.archive import made
from tests.dicom.datasets import CT, EXPLICIT, read_back
from tests.hostile.test_faults import eventually
from tests.interop.dicom_peers import Station, storescp
from tests.peers import free_port, require
from tests.product import Product, running, studies

SENDER = "SECRETCT"
SENDER_CLASS = "1.2.826.0.1.777777.9.9"
SENDER_VERSION = "GEHEIME_VERSION"
PATIENT = b"Geheim^Wort "


@dataclass(frozen=True)
class Crossed:
    """One object that crossed a relay."""

    relay: Product
    pacs: Station
    port: int
    metrics: dict[str, int]
    uid: str

    def pid(self, name: str) -> int:
        pid: int = ask(str(self.relay.state))["lanes"][0][name]["pid"]
        return pid

    def secrets(self) -> list[bytes]:
        """What is A's alone: who sends, with what, and where A listens."""
        source_metrics = f"127.0.0.1:{self.metrics['source']}"
        return [
            each.encode()
            for each in (SENDER, SENDER_VERSION, SENDER_CLASS, f"127.0.0.1:{self.port}", source_metrics)
        ]


@pytest.fixture(scope="module")
def crossed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crossed]:
    require("storescp")
    directory = tmp_path_factory.mktemp("secrets")
    port, metrics = free_port(), {"source": free_port(), "sink": free_port()}
    obj = made(1, 100_000, patient=PATIENT)
    with contextlib.ExitStack() as stack:
        pacs = stack.enter_context(storescp(directory / "pacs"))
        config = studies(
            listen=f"127.0.0.1:{port}",
            destinations={"pacs": (pacs.ae_title, pacs.address)},
            source=f'metrics = "127.0.0.1:{metrics["source"]}"',
            sink=f'metrics = "127.0.0.1:{metrics["sink"]}"',
        )
        relay = stack.enter_context(running(config, directory / "relay"))
        entity = AE(SENDER)
        entity.implementation_class_uid = SENDER_CLASS
        entity.implementation_version_name = SENDER_VERSION
        entity.add_requested_context(CT, EXPLICIT)
        association = entity.associate("127.0.0.1", port, ae_title="MEDFERRY")
        data_set = read_back(obj.data, EXPLICIT)
        assert association.send_c_store(data_set).Status == 0x0000
        association.release()
        eventually(lambda: bool(os.listdir(pacs.directory)))
        yield Crossed(relay=relay, pacs=pacs, port=port, metrics=metrics, uid=obj.uid)


def found(secrets: list[bytes], where: bytes) -> list[bytes]:
    return [secret for secret in secrets if secret in where]


def test_the_secrets_are_such_that_a_search_finds_them(crossed: Crossed) -> None:
    """Side A's own log and command would show them: the other tests look for the right thing."""
    assert SENDER in crossed.relay.log
    assert str(crossed.port) in crossed.relay.config_file.read_text()


def test_the_destination_learns_nothing_of_the_sender(crossed: Crossed) -> None:
    (path,) = crossed.pacs.directory.iterdir()
    assert found(crossed.secrets(), path.read_bytes()) == []
    meta = pydicom.dcmread(path).file_meta
    assert meta.get("SourceApplicationEntityTitle", "MEDFERRY") == "MEDFERRY"
    assert found(crossed.secrets(), (path.parent.parent / "storescp.log").read_bytes()) == []


def test_the_sinks_directory_log_and_metrics_hold_nothing_of_side_a(crossed: Crossed) -> None:
    directory = crossed.relay.state / "lanes" / "studies" / "sink"
    files = [path for path in directory.rglob("*") if path.is_file()]
    assert any(path.name == "index.db" for path in files)
    for path in files:
        assert found(crossed.secrets(), path.read_bytes()) == [], path.name
    lines = [line for line in crossed.relay.lines if "studies.sink" in line]
    assert found(crossed.secrets(), "".join(lines).encode()) == []
    with urllib.request.urlopen(f"http://127.0.0.1:{crossed.metrics['sink']}/metrics") as answer:
        assert found(crossed.secrets(), answer.read()) == []


def test_the_sinks_process_is_started_without_anything_of_side_a(crossed: Crossed) -> None:
    process = Path(f"/proc/{crossed.pid('sink')}")
    for name in ("cmdline", "environ"):
        assert found(crossed.secrets(), (process / name).read_bytes()) == []
    # No listening socket of A's among what it inherited: only its own metrics listen.
    sockets = {os.readlink(fd) for fd in (process / "fd").iterdir()}
    listening = {}
    for line in (process / "net" / "tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] == "0A":
            listening[f"socket:[{fields[9]}]"] = int(fields[1].rpartition(":")[2], 16)
    assert {listening[each] for each in sockets & listening.keys()} == {crossed.metrics["sink"]}


@pytest.mark.root
def test_the_sinks_memory_holds_nothing_of_side_a(crossed: Crossed) -> None:
    if os.geteuid() != 0:
        pytest.skip("reading another process's memory needs root")

    def memory(name: str) -> bytes:
        pid = crossed.pid(name)
        pieces = []
        with (
            Path(f"/proc/{pid}/maps").open() as maps,
            open(f"/proc/{pid}/mem", "rb", buffering=0) as content,
        ):
            for line in maps:
                match = re.match(r"([0-9a-f]+)-([0-9a-f]+) rw", line)
                if match is None or "[vvar" in line:
                    continue
                start, end = (int(each, 16) for each in match.groups())
                content.seek(start)
                with contextlib.suppress(OSError):
                    pieces.append(content.read(end - start))
        return b"".join(pieces)

    secrets = crossed.secrets()
    # The search is able to find: side A's own process has some of it still.
    assert SENDER.encode() in found(secrets, memory("source"))
    assert found(secrets, memory("sink")) == []


def test_the_patients_name_is_in_no_log_status_or_metric(crossed: Crossed) -> None:
    said = [crossed.relay.log, json.dumps(ask(str(crossed.relay.state)))]
    for port in crossed.metrics.values():
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            said.append(answer.read().decode())
    assert all("objects_" in each for each in said[2:])
    assert all("Geheim" not in each and "Wort" not in each for each in said)
    assert all(crossed.uid not in each for each in said)
