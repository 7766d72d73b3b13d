"""The ``[[lane]]`` table of a DICOM lane: who may send, what may pass, where it goes, and every limit."""

from __future__ import annotations

import ipaddress
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from relay.config import Address, LaneSettings, Listener, Name, Settings, SideSettings
from relay.records import MAX_OBJECT_BYTES, is_uid

ANY = "*"

MIB = 1 << 20
GIB = 1 << 30


def _ae_title(text: str) -> str:
    """PS3.5 §6.2: AE is at most 16 characters of the default repertoire, no backslash, not only spaces."""
    stripped = text.strip(" ")
    if (
        not 1 <= len(stripped) <= 16
        or not stripped.isascii()
        or not stripped.isprintable()
        or "\\" in stripped
    ):
        raise ValueError(
            f"{text!r} is no AE title; write 1 to 16 printable ASCII characters without backslash"
        )
    return stripped


def _network(text: str) -> str:
    try:
        ipaddress.ip_network(text)
    except ValueError:
        raise ValueError(
            f"{text!r} is no network; write one as in 10.1.2.0/24, 10.1.2.3 or fd00::/8"
        ) from None
    return text


def _uid(text: str) -> str:
    if not is_uid(text):
        raise ValueError(f"{text!r} is no UID; write digits and dots, at most 64 characters")
    return text


AETitle = Annotated[str, AfterValidator(_ae_title)]
Network = Annotated[str, AfterValidator(_network)]
Uid = Annotated[str, AfterValidator(_uid)]


class Accept(Settings):
    """One rule of who may associate: calling AE title and source networks, both must fit."""

    ae_title: AETitle
    from_: Annotated[tuple[Network, ...], Field(alias="from", min_length=1)]


class SpoolSettings(Settings):
    """Bounds of one side's custody."""

    max_bytes: Annotated[int, Field(ge=MIB)] = 64 * GIB
    max_objects: Annotated[int, Field(ge=1, le=10_000_000)] = 1_000_000
    min_free_disk_bytes: Annotated[int, Field(ge=0)] = 512 * MIB
    retention_seconds: Annotated[float, Field(ge=0)] = 24 * 3600
    """How long what was sent (source) or delivered (sink) is kept, so that an operator can send it again."""
    max_quarantine_bytes: Annotated[int, Field(ge=MIB)] = 4 * GIB


class DicomSource(SideSettings):
    """Side A: the storage SCP."""

    listen: Address
    ae_title: AETitle = "MEDFERRY"
    accept: Annotated[tuple[Accept, ...], Field(min_length=1)]
    private_sop_classes: tuple[Uid, ...] = ()
    """Accepted beside the standard's storage classes."""
    private_transfer_syntaxes: tuple[Uid, ...] = ()
    max_associations: Annotated[int, Field(ge=1, le=1000)] = 100
    max_associations_per_address: Annotated[int, Field(ge=1, le=1000)] = 32
    max_object_bytes: Annotated[int, Field(ge=1024, le=MAX_OBJECT_BYTES)] = 4 * GIB
    max_pdu: Annotated[int, Field(ge=4096, le=MIB)] = 256 * 1024
    """Bytes of the longest P-DATA-TF that senders may use."""
    idle_seconds: Annotated[float, Field(ge=1)] = 300
    """An association that says nothing for so long is aborted."""
    spool: SpoolSettings = SpoolSettings()

    def listeners(self) -> list[Listener]:
        return [*super().listeners(), Listener(name="dicom", address=self.listen, kind="tcp")]


class Destination(Settings):
    """One storage SCP on side B."""

    name: Name
    ae_title: AETitle
    address: Address
    max_associations: Annotated[int, Field(ge=1, le=16)] = 4
    """At most so many at once; a destination that takes one at a time is served with one."""
    timeout_seconds: Annotated[float, Field(ge=1, le=3600)] = 60
    """A destination that neither takes bytes nor answers for so long is left and tried again."""
    release_seconds: Annotated[float, Field(ge=0.1, le=3600)] = 5
    """An association with nothing to send is released after so long."""


class DicomSink(SideSettings):
    """Side B: the storage SCU."""

    ae_title: AETitle = "MEDFERRY"
    destination: Annotated[tuple[Destination, ...], Field(min_length=1)]
    retry_seconds: Annotated[float, Field(ge=0.1, le=3600)] = 1
    max_retry_seconds: Annotated[float, Field(ge=0.1, le=86_400)] = 60
    """First and longest wait before a destination that is away is tried again; each wait has jitter."""
    max_object_bytes: Annotated[int, Field(ge=1024, le=MAX_OBJECT_BYTES)] = 4 * GIB
    spool: SpoolSettings = SpoolSettings()

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [destination.name for destination in self.destination]
        if len(set(names)) < len(names):
            raise ValueError("two destinations have the same name; give each its own")
        return self


class DicomLane(LaneSettings):
    """A DICOM lane."""

    kind: Literal["dicom"]
    source: DicomSource
    sink: DicomSink

    @model_validator(mode="after")
    def _only_in_a_lab(self) -> Self:
        if not self.lab:
            raise ValueError(
                "DICOM is plaintext here, and an AE title and an address authenticate nobody; "
                "write lab = true on a network without patient data"
            )
        return self

    @model_validator(mode="after")
    def _the_sink_takes_what_the_source_accepts(self) -> Self:
        """What was acknowledged on A must have a place on B: nothing can be refused to a sender there."""
        largest = min(self.source.max_object_bytes, self.source.spool.max_bytes)
        for key, limit in (
            ("sink.max_object_bytes", self.sink.max_object_bytes),
            ("sink.spool.max_bytes", self.sink.spool.max_bytes),
        ):
            if limit < largest:
                raise ValueError(
                    f"the source accepts objects of {largest} bytes, {key} is only {limit}; "
                    f"write a larger {key} or source.max_object_bytes = {limit}"
                )
        return self
