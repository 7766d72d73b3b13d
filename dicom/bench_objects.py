"""The objects that benchmarks send: valid images, each a SOP instance that nobody has seen.

Pixels are noise from a fixed seed, so that no two machines measure different data. A relay suppresses what it
has delivered before, so every object must be another one: its UID is 44 characters long and overwritten in
place.
"""

from __future__ import annotations

import random
import secrets
from dataclasses import dataclass

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset
from pydicom.uid import (
    CTImageStorage,
    ExplicitVRLittleEndian,
    MultiFrameGrayscaleWordSecondaryCaptureImageStorage,
)

SEED = 20_261_124

UID_ROOT = "2.25."
"""Before the decimal of a 128-bit number (PS3.5 §B.2), here of 39 digits: stamping never moves a byte."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """What a set consists of. One object's pixels are frames * side * side * 2 bytes."""

    name: str
    count: int
    side: int
    frames: int = 1


def new_uid_block() -> int:
    """A number so that it and the next million fit 39 digits and nobody has used them."""
    return secrets.randbelow(2 * 10**38) + 10**38


def uid(number: int) -> str:
    """The UID for `number`, always of the same length."""
    return UID_ROOT + str(number)


def _rng(*words: object) -> random.Random:
    return random.Random(f"{SEED} {words}")


def fixed_uid(*words: object) -> str:
    """The UID that `words` always have."""
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
    ds.StudyInstanceUID = fixed_uid(spec.name, "study")
    ds.SeriesInstanceUID = fixed_uid(spec.name, "series")
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
        ds.FrameOfReferenceUID = fixed_uid(spec.name, "frame of reference")
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
    placeholder = fixed_uid(spec.name, "instance", 0)
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
