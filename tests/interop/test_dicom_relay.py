"""Real DICOM applications on both sides of the running product: what they send is what arrives."""

from __future__ import annotations

import hashlib
import io
import shutil
import subprocess
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pydicom
import pytest
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset, write_file_meta_info
from pydicom.uid import UID
from pynetdicom import ALL_TRANSFER_SYNTAXES

from dicom.bench_objects import dataset, image, new_uid_block, uid
from perf.arrivals import Arrivals
from perf.client import Client
from perf.samples import QUICK
from tests.dicom.datasets import readable_files, split_file
from tests.dicom.test_walk import refusal_of_file
from tests.interop.dicom_peers import Archive, Station, archive, orthanc, storescp
from tests.peers import free_port, require
from tests.product import Product, running, studies

DELIVERY_SECONDS = 20.0

TRAILING_PADDING = 0xFFFCFFFC

DEFLATED = "1.2.840.10008.1.2.1.99"
EXPLICIT = "1.2.840.10008.1.2.1"

NATIVE_FILES = ("CT_small.dcm", "MR_small.dcm", "examples_palette.dcm", "liver_1frame.dcm")
"""Not compressed: any DCMTK sender takes them as they are."""

ENCAPSULATED_FILES = ("JPEG2000.dcm", "JPEG-lossy.dcm", "SC_rgb_rle.dcm", "JPEGLSNearLossless_16.dcm")


def until(condition: Callable[[], bool], what: str) -> None:
    """Look at `condition` until it holds; fails after DELIVERY_SECONDS."""
    deadline = time.monotonic() + DELIVERY_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {DELIVERY_SECONDS:.0f} s"
        time.sleep(0.02)


def folder(directory: Path, *names: str) -> dict[str, Path]:
    """Copies of pydicom's sample files in `directory`, by SOP Instance UID."""
    directory.mkdir(parents=True)
    found = {}
    for name in names:
        path = get_testdata_file(name, download=False)
        assert isinstance(path, str)
        copy = Path(shutil.copy(path, directory))
        found[str(pydicom.dcmread(copy, stop_before_pixels=True).SOPInstanceUID)] = copy
    assert len(found) == len(names), "two files of one SOP instance"
    return found


def same(one: Dataset, other: Dataset) -> bool:
    """Equal element for element. File meta information is made anew and does not count."""
    return bool(Dataset(one) == Dataset(other))


def same_for_dcmtk(one: Dataset, other: Dataset) -> bool:
    """Equal but for Data Set Trailing Padding, which DCMTK itself (and Orthanc with it) leaves out."""
    for each in (one, other):
        each.pop(TRAILING_PADDING, None)
    return same(one, other)


def arrived_files(station: Station) -> dict[str, Path]:
    """What a storescp has stored, by SOP Instance UID."""
    return {path.name.partition(".")[2]: path for path in station.directory.iterdir()}


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"{command[0]}: {done.stdout}{done.stderr}"


def lane(*destinations: Station | Archive, host: str = "127.0.0.1", **lines: str) -> str:
    """A configuration that sends to all of `destinations`."""
    listen = f"[{host}]" if ":" in host else host
    targets = {f"to-{n}": (each.ae_title, each.address) for n, each in enumerate(destinations)}
    return studies(listen=f"{listen}:{free_port(host=host)}", destinations=targets, **lines)


@pytest.fixture(scope="module")
def pacs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Station]:
    require("storescp")
    with storescp(tmp_path_factory.mktemp("pacs"), options=("--fork", "--accept-all")) as station:
        yield station


@pytest.fixture(scope="module")
def relay(pacs: Station, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Product]:
    with running(lane(pacs), tmp_path_factory.mktemp("relay")) as product:
        yield product


@pytest.fixture(scope="module")
def store() -> Iterator[Archive]:
    with archive() as opened:
        yield opened


@pytest.fixture(scope="module")
def relay_to_archive(store: Archive, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Product]:
    with running(lane(store), tmp_path_factory.mktemp("relay_to_archive")) as product:
        yield product


# ---- DCMTK on both sides --------------------------------------------------------------------------------


@pytest.mark.peer
def test_echoscu_is_answered(relay: Product) -> None:
    host, port = relay.address("studies")
    run(require("echoscu"), "-aec", "MEDFERRY", host, str(port))


SENDERS = {
    "storescu": (("--scan-directories",), NATIVE_FILES[:2]),
    "dcmsend": (("--scan-directories", "--decompress-never"), NATIVE_FILES[2:] + ENCAPSULATED_FILES),
}
"""Program to its options and the files it sends."""


