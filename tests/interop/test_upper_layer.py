"""The upper layer against others: DCMTK's tools and pynetdicom, both ways, on uvloop."""

from __future__ import annotations

import asyncio
import io
import os
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pydicom
import pytest
import uvloop
from pydicom.data import get_testdata_file
from pydicom.uid import UID
from pynetdicom import AE, evt
from pynetdicom.sop_class import CTImageStorage, Verification  # type: ignore[attr-defined]

from dicom import part10, scu
from relay.errors import PeerError
from tests.dicom.associations import CT, EXPLICIT, IMPLICIT, VERIFICATION
from tests.dicom.callers import serving, until
from tests.interop import dicom_peers
from tests.peers import require

SENDERS_SECONDS = 30.0
MANY = 60
"""Objects; a stall of 40 ms at each would take 2.4 s."""

NO_STALL_SECONDS = 1.5

T = TypeVar("T")


def on_uvloop(main: Coroutine[Any, Any, T]) -> T:
    return uvloop.run(main)


async def run(program: str, *arguments: str, **environment: str) -> tuple[int, str]:
    """Run a peer to its end: exit status, and what it said."""
    process = await asyncio.create_subprocess_exec(
        program,
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={**os.environ, **environment},
    )
    async with asyncio.timeout(SENDERS_SECONDS):
        said, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, said.decode(errors="replace")


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """So many CT objects of 10 KB, files as a modality would keep them."""
    directory = tmp_path_factory.mktemp("samples")
    path = get_testdata_file("CT_small.dcm")
    assert isinstance(path, str)
    original = pydicom.dcmread(path)
    original.Rows, original.Columns = 64, 72
    del original[0xFFFCFFFC]  # DCMTK leaves out padding when it encodes anew
    original.PixelData = bytes(64 * 72 * 2)
    for number in range(MANY):
        original.SOPInstanceUID = original.file_meta.MediaStorageSOPInstanceUID = UID(
            f"2.25.{10**20 + number}"
        )
        original.save_as(directory / f"{number:03}.dcm")
    return directory


def data_sets(directory: Path) -> list[bytes]:
    found = []
    for path in sorted(directory.glob("*.dcm")):
        raw = path.read_bytes()
        found.append(raw[part10.parse(raw).data_offset :])
    return found


def read(data: bytes, syntax: str) -> pydicom.Dataset:
    """A data set as pydicom reads it: DCMTK's senders encode it anew."""
    return pydicom.dcmread(io.BytesIO(part10.header(CT, "1.2", syntax) + data))


# ---- into our SCP ------------------------------------------------------------------------------------------


@pytest.mark.peer
@pytest.mark.parametrize("options", [(), ("--max-pdu", "131072"), ("-pdu", "4096"), ("--verbose",)], ids=str)
def test_echoscu(options: tuple[str, ...]) -> None:
    program = require("echoscu")

    async def main() -> None:
        async with serving() as station:
            status, said = await run(
                program, *options, "--repeat", "20", "-aec", "MEDFERRY", "127.0.0.1", str(station.port)
            )
            assert status == 0, said
            assert station.server.stats()["accepted"] == 1

    on_uvloop(main())


SENDERS: dict[str, tuple[str, ...]] = {
    "storescu": ("storescu",),
    "storescu with long PDUs": ("storescu", "--max-send-pdu", "131072"),
    "storescu with short PDUs": ("storescu", "--max-send-pdu", "4096"),
    "storescu that proposes one context a syntax": ("storescu", "--combine"),
    "storescu with implicit": ("storescu", "-xi"),
    "dcmsend": ("dcmsend",),
    "dcmsend, one association an object": ("dcmsend", "--max-send-pdu", "16384", "+ma"),
}


