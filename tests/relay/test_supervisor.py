"""The supervisor with real processes: it starts, restarts, reloads, drains and tells, and loses nothing."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from relay.config import parse
from relay.errors import MedferryError
from relay.supervisor import CONTROL_SOCKET, MAX_FILE_BYTES, Epochs, LogSettings, Supervisor, ask
from tests.fake_lane import kit
from tests.product import REPOSITORY, Product
from tests.relay.test_config import CONTRACT

QUICK = "drain_seconds = 5"


@pytest.fixture(scope="module")
def product(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Product]:
    """Two lanes that every test finds running."""
    config = kit.relay(kit.lane("one"), kit.lane("two"), keys=QUICK)
    with kit.relaying(config, tmp_path_factory.mktemp("relay")) as running:
        yield running


@pytest.fixture
def notices(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """The service manager's socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(f"\0medferry-notify-{os.getpid()}-{time.monotonic_ns()}")
        sock.settimeout(20)
        monkeypatch.setenv("NOTIFY_SOCKET", "@" + sock.getsockname()[1:].decode())
        yield sock


def hear(notices: socket.socket) -> dict[str, str]:
    return dict(line.split("=", 1) for line in notices.recv(4096).decode().splitlines())


def reload(product: Product, text: str) -> None:
    product.config_file.write_text(text)
    product.process.send_signal(signal.SIGHUP)


def stays(product: Product, name: str, before: dict[str, int]) -> bool:
    return kit.pids(product, name) == before


def test_epochs_only_rise() -> None:
    epochs = Epochs()
    numbers = [epochs.next() for _ in range(100)]
    assert numbers == sorted(set(numbers))
    assert numbers[0] >= int(time.time()) - 1


# One relay that lives through all of these


def test_records_cross_and_lanes_do_not_mix(product: Product) -> None:
    with kit.client(product, "one") as one, kit.client(product, "two") as two:
        for number in range(20):
            (one if number % 2 else two).send(1000 + number)
    odd, even = list(range(1001, 1020, 2)), list(range(1000, 1020, 2))
    kit.until(lambda: kit.arrived(product, "one") == odd, "lane one")
    kit.until(lambda: kit.arrived(product, "two") == even, "lane two")


@pytest.mark.parametrize("part", ["source", "valve", "sink"])
def test_what_is_killed_is_back_and_the_others_stay(product: Product, part: str) -> None:
    before, others = kit.pids(product, "one"), kit.pids(product, "two")
    with kit.client(product, "one") as client:
        client.send(2000)
    os.kill(before[part], signal.SIGKILL)

    def back() -> bool:
        state = kit.lane_state(product, "one")
        return bool(state["state"] == "running" and state[part]["pid"] not in (None, before[part]))

    kit.until(back, f"{part} is running again")
    with kit.client(product, "one") as client:
        client.send(2001)
    kit.until(lambda: kit.arrived(product, "one")[-1] == 2001, "the lane goes on")
    assert 2000 in kit.arrived(product, "one")
    after = kit.pids(product, "one")
    changed = {name for name in before if before[name] != after[name]}
    # A new source is a new epoch, which the valve has to be told.
    assert changed == ({"source", "valve"} if part == "source" else {part})
    assert kit.pids(product, "two") == others
    state = kit.lane_state(product, "one")
    assert state[part]["last_exit"] == "signal 9"
    assert state[part]["restarts"] >= 1


@pytest.mark.parametrize("deed", ["shut", "unwatch"])
def test_a_source_in_the_wrong_hands_is_replaced(product: Product, deed: str) -> None:
    """It shuts its end of the link, or closes the pipe that it is watched by."""
    before = kit.pids(product, "one")
    with kit.client(product, "one") as client:
        client.sock.sendall(deed.encode() + b"\n")
        kit.until(lambda: not kit.alive(before["source"]), "the source is ended")
    kit.until(lambda: kit.lane_state(product, "one")["state"] == "running", "the lane is whole again")
    with kit.client(product, "one") as client:
        client.send(3000)
    kit.until(lambda: kit.arrived(product, "one")[-1] == 3000, "the lane goes on")
    assert kit.pids(product, "one")["sink"] == before["sink"]


