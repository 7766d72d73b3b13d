"""DICOM applications that are not ours, each as a context manager: started, listening, stopped again.

    with storescp(directory) as pacs:            # DCMTK's receiver
        with orthanc(directory, forward_to=pacs) as router:   # Orthanc, auto-forwarding
            with plain_relay(directory, forward_to=pacs) as relay:   # a relay as pynetdicom's users write it
    with archive() as store:                     # pynetdicom's SCP in this process: every syntax, exact bytes

All listen on loopback, on ports free at that moment, and keep what they write below the directory they are
given. "Listening" is proven by a connection. Nothing is stopped but what was started here.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pynetdicom import AE, ALL_TRANSFER_SYNTAXES, evt
from pynetdicom.dimse_primitives import C_STORE
from pynetdicom.presentation import AllStoragePresentationContexts

from tests.peers import PACKAGES, SYSTEM_PATH, free_port

START_SECONDS = 30.0
"""A peer that does not listen after so long is taken for broken. Orthanc needs one to three."""

STOP_SECONDS = 10.0
"""Between asking a peer to stop and killing it."""

CONNECT_PAUSE_SECONDS = 0.02
"""Between two attempts to connect, spent waiting for the process to end."""

NO_STALL = {"TCP_NODELAY": "1"}
"""Environment that makes DCMTK turn Nagle's algorithm off. Without it responses wait 40 ms for an ACK."""

REPOSITORY = Path(__file__).resolve().parents[2]


class PeerFailed(Exception):
    """A peer is not installed, did not start, or ended early. Says what its last words were."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Station:
    """A running application entity: where it listens, and where it puts what it receives."""

    host: str
    port: int
    ae_title: str
    directory: Path
    pid: int

    @property
    def address(self) -> str:
        """``host:port`` as a configuration writes it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True, kw_only=True)
class OrthancStation(Station):
    """An Orthanc server; `http_port` is its REST interface, without a password, on loopback."""

    http_port: int

    def get(self, path: str) -> bytes:
        """The body of ``GET path`` from the REST interface."""
        url = f"http://127.0.0.1:{self.http_port}{path}"
        with urllib.request.urlopen(url, timeout=START_SECONDS) as response:
            body: bytes = response.read()
            return body

    def post(self, path: str, body: bytes) -> Any:
        """The JSON answer to ``POST path``."""
        url = f"http://127.0.0.1:{self.http_port}{path}"
        with urllib.request.urlopen(url, body, timeout=START_SECONDS) as response:
            return json.load(response)

    def instances(self) -> list[bytes]:
        """Every stored instance, as the bytes of a DICOM file."""
        return [self.get(f"/instances/{name}/file") for name in json.loads(self.get("/instances"))]


def program(name: str) -> str:
    """The system's own `name`, never the environment's namesake.

    Raises:
        PeerFailed: It is not installed.
    """
    path = shutil.which(name, path=SYSTEM_PATH)
    if path is None:
        raise PeerFailed(f"{name} is not installed: apt-get install {PACKAGES[name]}")
    return path


@contextlib.contextmanager
def spawned(command: Sequence[str], log: Path, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run `command` in a process group of its own until the block ends. What it says goes to `log`."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, **environment},
            start_new_session=True,
        )
    try:
        yield process
    finally:
        stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the process group of `process`: ask, wait, then kill."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        pass
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait_listening(process: subprocess.Popen[bytes], host: str, port: int, log: Path) -> None:
    """Return once `host:port` takes a connection.

    Raises:
        PeerFailed: `process` ended, or START_SECONDS passed.
    """
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        try:
            socket.create_connection((host, port), timeout=1).close()
            return
        except OSError:
            pass
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(CONNECT_PAUSE_SECONDS)
            break
    raise PeerFailed(f"{process.args!r} does not listen on {host}:{port}; it said: {tail(log)}")


def tail(log: Path, characters: int = 2000) -> str:
    """The end of what a peer wrote."""
    return log.read_text(errors="replace")[-characters:]


@contextlib.contextmanager
def storescp(
    directory: Path,
    *,
    options: Sequence[str] = ("--fork",),
    nodelay: bool = True,
    host: str = "127.0.0.1",
    port: int | None = None,
) -> Iterator[Station]:
    """DCMTK's storage SCP. Received files are ``directory/received/<modality>.<SOP Instance UID>``.

    Without ``--fork`` it serves one association at a time and lets others wait in the backlog. It binds all
    addresses, IPv4 or IPv6 by its own build, whatever `host` says; `host` is where the peers are sent.
    """
    port = port or free_port(host=host)
    received = directory / "received"
    received.mkdir(parents=True, exist_ok=True)
    command = [program("storescp"), "--aetitle", "PACS", "--max-pdu", "131072", *options]
    command += ["--output-directory", str(received), str(port)]
    log = directory / "storescp.log"
    environment = NO_STALL if nodelay else {}
    with spawned(command, log, **environment) as process:
        wait_listening(process, host, port, log)
        yield Station(host=host, port=port, ae_title="PACS", directory=received, pid=process.pid)


