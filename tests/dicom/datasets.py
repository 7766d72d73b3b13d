"""Data sets built byte by byte, for tests of the walk, and the sample files that pydicom can read."""

from __future__ import annotations

import functools
import io
import logging
import struct
import tempfile
import warnings
import zlib
from bisect import bisect_left
from typing import BinaryIO

import pydicom
from pydicom.data import get_charset_files, get_testdata_files
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError
from pydicom.filereader import _read_file_meta_info, read_preamble

from dicom.faults import Reason, Refused
from dicom.part10 import header
from dicom.syntaxes import encoding_of
from dicom.walk import LONG_MASKS, WalkLimits, walk

IMPLICIT = "1.2.840.10008.1.2"
EXPLICIT = "1.2.840.10008.1.2.1"
DEFLATED = "1.2.840.10008.1.2.1.99"
BIG = "1.2.840.10008.1.2.2"
JPEG = "1.2.840.10008.1.2.4.50"

CT = "1.2.840.10008.5.1.4.1.1.2"
INSTANCE = "2.25.1234567890"
UNDEFINED = 0xFFFFFFFF


def head(tag: int, vr: str, length: int, syntax: str = EXPLICIT, reserved: int = 0) -> bytes:
    """The header of an element."""
    encoding = encoding_of(syntax)
    order = ">" if encoding.big_endian else "<"
    group, element = tag >> 16, tag & 0xFFFF
    if encoding.implicit or group == 0xFFFE:
        return struct.pack(order + "HHL", group, element, length)
    raw = vr.encode()
    if raw in LONG_MASKS:
        return struct.pack(order + "HH2sHL", group, element, raw, reserved, length)
    return struct.pack(order + "HH2sH", group, element, raw, length)


def element(tag: int, vr: str, value: bytes, syntax: str = EXPLICIT) -> bytes:
    """An element with its true length."""
    return head(tag, vr, len(value), syntax) + value


def uid(text: str) -> bytes:
    """A UID's value, padded."""
    return text.encode() + b"\0" * (len(text) & 1)


def names(syntax: str = EXPLICIT, sop_class: str = CT, instance: str = INSTANCE) -> bytes:
    """The two elements that each object needs."""
    first = element(0x00080016, "UI", uid(sop_class), syntax)
    return first + element(0x00080018, "UI", uid(instance), syntax)


def item(content: bytes = b"", syntax: str = EXPLICIT) -> bytes:
    """An item of defined length."""
    return head(0xFFFEE000, "", len(content), syntax) + content


def open_item(content: bytes = b"", syntax: str = EXPLICIT, rest: int = 0) -> bytes:
    """An item of undefined length; `rest` is what its delimiter says of its length."""
    end = head(0xFFFEE00D, "", rest, syntax)
    return head(0xFFFEE000, "", UNDEFINED, syntax) + content + end


def end_sequence(syntax: str = EXPLICIT, rest: int = 0) -> bytes:
    return head(0xFFFEE0DD, "", rest, syntax)


def sequence(tag: int, content: bytes, syntax: str = EXPLICIT) -> bytes:
    """A sequence of defined length."""
    return element(tag, "SQ", content, syntax)


def open_sequence(tag: int, content: bytes, syntax: str = EXPLICIT, vr: str = "SQ") -> bytes:
    """A sequence of undefined length."""
    return head(tag, vr, UNDEFINED, syntax) + content + end_sequence(syntax if vr == "SQ" else IMPLICIT)


def fragments(*values: bytes, table: bytes = b"", tag: int = 0x7FE00010, vr: str = "OB") -> bytes:
    """Encapsulated pixel data."""
    return head(tag, vr, UNDEFINED) + item(table) + b"".join(map(item, values)) + end_sequence()


def nested(depth: int, syntax: str = EXPLICIT) -> bytes:
    """Sequences within sequences, of undefined length."""
    opened = head(0x0040A730, "SQ", UNDEFINED, syntax) + head(0xFFFEE000, "", UNDEFINED, syntax)
    return opened * depth + (head(0xFFFEE00D, "", 0, syntax) + end_sequence(syntax)) * depth


def deflate(data: bytes) -> bytes:
    """A raw deflate stream, padded to an even length."""
    squeezed = zlib.compressobj(9, wbits=-15)
    out = squeezed.compress(data) + squeezed.flush()
    return out + b"\0" * (len(out) & 1)


def scratch_file() -> BinaryIO:
    """An unlinked file, as a source hands out to inflate into."""
    return tempfile.TemporaryFile()


@functools.cache
def readable_files() -> dict[str, str]:
    """pydicom's packaged files that pydicom reads whole, every value converted: paths by short name."""
    found: dict[str, str] = {}
    logging.getLogger("pydicom").setLevel(logging.CRITICAL)
    for path in sorted({*get_testdata_files(), *get_charset_files()}):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                ds = pydicom.dcmread(path)
                for each in ds.iterall():
                    each.value  # noqa: B018  (converting is the test)
            except (InvalidDicomError, ValueError, NotImplementedError, AttributeError, TypeError, OSError):
                continue
            if "TransferSyntaxUID" in ds.file_meta:
                found["/".join(path.split("/")[-2:])] = path
    return found


def split_file(path: str) -> tuple[str, bytes]:
    """A file's transfer syntax and its data set's bytes, inflated where need be."""
    with open(path, "rb") as file:
        read_preamble(file, False)
        syntax = str(_read_file_meta_info(file).TransferSyntaxUID)
        data = file.read()
    return syntax, zlib.decompress(data, -15) if encoding_of(syntax).deflated else data


def read_back(data: bytes, syntax: str) -> Dataset:
    """What pydicom makes of a data set's bytes (inflated ones, for a deflated syntax)."""
    plain = EXPLICIT if encoding_of(syntax).deflated else syntax
    return pydicom.dcmread(io.BytesIO(header(CT, INSTANCE, plain) + data))


def measured(data: bytes, syntax: str = EXPLICIT) -> tuple[int, int]:
    """Depth of sequences, and elements with items, of a sound data set: the least limits that let it pass."""

    def passes(reason: Reason, **limits: int) -> bool:
        try:
            with memoryview(data) as view:
                walk(view, syntax, WalkLimits(**limits))  # type: ignore[arg-type]
        except Refused as refused:
            assert refused.reason == reason
            return False
        return True

    most = range(len(data) + 1)
    depth = bisect_left(most, True, key=lambda limit: passes(Reason.DEPTH, max_depth=limit))
    return depth, bisect_left(most, True, key=lambda limit: passes(Reason.ELEMENTS, max_elements=limit))