def test_a_connection_made_while_the_source_is_away_is_served(product: Product) -> None:
    source = kit.pids(product, "two")["source"]
    os.kill(source, signal.SIGKILL)
    kit.until(lambda: not kit.alive(source), "the source is gone")
    with kit.client(product, "two") as client:
        client.send(4000)
    kit.until(lambda: kit.arrived(product, "two")[-1] == 4000, "it waited in the backlog")


def test_status_is_for_its_own_user_alone(product: Product) -> None:
    control = product.state / CONTROL_SOCKET
    assert control.stat().st_mode & 0o777 == 0o600
    assert product.state.stat().st_mode & 0o066 == 0, "nobody else lists it"
    for side in ("source", "sink"):
        assert (product.state / "lanes" / "one" / side).stat().st_mode & 0o777 == 0o700


def test_status_says_what_isolation_is_in_force(product: Product) -> None:
    kit.until(lambda: ask(str(product.state))["state"] == "ready", "ready")
    lane = kit.lane_state(product, "one")
    for part in ("source", "valve", "sink"):
        isolation = lane[part]["isolation"]
        uid = os.stat(f"/proc/{lane[part]['pid']}").st_uid
        assert isolation["uid"] == str(uid)
        assert isolation["own uid"] is (uid != os.getuid())
        assert isolation["no new privileges"] is True
        status = Path(f"/proc/{lane[part]['pid']}/status").read_text()
        assert "NoNewPrivs:\t1\n" in status
        shared = os.stat(f"/proc/{lane[part]['pid']}/ns/net").st_ino == os.stat("/proc/self/ns/net").st_ino
        assert isolation["network namespace"] == ("shared" if shared else "empty")


def test_no_second_relay_takes_the_same_state(product: Product) -> None:
    before = kit.pids(product, "one")
    other = product.directory / "second.toml"
    other.write_text(kit.relay(kit.lane("one")))
    done = kit.command("run", str(other), directory=product.directory)
    assert done.returncode == 1
    assert "in use by another medferry: stop it first" in done.stderr
    assert "Traceback" not in done.stderr
    assert stays(product, "one", before)


REFUSED_RELOADS = {
    "no TOML": ("[relay", "not TOML"),
    "a key that is not there": (kit.relay(kit.lane("one", extra="nmae = 1"), keys=QUICK), "unknown key"),
    "another state directory": (kit.relay(kit.lane("one"), keys="drain_seconds = 6"), "restart medferry"),
}


@pytest.mark.parametrize("name", REFUSED_RELOADS)
def test_a_wrong_file_changes_nothing(product: Product, name: str) -> None:
    text, reason = REFUSED_RELOADS[name]
    good = product.config_file.read_text()
    before, lines = (kit.pids(product, "one"), kit.pids(product, "two")), len(product.lines)
    reload(product, text)
    kit.until(lambda: any(reason in line for line in product.lines[lines:]), "it is refused")
    assert all("nothing changed" in line for line in product.lines[lines:] if "reload" in line)
    assert (kit.pids(product, "one"), kit.pids(product, "two")) == before
    product.config_file.write_text(good)


def test_a_file_that_is_gone_is_named_once(product: Product) -> None:
    good, lines = product.config_file.read_text(), len(product.lines)
    product.config_file.unlink()
    product.process.send_signal(signal.SIGHUP)
    kit.until(lambda: any("reload refused" in line for line in product.lines[lines:]), "it is refused")
    [line] = [line for line in product.lines[lines:] if "reload refused" in line]
    assert line.count(str(product.config_file)) == 1
    product.config_file.write_text(good)


def _ready_again(product: Product, lines: int) -> bool:
    return any(line.startswith("ready") for line in product.lines[lines:])