@pytest.mark.peer
@pytest.mark.parametrize("name", SENDERS)
@pytest.mark.parametrize("nodelay", ["0", "1"], ids=["stock", "TCP_NODELAY"])
def test_dcmtk_senders_never_stall(name: str, nodelay: str, samples: Path) -> None:
    program, *options = SENDERS[name]
    command = [require(program), *options, "-aet", "SENDER", "-aec", "MEDFERRY"]
    environment = {"TCP_NODELAY": "1"} if nodelay == "1" else {}

    async def main() -> None:
        async with serving() as station:
            target = ["127.0.0.1", str(station.port), str(samples)]
            began = time.monotonic()
            status, said = await run(*command, "+sd", *target, **environment)
            took = time.monotonic() - began
            assert status == 0, said
            stored = station.archive.stored()
            assert len(stored) == MANY
            syntax = station.archive.objects[0].request.transfer_syntax
            assert syntax == (IMPLICIT if "implicit" in name else EXPLICIT)
            instances = [each.request.sop_instance for each in station.archive.objects]
            assert sorted(instances) == [f"2.25.{10**20 + number}" for number in range(MANY)]
            assert read(stored[0], syntax) == pydicom.dcmread(samples / f"{int(instances[0][-5:]):03}.dcm")
            assert took < NO_STALL_SECONDS
            await until(lambda: station.server.stats()["open"] == 0)
            assert station.server.stats()["released"] == station.server.stats()["accepted"]

    on_uvloop(main())


@pytest.mark.peer
def test_dcmtk_understands_our_refusals(samples: Path) -> None:
    program = require("storescu")
    file = str(samples / "000.dcm")

    async def main() -> None:
        async with serving() as station:
            target = ["127.0.0.1", str(station.port), file]
            status, said = await run(program, "-aec", "WRONG", *target)
            assert status != 0 and "Called AE Title Not Recognized" in said
            station.archive.refuse_with = 0xA700
            status, said = await run(program, "-aec", "MEDFERRY", "-v", *target)
            assert "Out of resources" in said or "OutOfResources" in said, said

    on_uvloop(main())


@contextmanager
def pynetdicom_scp(stored: list[Any]) -> Iterator[int]:
    """A storage SCP of pynetdicom's, in threads of its own."""
    ae = AE("PACS")
    ae.add_supported_context(CTImageStorage, [EXPLICIT])
    ae.add_supported_context(Verification)

    def store(event: Any) -> int:
        stored.append((event.request.AffectedSOPInstanceUID, event.request.DataSet.getvalue()))
        return 0x0000

    server = ae.start_server(("127.0.0.1", 0), block=False, evt_handlers=[(evt.EVT_C_STORE, store)])
    assert server is not None and server.socket is not None
    try:
        yield server.socket.getsockname()[1]
    finally:
        server.shutdown()


def test_pynetdicom_as_the_sender(samples: Path) -> None:
    outcome: list[Any] = []
    files = sorted(samples.glob("*.dcm"))[:5]

    def send(port: int) -> None:
        ae = AE("SENDER")
        ae.add_requested_context(CTImageStorage, [EXPLICIT, IMPLICIT])
        ae.add_requested_context(Verification)
        association = ae.associate("127.0.0.1", port, ae_title="MEDFERRY")
        outcome.append(association.is_established)
        outcome.append(association.send_c_echo().Status)
        outcome.extend(association.send_c_store(str(file)).Status for file in files)
        association.release()
        outcome.append(association.is_released)

    async def main() -> list[bytes]:
        async with serving() as station:
            await asyncio.to_thread(send, station.port)
            return station.archive.stored()

    stored = on_uvloop(main())
    assert outcome == [True, 0, *[0] * len(files), True]
    for file, data in zip(files, stored, strict=True):
        assert pydicom.dcmread(file).SOPInstanceUID.encode() in data


# ---- from our SCU ------------------------------------------------------------------------------------------


async def associate(port: int, **options: Any) -> scu.Requestor:
    contexts = [(CT, EXPLICIT), (VERIFICATION, IMPLICIT)]
    return await scu.associate(
        "127.0.0.1",
        port,
        calling_ae_title="MEDFERRY",
        called_ae_title="PACS",
        contexts=contexts,
        **{"association_seconds": 5.0, "progress_seconds": 5.0, **options},
    )


async def send(requestor: scu.Requestor, path: Path) -> int:
    fd = os.open(path, os.O_RDONLY)
    try:
        head = part10.parse(os.pread(fd, 4096, 0))
        return await requestor.store(
            sop_class=head.sop_class,
            sop_instance=head.sop_instance,
            transfer_syntax=head.transfer_syntax,
            fd=fd,
            offset=head.data_offset,
            size=os.fstat(fd).st_size - head.data_offset,
        )
    finally:
        os.close(fd)


