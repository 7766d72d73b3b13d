"""Destinations and disks that fail, through the running product: nothing acknowledged is lost, nothing stops.

Each test begins with a fault, shows that what can go on does, then ends the fault and counts.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from perf.client import Client, NotUnderstood
from relay.link import SILENCE_SECONDS
from relay.status import complaints
from relay.supervisor import ask
from tests.archive import Archive, Made, made
from tests.dicom.datasets import CT, EXPLICIT, IMPLICIT, JPEG
from tests.interop.dicom_peers import storescp
from tests.peers import free_port, require
from tests.product import Product, running, studies

QUICK = "retry_seconds = 0.1\nmax_retry_seconds = 0.5"
"""For the sink: a destination that is back is noticed within half a second."""


def store(address: tuple[str, int], objects: Iterable[Made], calling: str = "BENCH") -> list[int]:
    """The statuses of one association that stores `objects`."""
    with Client(address, "MEDFERRY", [(CT, [EXPLICIT])], calling) as client:
        return [client.store(each.sop_class, each.uid, each.data) for each in objects]


def eventually(what: Callable[[], bool], seconds: float = 30.0) -> None:
    """Return once `what` holds: status is told each second, and before the first time has no figures."""

    def holds() -> bool:
        with contextlib.suppress(KeyError):
            return what()
        return False

    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"{what} does not hold after {seconds:.0f} s"
        threading.Event().wait(0.1)


def sink_figures(relay: Product) -> dict[str, Any]:
    """The sink's figures, as ``medferry status --json`` shows them."""
    figures: dict[str, Any] = ask(str(relay.state))["lanes"][0]["sink"]["figures"]
    return figures


def source_complaints(relay: Product) -> str:
    """What ``medferry status`` complains about on side A."""
    return str(ask(str(relay.state))["lanes"][0]["source"]["figures"].get("complaints"))


def spool_ls(relay: Product, *arguments: str) -> list[dict[str, Any]]:
    """``medferry spool ls --side sink --json``."""
    output = relay.command("spool", "ls", "--state", str(relay.state), "--side", "sink", "--json", *arguments)
    rows: list[dict[str, Any]] = json.loads(output)
    return rows


# ---- destinations ---------------------------------------------------------------------------------------


@pytest.mark.peer
def test_destinations_that_are_absent_or_refuse_hold_up_no_other(tmp_path: Path) -> None:
    require("storescp")
    absent_port, refusing_port, port = free_port(), free_port(), free_port()
    objects = [made(number) for number in range(5)]
    uids = [each.uid for each in objects]
    with contextlib.ExitStack() as peers:
        pacs = peers.enter_context(Archive())
        refusing = contextlib.ExitStack()
        refusing.enter_context(storescp(tmp_path / "refusing", options=("--refuse",), port=refusing_port))
        config = studies(
            listen=f"127.0.0.1:{port}",
            destinations={
                "pacs": pacs.destination,
                "absent": ("PACS", f"127.0.0.1:{absent_port}"),
                "refusing": ("PACS", f"127.0.0.1:{refusing_port}"),
            },
            sink=QUICK,
        )
        with running(config, tmp_path / "relay") as relay:
            assert store(("127.0.0.1", port), objects) == [0] * 5
            pacs.wait(uids, 10)
            eventually(lambda: str(sink_figures(relay).get("destination")).count("'away'") == 2)
            figures = sink_figures(relay)
            assert figures["destination"]["absent"]["last error"] == "unreachable"
            assert figures["destination"]["refusing"]["last error"].startswith("rejected")
            eventually(lambda: sink_figures(relay)["waiting"] == {"absent": 5, "refusing": 5, "pacs": 0})
            assert any("destination absent is away" in each for each in figures["complaints"])

            refusing.close()
            for late_port in (absent_port, refusing_port):
                late = peers.enter_context(Archive(port=late_port))
                late.wait(uids, 10)
                assert all(late.received[each.uid] == [each.sha256] for each in objects)


