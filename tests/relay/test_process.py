"""One supervised process: what of its behaviour ends it, what of it is kept, when it comes back."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator
from typing import Any

import pytest

from relay import process as subject
from relay.errors import MedferryError
from relay.process import Launch, Process, describe_exit, within, worker_environment

READY = "import os, sys; r = int(sys.argv[1]); os.write(r, b'{\"ready\": true}\\n')\n"
WAIT = "import time\nwhile True: time.sleep(60)\n"


def process(script: str, **options: Any) -> Process:
    """A process that runs a Python script; the report pipe's number is its first argument."""
    return Process(
        "lane.part",
        lambda fd: Launch([sys.executable, "-I", "-c", script, str(fd)], (), options.get("stdin", b"")),
        options.get("on_report", lambda _: None),
    )


@contextlib.asynccontextmanager
async def running(part: Process) -> AsyncIterator[Process]:
    task = asyncio.create_task(part.run())
    try:
        yield part
    finally:
        part.stop(signal.SIGKILL)
        await asyncio.wait_for(task, 10)


async def until(condition: Any, what: str) -> None:
    async def wait() -> None:
        while not condition():
            await asyncio.sleep(0.01)

    assert await within(10, wait()), f"waited in vain: {what}"


async def test_it_gets_its_input_and_tells_when_it_is_ready() -> None:
    script = "import sys; text = sys.stdin.read()\n" + READY
    script += 'os.write(r, b\'{"status": {"got": "\' + text.encode() + b\'"}}\\n\')\n' + WAIT
    heard: list[dict[str, Any]] = []
    async with running(process(script, stdin=b"settings", on_report=heard.append)) as part:
        await until(lambda: part.figures, "figures")
        assert part.ready
        assert part.figures == {"got": "settings"}
        assert heard == [{"ready": True}, {"status": {"got": "settings"}}]
        assert part.state()["state"] == "running"
        assert repr(part) == f"<Process lane.part ready pid={part.pid} restarts=0>"
    assert part.state() | {"figures": {}} == {
        "pid": None,
        "state": "down",
        "restarts": 0,
        "up_seconds": 0.0,
        "last_exit": "signal 9",
        "figures": {},
    }
    assert repr(part) == "<Process lane.part down pid=None restarts=0>"


async def test_what_ends_comes_back_sooner_than_what_keeps_ending() -> None:
    async with running(process(READY + "sys.exit(3)")) as part:
        await until(lambda: part.restarts >= 3, "three restarts")
        assert part.state()["last_exit"] == "exit 3"