@pytest.mark.peer
@pytest.mark.parametrize("program", SENDERS)
def test_dcmtk_to_dcmtk(program: str, relay: Product, pacs: Station, tmp_path: Path) -> None:
    options, names = SENDERS[program]
    sent = folder(tmp_path / "sent", *names)
    host, port = relay.address("studies")
    with Arrivals(pacs.directory) as arrivals:
        run(require(program), *options, "-aec", "MEDFERRY", host, str(port), str(tmp_path / "sent"))
        assert arrivals.wait(sent, DELIVERY_SECONDS)
    for name, path in sent.items():
        assert same_for_dcmtk(pydicom.dcmread(arrived_files(pacs)[name]), pydicom.dcmread(path)), path.name


@pytest.mark.peer
def test_a_destination_that_takes_one_association_at_a_time(tmp_path: Path) -> None:
    """DCMTK's storescp without --fork leaves the second caller in its backlog while it serves the first."""
    require("storescp")
    sop_class = image(QUICK["small"]).sop_class
    with ExitStack() as stack:
        pacs = stack.enter_context(storescp(tmp_path / "pacs", options=()))
        product = stack.enter_context(running(lane(pacs), tmp_path / "relay"))
        arrivals = stack.enter_context(Arrivals(pacs.directory))
        clients = [
            stack.enter_context(Client(product.address("studies"), "MEDFERRY", [(sop_class, [EXPLICIT])]))
            for _ in range(4)
        ]
        block, sent = new_uid_block(), []
        for number in range(40):
            object_ = image(QUICK["small"])
            sent.append(object_.renew(block + number))
            assert clients[number % 4].store(object_.sop_class, sent[-1], object_.data) == 0
        assert arrivals.wait(sent, DELIVERY_SECONDS)


# ---- Orthanc on both sides ------------------------------------------------------------------------------


@pytest.mark.peer
def test_orthanc_to_orthanc_and_dcmtk(tmp_path: Path) -> None:
    """One lane with two destinations: each gets every object."""
    require("Orthanc")
    require("storescp")
    names = [*NATIVE_FILES[:2], *ENCAPSULATED_FILES[:2]]
    sent = folder(tmp_path / "sent", *names)
    with ExitStack() as stack:
        pacs = stack.enter_context(storescp(tmp_path / "pacs", options=("--fork", "--accept-all")))
        far = stack.enter_context(orthanc(tmp_path / "far"))
        product = stack.enter_context(running(lane(pacs, far), tmp_path / "relay"))
        host, port = product.address("studies")
        entry = Station(host=host, port=port, ae_title="MEDFERRY", directory=tmp_path, pid=0)
        near = stack.enter_context(orthanc(tmp_path / "near", forward_to=entry))
        arrivals = stack.enter_context(Arrivals(pacs.directory))
        for path in sent.values():
            near.post("/instances", path.read_bytes())
        assert arrivals.wait(sent, DELIVERY_SECONDS)
        until(lambda: len(far.instances()) == len(sent), "objects in the far Orthanc")
        for body in far.instances():
            found = pydicom.dcmread(io.BytesIO(body))
            assert same_for_dcmtk(found, pydicom.dcmread(sent[str(found.SOPInstanceUID)]))


# ---- IPv6 -----------------------------------------------------------------------------------------------


def test_ipv6_on_both_sides(tmp_path: Path) -> None:
    object_ = image(QUICK["small"])
    name = object_.renew(new_uid_block())
    with archive("::1") as far, running(lane(far, host="::1"), tmp_path) as product:
        contexts = [(object_.sop_class, [EXPLICIT])]
        with Client(product.address("studies"), "MEDFERRY", contexts) as client:
            assert client.store(object_.sop_class, name, object_.data) == 0
        (received,) = far.wait(1, DELIVERY_SECONDS)
    assert received.data == object_.data


# ---- pydicom's files ------------------------------------------------------------------------------------


def as_file(syntax: str, data: bytes) -> Dataset:
    """What pydicom reads from a data set's bytes as they went over the wire."""
    if syntax == DEFLATED:
        syntax, data = EXPLICIT, zlib.decompress(data, -15)
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = UID(syntax)
    file = DicomBytesIO()
    file.write(bytes(128) + b"DICM")
    write_file_meta_info(file, meta, enforce_standard=False)
    file.write(data)
    file.seek(0)
    return pydicom.dcmread(file)


def on_the_wire(syntax: str, data: bytes) -> bytes:
    """Bytes to send for an inflated data set: deflated again where its syntax says so."""
    if syntax != DEFLATED:
        return data
    squeezed = zlib.compressobj(wbits=-15)
    deflated = squeezed.compress(data) + squeezed.flush()
    return deflated + bytes(len(deflated) % 2)


