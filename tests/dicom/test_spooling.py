"""What a spool of a DICOM lane says when it is opened, in status, and to whoever looks after it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from dicom import part10
from dicom.settings import SpoolSettings
from dicom.spooling import complaints, describe, figures, findings, open_spool
from relay.spool import Recovered, Spool
from tests.archive import Made, made
from tests.dicom.datasets import CT, EXPLICIT
from tests.relay.spool_kit import scratch, written

SETTINGS = SpoolSettings(min_free_disk_bytes=0)


@pytest.fixture
def directory() -> Iterator[str]:
    with scratch() as path:
        os.mkdir(path)
        yield path


async def opened(directory: str, *destinations: str) -> Spool:
    return await open_spool(directory, SETTINGS, destinations=destinations, max_object_bytes=1 << 20)


async def filled(directory: str, count: int, destinations: Sequence[str] = ("pacs",)) -> list[Path]:
    """The files of a closed spool that holds so many objects."""
    spool = await opened(directory, *destinations)
    for number in range(count):
        await store(spool, made(number))
    await spool.close()
    return sorted((Path(directory) / "spool" / "objects").iterdir())


async def store(spool: Spool, obj: Made) -> None:
    head = part10.header(CT, obj.uid, EXPLICIT)
    part = spool.begin(head)
    part.write([obj.data])
    await spool.commit(part, describe(head))


async def test_what_is_as_it_was_is_not_worth_a_word(
    directory: str, caplog: pytest.LogCaptureFixture
) -> None:
    await filled(directory, 2)
    spool = await opened(directory, "pacs")
    assert (complaints(spool, ["pacs"]), figures(spool)["at opening"]) == ([], {})
    await spool.close()
    assert caplog.records == []


async def test_deleted_and_torn_files_are_said_in_log_figures_and_complaints(
    directory: str, caplog: pytest.LogCaptureFixture
) -> None:
    gone, torn, _ = await filled(directory, 3)
    gone.unlink()
    # Under another hash than its own: what the index says of this file is gone too.
    torn.rename(torn.with_name(f"{torn.name[:32]}.{'0' * 64}.dcm"))
    spool = await opened(directory, "pacs")
    said = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert f"object {gone.name[:32]} is gone: somebody deleted its file" in said
    assert any(text.startswith("opening the spool: 2 objects are gone") for text in said)
    assert any(text.startswith("opening the spool: 1 files are not what their names say") for text in said)
    assert figures(spool)["at opening"] == {"missing": 2, "torn": 1}
    found = complaints(spool, ["pacs"])
    assert [text.split(":")[1].split()[0] for text in found[:2]] == ["2", "1"]
    assert found[2] == "1 objects are in quarantine; see medferry quarantine ls"
    await spool.close()


async def test_a_damaged_index_is_said(directory: str, caplog: pytest.LogCaptureFixture) -> None:
    await filled(directory, 1)
    index = os.path.join(directory, "spool", "index.db")
    with open(index, "wb") as file:
        file.write(b"this is no database" * 500)
    spool = await opened(directory, "pacs")
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert any(f"{index} is damaged" in text and "index.db.damaged" in text for text in warnings)
    assert any("all is delivered again" in text for text in warnings)
    assert figures(spool)["at opening"] == {"rebuilt": True, "adopted": 1}
    assert complaints(spool, ["pacs"]) == [], "nothing is left to do"
    await spool.close()


async def test_what_waits_for_a_destination_that_is_not_configured(
    directory: str, caplog: pytest.LogCaptureFixture
) -> None:
    await filled(directory, 2, ("pacs", "old"))
    spool = await opened(directory, "pacs")
    assert "2 deliveries are parked, their destinations are not configured" in caplog.text
    for entry in [await spool.feed("pacs").next() for _ in range(2)]:
        spool.park(entry, "pacs", 0xA900)
    await written(spool)
    (text,) = complaints(spool, ["pacs"])
    assert text.startswith("2 objects wait for destination old, which is not configured")
    assert text.endswith("medferry spool drop --destination old")
    await spool.close()


def test_every_finding_has_words() -> None:
    everything = Recovered(
        rebuilt=True, adopted=1, restored=2, torn=3, missing=4, parts_removed=5, unconfigured=6
    )
    assert len(findings(everything)) == len(Recovered.__slots__)
    assert findings(Recovered()) == []
