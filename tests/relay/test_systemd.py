"""What the service manager hears, and that nothing depends on its ears."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from relay.systemd import notify


def test_without_a_service_manager_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert notify(READY=1) is False


@pytest.mark.parametrize("abstract", [True, False])
def test_lines_go_to_the_socket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, abstract: bool) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        name = f"@medferry-systemd-{os.getpid()}" if abstract else str(tmp_path / "n")
        manager.bind("\0" + name[1:] if abstract else name)
        manager.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        assert notify(READY=1, STATUS="2 lanes") is True
        assert manager.recv(1000) == b"READY=1\nSTATUS=2 lanes"


def test_a_manager_that_is_gone_is_told_to_the_log_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "gone"))
    assert notify(READY=1) is False
    assert "could not be told READY" in caplog.text