def test_a_reload_adds_changes_and_removes_lanes_and_leaves_the_rest_alone(product: Product) -> None:
    good = product.config_file.read_text()
    before = kit.pids(product, "one")
    one = good[: good.index('[[lane]]\nname = "two"')]

    lines = len(product.lines)
    reload(product, one + kit.lane("three"))
    kit.until(lambda: _ready_again(product, lines), "two is gone, three is there")
    assert [lane["name"] for lane in ask(str(product.state))["lanes"]] == ["one", "three"]
    assert stays(product, "one", before)
    three = kit.pids(product, "three")

    lines = len(product.lines)
    reload(product, one + kit.lane("three", sink="slow = 0.01"))
    kit.until(lambda: _ready_again(product, lines), "three is another")
    assert stays(product, "one", before)
    assert not set(three.values()) & set(kit.pids(product, "three").values())

    lines = len(product.lines)
    reload(product, good)
    kit.until(lambda: _ready_again(product, lines), "all is as it was")
    assert stays(product, "one", before)
    with kit.client(product, "two") as client:
        client.send(5000)
    kit.until(lambda: kit.arrived(product, "two")[-1] == 5000, "two works again")


def test_a_reload_that_cannot_listen_is_taken_back(product: Product) -> None:
    good, lines = product.config_file.read_text(), len(product.lines)
    before = kit.pids(product, "one")
    one = good[: good.index('[[lane]]\nname = "two"')]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        reload(product, one + kit.lane("three", port=taken.getsockname()[1]))
        kit.until(lambda: any("reload refused" in line for line in product.lines[lines:]), "it is refused")
    assert [lane["name"] for lane in ask(str(product.state))["lanes"]] == ["one", "two"]
    assert stays(product, "one", before)
    kit.until(lambda: kit.lane_state(product, "two")["state"] == "running", "the removed lane is back")
    [line] = [line for line in product.lines[lines:] if "reload refused" in line]
    assert "ended and started again as before: two" in line
    assert "nothing changed" not in line
    assert "lane 'three'.source.listen: cannot listen on 127.0.0.1:" in line
    product.config_file.write_text(good)


def test_a_reload_that_ended_every_lane_in_vain_leaves_a_relay_that_is_ready(product: Product) -> None:
    good, lines = product.config_file.read_text(), len(product.lines)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        changed = good.replace("[lane.sink]", "[lane.sink]\nslow = 0.001")
        reload(product, changed + kit.lane("three", port=taken.getsockname()[1]))
        kit.until(lambda: any("reload refused" in line for line in product.lines[lines:]), "it is refused")
    kit.until(lambda: _ready_again(product, lines), "it says that it is ready again")
    kit.until(lambda: ask(str(product.state))["state"] == "ready", "and status does as well")
    assert any("started again as before: one, two" in line for line in product.lines[lines:])
    product.config_file.write_text(good)


