"""Programs that are not ours, which tests send to and receive from.

A test that needs one calls `require`; where the program is missing, the test skips and says how to install
it, except in CI, where a missing peer is a failure.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import socket
import subprocess
from typing import NoReturn

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
    "libx264.so.164": "gstreamer1.0-plugins-ugly",
}
"""Program or library to Debian package."""

RTSP_SERVER_PACKAGES = "python3 python3-gi gir1.2-gst-rtsp-server-1.0"

SYSTEM_PATH = "/usr/bin:/usr/sbin:/bin:/sbin"
"""pynetdicom installs commands with DCMTK's names into the environment: only the system's are meant here."""


def require(program: str) -> str:
    """The path of `program`; skips the test (fails it in CI) where it is not installed."""
    path = shutil.which(program, path=SYSTEM_PATH)
    if path is None:
        _missing(program, PACKAGES[program])
    return path


def require_library(name: str) -> str:
    """The shared library's `name`; skips the test (fails it in CI) where it is not installed."""
    try:
        ctypes.CDLL(name)
    except OSError:
        _missing(name, PACKAGES[name])
    return name


def require_rtsp_server() -> str:
    """The Python that has GStreamer's RTSP server; skips the test (fails it in CI) where there is none."""
    require("gst-launch-1.0")
    python = shutil.which("python3", path=SYSTEM_PATH)
    load = "import gi; gi.require_version('GstRtspServer', '1.0')"
    if python is None or subprocess.run([python, "-c", load], capture_output=True, check=False).returncode:
        _missing("GStreamer's RTSP server", RTSP_SERVER_PACKAGES)
    return python


def _missing(what: str, packages: str) -> NoReturn:
    message = f"{what} is not installed: apt-get install {packages}"
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)


def free_port(kind: socket.SocketKind = socket.SOCK_STREAM, host: str = "127.0.0.1") -> int:
    """A port that nobody listens on at this moment."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, kind) as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port