@pytest.mark.slow
@pytest.mark.peer
def test_a_destination_that_breaks_off_every_object_gets_them_once_it_is_well(tmp_path: Path) -> None:
    require("storescp")
    broken_port, port = free_port(), free_port()
    objects = [made(number, 300_000) for number in range(3)]
    broken = contextlib.ExitStack()
    broken.enter_context(storescp(tmp_path / "broken", options=("--abort-during",), port=broken_port))
    config = studies(
        listen=f"127.0.0.1:{port}",
        destinations={"pacs": ("PACS", f"127.0.0.1:{broken_port}")},
        sink="retry_seconds = 0.1\nmax_retry_seconds = 0.1",
    )
    with running(config, tmp_path / "relay") as relay:
        assert store(("127.0.0.1", port), objects) == [0] * 3
        # Long enough for more tries of each than would park an object that alone is at fault.
        eventually(lambda: relay.log.count("pacs: object") >= 15 or "is away" in relay.log)
        threading.Event().wait(1.5)
        assert spool_ls(relay, "--only", "parked") == []
        broken.close()
        with Archive(port=broken_port) as pacs:
            pacs.wait([each.uid for each in objects], 15)
            assert {uid: shas[-1] for uid, shas in pacs.received.items()} == {
                each.uid: each.sha256 for each in objects
            }


def test_a_destination_that_falls_silent_is_left_and_tried_again(tmp_path: Path) -> None:
    port = free_port()
    silent = threading.Event()
    objects = [made(number, 50_000) for number in range(3)]

    def answer(uid: str) -> int:
        if not silent.is_set() and uid == objects[1].uid:
            silent.wait(30)
        return 0x0000

    with Archive(answer=answer) as pacs:
        config = studies(listen=f"127.0.0.1:{port}", destinations={"pacs": pacs.destination}, sink=QUICK)
        with running(config + "timeout_seconds = 1\n", tmp_path) as relay:
            assert store(("127.0.0.1", port), objects) == [0] * 3
            pacs.wait([objects[0].uid, objects[2].uid], 10)
            assert "did not respond within 1 s" in relay.log
            silent.set()
            pacs.wait([each.uid for each in objects], 10)


@pytest.mark.peer
def test_a_destination_that_takes_one_association_at_a_time(tmp_path: Path) -> None:
    """DCMTK's storescp lets further associations wait without an answer; all objects come all the same."""
    require("storescp")
    port = free_port()
    objects = [made(number) for number in range(400)]
    with storescp(tmp_path / "pacs", options=()) as pacs:
        destination = {"pacs": (pacs.ae_title, pacs.address)}
        config = studies(listen=f"127.0.0.1:{port}", destinations=destination, sink=QUICK)
        with running(config + "max_associations = 4\nrelease_seconds = 0.5\n", tmp_path / "relay") as relay:
            assert set(store(("127.0.0.1", port), objects)) == {0}
            wanted = {each.uid for each in objects}
            eventually(lambda: {name.split(".", 1)[1] for name in os.listdir(pacs.directory)} == wanted)
            eventually(lambda: sink_figures(relay)["waiting"] == {"pacs": 0})


