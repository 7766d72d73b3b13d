"""`medferry demo`: a whole relay on loopback, with studies and a camera crossing it.

A storage SCP plays the PACS on side B, a storage SCU the modality on side A; both are pynetdicom as it comes.
What arrives is compared with what was sent: as many objects, and every pixel hash equal.
"""

from __future__ import annotations

import asyncio
import contextlib
import glob
import hashlib
import os
import shutil
import signal
import socket
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from pydicom import Dataset, dcmread
from pydicom.data.data_manager import DATA_ROOT
from pydicom.errors import InvalidDicomError
from pydicom.uid import UID
from pynetdicom import AE, _config, evt
from pynetdicom.association import Association
from pynetdicom.events import Event
from pynetdicom.presentation import build_context
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from relay.config import read
from relay.errors import MedferryError
from relay.lanes import load
from relay.supervisor import ask

DIRECTORY = "medferry-demo"
READY_SECONDS = 60.0
DELIVERY_SECONDS = 60.0
POLL_SECONDS = 0.005
END_SECONDS = 40.0
MAX_OBJECT_BYTES = 8 << 20
"""Larger samples are left out: the demo should take seconds."""

HOW_TO_KEEP = "The relay ends here, and its pages with it. To open them, let it run on: {command} demo --keep"

CONFIGURATION = """\
[relay]
name  = "demo"
state = "{directory}/state"

[[lane]]
name = "studies"
kind = "dicom"
lab  = true
[lane.source]
listen = "127.0.0.1:{modality}"
accept = [ {{ ae_title = "*", from = ["127.0.0.0/8"] }} ]
[[lane.sink.destination]]
name     = "pacs"
ae_title = "PACS"
address  = "127.0.0.1:{pacs}"

[[lane]]
name = "camera"
kind = "media"
lab  = true
[lane.source.rtp]
listen = "127.0.0.1:{camera_in}"
codec  = "h264"
[lane.source.whip]
listen = "127.0.0.1:{publish}"
[lane.sink.rtp]
address = "127.0.0.1:{camera_out}"
codec   = "h264"
bitrate = 4_000_000
[lane.sink.whep]
listen = "127.0.0.1:{view}"
"""


@dataclass(slots=True)
class Ports:
    """The demo's loopback ports, free at the moment of asking."""

    modality: int
    pacs: int
    camera_in: int
    camera_out: int
    publish: int
    view: int


def _free_ports() -> Ports:
    """Ports that nobody has; the RTP ones even, with the next one free for RTCP."""
    with contextlib.ExitStack() as held:

        def free(kind: socket.SocketKind) -> int:
            while True:
                first = held.enter_context(socket.socket(socket.AF_INET, kind))
                first.bind(("127.0.0.1", 0))
                port: int = first.getsockname()[1]
                if kind is socket.SOCK_STREAM:
                    return port
                if port % 2 == 0:
                    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, kind) as second:
                        second.bind(("127.0.0.1", port + 1))
                        return port

        stream, datagram = socket.SOCK_STREAM, socket.SOCK_DGRAM
        return Ports(free(stream), free(stream), free(datagram), free(datagram), free(stream), free(stream))


def pixel_hash(data_set: Dataset) -> str:
    """SHA-256 of the pixel data as encoded; of nothing where there is none."""
    return hashlib.sha256(bytes(data_set.get("PixelData") or b"")).hexdigest()


@dataclass(slots=True)
class Pacs:
    """The storage SCP on side B."""

    directory: str
    arrived: dict[str, str] = field(default_factory=dict)
    """SOP Instance UID to pixel hash."""

    def _store(self, event: Event) -> int:
        data_set = event.dataset
        data_set.file_meta = event.file_meta
        path = os.path.join(self.directory, f"{len(self.arrived):04d}.dcm")
        with open(path, "wb") as file:
            file.write(event.encoded_dataset())
        self.arrived[str(data_set.SOPInstanceUID)] = pixel_hash(data_set)
        return 0x0000

    @contextlib.contextmanager
    def serving(self, port: int, contexts: set[tuple[str, str]]) -> Iterator[None]:
        """Take every object whose class and transfer syntax is in `contexts`."""
        entity = AE("PACS")
        for abstract, transfer in sorted(contexts):
            entity.add_supported_context(abstract, transfer)
        server = entity.start_server(
            ("127.0.0.1", port), block=False, evt_handlers=[(evt.EVT_C_STORE, self._store)]
        )
        try:
            yield
        finally:
            if server is not None:
                server.shutdown()


