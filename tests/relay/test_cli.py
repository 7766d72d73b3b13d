"""The commands: their exit status, and what they say. (That they run a relay: see test_supervisor.)"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from relay.cli import app
from relay.confine import possible
from relay.demo import DIRECTORY
from tests.relay.test_config import CONTRACT
from tests.relay.test_status import state


def medferry(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture
def good(tmp_path: Path) -> str:
    path = tmp_path / "good.toml"
    path.write_text(CONTRACT)
    return str(path)


@pytest.fixture
def wrong(tmp_path: Path) -> str:
    path = tmp_path / "wrong.toml"
    path.write_text(CONTRACT.replace('name  = "edge-1"', 'nmae = "x"').replace("4_000_000", '"fast"'))
    return str(path)


def test_a_good_file_is_ok(good: str) -> None:
    done = medferry("check", good)
    assert (done.exit_code, done.stdout) == (0, f"{good}: ok, 2 lane(s)\n")


def test_a_wrong_file_has_exit_status_2_and_a_line_for_each_problem(wrong: str) -> None:
    done = medferry("check", wrong)
    assert done.exit_code == 2
    lines = done.stderr.splitlines()
    assert len(lines) == 3
    for line in lines:
        assert line.startswith(f"{wrong}: ")
        assert len(line.split(": ")) >= 4 or "missing: add this key" in line


def test_check_for_scripts(good: str, wrong: str) -> None:
    assert json.loads(medferry("check", good, "--json").stdout) == {"ok": True, "problems": []}
    done = medferry("check", wrong, "--json")
    assert done.exit_code == 2
    answer = json.loads(done.stdout)
    assert answer["ok"] is False
    assert len(answer["problems"]) == 3


@pytest.mark.parametrize("command", ["check", "run"])
def test_a_file_that_is_not_there(command: str, tmp_path: Path) -> None:
    done = medferry(command, str(tmp_path / "absent.toml"))
    assert done.exit_code == 2
    assert "absent.toml: No such file or directory: name a readable file" in done.stderr
    assert done.stderr.count("absent.toml") == 1


def test_run_refuses_a_wrong_file(wrong: str) -> None:
    done = medferry("run", wrong)
    assert done.exit_code == 2
    assert "unknown key: write 'name'" in done.stderr


@pytest.mark.parametrize(
    ("option", "advice"),
    [(("--log", "xml"), "write text or json"), (("--log-level", "loud"), "write one of debug")],
)
def test_run_refuses_an_option_it_does_not_know(good: str, option: tuple[str, str], advice: str) -> None:
    done = medferry("run", good, *option)
    assert done.exit_code == 2
    assert advice in " ".join(done.stderr.split())


def test_status_without_a_relay(tmp_path: Path) -> None:
    done = medferry("status", "--state", str(tmp_path))
    assert done.exit_code == 1
    assert done.stderr.startswith("medferry: no relay runs on ")
    done = medferry("status", "--state", str(tmp_path / "absent"))
    assert done.exit_code == 1
    assert "name its state directory with --state" in done.stderr


@pytest.mark.parametrize(("lane_state", "code"), [("running", 0), ("degraded", 3)])
def test_status_has_exit_status_3_where_something_is_not_well(
    monkeypatch: pytest.MonkeyPatch, lane_state: str, code: int
) -> None:
    monkeypatch.setattr("relay.cli.ask", lambda _: state(state=lane_state))
    assert medferry("status").exit_code == code
    done = medferry("status", "--json")
    assert done.exit_code == code
    assert json.loads(done.stdout)["lanes"][0]["state"] == lane_state


def test_the_demo_says_where_it_cannot_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / DIRECTORY).write_text("a file")
    done = medferry("demo")
    assert done.exit_code == 1
    assert "start the demo in a directory that you may write to" in done.stderr


def test_doctor_says_what_this_host_can_give() -> None:
    done = medferry("doctor", "--json")
    assert done.exit_code == 0
    assert json.loads(done.stdout)["measures"] == possible()
    text = medferry("doctor").stdout
    for measure, available in possible().items():
        assert f"{'yes' if available else 'no '}  {measure}" in text


def test_without_a_command_the_help_names_them_all() -> None:
    text = medferry().output
    for command in ("run", "check", "status", "doctor", "demo", "spool", "quarantine"):
        assert f" {command} " in text


@pytest.mark.parametrize(
    ("kind", "source", "sink", "words"),
    [
        ("rtp", "foo", "127.0.0.1:5006", "'foo' has no port: write host:port"),
        ("rtp", "127.0.0.1:5004", "::1", "write an IPv6 address in brackets"),
        ("webrtc", "foo", "http://127.0.0.1/whep/x", "'foo' is no URL"),
        ("webrtc", "http://127.0.0.1/whip/x", "http://[1/whep/x", "is no URL"),
        ("dicom", "127.0.0.1", "127.0.0.1:11113", "host:port"),
        ("webrtc", "http://127.0.0.1:port/whip/x", "http://127.0.0.1/whep/x", "is no URL"),
    ],
)
def test_bench_refuses_an_address_that_is_none(kind: str, source: str, sink: str, words: str) -> None:
    done = medferry("bench", kind, source, sink)
    assert done.exit_code == 2
    # The message is in a box as wide as the terminal: its words may be on several lines.
    assert words in " ".join(done.stderr.replace("│", " ").split())
