"""The tree of errors is the one that its module draws, and each carries what its catcher needs."""

from __future__ import annotations

import errno
import inspect
import socket
import ssl

import pytest

from relay import errors


def test_the_drawing_is_the_tree() -> None:
    drawn = {}
    lines = (errors.__doc__ or "").splitlines()
    trail: list[str] = []
    for line in lines:
        name = line.strip("│├└─ ").split(" ")[0]
        if name.endswith("Error") or name == "SpoolFull":
            depth = (len(line) - len(line.lstrip("│├└─ "))) // 4 - 1
            trail[depth:] = [name]
            drawn[name] = trail[depth - 1] if depth else "Exception"
    tree = {
        name: item.__mro__[1].__name__
        for name, item in inspect.getmembers(errors, inspect.isclass)
        if issubclass(item, Exception)
    }
    assert drawn == tree


@pytest.mark.parametrize(
    ("error", "text", "fields"),
    [
        (
            errors.ConfigError(["a: b: c", "d: e: f"]),
            "a: b: c\nd: e: f",
            {"problems": ["a: b: c", "d: e: f"]},
        ),
        (errors.WireError("mac", "epoch 1"), "mac: epoch 1", {"reason": "mac"}),
        (errors.SpoolFull("bytes", "9 of 9"), "9 of 9", {"bound": "bytes"}),
        (errors.PeerError("abort", "it left"), "it left", {"reason": "abort"}),
    ],
)
def test_what_an_error_carries(error: errors.MedferryError, text: str, fields: dict[str, object]) -> None:
    assert str(error) == text
    assert {name: getattr(error, name) for name in fields} == fields


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OSError(errno.ECONNREFUSED, "Connect call failed ('127.0.0.1', 1)"), "Connection refused"),
        (OSError(errno.ENOSPC, "No space left on device", "/x"), "No space left on device"),
        (OSError("pics has no address"), "pics has no address"),
        (socket.gaierror(socket.EAI_NONAME, "Name or service not known"), "Name or service not known"),
        (ssl.SSLError(1, "wrong version number"), "wrong version number"),
        (TimeoutError(), "TimeoutError"),
    ],
)
def test_a_systems_error_is_told_in_the_systems_words(error: OSError, text: str) -> None:
    assert errors.os_reason(error) == text
