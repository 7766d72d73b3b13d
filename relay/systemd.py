"""sd_notify: tell the service manager how things are (man 3 sd_notify). Without one, nothing happens."""

from __future__ import annotations

import os
import socket


def notify(**fields: str | int) -> bool:
    """Send ``KEY=value`` lines to ``$NOTIFY_SOCKET``; returns whether there was one.

    Raises:
        OSError: The socket is named but cannot be written to.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]
    lines = "\n".join(f"{key}={value}" for key, value in fields.items())
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        sock.connect(address)
        sock.sendall(lines.encode())
    return True