def test_what_a_destination_will_never_take_is_parked_and_can_be_sent_again(tmp_path: Path) -> None:
    port = free_port()
    good, refused, busy, foreign = (made(number) for number in range(4))
    foreign = made(9, syntax=JPEG)
    busy_answers = iter((0xA700, 0xA701))
    statuses: dict[str, Callable[[], int]] = {
        refused.uid: lambda: 0x0122,
        busy.uid: lambda: next(busy_answers, 0),
    }

    def answer(uid: str) -> int:
        return statuses.get(uid, lambda: 0)()

    with contextlib.ExitStack() as stack, contextlib.ExitStack() as first:
        pacs = first.enter_context(Archive(answer=answer, syntaxes=(EXPLICIT, IMPLICIT)))
        config = studies(listen=f"127.0.0.1:{port}", destinations={"pacs": pacs.destination}, sink=QUICK)
        relay = stack.enter_context(running(config, tmp_path))
        with Client(("127.0.0.1", port), "MEDFERRY", [(CT, [JPEG])]) as client:
            assert client.store(CT, foreign.uid, foreign.data) == 0
        assert store(("127.0.0.1", port), [refused, busy, good]) == [0, 0, 0]
        pacs.wait([busy.uid, good.uid], 10)
        eventually(lambda: sink_figures(relay)["parked"] == {"pacs": 2})
        assert [each.status for each in pacs.arrivals if each.uid == busy.uid] == [0xA700, 0xA701, 0]
        parked = {
            row["sop_instance"]: row["deliveries"]["pacs"] for row in spool_ls(relay, "--only", "parked")
        }
        assert parked[refused.uid]["last_status"] == 0x0122
        assert parked[foreign.uid]["last_status"] == "transfer-syntax-not-accepted"
        eventually(lambda: bool(sink_figures(relay)["complaints"]))
        assert "2 objects for destination pacs are parked" in str(sink_figures(relay)["complaints"])

        # The archive learns the transfer syntax and changes its mind; the operator sends again.
        first.close()
        again = stack.enter_context(Archive(port=pacs.port))
        assert "2 deliveries" in relay.command("spool", "resend", "--parked", "--state", str(relay.state))
        again.wait([refused.uid, foreign.uid], 10)
        assert again.received[foreign.uid] == [foreign.sha256]
        eventually(lambda: sink_figures(relay)["parked"] == {"pacs": 0})


# ---- fullness -------------------------------------------------------------------------------------------


def test_full_spools_refuse_as_transient_and_lose_nothing(tmp_path: Path) -> None:
    """B fills up first and the link blocks, then A fills up and senders are told to come back."""
    port, pacs_port = free_port(), free_port()
    config = studies(
        listen=f"127.0.0.1:{port}",
        destinations={"pacs": ("PACS", f"127.0.0.1:{pacs_port}")},
        source="[lane.source.spool]\nmax_objects = 4",
        sink=f"{QUICK}\n[lane.sink.spool]\nmax_objects = 3",
    )
    acknowledged: list[Made] = []
    # Each more than a fragment, so that the link's own buffers hold few of them.
    offered = (made(number, 2_000_000) for number in range(100))
    with running(config, tmp_path) as relay:
        with Client(("127.0.0.1", port), "MEDFERRY", [(CT, [EXPLICIT])]) as client:
            each = next(offered)
            refusals = 0
            # Twice in a row, half a second apart: by then the link has taken all that it takes.
            while refusals < 2:
                status = client.store(CT, each.uid, each.data)
                assert status in (0x0000, 0xA700)
                if status == 0xA700:
                    refusals += 1
                    threading.Event().wait(0.5)
                    continue
                refusals = 0
                acknowledged.append(each)
                each = next(offered)
                if len(acknowledged) == 3:
                    eventually(lambda: sink_figures(relay)["undelivered"] == 3)
            assert 7 <= len(acknowledged) < 30
        with pytest.raises(NotUnderstood, match="PDU type 0x03, 0002"):
            # Rejected-transient, by PS3.8 Table 9-21.
            store(("127.0.0.1", port), [])
        eventually(lambda: "the sink's spool is full" in str(sink_figures(relay)["complaints"]))
        eventually(lambda: "senders are refused: the spool is full (objects)" in source_complaints(relay))
        # For longer than a silent link is taken for one: the sink does not listen, and says nothing of that.
        threading.Event().wait(SILENCE_SECONDS + 1.5)
        assert "heartbeats" not in str(complaints(ask(str(relay.state))))
        assert "the link waits" in relay.log

        with Archive(port=pacs_port) as pacs:
            pacs.wait([one.uid for one in acknowledged], 20)
            eventually(lambda: sink_figures(relay)["waiting"] == {"pacs": 0})
            assert store(("127.0.0.1", port), [each]) == [0]
            pacs.wait([each.uid], 10)
            assert all(pacs.received[one.uid] == [one.sha256] for one in (*acknowledged, each))
            eventually(lambda: source_complaints(relay) == "[]")