@pytest.mark.peer
@pytest.mark.parametrize("options", [(), ("--fork",), ("--max-pdu", "4096")], ids=str)
@pytest.mark.parametrize("nodelay", [False, True], ids=["stock", "TCP_NODELAY"])
def test_dcmtks_storescp_takes_all_without_a_stall(
    options: tuple[str, ...], nodelay: bool, samples: Path, tmp_path: Path
) -> None:
    require("storescp")

    async def main(port: int) -> float:
        requestor = await associate(port)
        assert await requestor.echo() == 0
        began = time.monotonic()
        for path in sorted(samples.glob("*.dcm")):
            assert await send(requestor, path) == 0
        took = time.monotonic() - began
        await requestor.release()
        return took

    with dicom_peers.storescp(tmp_path, options=("--bit-preserving", *options), nodelay=nodelay) as pacs:
        assert on_uvloop(main(pacs.port)) < NO_STALL_SECONDS
        received = sorted(pacs.directory.iterdir())
        assert len(received) == MANY
        for path, expected in zip(received, data_sets(samples), strict=True):
            raw = path.read_bytes()
            assert raw[part10.parse(raw).data_offset :] == expected


@pytest.mark.peer
def test_a_storescp_that_refuses_is_a_rejection(tmp_path: Path) -> None:
    require("storescp")
    with dicom_peers.storescp(tmp_path, options=("--refuse",)) as pacs:
        with pytest.raises(PeerError) as caught:
            on_uvloop(associate(pacs.port))
        assert caught.value.reason.startswith("rejected")


@pytest.mark.peer
@pytest.mark.parametrize("option", ["--abort-during", "--abort-after"])
def test_a_storescp_that_aborts_is_left(option: str, samples: Path, tmp_path: Path) -> None:
    require("storescp")

    async def main(port: int) -> str:
        requestor = await associate(port)
        with pytest.raises(PeerError) as caught:
            for path in sorted(samples.glob("*.dcm")):
                await send(requestor, path)
        assert requestor.ended
        return caught.value.reason

    with dicom_peers.storescp(tmp_path, options=(option,)) as pacs:
        assert on_uvloop(main(pacs.port)) == "aborted"


@pytest.mark.peer
def test_a_storescp_that_sleeps_is_waited_for_within_limits(samples: Path, tmp_path: Path) -> None:
    require("storescp")
    path = samples / "000.dcm"

    async def main(port: int) -> None:
        patient = await associate(port)
        assert await send(patient, path) == 0
        await patient.release()
        hasty = await associate(port, progress_seconds=0.2)
        with pytest.raises(PeerError) as caught:
            await send(hasty, path)
        assert caught.value.reason == "timeout"

    with dicom_peers.storescp(tmp_path, options=("--fork", "--sleep-during", "1")) as pacs:
        on_uvloop(main(pacs.port))


@pytest.mark.peer
def test_a_storescp_that_takes_one_at_a_time_lets_the_second_wait(samples: Path, tmp_path: Path) -> None:
    require("storescp")
    path = samples / "000.dcm"

    async def main(port: int) -> None:
        first = await associate(port)
        with pytest.raises(PeerError) as caught:
            await associate(port, association_seconds=0.3)
        assert caught.value.reason == "timeout"
        assert await send(first, path) == 0
        await first.release()

    with dicom_peers.storescp(tmp_path, options=()) as pacs:
        on_uvloop(main(pacs.port))


def test_pynetdicom_as_the_destination(samples: Path) -> None:
    stored: list[Any] = []
    files = sorted(samples.glob("*.dcm"))[:5]

    async def main(port: int) -> None:
        requestor = await associate(port)
        assert await requestor.echo() == 0
        for file in files:
            assert await send(requestor, file) == 0
        await requestor.release()

    with pynetdicom_scp(stored) as port:
        on_uvloop(main(port))
    assert [data for _, data in stored] == data_sets(samples)[:5]
