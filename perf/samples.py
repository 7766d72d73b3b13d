"""The files that benchmarks send: three sets of valid images, made once, stamped anew for every run.

Each file's SOP Instance UID is overwritten in place at two known offsets (`dicom.bench_objects` says why),
which costs two small writes an object instead of writing a gigabyte again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from pydicom.filewriter import dcmwrite

from dicom.bench_objects import Spec, dataset, fixed_uid, new_uid_block, uid

HEADER_BYTES = 8192
"""Both copies of the SOP Instance UID are well within so many first bytes of a file."""


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


def dataset_start(header: bytes) -> int:
    """Where the data set begins in a DICOM file: after preamble, prefix and group 0002 (PS3.10 §7.1)."""
    if header[128:132] != b"DICM" or header[132:140] != b"\x02\x00\x00\x00UL\x04\x00":
        raise ValueError("not a DICOM file with a group length")
    return 144 + int.from_bytes(header[140:144], "little")


def _write(spec: Spec, index: int, path: Path) -> Sample:
    placeholder = fixed_uid(spec.name, "instance", index)
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