def samples() -> list[Dataset]:
    """pydicom's own sample objects, one of each SOP Instance UID."""
    found: dict[str, Dataset] = {}
    # The files in the package itself: pydicom's own search would fetch more from elsewhere.
    for path in sorted(glob.glob(os.path.join(DATA_ROOT, "test_files", "**", "*.dcm"), recursive=True)):
        if os.path.getsize(path) > MAX_OBJECT_BYTES:
            continue
        try:
            with warnings.catch_warnings():
                # Some of them are wrong on purpose; the relay says so better.
                warnings.simplefilter("ignore")
                data_set = dcmread(path)
        except (InvalidDicomError, OSError, AttributeError, NotImplementedError):
            continue
        syntax = data_set.file_meta.get("TransferSyntaxUID") if hasattr(data_set, "file_meta") else None
        has_pixels = "PixelData" in data_set
        if syntax and has_pixels and data_set.get("SOPClassUID") and data_set.get("SOPInstanceUID"):
            found.setdefault(str(data_set.SOPInstanceUID), data_set)
    return list(found.values())


def _context(data_set: Dataset) -> tuple[str, str]:
    return str(data_set.SOPClassUID), str(data_set.file_meta.TransferSyntaxUID)


def _associate(port: int, contexts: set[tuple[str, str]]) -> Association:
    # Data sets leave as they are in the files, not as a library would write them anew.
    _config.STORE_SEND_CHUNKED_DATASET = True
    entity = AE("MODALITY")
    proposal = [build_context(UID(abstract), UID(transfer)) for abstract, transfer in sorted(contexts)]
    association = entity.associate("127.0.0.1", port, contexts=proposal, ae_title="MEDFERRY")
    if not association.is_established:
        raise MedferryError("the relay refused the demo's association: see its log above")
    return association


async def _wait_until_ready(process: asyncio.subprocess.Process) -> None:
    assert process.stdout is not None
    try:
        async with asyncio.timeout(READY_SECONDS):
            while line := await process.stdout.readline():
                if line.startswith(b"ready"):
                    return
    except TimeoutError:
        raise MedferryError(f"the relay was not ready within {READY_SECONDS:.0f} s") from None
    raise MedferryError("the relay ended before it was ready: see its log above")


async def _send(console: Console, objects: list[Dataset], ports: Ports, pacs: Pacs) -> int:
    """Send every sample and wait until all that was accepted has arrived; how many were accepted."""
    association = await asyncio.to_thread(_associate, ports.modality, {_context(item) for item in objects})
    accepted = 0
    with Progress(console=console, transient=True) as progress:
        sending = progress.add_task("sent", total=len(objects))
        delivering = progress.add_task("delivered", total=len(objects))
        for item in objects:
            status = await asyncio.to_thread(association.send_c_store, item.filename)
            accepted += status.get("Status") == 0x0000
            progress.update(sending, advance=1)
            # One after the other, so that the latency shown is the relay's and not that of a queue.
            until = time.monotonic() + DELIVERY_SECONDS
            while len(pacs.arrived) < accepted and time.monotonic() < until:
                await asyncio.sleep(POLL_SECONDS)
            progress.update(delivering, completed=len(pacs.arrived))
        await asyncio.to_thread(association.release)
    return accepted


def _figures(lane: dict[str, Any]) -> tuple[float, float]:
    latency = lane["sink"]["figures"]["latency"].get("custody to delivered", {})
    return latency.get("p50_ms", 0.0), latency.get("p99_ms", 0.0)


async def show(seconds: float, keep: bool) -> int:
    """Run the demo; the exit status is 0 when everything that was accepted arrived unchanged.

    Args:
        seconds: How long the synthetic camera runs.
        keep: Leave the relay and its camera running afterwards, until Ctrl-C.

    Raises:
        MedferryError: The relay did not start, or another demo runs in the same directory.
    """
    # Ended in whatever way, it takes its relay with it.
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, signal.raise_signal, signal.SIGINT)
    console = Console()
    directory = os.path.abspath(DIRECTORY)
    received = os.path.join(directory, "received")
    _begin_anew(directory, received)
    ports = _free_ports()
    configuration = os.path.join(directory, "medferry.toml")
    with open(configuration, "w", encoding="utf-8") as file:
        file.write(
            CONFIGURATION.format(
                directory=directory, **{name: getattr(ports, name) for name in Ports.__slots__}
            )
        )
    state = read(configuration).relay.state
    console.print(f"Starting a relay: {configuration}")
    command = (sys.executable, "-m", "relay.cli", "run", configuration, "--log-level", "warning")
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    try:
        await _wait_until_ready(process)
        ok = await _studies(console, ports, received, state)
        ok &= await _camera(console, ports, seconds)
        if keep:
            await _keep(console, ports, process)
        elif console.is_terminal:
            console.print(HOW_TO_KEEP.format(command=_command()), soft_wrap=True, highlight=False)
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(END_SECONDS):
                await process.wait()
    return 0 if ok else 1