def test_a_full_disk_refuses_and_recovers(tmp_path: Path) -> None:
    port = free_port()
    margin = 300 << 20
    free = shutil.disk_usage(tmp_path).free
    if free < 4 * margin:
        pytest.skip("too little free disk to fill some of it")
    with Archive() as pacs:
        config = studies(
            listen=f"127.0.0.1:{port}",
            destinations={"pacs": pacs.destination},
            source=f"[lane.source.spool]\nmin_free_disk_bytes = {free - margin}",
        )
        one, two = made(1), made(2)
        with running(config, tmp_path / "relay") as relay:
            with Client(("127.0.0.1", port), "MEDFERRY", [(CT, [EXPLICIT])]) as client:
                assert client.store(CT, one.uid, one.data) == 0
                ballast = os.open(tmp_path / "ballast", os.O_CREAT | os.O_WRONLY)
                os.posix_fallocate(ballast, 0, 2 * margin)
                eventually(lambda: client.store(CT, two.uid, two.data) == 0xA700, 5)
                with pytest.raises(NotUnderstood, match="PDU type 0x03, 0002"):
                    store(("127.0.0.1", port), [])
                eventually(lambda: "the spool is full (disk)" in source_complaints(relay))
                os.ftruncate(ballast, 0)
                os.close(ballast)
                eventually(lambda: client.store(CT, two.uid, two.data) == 0, 5)
            pacs.wait([one.uid, two.uid], 10)


# ---- the end --------------------------------------------------------------------------------------------


def test_a_drain_in_mid_transfer_loses_nothing_and_keeps_its_time(tmp_path: Path) -> None:
    port = free_port()
    config_of = {"listen": f"127.0.0.1:{port}", "relay": "drain_seconds = 5"}
    acknowledged: dict[str, str] = {}
    started = threading.Event()

    def sender() -> None:
        with (
            contextlib.suppress(OSError, NotUnderstood),
            Client(("127.0.0.1", port), "MEDFERRY", [(CT, [EXPLICIT])]) as client,
        ):
            for number in range(100_000):
                each = made(number, 3_000_000 if number % 5 == 0 else 5_000)
                if client.store(CT, each.uid, each.data) == 0:
                    acknowledged[each.uid] = each.sha256
                if number == 20:
                    started.set()

    with Archive() as pacs:
        config = studies(destinations={"pacs": pacs.destination}, **config_of)
        thread = threading.Thread(target=sender)
        with running(config, tmp_path) as relay:
            thread.start()
            assert started.wait(20)
            before = time.monotonic()
            relay.process.send_signal(signal.SIGTERM)
            assert relay.process.wait(15) == 0
            assert time.monotonic() - before < 5 + 1
            thread.join(10)
            assert not thread.is_alive()
        if acknowledged.keys() - pacs.received.keys():
            # It ran out of time: what it accepted is in its spool, and goes on when it is started again.
            with running(config, tmp_path):
                pacs.wait(acknowledged, 20)
        assert all(set(pacs.received[uid]) == {sha} for uid, sha in acknowledged.items())


def test_a_drain_with_a_destination_away_still_ends_in_time(tmp_path: Path) -> None:
    port, pacs_port = free_port(), free_port()
    config = studies(
        listen=f"127.0.0.1:{port}",
        destinations={"pacs": ("PACS", f"127.0.0.1:{pacs_port}")},
        relay="drain_seconds = 5",
    )
    objects = [made(number) for number in range(3)]
    with running(config, tmp_path) as relay:
        assert store(("127.0.0.1", port), objects) == [0] * 3
        before = time.monotonic()
        relay.process.send_signal(signal.SIGTERM)
        assert relay.process.wait(15) == 0
        assert time.monotonic() - before < 5 + 1
        assert "the drain is over: 3 deliveries go on at the next start" in relay.log
    with Archive(port=pacs_port) as pacs, running(config, tmp_path):
        pacs.wait([each.uid for each in objects], 10)
