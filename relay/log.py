"""Structured logs: one line a step, as JSON or as text, never with patient data.

Every line has a time, a level, where it comes from (lane and side) and a message; callers put figures into
the message or, for machines, into ``extra={"event": "word", …}``. JSON has date and time in UTC; text, for
people at the machine, the local time of day. What a peer wrote (AE titles apart) is never logged as it came:
names, identifiers and element values have no place here.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from types import TracebackType

_CONTROLS = {code: "?" for code in (*range(0x20), *range(0x7F, 0xA0)) if code not in (0x09, 0x0A)}
"""What would move a terminal's cursor or change its colours. JSON writes it as escapes anyway."""

_STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def __init__(self, where: dict[str, str]) -> None:
        super().__init__()
        self._where = where

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{record.msecs:03.0f}Z",
            "level": record.levelname.lower(),
            **self._where,
            "message": record.getMessage(),
        }
        line.update({key: value for key, value in record.__dict__.items() if key not in _STANDARD})
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str, ensure_ascii=False)


def _one_line(message: str) -> str:
    """A peer's text may be in a message: it must not look like lines of our own."""
    return message.replace("\n", " | ").translate(_CONTROLS)


class TextFormatter(logging.Formatter):
    """``12:00:00.123 warning studies.source message``, for people: local time, without a date."""

    def __init__(self, where: dict[str, str]) -> None:
        super().__init__()
        self._where = ".".join(where.values()) or "relay"

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        level = record.levelname.lower()
        line = f"{clock}.{record.msecs:03.0f} {level:<7} {self._where} {_one_line(record.getMessage())}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


FORMATS: dict[str, type[JsonFormatter] | type[TextFormatter]] = {"json": JsonFormatter, "text": TextFormatter}


LEVELS = ("debug", "info", "warning", "error")


def _fault(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """An exception that ends this process: a line like others, with its trace."""
    if issubclass(kind, Exception):
        logging.getLogger("medferry").critical("ended by a fault", exc_info=(kind, error, trace))
    else:
        sys.__excepthook__(kind, error, trace)


def configure(style: str, level: str, **where: str) -> None:
    """Send this process's log, and the exception that ends it, to standard error as `style` of `FORMATS`."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(FORMATS[style](where))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    sys.excepthook = _fault
    # Libraries describe associations and peers line by line, with values; their warnings are enough.
    for library in ("pynetdicom", "pydicom", "aiortc", "aioice", "libav", "asyncio", "aiohttp.access"):
        logging.getLogger(library).setLevel(logging.ERROR)