def _begin_anew(directory: str, received: str) -> None:
    """Remove what an earlier demo left in `directory`, and make it again with `received` in it.

    Raises:
        MedferryError: A demo runs there, or the directory cannot be made.
    """
    if _runs(os.path.join(directory, "state")):
        raise MedferryError(f"a demo runs in {directory} already: end it, or start this one somewhere else")
    try:
        if os.path.lexists(directory):
            shutil.rmtree(directory)
        os.makedirs(received)
    except OSError as error:
        where = f"{error.filename}: {error.strerror}"
        raise MedferryError(f"{where}: start the demo in a directory that you may write to") from None


def _runs(state: str) -> bool:
    try:
        ask(state)
    except MedferryError:
        return False
    return True


async def _studies(console: Console, ports: Ports, received: str, state: str) -> bool:
    objects = samples()
    sent = {str(item.SOPInstanceUID): pixel_hash(item) for item in objects}
    pacs = Pacs(received)
    with pacs.serving(ports.pacs, {_context(item) for item in objects}):
        accepted = await _send(console, objects, ports, pacs)
        # Figures are reported each second.
        await asyncio.sleep(1.2)
        lane = next(lane for lane in ask(state)["lanes"] if lane["name"] == "studies")
    equal = sum(pacs.arrived.get(uid) == digest for uid, digest in sent.items())
    p50, p99 = _figures(lane)
    quarantined = lane["source"]["figures"]["quarantined"]
    table = Table(title="A study crossed", title_justify="left", show_header=False)
    table.add_row("objects sent", str(len(sent)))
    table.add_row("accepted into custody", str(accepted))
    table.add_row("refused, in quarantine", str(quarantined))
    table.add_row("delivered", str(len(pacs.arrived)))
    table.add_row("pixel hashes equal", f"{equal} of {len(pacs.arrived)}")
    table.add_row("custody to delivered", f"p50 {p50:.1f} ms, p99 {p99:.1f} ms")
    table.add_row("received files", received)
    table.add_row("spools and quarantine", state)
    console.print(table)
    return len(pacs.arrived) == equal == accepted and accepted + quarantined == len(sent)


async def _camera(console: Console, ports: Ports, seconds: float) -> bool:
    """Show a synthetic camera to the relay and watch it come out, by RTP: glass to glass."""
    source, sink = f"127.0.0.1:{ports.camera_in}", f"127.0.0.1:{ports.camera_out}"
    for line in pages(ports):
        console.print(line, soft_wrap=True, highlight=False)
    with console.status(f"A camera runs for {seconds:.0f} s"):
        report = await load("rtc.demo_camera:show")(source, sink, seconds)
    table = Table(title="A camera crossed", title_justify="left", show_header=False)
    for name, value in load("rtc.bench_report:lines")(report):
        table.add_row(name, value)
    console.print(table)
    return bool(report.pictures)


def pages(ports: Ports) -> list[str]:
    """What can be opened in a browser as long as the relay runs."""
    return [
        f"Watch the camera on side B:     http://127.0.0.1:{ports.view}/?stream=camera",
        f"Publish your own from side A:   http://127.0.0.1:{ports.publish}/",
    ]


async def _keep(console: Console, ports: Ports, process: asyncio.subprocess.Process) -> None:
    """Let the relay and its camera run until the relay ends or the demo is interrupted."""
    console.print("\nThe relay and its camera run on; end them with Ctrl-C.")
    for line in pages(ports):
        console.print(line, soft_wrap=True, highlight=False)
    camera = asyncio.create_task(load("rtc.demo_camera:show_for_ever")(f"127.0.0.1:{ports.camera_in}"))
    ended = asyncio.create_task(process.wait())
    try:
        await asyncio.wait({camera, ended}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        camera.cancel()
        ended.cancel()


def _command() -> str:
    """How this very `medferry` is called from here."""
    installed = os.path.join(os.path.dirname(sys.executable), "medferry")
    if shutil.which("medferry") == installed or not os.path.exists(installed):
        return "medferry"
    return os.path.relpath(installed)