def test_a_new_lane_that_cannot_listen_changes_nothing(product: Product) -> None:
    good, lines = product.config_file.read_text(), len(product.lines)
    before = (kit.pids(product, "one"), kit.pids(product, "two"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        reload(product, good + kit.lane("three", port=taken.getsockname()[1]))
        kit.until(lambda: any("nothing changed" in line for line in product.lines[lines:]), "it is refused")
    assert (kit.pids(product, "one"), kit.pids(product, "two")) == before
    product.config_file.write_text(good)


def test_a_lane_that_never_gets_ready_does_not_stop_a_later_reload(product: Product) -> None:
    good, lines = product.config_file.read_text(), len(product.lines)
    before = kit.pids(product, "one")
    reload(product, good + kit.lane("three", source="fail_at_start = true"))
    kit.until(
        lambda: any("three.source ended (exit 1)" in line for line in product.lines[lines:]), "it fails"
    )
    lines = len(product.lines)
    reload(product, good)
    kit.until(lambda: _ready_again(product, lines), "the next reload repairs it")
    assert [lane["name"] for lane in ask(str(product.state))["lanes"]] == ["one", "two"]
    assert stays(product, "one", before)


# Relays of their own


def test_a_reload_asked_for_while_it_still_starts_is_done_and_not_its_end(tmp_path: Path) -> None:
    hangup = 1 << (signal.SIGHUP - 1)

    def holds_it_back(pid: int) -> bool:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return bool(int(next(line for line in lines if line.startswith("SigBlk:")).split()[1], 16) & hangup)

    file = tmp_path / "medferry.toml"
    file.write_text(kit.relay(kit.lane("one"), keys=QUICK))
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": "1"}
    with (
        subprocess.Popen(
            [*kit.COMMAND, "run", str(file)],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process,
        contextlib.ExitStack() as ending,
    ):
        ending.callback(process.terminate)
        kit.until(lambda: holds_it_back(process.pid), "it has begun")
        process.send_signal(signal.SIGHUP)
        assert process.stdout is not None
        assert any("reloaded: 1 lane(s), 0 ended or changed" in line for line in process.stdout)
        assert not holds_it_back(process.pid)
        worker = ask(str(tmp_path / "medferry-state"))["lanes"][0]["source"]["pid"]
        assert not holds_it_back(worker)
        process.terminate()
        process.communicate(timeout=20)
        assert process.returncode == 0


def test_the_service_manager_hears_of_ready_reload_and_end(notices: socket.socket, tmp_path: Path) -> None:
    # Also that a long path will do: a socket's own may have 107 bytes.
    state = tmp_path / ("d" * 90) / ("e" * 90)
    config = kit.relay(kit.lane("one"), keys=f'{QUICK}\nstate = "{state}"')
    with kit.relaying(config, tmp_path) as product:
        assert ask(str(state))["pid"] == product.process.pid
        heard = hear(notices)
        assert heard["READY"] == "1"
        assert heard["MAINPID"] == str(product.process.pid)
        product.process.send_signal(signal.SIGHUP)
        assert hear(notices)["RELOADING"] == "1"
        assert hear(notices)["READY"] == "1"
        product.config_file.write_text("nonsense")
        product.process.send_signal(signal.SIGHUP)
        assert hear(notices)["RELOADING"] == "1"
        assert "refused" in hear(notices)["STATUS"]
    assert hear(notices) == {"STOPPING": "1"}


def test_what_was_accepted_is_delivered_before_the_end(tmp_path: Path) -> None:
    config = kit.relay(kit.lane("one", sink="slow = 0.005"), keys="drain_seconds = 10")
    with kit.relaying(config, tmp_path) as product:
        processes = kit.pids(product, "one").values()
        with kit.client(product, "one") as client:
            for number in range(300):
                client.send(number)
        assert len(kit.arrived(product, "one")) < 300
        assert product.terminate() == 0
        assert kit.arrived(product, "one") == list(range(300))
        assert not any(kit.alive(pid) for pid in processes)
        assert not (product.state / CONTROL_SOCKET).exists()


def test_a_sink_that_hangs_is_ended_in_time(tmp_path: Path) -> None:
    config = kit.relay(kit.lane("one", sink="slow = 30"), keys="drain_seconds = 1")
    with kit.relaying(config, tmp_path) as product:
        with kit.client(product, "one") as client:
            client.send(1)
        began = time.monotonic()
        assert product.terminate() == 0
        assert time.monotonic() - began < 1 + 1.5
        assert "one.sink did not end in time and was killed" in product.log


def test_nothing_outlives_a_supervisor_that_is_killed_and_the_next_takes_over(tmp_path: Path) -> None:
    config = kit.relay(kit.lane("one"), keys=QUICK)
    with kit.relaying(config, tmp_path, drain=False) as product:
        with kit.client(product, "one") as client:
            client.send(1)
        kit.until(lambda: kit.arrived(product, "one") == [1], "a record crosses")
        orphans = kit.pids(product, "one").values()
        os.kill(product.process.pid, signal.SIGKILL)
        kit.until(lambda: not any(kit.alive(pid) for pid in orphans), "all three end with it")
    with kit.relaying(config, tmp_path) as product, kit.client(product, "one") as client:
        client.send(2)
        kit.until(lambda: kit.arrived(product, "one") == [1, 2], "the next relay goes on")


def _fails(config: str, directory: Path) -> str:
    """What ``medferry run`` says about a file with which it cannot start."""
    file = directory / "medferry.toml"
    file.write_text(config)
    done = kit.command("run", str(file), directory=directory)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    return done.stderr


def test_a_port_that_is_taken_is_told_at_the_start(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        message = _fails(kit.relay(kit.lane("one", port=taken.getsockname()[1])), tmp_path)
    assert "cannot listen on 127.0.0.1:" in message
    assert "nobody else listens there" in message


def test_a_key_file_that_is_not_there_is_told_at_the_start(tmp_path: Path) -> None:
    message = _fails(kit.relay(kit.lane("one", source='key_file = "/nowhere/key.pem"')), tmp_path)
    assert "/nowhere/key.pem" in message
    assert "No such file" in message


def test_a_file_that_is_too_long_is_refused_and_not_cut(tmp_path: Path) -> None:
    key = tmp_path / "key.pem"
    key.write_bytes(b"x" * (MAX_FILE_BYTES + 1))
    message = _fails(kit.relay(kit.lane("one", source=f'key_file = "{key}"')), tmp_path)
    assert f"{key} has over {MAX_FILE_BYTES} bytes" in message


def test_a_key_file_is_handed_over_and_read_anew_at_each_start(tmp_path: Path) -> None:
    key = tmp_path / "key.pem"
    key.write_text("x" * 10)
    key.chmod(0o600)
    config = kit.relay(kit.lane("one", source=f'key_file = "{key}"'), keys=QUICK)
    with kit.relaying(config, tmp_path) as product:
        kit.until(lambda: "key file has 10 characters" in product.log, "the worker reads it")
        key.write_text("x" * 20)
        os.kill(kit.pids(product, "one")["source"], signal.SIGKILL)
        kit.until(lambda: "key file has 20 characters" in product.log, "the next worker reads the new one")
        key.unlink()
        os.kill(kit.pids(product, "one")["source"], signal.SIGKILL)
        kit.until(lambda: "one.source could not be started" in product.log, "its absence is told")
        key.write_text("x" * 30)
        kit.until(lambda: "key file has 30 characters" in product.log, "and it is tried again")


def test_asking_where_no_relay_runs_says_so(tmp_path: Path) -> None:
    done = kit.command("status", "--state", str(tmp_path), directory=tmp_path)
    assert done.returncode == 1
    assert "start it with medferry run FILE" in done.stderr


def test_an_answer_that_breaks_off_is_told_in_a_line(tmp_path: Path) -> None:
    """The supervisor ended, or was ended, while it answered."""
    path = str(tmp_path / CONTROL_SOCKET)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        server.bind(path)
        server.listen()

        def answer() -> None:
            connection, _ = server.accept()
            connection.sendall(b'{"relay": "te')
            connection.close()

        answering = threading.Thread(target=answer)
        answering.start()
        with pytest.raises(MedferryError, match="it does not answer"):
            ask(str(tmp_path))
        answering.join()


async def test_who_asks_and_does_not_read_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relay.supervisor.ASK_SECONDS", 0.05)
    monkeypatch.setattr(Supervisor, "state", lambda self: {"filling": "x" * (8 << 20)})
    supervisor = Supervisor("absent", parse(CONTRACT), LogSettings())
    answered = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await supervisor._answer(reader, writer)
        answered.set()

    server = await asyncio.start_unix_server(answer, tmp_path / "s")
    _, writer = await asyncio.open_unix_connection(tmp_path / "s", limit=1)
    async with asyncio.timeout(10):
        await answered.wait()
    writer.close()
    server.close()
