"""What a worker tells its supervisor, and what it may know. (How it runs: see test_supervisor.)"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from relay.config import parse
from relay.errors import MedferryError
from relay.metrics import Metrics
from relay.web import METRICS_LIMITS
from relay.worker import Bootstrap, Reporter, Side, _lock, _own_part, _serve_metrics
from tests.product import REPOSITORY
from tests.relay.test_config import CONTRACT


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    yield reader, writer
    os.close(reader)
    os.close(writer)


def test_reports_are_lines(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    reporter = Reporter(writer)
    reporter.send(ready=True)
    reporter.send(status={"a": 1})
    assert os.read(reader, 4096) == b'{"ready": true}\n{"status": {"a": 1}}\n'
    assert reporter.dropped == 0


def test_a_full_pipe_drops_lines_and_never_tears_one(pipe: tuple[int, int]) -> None:
    """The supervisor ends a worker whose report is not one: it must not be stopped for being slow itself."""
    reader, writer = pipe
    reporter = Reporter(writer)
    for number in range(20):
        reporter.send(status={"number": number, "filling": "x" * 6000})
    assert reporter.dropped > 0
    text = b""
    while len(text) < 6000:
        text += os.read(reader, 4096)
        reporter.send(status={"number": 99})
    reporter.send(status={"number": 100})
    text += os.read(reader, 4096)
    numbers = [json.loads(line)["status"]["number"] for line in text.splitlines()]
    assert numbers[0] == 0
    assert numbers[-1] == 100
    assert numbers == sorted(numbers)


def test_a_directory_is_one_workers_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relay.worker.LOCK_SECONDS", 0.05)
    first = _lock(str(tmp_path))
    with pytest.raises(MedferryError, match="in use by another process"):
        _lock(str(tmp_path))
    os.close(first)
    os.close(_lock(str(tmp_path)))


def test_a_predecessor_that_is_just_ending_is_waited_for(tmp_path: Path) -> None:
    script = "import fcntl, os, sys, time\n"
    script += "fd = os.open(sys.argv[1], os.O_CREAT | os.O_RDWR)\nfcntl.flock(fd, fcntl.LOCK_EX)\n"
    script += "print('held', flush=True)\ntime.sleep(0.2)\n"
    command = [sys.executable, "-I", "-c", script, str(tmp_path / "lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as predecessor:
        assert predecessor.stdout is not None
        assert predecessor.stdout.readline() == b"held\n"
        os.close(_lock(str(tmp_path)))
        assert predecessor.wait(5) == 0


async def test_figures_are_served_within_limits(tmp_path: Path) -> None:
    """Whoever holds connections to /metrics must not use up the descriptors of what the side is there for."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=64)
    listener.setblocking(False)
    metrics = Metrics("studies", "sink")
    side = Side(
        relay_name="test",
        lane=parse(CONTRACT).lanes[0],
        epoch=1,
        state=str(tmp_path),
        sockets={"metrics": [listener]},
        metrics=metrics,
        log=logging.getLogger("medferry.test"),
        draining=asyncio.Event(),
        drain_seconds=1.0,
    )
    server = await _serve_metrics(side)
    assert server is not None
    address = listener.getsockname()
    held = [await asyncio.open_connection(*address) for _ in range(METRICS_LIMITS.connections)]
    refused, refused_writer = await asyncio.open_connection(*address)
    async with asyncio.timeout(5):
        with contextlib.suppress(ConnectionResetError):
            assert await refused.read() == b""
    reader, writer = held[0]
    writer.write(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    async with asyncio.timeout(5):
        assert b"medferry_http_connections_refused_total" in await reader.read()
        for open_writer in [refused_writer, *(each for _, each in held)]:
            open_writer.close()
        await server.stop()


def _boot(side: str, table: dict[str, Any], **changes: Any) -> Bootstrap:
    return Bootstrap.model_validate(
        {
            "relay_name": "edge-1",
            "side": side,
            "lane": table,
            "serve": "x:y",
            "settings": "x:y",
            "lane_number": 1,
            "key": "00" * 32,
            "epoch": 1,
            "link_is_new": True,
            "state": "/",
            "link_fd": 3,
            "report_fd": 4,
            "listeners": (),
            "files": {},
            "drain_seconds": 1.0,
            "log_style": "json",
            "log_level": "info",
            **changes,
        }
    )


def _worker(directory: Path, serve: str) -> subprocess.CompletedProcess[str]:
    """Run a worker, the sink of a fake lane, to its end."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    report_out, report_in = os.pipe()
    table = {"name": "one", "kind": "fake", "sink": {}}
    boot = _boot(
        "sink",
        table,
        serve=serve,
        settings="tests.fake_lane.lane:FakeLane",
        state=str(directory),
        link_fd=theirs.fileno(),
        report_fd=report_in,
        log_style="text",
    )
    with ours, theirs:
        try:
            return subprocess.run(
                [sys.executable, "-m", "relay.worker"],
                input=boot.model_dump_json(),
                pass_fds=(theirs.fileno(), report_in),
                env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
                capture_output=True,
                text=True,
                timeout=40,
                check=False,
            )
        finally:
            os.close(report_out)
            os.close(report_in)


def test_faults_in_tasks_of_tasks_are_told_one_by_one(tmp_path: Path) -> None:
    done = _worker(tmp_path, "tests.fake_lane.lane:nested_faults")
    assert done.returncode == 1
    assert [line.split("one.sink ")[1] for line in done.stderr.splitlines()] == ["the first", "the second"]


def test_a_directory_that_another_holds_is_told_in_a_line(tmp_path: Path) -> None:
    lock = _lock(str(tmp_path))
    try:
        done = _worker(tmp_path, "tests.fake_lane.lane:nested_faults")
    finally:
        os.close(lock)
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert "is in use by another process" in line


@pytest.mark.parametrize("side", ["source", "sink"])
@pytest.mark.parametrize("number", [0, 1])
def test_a_side_knows_its_own_part_as_it_was_read_and_nothing_of_the_other(side: str, number: int) -> None:
    lane = parse(CONTRACT).lanes[number]
    other = "sink" if side == "source" else "source"
    table = lane.model_dump(mode="json", by_alias=True, exclude={other})
    boot = _boot(side, table)
    known = _own_part(type(lane), boot)
    assert getattr(known, side) == getattr(lane, side)
    assert getattr(known, other).model_dump(exclude_none=True) == {}
    assert (known.name, known.kind, known.lab) == (lane.name, lane.kind, lane.lab)
