"""From C-STORE into custody: what is durable once success is answered, what each refusal leaves behind."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from dicom import intake as module
from dicom.dimse import Status
from dicom.intake import Intake, Reception
from dicom.negotiation import Rejection
from dicom.screen import Rules
from dicom.settings import SpoolSettings
from dicom.spooling import Examiner, open_spool
from dicom.storage import Peer, StoreFailed, StoreRequest
from relay.errors import SpoolError
from relay.metrics import Metrics
from relay.spool import Spool
from tests.archive import Made, made
from tests.dicom.datasets import CT, EXPLICIT, element, head, names, nested

PEER = Peer(
    address="127.0.0.1",
    calling_ae_title="CT_1",
    called_ae_title="MEDFERRY",
    number=1,
)


@contextlib.asynccontextmanager
async def intake_in(directory: Path, **settings: Any) -> AsyncIterator[Intake]:
    """An intake over a real spool in `directory`."""
    spool = await open_spool(
        str(directory),
        SpoolSettings(min_free_disk_bytes=0, **settings),
        destinations=["link"],
        max_object_bytes=1 << 20,
    )
    try:
        yield Intake(spool, Rules(), Examiner(str(directory), 1 << 20), Metrics("studies", "source"))
    finally:
        await spool.close()


def request(obj: Made, **changes: str) -> StoreRequest:
    fields: dict[str, Any] = {
        "abstract_syntax": obj.sop_class,
        "transfer_syntax": obj.syntax,
        "sop_class": obj.sop_class,
        "sop_instance": obj.uid,
        **changes,
    }
    return StoreRequest(peer=PEER, **fields)


def begun(intake: Intake, obj: Made) -> Reception:
    reception = intake.begin(request(obj))
    assert isinstance(reception, Reception)
    return reception


async def stored(intake: Intake, obj: Made, step: int = 300) -> int:
    """The status of a C-STORE whose data set arrives in pieces of `step` bytes."""
    reception = begun(intake, obj)
    view = memoryview(obj.data)
    for start in range(0, len(view), step):
        reception.write([view[start : start + step]])
    return await reception.finish()


def files(spool_directory: Path, folder: str) -> list[Path]:
    return sorted((spool_directory / "spool" / folder).iterdir())


async def test_success_means_a_whole_file_in_custody(tmp_path: Path) -> None:
    obj = made(1, 5000)
    async with intake_in(tmp_path) as intake:
        assert await stored(intake, obj) == 0x0000
        (path,) = files(tmp_path, "objects")
        assert path.read_bytes().endswith(obj.data) and obj.sha256 in path.name
        assert path.read_bytes()[:128] == bytes(128)
        entry = await intake.spool.feed("link").next()
        assert (entry.sop_instance, entry.sha256, entry.size) == (obj.uid, obj.sha256, len(obj.data))
        assert 0 < entry.received_ns <= entry.parsed_ns
        assert intake.stored == 1 and intake.refused == {}
        assert files(tmp_path, "parts") == []


async def test_an_association_that_ends_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    async with intake_in(tmp_path) as intake:
        reception = begun(intake, made(1))
        reception.write([memoryview(b"\x08\x00\x16")])
        reception.abandon()
        reception.abandon()
        assert files(tmp_path, "parts") == files(tmp_path, "objects") == []
        assert intake.spool.stats().part_objects == 0


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"sop_class": "1.2.3.4", "abstract_syntax": "1.2.3.4"}, 0x0122),
        ({"sop_class": "1.2.840.10008.5.1.4.1.1.4"}, 0x0122),
        ({"transfer_syntax": "1.2.3.4"}, 0xC020),
        ({"sop_instance": "../../etc/passwd"}, 0x0117),
        ({"sop_instance": "1." + "2" * 63}, 0x0117),
        ({"sop_instance": ""}, 0x0117),
    ],
)
async def test_a_command_that_may_not_pass(tmp_path: Path, changes: dict[str, str], status: int) -> None:
    async with intake_in(tmp_path) as intake:
        assert intake.begin(request(made(1), **changes)) == status
        assert files(tmp_path, "parts") == [] and sum(intake.refused.values()) == 1


@pytest.mark.parametrize(
    ("data", "reason", "status"),
    [
        (names()[:-3], "length", 0xC002),
        (names() + b"\x10", "truncated", 0xC001),
        (names() + nested(300), "depth", 0xC010),
        (names(instance="2.25.1"), "mismatch", 0xA900),
        (b"", "uid", 0xC00C),
    ],
)
async def test_a_data_set_that_may_not_pass(tmp_path: Path, data: bytes, reason: str, status: int) -> None:
    async with intake_in(tmp_path) as intake:
        answer = await stored(intake, Made(uid="2.25.77", data=data))
        (path,) = files(tmp_path, "quarantine")
        assert (path.name.split(".")[1], hex(answer)) == (reason, hex(status))
        assert path.read_bytes().endswith(data)
        assert intake.refused == {reason: 1}
        assert files(tmp_path, "objects") == files(tmp_path, "parts") == []


ODD = names(instance="2.25.77") + head(0x00091001, "OB", 2, reserved=7) + b"ab"
"""Reserved bytes that are not zero: to be put right before it goes on."""


async def test_an_encoding_that_can_be_put_right_is(tmp_path: Path) -> None:
    async with intake_in(tmp_path) as intake:
        assert await stored(intake, Made(uid="2.25.77", data=ODD)) == 0x0000
        (path,) = files(tmp_path, "objects")
        assert path.read_bytes().endswith(names(instance="2.25.77") + element(0x00091001, "OB", b"ab"))
        assert files(tmp_path, "parts") == []


async def test_what_was_put_right_and_is_refused_then_is_in_quarantine(tmp_path: Path) -> None:
    """The command names another instance than the data set, which moreover needs an edit."""
    async with intake_in(tmp_path) as intake:
        assert await stored(intake, Made(uid="2.25.78", data=ODD)) == 0xA900
        assert len(files(tmp_path, "quarantine")) == 1
        assert files(tmp_path, "parts") == [] and intake.spool.stats().part_objects == 0


async def test_no_room_for_what_is_put_right(tmp_path: Path) -> None:
    obj = Made(uid="2.25.77", data=ODD + element(0x7FE00010, "OW", bytes(700_000)))
    async with intake_in(tmp_path, max_bytes=1 << 20) as intake:
        assert await stored(intake, obj, step=1 << 20) == Status.OUT_OF_RESOURCES
        assert files(tmp_path, "parts") == [] and intake.spool.stats().part_bytes == 0


async def test_a_full_spool_refuses_objects_and_associations_and_keeps_nothing(tmp_path: Path) -> None:
    async with intake_in(tmp_path, max_objects=1) as intake:
        assert intake.admit(PEER) is None
        assert await stored(intake, made(1)) == 0x0000
        assert intake.begin(request(made(2))) == Status.OUT_OF_RESOURCES
        assert intake.admit(PEER) is Rejection.FULL
        assert intake.refused == {"full-objects": 2}
        assert intake.complaints() == [
            "senders are refused: the spool is full (objects); see why they do not go on"
        ]
        intake.spool.done(await intake.spool.feed("link").next(), "link")
        await intake.spool.recent("link", 1)
        assert intake.spool.full is None
        assert await stored(intake, made(2)) == 0x0000
        intake.spool.done(await intake.spool.feed("link").next(), "link")
        await intake.spool.recent("link", 1)
        assert intake.complaints() == []


async def test_an_object_that_outgrows_the_spool(tmp_path: Path) -> None:
    async with intake_in(tmp_path, max_bytes=1 << 20) as intake:
        obj = made(1, 900_000)
        assert await stored(intake, obj, 100_000) == 0x0000
        reception = begun(intake, made(2, 900_000))
        with pytest.raises(StoreFailed) as failed:
            for _ in range(9):
                reception.write([memoryview(bytes(100_000))])
        assert failed.value.status == Status.OUT_OF_RESOURCES
        reception.abandon()
        assert files(tmp_path, "parts") == []
        assert intake.refused == {"full-bytes": 1}
        # There is room for a smaller one; who was refused comes back with the larger one.
        assert intake.spool.full is None
        assert "the spool is full (bytes)" in intake.complaints()[0]
        assert await stored(intake, made(3, 1000)) == 0x0000
        assert intake.complaints() == []


async def test_an_object_over_its_own_limit(tmp_path: Path) -> None:
    async with intake_in(tmp_path) as intake:
        with pytest.raises(StoreFailed):
            await stored(intake, made(1, (1 << 20) + 2), 1 << 19)
        assert intake.refused == {"full-object": 1}
        assert intake.complaints() == [], "it is the object's fault"


@pytest.mark.parametrize("where", ["begin", "quarantine"])
async def test_a_disk_that_fails_is_answered_as_out_of_resources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def failing(*_: object, **__: object) -> None:
        raise SpoolError("the disk failed")

    bad = Made(uid="2.25.77", data=names()[:-3])
    async with intake_in(tmp_path) as intake:
        monkeypatch.setattr(Spool, where, failing)
        if where == "begin":
            assert intake.begin(request(bad)) == Status.OUT_OF_RESOURCES
        else:
            assert await stored(intake, bad) == Status.OUT_OF_RESOURCES
        assert intake.complaints() == ["senders are refused: the disk takes no object; see the source's log"]
        assert files(tmp_path, "parts") == [] == files(tmp_path, "quarantine")


async def test_a_full_quarantine_refuses_and_keeps_nothing(tmp_path: Path) -> None:
    async with intake_in(tmp_path, max_quarantine_bytes=1 << 20) as intake:
        bad = Made(uid="2.25.77", data=made(1, 700_000).data[:-1])
        assert await stored(intake, bad, 1 << 20) & 0xF000 == 0xC000
        assert await stored(intake, bad, 1 << 20) == Status.OUT_OF_RESOURCES
        assert len(files(tmp_path, "quarantine")) == 1 and files(tmp_path, "parts") == []
        assert "release or drop some from quarantine" in intake.complaints()[0]


async def test_a_refusal_of_long_ago_is_forgiven(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with intake_in(tmp_path) as intake:
        intake.turn_away("full-disk")
        assert intake.complaints() == [
            "senders are refused: the spool is full (disk); free space on its file system"
        ]
        later = time.monotonic() + module.TURNED_AWAY_SECONDS
        monkeypatch.setattr("dicom.intake.time.monotonic", lambda: later)
        assert intake.complaints() == []


async def test_two_senders_at_once_are_kept_apart(tmp_path: Path) -> None:
    one, two = made(1, 50_000), made(2, 50_000)
    async with intake_in(tmp_path) as intake:
        first, second = begun(intake, one), begun(intake, two)
        for start in range(0, max(len(one.data), len(two.data)), 999):
            first.write([memoryview(one.data)[start : start + 999]])
            second.write([memoryview(two.data)[start : start + 999]])
        assert [await second.finish(), await first.finish()] == [0, 0]
        names_of = {path.name.split(".")[1]: path for path in files(tmp_path, "objects")}
        assert names_of.keys() == {one.sha256, two.sha256}
        assert os.path.getsize(names_of[one.sha256]) > len(one.data)


async def test_a_repr_tells_nothing_of_the_patient(tmp_path: Path) -> None:
    async with intake_in(tmp_path) as intake:
        reception = begun(intake, made(1))
        assert made(1).uid not in repr(reception) and CT not in repr(reception)
        assert EXPLICIT not in repr(reception)
        reception.abandon()