async def test_the_pause_before_a_restart_doubles_up_to_a_limit(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(subject, "LAST_BACKOFF", 0.15)
    caplog.set_level(logging.WARNING)
    async with running(process("import sys; sys.exit(3)")) as part:
        await until(lambda: part.restarts >= 4, "four restarts")
    pauses = [message.rpartition(" in ")[2] for message in caplog.messages]
    assert pauses[:4] == ["0.05 s", "0.10 s", "0.15 s", "0.15 s"]


async def test_what_lived_long_is_back_at_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(subject, "STABLE_SECONDS", 0.0)
    async with running(process("import sys; sys.exit(3)")) as part:
        await until(lambda: part.restarts >= 2, "two restarts")
    assert {message.rpartition(" in ")[2] for message in caplog.messages} == {"0.00 s"}


@pytest.mark.parametrize(
    ("name", "deed"),
    [
        ("no JSON", "os.write(r, b'hello\\n')"),
        ("no object", "os.write(r, b'[1]\\n')"),
        ("nested without end", "os.write(r, b'[' * 50_000 + b'\\n')"),
        ("an endless line", "[os.write(r, b'x' * 65536) for _ in range(9)]"),
        ("a closed pipe", "os.close(r)"),
        ("a line that is not text", "os.write(r, b'\\xff\\xfe\\n')"),
    ],
)
async def test_who_reports_nonsense_is_ended(name: str, deed: str) -> None:
    async with running(process(READY + deed + "\n" + WAIT)) as part:
        await until(lambda: part.restarts >= 1, f"{name} is noticed")
        assert part.state()["last_exit"] == "signal 9"


async def test_a_child_that_keeps_the_pipes_open_does_not_hide_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(subject, "LAST_WORDS_SECONDS", 0.1)
    script = READY + "\nif os.fork() == 0:\n import time; time.sleep(3)\nelse: os._exit(7)\n"
    async with running(process(script)) as part:
        await until(lambda: part.restarts >= 1, "the parent's end is seen")
        assert part.state()["last_exit"] == "exit 7"


async def test_its_last_words_are_logged(capsys: pytest.CaptureFixture[str]) -> None:
    script = READY + "sys.stderr.write('Traceback: the end, with no line feed')"
    async with running(process(script)) as part:
        await until(lambda: part.restarts >= 1, "it ends")
    assert "Traceback: the end, with no line feed\n" in capsys.readouterr().err


async def test_its_log_is_cut_into_lines_without_control_characters(
    capsys: pytest.CaptureFixture[str],
) -> None:
    long = subject.MAX_LOG_LINE * 3
    script = (
        READY
        + f"sys.stderr.write('x' * {long} + '\\n\\x1b[2J\\ttab \\u00e9\\n'); sys.stderr.flush()\n"
        + WAIT
    )
    async with running(process(script)):
        text = ""

        def there() -> bool:
            nonlocal text
            text += capsys.readouterr().err
            return "tab" in text

        await until(there, "the log")
    lines = text.splitlines()
    assert max(map(len, lines)) <= subject.MAX_LOG_LINE
    assert text.count("x") >= long
    assert "?[2J\ttab" in text
    assert "\x1b" not in text


async def test_too_much_of_a_log_is_dropped_and_counted(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    count = subject.LOG_LINES_AT_ONCE * 4
    script = READY + f"sys.stderr.write('noise\\n' * {count})"
    async with running(process(script)) as part:
        await until(lambda: part.restarts >= 1, "it ends")
    written = capsys.readouterr().err.count("noise")
    assert subject.LOG_LINES_AT_ONCE <= written < count
    assert any("lines dropped" in message for message in caplog.messages)


async def test_its_standard_output_goes_nowhere(capfd: pytest.CaptureFixture[str]) -> None:
    async with running(process(READY + "print('ready: 99 lanes', flush=True)\n" + WAIT)) as part:
        await until(lambda: part.ready, "ready")
    assert capfd.readouterr().out == ""


async def test_a_start_that_fails_is_told_and_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    tries: list[int] = []

    def launch(fd: int) -> Launch:
        tries.append(fd)
        if len(tries) == 1:
            raise MedferryError("no key yet")
        if len(tries) == 2:
            return Launch(["/nowhere/python"], ())
        return Launch([sys.executable, "-I", "-c", READY + WAIT, str(fd)], ())

    before = len(os.listdir("/proc/self/fd"))
    async with running(Process("lane.part", launch)) as part:
        await until(lambda: part.ready, "the third try")
        assert part.restarts == 2
    assert "could not be started (no key yet)" in caplog.text
    assert "No such file or directory" in caplog.text
    assert len(os.listdir("/proc/self/fd")) <= before + 1, "no descriptor is left behind"


async def test_a_fault_of_ours_in_a_launch_is_not_swallowed() -> None:
    def launch(_: int) -> Launch:
        raise KeyError("ours")

    with pytest.raises(KeyError):
        await Process("lane.part", launch).run()


async def test_stop_ends_it_for_good() -> None:
    async with running(process(READY + WAIT)) as part:
        await until(lambda: part.ready, "ready")
        part.stop(signal.SIGTERM)
        await asyncio.wait_for(part.ended.wait(), 10)
        assert part.state()["last_exit"] == "signal 15"
        assert part.restarts == 0


async def test_stop_reaches_a_process_that_is_only_just_being_started() -> None:
    part = process(READY + WAIT)
    task = asyncio.create_task(part.run())
    await asyncio.sleep(0)
    part.stop(signal.SIGTERM)
    await asyncio.wait_for(task, 10)
    assert part.pid is None


async def test_stop_does_not_wait_for_a_pause_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "FIRST_BACKOFF", 600.0)
    monkeypatch.setattr(subject, "LAST_BACKOFF", 600.0)
    part = process("import sys; sys.exit(1)")
    task = asyncio.create_task(part.run())
    await until(lambda: part.restarts == 1, "the pause")
    part.stop(signal.SIGTERM)
    await asyncio.wait_for(task, 5)


async def test_finish_waits_for_a_clean_end_and_restarts_until_then() -> None:
    """A valve that is killed in a drain still has fragments to move."""
    script = READY + "sys.exit(0 if sys.stdin.read() == 'well' else 5)"
    ways = iter([b"ill", b"ill", b"well", b"well"])
    part = Process(
        "lane.part", lambda fd: Launch([sys.executable, "-I", "-c", script, str(fd)], (), next(ways))
    )
    part.finish()
    await asyncio.wait_for(part.run(), 10)
    assert (part.restarts, part.last_exit) == (2, 0)


async def test_renew_starts_it_anew_and_counts_no_failure(caplog: pytest.LogCaptureFixture) -> None:
    async with running(process(READY + WAIT)) as part:
        await until(lambda: part.ready, "ready")
        first = part.pid
        part.renew()
        await until(lambda: part.ready and part.pid != first, "the next")
        assert part.restarts == 0
        assert caplog.messages == []


async def test_cancelling_its_caretaker_ends_it() -> None:
    part = process(READY + WAIT)
    task = asyncio.create_task(part.run())
    await until(lambda: part.ready, "ready")
    pid = part.pid
    assert pid is not None
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_launch_does_not_show_the_key_that_it_carries() -> None:
    assert "secret" not in repr(Launch(["x"], (), b"secret"))


@pytest.mark.parametrize(("code", "text"), [(None, "not started"), (0, "exit 0"), (-9, "signal 9")])
def test_exits_in_words(code: int | None, text: str) -> None:
    assert describe_exit(code) == text


def test_of_the_environment_only_the_harmless_is_passed_on() -> None:
    given = {
        "PATH": "/bin",
        "LANG": "C.UTF-8",
        "PYTHONPATH": "/a",
        "NOTIFY_SOCKET": "/run/notify",
        "AWS_SECRET_ACCESS_KEY": "x",
        "PYTHONSTARTUP": "/tmp/x.py",
        "LD_PRELOAD": "/tmp/x.so",
        "SSH_AUTH_SOCK": "/tmp/agent",
    }
    passed = worker_environment(given)
    assert passed.keys() == {"PATH", "LANG", "PYTHONPATH", "PYTHONSAFEPATH"}
    assert passed["PYTHONPATH"].split(os.pathsep)[0] == "/a"