FORWARD_LUA = """
function OnStoredInstance(instanceId, tags, metadata)
  Delete(SendToModality(instanceId, 'next'))
end
"""
"""Auto-routing as the Orthanc project teaches it: send each instance on as it comes, then forget it."""


@contextlib.contextmanager
def orthanc(
    directory: Path,
    *,
    forward_to: Station | None = None,
    nodelay: bool = False,
) -> Iterator[OrthancStation]:
    """An Orthanc server: a plain archive, or with `forward_to` a router that sends each instance on.

    Args:
        directory: Its configuration, database and files live here.
        forward_to: Where it sends what it receives.
        nodelay: Turn Nagle's algorithm off in its DCMTK. Its packages do not.
    """
    port, http_port = free_port(), free_port()
    storage = directory / "orthanc"
    storage.mkdir(parents=True, exist_ok=True)
    settings: dict[str, Any] = {
        "Name": "peer",
        "StorageDirectory": str(storage),
        "IndexDirectory": str(storage),
        "DicomAet": "ORTHANC",
        "DicomPort": port,
        "DicomAlwaysAllowStore": True,
        "DicomCheckCalledAet": False,
        "UnknownSopClassAccepted": True,
        "MaximumPduLength": 131072,
        "HttpServerEnabled": True,
        "HttpPort": http_port,
        "RemoteAccessAllowed": False,
        "AuthenticationEnabled": False,
        "OverwriteInstances": True,
        "Plugins": [],
    }
    if forward_to is not None:
        script = directory / "forward.lua"
        script.write_text(FORWARD_LUA)
        settings["LuaScripts"] = [str(script)]
        settings["DicomModalities"] = {"next": [forward_to.ae_title, forward_to.host, forward_to.port]}
    configuration = directory / "orthanc.json"
    configuration.write_text(json.dumps(settings, indent=2))
    log = directory / "orthanc.log"
    environment = NO_STALL if nodelay else {}
    with spawned([program("Orthanc"), str(configuration)], log, **environment) as process:
        wait_listening(process, "127.0.0.1", http_port, log)
        wait_listening(process, "127.0.0.1", port, log)
        yield OrthancStation(
            host="127.0.0.1",
            port=port,
            ae_title="ORTHANC",
            directory=storage,
            pid=process.pid,
            http_port=http_port,
        )


@contextlib.contextmanager
def plain_relay(directory: Path, *, forward_to: Station) -> Iterator[Station]:
    """A relay of forty lines of pynetdicom (`perf/plain_relay.py`), as its users write one."""
    port = free_port()
    log = directory / "plain_relay.log"
    directory.mkdir(parents=True, exist_ok=True)
    target = [forward_to.host, str(forward_to.port), forward_to.ae_title]
    command = [sys.executable, str(REPOSITORY / "perf" / "plain_relay.py"), str(port), *target]
    with spawned(command, log) as process:
        wait_listening(process, "127.0.0.1", port, log)
        yield Station(host="127.0.0.1", port=port, ae_title="RELAY", directory=directory, pid=process.pid)


@dataclass(frozen=True, slots=True, kw_only=True)
class Received:
    """One object as it came over the wire."""

    sop_class: str
    sop_instance: str
    transfer_syntax: str
    data: bytes


@dataclass(slots=True, kw_only=True)
class Archive:
    """What pynetdicom's storage SCP received, in order of arrival."""

    host: str
    port: int
    ae_title: str = "ARCHIVE"
    received: list[Received] = field(default_factory=list)
    _changed: threading.Condition = field(default_factory=threading.Condition)

    @property
    def address(self) -> str:
        """``host:port`` as a configuration writes it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def _store(self, event: evt.Event) -> int:
        request = event.request
        assert isinstance(request, C_STORE) and isinstance(request.DataSet, io.BytesIO)
        item = Received(
            sop_class=str(request.AffectedSOPClassUID),
            sop_instance=str(request.AffectedSOPInstanceUID),
            transfer_syntax=str(event.context.transfer_syntax),
            data=request.DataSet.getvalue(),
        )
        with self._changed:
            self.received.append(item)
            self._changed.notify_all()
        return 0

    def wait(self, count: int, seconds: float) -> list[Received]:
        """Everything received, once it is at least `count` objects or `seconds` have passed."""
        with self._changed:
            self._changed.wait_for(lambda: len(self.received) >= count, seconds)
            return list(self.received)


@contextlib.contextmanager
def archive(host: str = "127.0.0.1") -> Iterator[Archive]:
    """pynetdicom's storage SCP in this process: every storage class in every transfer syntax it knows."""
    ae = AE("ARCHIVE")
    ae.maximum_associations = 100
    for context in AllStoragePresentationContexts:
        ae.add_supported_context(str(context.abstract_syntax), ALL_TRANSFER_SYNTAXES)
    store = Archive(host=host, port=free_port(host=host))
    server = ae.start_server((host, store.port), block=False, evt_handlers=[(evt.EVT_C_STORE, store._store)])
    assert server is not None
    try:
        yield store
    finally:
        server.shutdown()
