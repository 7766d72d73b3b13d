"""The valve: the small trusted process in the middle of a one-machine link.

    source ──▶ [A's end | valve's end]   valve   [valve's end | B's end] ──▶ sink
                 half-shut SEQPACKET                half-shut SEQPACKET

It moves fragments from a socket that it can only read to a socket that it can only write, so the two sides
share no kernel object: a descriptor that A passes is dropped here by the kernel (receives ask for no
ancillary data), and what B does to its socket is seen by this process alone.

Each fragment is peeked at, checked, sent, and only then taken. Killed at any point, the valve loses nothing;
at worst the next one sends a fragment twice, which B drops by its number. Checked are size, shape, lane,
order (an epoch never goes back, nor beyond the source's own; a number never comes twice) and rate. It holds
no key and cannot forge: the MAC is B's to check. Standard library only; it imports nothing of medferry, and
a test keeps these numbers equal to `wire.py`'s.

    python -I valve.py IN_FD OUT_FD REPORT_FD LANE NEWEST_EPOCH BYTES_PER_SECOND
"""

import array
import fcntl
import json
import os
import select
import socket
import struct
import sys
import termios
import time

HEADER = struct.Struct(">2sBBHHIIQQII")
TAG_BYTES = 16
MAX_PAYLOAD = 130 * 1024
MAX_FRAGMENT = HEADER.size + MAX_PAYLOAD + TAG_BYTES
REPORT_SECONDS = 1.0
BURST_SECONDS = 0.05  # how far a sender may run ahead of its rate: what one timer tick would lose otherwise


class Order:
    """What of a fragment can be checked without a key, and what was seen so far."""

    def __init__(self, lane: int, newest_epoch: int) -> None:
        self.lane = lane
        self.newest_epoch = newest_epoch
        self.epoch = -1
        self.next = 0

    def refusal(self, fragment: memoryview) -> str | None:
        """Why `fragment` may not pass, as one of a few words; None lets it pass and moves the order on."""
        if not HEADER.size + TAG_BYTES < len(fragment) <= MAX_FRAGMENT:
            return "size"
        magic, version, shape, lane, zero, epoch, _, seq, _, size, pad = HEADER.unpack_from(fragment)
        if magic != b"MF" or version != 1 or not 1 <= shape <= 4 or zero or pad:
            return "shape"
        if size != len(fragment) - HEADER.size - TAG_BYTES:
            return "size"
        if lane != self.lane:
            return "lane"
        if not self.epoch <= epoch <= self.newest_epoch or (epoch == self.epoch and seq < self.next):
            return "order"
        self.epoch, self.next = epoch, seq + 1
        return None


def waiting(inlet: socket.socket) -> int:
    """Bytes of fragments that nobody has taken yet."""
    count = array.array("i", [0])
    fcntl.ioctl(inlet, termios.FIONREAD, count)
    return count[0]


def ended(inlet: socket.socket) -> bool:
    """Whether A's side is closed for good and nothing waits: an empty message alone does not end a link."""
    poll = select.poll()
    poll.register(inlet, select.POLLRDHUP)
    return bool(poll.poll(0)) and not waiting(inlet)


def run(inlet: socket.socket, outlet: socket.socket, report_fd: int, order: Order, rate: int) -> None:
    """Move fragments until A's side ends. `rate` is bytes a second, 0 for no limit."""
    buffer = memoryview(bytearray(MAX_FRAGMENT + 1))
    taken = bytearray(1)
    figures: dict[str, int] = {"fragments": 0, "bytes": 0}
    next_report = allowed_at = time.monotonic()
    while True:
        size = inlet.recv_into(buffer, 0, socket.MSG_PEEK)
        if size == 0 and ended(inlet):
            return
        reason = order.refusal(buffer[:size])
        now = time.monotonic()
        if reason is None:
            if rate:
                allowed_at = max(allowed_at, now - BURST_SECONDS) + size / rate
                if allowed_at > now:
                    select.select([], [], [], allowed_at - now)
            outlet.send(buffer[:size])
            figures["fragments"] += 1
            figures["bytes"] += size
        else:
            figures[reason] = figures.get(reason, 0) + 1
        inlet.recv_into(taken)
        if now >= next_report:
            os.write(report_fd, json.dumps({"status": figures}).encode() + b"\n")
            next_report = now + REPORT_SECONDS


if __name__ == "__main__":
    in_fd, out_fd, report, lane_number, newest, limit = map(int, sys.argv[1:])
    os.write(report, b'{"ready": true}\n')
    run(socket.socket(fileno=in_fd), socket.socket(fileno=out_fd), report, Order(lane_number, newest), limit)
