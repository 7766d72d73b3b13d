"""The objects that benchmarks send: three sets of valid images, made once, stamped anew for every run.

Pixels are noise from a fixed seed, so that no two machines measure different data. A relay suppresses what it
has delivered before, so every run must send SOP instances that nobody has seen: each file's UID is 44
characters long at two known offsets and is overwritten in place, which costs two small writes an object
instead of writing a gigabyte again.
"""

from __future__ import annotations

import json
import os
import random
import secrets
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import dcmwrite, write_dataset
from pydicom.uid import (
    CTImageStorage,
    ExplicitVRLittleEndian,
    MultiFrameGrayscaleWordSecondaryCaptureImageStorage,
)

SEED = 20_261_124

UID_ROOT = "2.25."
"""Before the decimal of a 128-bit number (PS3.5 §B.2), here of 39 digits: stamping never moves a byte."""

HEADER_BYTES = 8192
"""Both copies of the SOP Instance UID are well within so many first bytes of a file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """What a set consists of. One object's pixels are frames * side * side * 2 bytes."""

    name: str
    count: int
    side: int
    frames: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One file of a set: the offsets of its UID (in the meta header and in the data set), its sizes."""

    path: str
    meta_uid_at: int
    uid_at: int
    dataset_at: int
    pixel_bytes: int
    file_bytes: int


FULL = {
    "small": Spec(name="small", count=1000, side=68),
    "ct": Spec(name="ct", count=400, side=512),
    "large": Spec(name="large", count=4, side=512, frames=512),
}
"""1000 objects of 10 KB, 400 CT of 0.5 MB, 4 multi-frame objects of 268 MB."""

QUICK = {
    "small": Spec(name="small", count=200, side=68),
    "ct": Spec(name="ct", count=60, side=512),
    "large": Spec(name="large", count=4, side=512, frames=64),
}
"""The same shapes, fewer and (multi-frame) smaller: shows that everything works, not how fast it is."""


def new_uid_block() -> int:
    """A number so that it and the next million fit 39 digits and nobody has used them."""
    return secrets.randbelow(2 * 10**38) + 10**38


def uid(number: int) -> str:
    """The UID for `number`, always of the same length."""
    return UID_ROOT + str(number)


def _rng(*words: object) -> random.Random:
    return random.Random(f"{SEED} {words}")


def _fixed_uid(*words: object) -> str:
    return uid(10**38 + _rng(*words).randrange(2 * 10**38))


def dataset(spec: Spec, index: int, sop_instance: str) -> Dataset:
    """One valid image: CT, or multi-frame grayscale secondary capture where `spec.frames` is above 1."""
    multi = spec.frames > 1
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.ImageType = ["DERIVED", "SECONDARY"] if multi else ["ORIGINAL", "PRIMARY", "AXIAL"]
    ds.SOPClassUID = MultiFrameGrayscaleWordSecondaryCaptureImageStorage if multi else CTImageStorage
    ds.SOPInstanceUID = sop_instance
    ds.StudyDate = ds.ContentDate = "20261124"
    ds.StudyTime = ds.ContentTime = "120000"
    ds.AccessionNumber = ""
    ds.Modality = "OT" if multi else "CT"
    ds.BodyPartExamined = "HEAD"
    ds.Manufacturer = "medferry benchmark"
    ds.ReferringPhysicianName = ""
    ds.PatientName = "Benchmark^Synthetic"
    ds.PatientID = f"BENCH-{spec.name.upper()}"
    ds.PatientBirthDate = ""
    ds.PatientSex = "O"
    ds.StudyInstanceUID = _fixed_uid(spec.name, "study")
    ds.SeriesInstanceUID = _fixed_uid(spec.name, "series")
    ds.StudyID = "1"
    ds.SeriesNumber = 1
    ds.InstanceNumber = index + 1
    if multi:
        ds.ConversionType = "SYN"
        ds.PatientOrientation = ""
        ds.NumberOfFrames = spec.frames
        ds.FrameIncrementPointer = 0x00182001
        ds.PageNumberVector = list(range(1, spec.frames + 1))
        ds.BurnedInAnnotation = "NO"
        ds.PresentationLUTShape = "IDENTITY"
    else:
        ds.KVP = "120"
        ds.PatientPosition = "HFS"
        ds.FrameOfReferenceUID = _fixed_uid(spec.name, "frame of reference")
        ds.PositionReferenceIndicator = ""
        ds.AcquisitionNumber = 1
        ds.ImagePositionPatient = [-250, -250, index]
        ds.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        ds.SliceThickness = "1"
        ds.PixelSpacing = ["0.9765625", "0.9765625"]
    ds.RescaleIntercept = "0" if multi else "-1024"
    ds.RescaleSlope = "1"
    ds.RescaleType = "US" if multi else "HU"
    ds.SamplesPerPixel = 1
    ds.PhotometricInterpretation = "MONOCHROME2"
    ds.Rows = ds.Columns = spec.side
    ds.BitsAllocated = 16
    ds.BitsStored = 16
    ds.HighBit = 15
    ds.PixelRepresentation = 0
    generator = np.random.Generator(np.random.PCG64([SEED, index, spec.side, spec.frames]))
    ds.PixelData = generator.bytes(spec.frames * spec.side * spec.side * 2)
    ds["PixelData"].VR = "OW"
    return ds


@dataclass(slots=True, kw_only=True)
class Image:
    """One object in memory, as it goes over the wire. `renew` makes it another SOP instance."""

    sop_class: str
    sop_instance: str
    data: bytearray
    uid_at: int

    def renew(self, number: int) -> str:
        """Overwrite the SOP Instance UID with that of `number`, and return it."""
        self.sop_instance = uid(number)
        self.data[self.uid_at : self.uid_at + len(self.sop_instance)] = self.sop_instance.encode()
        return self.sop_instance


def image(spec: Spec) -> Image:
    """The first object of a set, as an explicit VR little endian data set in memory."""
    placeholder = _fixed_uid(spec.name, "instance", 0)
    ds = dataset(spec, 0, placeholder)
    buffer = DicomBytesIO()
    buffer.is_little_endian, buffer.is_implicit_VR = True, False
    write_dataset(buffer, ds)
    data = bytearray(buffer.getvalue())
    return Image(
        sop_class=str(ds.SOPClassUID),
        sop_instance=placeholder,
        data=data,
        uid_at=data.index(placeholder.encode()),
    )


def dataset_start(header: bytes) -> int:
    """Where the data set begins in a DICOM file: after preamble, prefix and group 0002 (PS3.10 §7.1)."""
    if header[128:132] != b"DICM" or header[132:140] != b"\x02\x00\x00\x00UL\x04\x00":
        raise ValueError("not a DICOM file with a group length")
    return 144 + int.from_bytes(header[140:144], "little")


def _write(spec: Spec, index: int, path: Path) -> Sample:
    placeholder = _fixed_uid(spec.name, "instance", index)
    ds = dataset(spec, index, placeholder)
    dcmwrite(path, ds, enforce_file_format=True)
    with path.open("rb") as file:
        header = file.read(HEADER_BYTES)
    key = placeholder.encode()
    first = header.index(key)
    return Sample(
        path=str(path),
        meta_uid_at=first,
        uid_at=header.index(key, first + 1),
        dataset_at=dataset_start(header),
        pixel_bytes=len(ds.PixelData),
        file_bytes=path.stat().st_size,
    )


def load(spec: Spec, cache: Path, progress: Callable[[], None] = lambda: None) -> list[Sample]:
    """The set's files below `cache`, made on the first call. `progress` is called once per object."""
    directory = cache / f"{spec.name}-{spec.count}x{spec.frames}x{spec.side}"
    index = directory / "index.json"
    if index.exists():
        return [Sample(**item) for item in json.loads(index.read_text())]
    directory.mkdir(parents=True, exist_ok=True)
    samples = []
    for number in range(spec.count):
        samples.append(_write(spec, number, directory / f"{number:05}.dcm"))
        progress()
    unfinished = directory / "index.tmp"
    unfinished.write_text(json.dumps([asdict(item) for item in samples]))
    unfinished.rename(index)
    return samples


def stamp(samples: list[Sample]) -> dict[str, Sample]:
    """Give every file a SOP Instance UID that was never used; returns the samples by their new UID."""
    block = new_uid_block()
    stamped = {}
    for number, sample in enumerate(samples):
        new = uid(block + number)
        file = os.open(sample.path, os.O_WRONLY)
        try:
            os.pwrite(file, new.encode(), sample.meta_uid_at)
            os.pwrite(file, new.encode(), sample.uid_at)
        finally:
            os.close(file)
        stamped[new] = sample
    return stamped
