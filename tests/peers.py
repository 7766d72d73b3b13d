"""Programs that are not ours, which tests send to and receive from.

A test that needs one calls `require`; where the program is missing, the test skips and says how to install
it, except in CI, where a missing peer is a failure.
"""

from __future__ import annotations

import os
import shutil
import socket

import pytest

PACKAGES = {
    "storescu": "dcmtk",
    "storescp": "dcmtk",
    "dcmsend": "dcmtk",
    "echoscu": "dcmtk",
    "dcmdump": "dcmtk",
    "Orthanc": "orthanc",
    "ffmpeg": "ffmpeg",
    "gst-launch-1.0": "gstreamer1.0-tools gstreamer1.0-plugins-{base,good,bad,ugly} gstreamer1.0-libav",
    "chromium": "chromium",
    "ip": "iproute2",
}
"""Program to Debian package."""

SYSTEM_PATH = "/usr/bin:/usr/sbin:/bin:/sbin"
"""pynetdicom installs commands with DCMTK's names into the environment: only the system's are meant here."""


def require(program: str) -> str:
    """The path of `program`; skips the test (fails it in CI) where it is not installed."""
    path = shutil.which(program, path=SYSTEM_PATH)
    if path is None:
        message = f"{program} is not installed: apt-get install {PACKAGES[program]}"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return path


def free_port(kind: socket.SocketKind = socket.SOCK_STREAM, host: str = "127.0.0.1") -> int:
    """A port that nobody listens on at this moment."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, kind) as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port
