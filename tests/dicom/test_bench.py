"""The DICOM benchmark on a running relay: its figures are of its own objects, and it takes no others'."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dicom import bench
from dicom.bench import Options, bench_dicom, lines
from dicom.bench_objects import Spec, image, new_uid_block
from perf.client import CT_IMAGE_STORAGE, EXPLICIT_LE, Client
from relay.errors import MedferryError
from tests.peers import free_port
from tests.product import Product, running, studies

QUICK_RETRY = "retry_seconds = 0.1\nmax_retry_seconds = 0.2"


@pytest.fixture
def product(tmp_path: Path) -> Iterator[Product]:
    config = studies(
        listen=f"127.0.0.1:{free_port()}",
        destinations={"pacs": ("PACS", f"127.0.0.1:{free_port()}")},
        sink=QUICK_RETRY,
    )
    with running(config, tmp_path) as relay:
        yield relay


@pytest.fixture
def options(product: Product) -> Options:
    lane = product.lane("studies")
    [destination] = lane["sink"]["destination"]
    return Options(source=lane["source"]["listen"], sink=destination["address"], seconds=1.0, side=64)


@pytest.mark.parametrize("associations", [1, 3])
async def test_figures_are_of_all_objects_from_c_store_to_the_receiver(
    options: Options, associations: int
) -> None:
    report = await bench_dicom(replace(options, associations=associations))
    assert report.objects > 10
    assert report.missing == 0
    assert report.object_bytes > 2 * 64 * 64
    assert report.answer["count"] == report.delivery["count"] == report.objects
    assert 0 < report.answer["p50_ms"] <= report.answer["max_ms"]
    assert 0 < report.delivery["p50_ms"] <= report.delivery["max_ms"] < 1000 * report.seconds
    assert report.objects_per_second == pytest.approx(report.objects / report.seconds, rel=0.01)
    json.dumps(report.as_json())
    assert dict(lines(report))["missing"] == "0"


def test_the_command_prints_what_was_measured_and_nothing_else(product: Product, options: Options) -> None:
    printed = product.command(
        "bench", "dicom", options.source, options.sink, "--seconds", "1", "--side", "64", "--json"
    )
    assert json.loads(printed)["missing"] == 0


async def test_objects_of_others_are_left_to_their_destination(product: Product, options: Options) -> None:
    other = image(Spec(name="other", count=1, side=16))
    host, port = product.address("studies")
    with Client((host, port), "MEDFERRY", [(CT_IMAGE_STORAGE, [EXPLICIT_LE])]) as client:
        assert client.store(other.sop_class, other.renew(new_uid_block()), other.data) == 0
    with pytest.raises(MedferryError, match="objects of others wait for PACS"):
        await bench_dicom(options)
    [kept] = json.loads(
        product.command(
            "spool", "ls", "--state", str(product.state), "--side", "sink", "--only", "waiting", "--json"
        )
    )
    assert kept["sop_instance"] == other.sop_instance


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"receiver_ae_title": "OTHER"}, r"rejected \(called-ae-title\): use the destination's own AE title"),
        ({"called_ae_title": "OTHER"}, "rejected the association"),
        ({"sink": f"127.0.0.1:{free_port()}"}, "nothing came to PACS"),
        ({"source": f"127.0.0.1:{free_port()}"}, "cannot be reached"),
    ],
)
async def test_what_is_wrong_is_told(
    options: Options, change: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "ARRIVE_SECONDS", 1.0)
    with pytest.raises(MedferryError, match=words):
        await bench_dicom(replace(options, seconds=0.5, **change))
