"""What the spool's tests share: a header that describes itself, and objects made in one line."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, closing, contextmanager
from typing import Any

from relay.errors import SpoolError
from relay.spool import Entry, Facts, Part, Spool, SpoolLimits
from relay.spool_files import Directory

MEMORY = "/dev/shm"
MAGIC = b"HEAD"
HEADER_BYTES = 72
SOP_CLASS = "1.2.840.10008.5.1.4.1.1.2"
TRANSFER_SYNTAX = "1.2.840.10008.1.2.1"
LIMITS = SpoolLimits(min_free_disk_bytes=0)


def header(sop_instance: str = "1.2.3") -> bytes:
    """A header that names its instance, as a Part 10 header does."""
    return MAGIC + sop_instance.encode().ljust(HEADER_BYTES - len(MAGIC))


def describe(head: bytes) -> Facts:
    """Reads `header`."""
    if len(head) < HEADER_BYTES or not head.startswith(MAGIC):
        raise SpoolError("the header is not whole")
    return facts(head[len(MAGIC) : HEADER_BYTES].decode().strip())


def facts(sop_instance: str = "1.2.3") -> Facts:
    """What is known of an object of `header(sop_instance)`."""
    return Facts(
        data_offset=HEADER_BYTES,
        sop_class=SOP_CLASS,
        sop_instance=sop_instance,
        transfer_syntax=TRANSFER_SYNTAX,
        received_ns=7,
        parsed_ns=8,
    )


@contextmanager
def scratch() -> Iterator[str]:
    """Where a spool may be made, in memory if there is such a file system: these tests wait for no disk."""
    with tempfile.TemporaryDirectory(dir=MEMORY if os.access(MEMORY, os.W_OK) else None) as parent:
        yield os.path.join(parent, "spool")


@contextmanager
def folders() -> Iterator[Directory]:
    """The directory of a spool that is not opened."""
    with scratch() as path, closing(Directory(path, ".dcm")) as held:
        yield held


@asynccontextmanager
async def opened(
    directory: str,
    limits: SpoolLimits = LIMITS,
    *,
    destinations: Sequence[str] = ("pacs",),
    resumable: bool = False,
    **other: Any,
) -> AsyncIterator[Spool]:
    """A spool for the time of a ``with``."""
    spool = await Spool.open(
        directory,
        limits,
        destinations=destinations,
        suffix=".dcm",
        describe=describe,
        resumable=resumable,
        **other,
    )
    try:
        yield spool
    finally:
        await spool.close()


def begun(spool: Spool, data: bytes = b"data", sop_instance: str = "1.2.3", id: str | None = None) -> Part:
    """A part with all of `data` written."""
    part = spool.begin(header(sop_instance), id=id)
    part.write([data])
    return part


async def stored(spool: Spool, data: bytes = b"data", sop_instance: str = "1.2.3") -> Entry:
    """An object committed."""
    return await spool.commit(begun(spool, data, sop_instance), facts(sop_instance))


async def deliver(spool: Spool, count: int, destination: str = "pacs") -> list[Entry]:
    """The next `count` objects, delivered."""
    entries = []
    for _ in range(count):
        entry = await spool.feed(destination).next()
        spool.done(entry, destination)
        entries.append(entry)
    return entries


async def written(spool: Spool) -> None:
    """Wait until all rows so far are in the index."""
    await spool.recent("pacs", 1)


def data_of(spool: Spool, entry: Entry) -> bytes:
    """The data set in custody."""
    fd = spool.open_data(entry)
    with open(fd, "rb", buffering=0) as file:
        return file.readall()


def sha256(data: bytes) -> str:
    """Lower hex."""
    return hashlib.sha256(data).hexdigest()


def names(directory: str, folder: str) -> list[str]:
    """File names in a folder of a spool."""
    return sorted(os.listdir(os.path.join(directory, folder)))