def pixel_hash(found: Dataset) -> str:
    """SHA-256 of the pixel bytes as they are encoded; of nothing where there are none."""
    return hashlib.sha256(found.PixelData if "PixelData" in found else b"").hexdigest()


def by_syntax() -> dict[str, str]:
    """One file with pixels for each transfer syntax among pydicom's samples: file names by syntax."""
    found: dict[str, str] = {}
    for name, path in readable_files().items():
        if refusal_of_file(name) is None:
            head = pydicom.dcmread(path, specific_tags=["PixelData"])
            if "PixelData" in head:
                found.setdefault(str(head.file_meta.TransferSyntaxUID), name)
    return found


def send_and_compare(name: str, relay: Product, store: Archive) -> None:
    """Send one of pydicom's files; it arrives equal, or is refused for the reason known and quarantined."""
    syntax, data = split_file(readable_files()[name])
    sent = as_file(syntax, on_the_wire(syntax, data))
    sop_class, sop_instance = str(sent.get("SOPClassUID", "")), str(sent.get("SOPInstanceUID", ""))
    if not sop_class or not sop_instance:
        return  # no C-STORE can name it
    already = len(store.received)
    quarantined = len(relay.quarantine()) if refusal_of_file(name) else 0
    with Client(relay.address("studies"), "MEDFERRY", [(sop_class, [syntax])]) as client:
        status = client.store(sop_class, sop_instance, on_the_wire(syntax, data))
    if refusal_of_file(name):
        assert status != 0
        until(lambda: len(relay.quarantine()) > quarantined, f"{name} in quarantine")
        return
    assert status == 0
    received = store.wait(already + 1, DELIVERY_SECONDS)[already:]
    assert len(received) == 1, "not delivered"
    found = as_file(received[0].transfer_syntax, received[0].data)
    assert received[0].transfer_syntax == syntax
    assert received[0].sop_instance == sop_instance
    assert pixel_hash(found) == pixel_hash(sent)
    assert same(found, sent)


@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
def test_pixels_of_every_transfer_syntax_among_the_files(relay_to_archive: Product, store: Archive) -> None:
    files = by_syntax()
    assert len(files) >= 12, sorted(files)
    for name in files.values():
        send_and_compare(name, relay_to_archive, store)


ENCAPSULATED = [
    str(each)
    for each in map(UID, ALL_TRANSFER_SYNTAXES)
    if each.is_compressed and "JPIP" not in each.name and "SMPTE" not in each.name
]
"""Those of the standard whose objects hold pixels in fragments, from JPEG to HTJ2K, HEVC and JPEG XL."""


def test_pixels_of_every_encapsulated_syntax(relay_to_archive: Product, store: Archive) -> None:
    """The code stream is noise: what is never decoded on the way must not be touched on the way."""
    assert len(ENCAPSULATED) >= 34
    for number, syntax in enumerate(ENCAPSULATED):
        made = dataset(QUICK["small"], number, uid(new_uid_block()))
        fragments = [made.PixelData[at::3] for at in range(3)]
        made.PixelData = encapsulate([item + bytes(len(item) % 2) for item in fragments], has_bot=False)
        made["PixelData"].VR = "OB"
        made["PixelData"].is_undefined_length = True
        file = DicomBytesIO()
        file.is_little_endian, file.is_implicit_VR = True, False
        write_dataset(file, made)
        already = len(store.received)
        contexts = [(str(made.SOPClassUID), [syntax])]
        with Client(relay_to_archive.address("studies"), "MEDFERRY", contexts) as client:
            assert client.store(contexts[0][0], str(made.SOPInstanceUID), file.getvalue()) == 0, syntax
        (received,) = store.wait(already + 1, DELIVERY_SECONDS)[already:]
        assert received.transfer_syntax == syntax
        assert pixel_hash(as_file(syntax, received.data)) == pixel_hash(made), syntax
        assert received.data == file.getvalue(), syntax


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
def test_all_of_pydicoms_files(store: Archive, tmp_path: Path) -> None:
    """A relay of its own: the first test's objects would be taken for repeats."""
    seen: set[tuple[str, bytes]] = set()
    before = len(store.received)
    with running(lane(store), tmp_path) as product:
        for name, path in readable_files().items():
            syntax, data = split_file(path)
            instance = str(as_file(syntax, on_the_wire(syntax, data)).get("SOPInstanceUID", ""))
            key = (instance, hashlib.sha256(data).digest())
            if key not in seen:
                send_and_compare(name, product, store)
            seen.add(key)
    assert len(store.received) - before > 150
