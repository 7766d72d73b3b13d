"""Real lanes: a source and its sink have no object of the kernel in common to signal through.

Lane one carries objects, lane two is live: its link has trays.
"""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fake_lane import kit
from tests.oneway.kit import same_open_file
from tests.product import Product

LANES = ("one", "two")


@pytest.fixture(scope="module")
def product(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Product]:
    directory = tmp_path_factory.mktemp("oneway")
    # Shadows of the standard library in the directory that medferry is started in.
    for module in ("json", "signal", "tomllib"):
        (directory / f"{module}.py").write_text(
            "raise SystemExit('a module of the working directory was run')\n"
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDFERRY_TEST_SECRET", "a-token")
        patch.setenv("NOTIFY_SOCKET", "")
        config = kit.relay(kit.lane("one"), kit.lane("two", kind="fake-live"))
        with kit.relaying(config, directory) as running:
            for name in LANES:
                with kit.client(running, name) as client:
                    client.send(1)
                kit.until(lambda name=name: kit.arrived(running, name) == [1], "a record crosses")  # type: ignore[misc]
            yield running


def opened(pid: int) -> dict[int, os.stat_result]:
    """What each descriptor of a process refers to."""
    return {int(number): os.stat(f"/proc/{pid}/fd/{number}") for number in os.listdir(f"/proc/{pid}/fd")}


def identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def kind(pid: int, number: int) -> str:
    return os.readlink(f"/proc/{pid}/fd/{number}").split(":")[0]


@pytest.mark.parametrize("name", LANES)
def test_source_and_sink_share_no_open_file(product: Product, name: str) -> None:
    """Not one: no stream, no log, no socket, whatever its number (kcmp(2))."""
    pids = kit.pids(product, name)
    for mine in opened(pids["source"]):
        for other in opened(pids["sink"]):
            assert not same_open_file(pids["source"], mine, pids["sink"], other), (
                f"source's {mine} ({kind(pids['source'], mine)}) is sink's {other}"
            )


@pytest.mark.parametrize("name", LANES)
def test_source_and_sink_share_no_inode_but_the_null_device(product: Product, name: str) -> None:
    """Neither pipe, socket, memory file nor file: an inode alone carries locks and times."""
    pids = kit.pids(product, name)
    source, sink = opened(pids["source"]), opened(pids["sink"])
    null = identity(os.stat("/dev/null"))
    anonymous = {
        identity(status) for number, status in source.items() if kind(pids["source"], number) == "anon_inode"
    }
    shared = {identity(item) for item in source.values()} & {identity(item) for item in sink.values()}
    # Every epoll and every timer of the machine has this one inode, which holds nothing of them.
    assert shared <= {null} | anonymous
    assert not any(stat.S_ISREG(item.st_mode) and identity(item) in shared for item in source.values())


def workers(product: Product) -> dict[str, int]:
    """All pids, by lane and part."""
    return {f"{lane}.{part}": pid for lane in ("one", "two") for part, pid in kit.pids(product, lane).items()}


def test_no_two_workers_are_in_one_session(product: Product) -> None:
    """Within a session SIGCONT reaches anyone, whatever their uids (kill(2)): a bit a time, from B to A."""
    for name, pid in workers(product).items():
        assert os.getsid(pid) == pid, name


@pytest.mark.root
@pytest.mark.skipif(not kit.root(), reason="needs root: run the tests as root")
@pytest.mark.parametrize("number", [signal.SIGCONT, signal.SIGURG])
def test_no_worker_may_signal_another(product: Product, number: signal.Signals) -> None:
    """Two that do nothing where they arrive, from a process like each worker, to each other one."""
    script = (
        "import os, sys\n"
        "for pid in map(int, sys.argv[2:]):\n"
        "    try:\n        os.kill(pid, int(sys.argv[1]))\n"
        "    except PermissionError:\n        print(pid)\n"
    )
    pids = workers(product)
    for name, pid in pids.items():
        uid = os.stat(f"/proc/{pid}").st_uid
        others = [str(other) for other in pids.values() if other != pid]
        done = subprocess.run(
            [sys.executable, "-I", "-c", script, str(int(number)), *others],
            user=uid,
            group=uid,
            extra_groups=[],
            start_new_session=True,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.split() == others, f"{name} reached {set(others) - set(done.stdout.split())}"


def test_the_valve_has_the_link_and_its_own_streams_only(product: Product) -> None:
    pids = kit.pids(product, "one")
    kinds = sorted(kind(pids["valve"], number) for number in opened(pids["valve"]) if number > 2)
    assert kinds == ["pipe", "socket", "socket"]


def inodes(pids: dict[str, int], *kinds: str) -> dict[str, set[tuple[int, int]]]:
    """What source, valve and sink have open of these kinds."""
    return {
        name: {identity(status) for number, status in opened(pid).items() if kind(pid, number) in kinds}
        for name, pid in pids.items()
    }


@pytest.mark.parametrize("name", LANES)
def test_the_valve_stands_between_two_pairs(product: Product, name: str) -> None:
    """Neither end that the source or the sink holds is one of the valve's."""
    ends = inodes(kit.pids(product, name), "socket", "pipe")
    assert not ends["source"] & ends["valve"]
    assert not ends["valve"] & ends["sink"]


def test_where_there_are_no_trays_no_memory_is_shared(product: Product) -> None:
    assert inodes(kit.pids(product, "one"), "/memfd")["valve"] == set()


def test_each_tray_is_of_the_valve_and_one_side_and_only_its_writer_can_write(product: Product) -> None:
    pids = kit.pids(product, "two")
    memory = inodes(pids, "/memfd")
    (of_a,), (of_b,) = memory["source"] & memory["valve"], memory["valve"] & memory["sink"]
    assert memory["valve"] == {of_a, of_b}
    assert of_a != of_b

    def access(name: str, tray: tuple[int, int]) -> set[int]:
        """The access modes of all descriptors of a tray."""
        pid = pids[name]
        return {
            int(Path(f"/proc/{pid}/fdinfo/{number}").read_text().split()[3], 8) & os.O_ACCMODE
            for number, status in opened(pid).items()
            if identity(status) == tray
        }

    def mapped(name: str, tray: tuple[int, int]) -> set[str]:
        """How a tray is mapped."""
        lines = Path(f"/proc/{pids[name]}/maps").read_text().splitlines()
        return {line.split()[1] for line in lines if line.split()[4] == str(tray[1]) and "tray" in line}

    assert (access("source", of_a), access("valve", of_a)) == ({os.O_RDWR}, {os.O_RDONLY})
    assert (access("valve", of_b), access("sink", of_b)) == ({os.O_RDWR}, {os.O_RDONLY})
    assert (mapped("source", of_a), mapped("valve", of_a)) == ({"rw-s"}, {"r--s"})
    assert (mapped("valve", of_b), mapped("sink", of_b)) == ({"rw-s"}, {"r--s"})


def test_no_worker_holds_a_stream_of_the_supervisors(product: Product) -> None:
    """A terminal, a file or a pipe behind the log can be locked, resized and set by all who hold it."""
    supervisor = product.process.pid
    streams = {identity(os.stat(f"/proc/{supervisor}/fd/{number}")) for number in (0, 1, 2)}
    streams.discard(identity(os.stat("/dev/null")))
    assert streams
    for name in ("one", "two"):
        for pid in kit.pids(product, name).values():
            assert not streams & {identity(status) for status in opened(pid).values()}


def test_two_lanes_share_nothing_either(product: Product) -> None:
    one, two = kit.pids(product, "one"), kit.pids(product, "two")
    for pid in one.values():
        for other in two.values():
            for mine in opened(pid):
                assert not any(same_open_file(pid, mine, other, number) for number in opened(other))


def inspection(product: Product, name: str) -> dict[str, Any]:
    with kit.client(product, name) as client:
        found: dict[str, Any] = json.loads(client.ask("inspect"))
        return found


def test_a_worker_has_no_secret_of_the_supervisors_environment(product: Product) -> None:
    environment = inspection(product, "one")["environment"]
    assert "a-token" not in environment.values()
    assert "NOTIFY_SOCKET" not in environment
    assert "HOME" not in environment
    assert {"PATH", "PYTHONSAFEPATH"} <= environment.keys()


def test_a_worker_runs_no_module_of_the_directory_that_medferry_was_started_in(product: Product) -> None:
    seen = inspection(product, "one")
    assert seen["directory"] == "/"
    assert "" not in seen["path"]
    assert str(product.directory) not in seen["path"]


def test_a_worker_is_told_nothing_of_the_other_side(product: Product) -> None:
    pids = kit.pids(product, "one")
    for name in ("source", "sink"):
        command = Path(f"/proc/{pids[name]}/cmdline").read_text()
        assert product.lane("one")["source"]["listen"] not in command


@pytest.mark.root
@pytest.mark.skipif(not kit.root(), reason="needs root: run the tests as root")
def test_every_process_of_every_lane_has_a_uid_of_its_own(product: Product) -> None:
    """Two lanes may face the same two networks in opposite directions."""
    every = [pid for name in ("one", "two") for pid in kit.pids(product, name).values()]
    uids = [os.stat(f"/proc/{pid}").st_uid for pid in every]
    assert len(set(uids)) == len(uids)
    assert 0 not in uids


@pytest.mark.root
@pytest.mark.skipif(not kit.root(), reason="needs root: run the tests as root")
def test_the_valve_has_no_network_at_all(product: Product) -> None:
    pids = kit.pids(product, "one")
    assert os.stat(f"/proc/{pids['valve']}/ns/net").st_ino != os.stat("/proc/self/ns/net").st_ino
    interfaces = Path(f"/proc/{pids['valve']}/net/dev").read_text().splitlines()[2:]
    assert [line.split(":")[0].strip() for line in interfaces] == ["lo"]
    assert Path(f"/proc/{pids['valve']}/net/route").read_text().splitlines()[1:] == []


def test_what_a_source_writes_forges_no_line_of_the_supervisors(product: Product) -> None:
    with kit.client(product, "one") as client:
        client.ask("shout")
    kit.until(lambda: "a bell ? and an escape ?[31m" in product.log, "the source's log is copied")
    assert "forged" not in product.log
    assert "\x1b" not in product.log


def test_a_source_that_floods_the_log_is_cut_short(product: Product) -> None:
    with kit.client(product, "two") as client:
        client.ask("flood")
        client.send(7)
    kit.until(lambda: 7 in kit.arrived(product, "two"), "the lane goes on")
    kit.until(lambda: "flood 100\n" in product.log, "the beginning is logged")
    assert "flood 19999\n" not in product.log
    assert product.log.count("flood ") < 8_000
