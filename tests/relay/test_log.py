"""Log lines: one a step, for people or for machines, and nobody else's words as lines of their own."""

from __future__ import annotations

import json
import logging
import subprocess
import sys

import pytest

from relay.log import FORMATS, JsonFormatter, TextFormatter, configure


def record(message: str, *values: object, **extra: object) -> logging.LogRecord:
    made = logging.LogRecord("x", logging.WARNING, "f.py", 1, message, values, None)
    made.__dict__.update(extra)
    made.created, made.msecs = 1_700_000_000.5, 500.0
    return made


def test_a_json_line_has_time_level_place_message_and_figures() -> None:
    text = JsonFormatter({"lane": "studies", "side": "sink"}).format(
        record("took %d", 3, event="stored", bytes=9)
    )
    assert json.loads(text) == {
        "time": "2023-11-14T22:13:20.500Z",
        "level": "warning",
        "lane": "studies",
        "side": "sink",
        "message": "took 3",
        "event": "stored",
        "bytes": 9,
    }


def test_a_text_line_is_short() -> None:
    text = TextFormatter({"lane": "studies", "side": "sink"}).format(record("took %d", 3))
    assert text.endswith(".500 warning studies.sink took 3")
    assert TextFormatter({}).format(record("hello")).endswith("relay hello")


HOSTILE = "AE\n12:00:00.000 error relay forged\x1b[2J\x9b31m\x00"


def test_words_of_a_peer_make_no_lines_and_no_colours() -> None:
    text = TextFormatter({}).format(record("refused %s", HOSTILE))
    assert len(text.splitlines()) == 1
    assert text.isprintable()
    assert len(JsonFormatter({}).format(record("refused %s", HOSTILE)).splitlines()) == 1


@pytest.mark.parametrize("style", FORMATS)
def test_a_fault_is_logged_with_its_trace(style: str) -> None:
    try:
        raise KeyError("ours")
    except KeyError:
        made = record("failed")
        made.exc_info = sys.exc_info()
    text = FORMATS[style]({}).format(made)
    assert "KeyError" in text
    assert "test_log.py" in text


@pytest.mark.parametrize("style", FORMATS)
def test_configure_replaces_what_was_there_and_quietens_libraries(
    style: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root = logging.getLogger()
    handlers, level, hook = root.handlers[:], root.level, sys.excepthook
    try:
        configure(style, "info", lane="studies", side="source")
        configure(style, "info", lane="studies", side="source")
        logging.getLogger("medferry.x").info("one line")
        logging.getLogger("medferry.x").debug("not this")
        logging.getLogger("pynetdicom").warning("nor a library's values")
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert "one line" in lines[0] and "studies" in lines[0]
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        sys.excepthook = hook


ENDING = """
import sys
from relay.log import configure
configure(sys.argv[1], "info", lane="studies", side="sink")
def inner():
    raise ExceptionGroup("tasks", [KeyError("ours")])
inner()
"""


@pytest.mark.parametrize("style", FORMATS)
def test_the_fault_that_ends_a_process_is_a_line_of_its_log(style: str) -> None:
    done = subprocess.run([sys.executable, "-c", ENDING, style], capture_output=True, text=True)
    assert done.returncode == 1
    first, *rest = done.stderr.splitlines()
    if style == "json":
        line = json.loads(first)
        assert rest == []
        assert (line["level"], line["lane"], line["message"]) == ("critical", "studies", "ended by a fault")
        assert "in inner" in line["trace"] and "KeyError" in line["trace"]
    else:
        assert first.endswith("critical studies.sink ended by a fault")
        assert any("KeyError" in line for line in rest)


def test_an_interrupt_is_no_fault() -> None:
    script = ENDING.replace('ExceptionGroup("tasks", [KeyError("ours")])', "KeyboardInterrupt")
    done = subprocess.run([sys.executable, "-c", script, "json"], capture_output=True, text=True)
    assert "ended by a fault" not in done.stderr
    assert done.returncode != 0
