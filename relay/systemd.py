"""sd_notify: tell the service manager how things are (man 3 sd_notify). Without one, nothing happens."""

from __future__ import annotations

import logging
import os
import socket

log = logging.getLogger(__name__)


def notify(**fields: str | int) -> bool:
    """Send ``KEY=value`` lines to ``$NOTIFY_SOCKET``; returns whether they went out.

    A service manager that does not listen is logged, and no reason to stop carrying data.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]
    lines = "\n".join(f"{key}={value}" for key, value in fields.items())
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.connect(address)
            sock.sendall(lines.encode())
    except OSError as error:
        log.warning("the service manager could not be told %s: %s", ", ".join(fields), error.strerror)
        return False
    return True
