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

A lane of pictures has a *tray* on each side: memory for one fragment that is too large for a message. A
short message, its *ticket*, then says how long it is. The valve can only read A's tray and only writes to
B's: it takes the header out, where A cannot change it any more, checks it, and copies what has passed. A tray
is free once all messages to its reader are taken.

    python -I valve.py IN_FD OUT_FD REPORT_FD LANE NEWEST_EPOCH BYTES_PER_SECOND [IN_TRAY_FD OUT_TRAY_FD]
"""

import array
import fcntl
import json
import mmap
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
TICKET = struct.Struct(">I")  # bytes of the fragment in the tray
TRAY_BYTES = 6146 * 4096
LOOK_SECONDS = 0.05  # between two looks at whether B has taken all, where no event tells
REPORT_SECONDS = 1.0
BURST_SECONDS = 0.05  # how far a sender may run ahead of its rate: what one timer tick would lose otherwise


class Order:
    """What of a fragment can be checked without a key, and what was seen so far."""

    def __init__(self, lane: int, newest_epoch: int) -> None:
        self.lane = lane
        self.newest_epoch = newest_epoch
        self.epoch = -1
        self.next = 0

    def refusal(self, header: bytes | memoryview, length: int, in_tray: bool = False) -> str | None:
        """Why a fragment of `length` bytes that begins with `header` may not pass, as one of a few words.

        None lets it pass and moves the order on.
        """
        least, most = (MAX_FRAGMENT, TRAY_BYTES) if in_tray else (HEADER.size + TAG_BYTES, MAX_FRAGMENT)
        if not least < length <= most:
            return "size"
        magic, version, shape, lane, zero, epoch, _, seq, _, size, pad = HEADER.unpack_from(header)
        if magic != b"MF" or version != 1 or not 1 <= shape <= 4 or zero or pad:
            return "shape"
        if size != length - HEADER.size - TAG_BYTES:
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


def untaken(outlet: socket.socket) -> bool:
    """Whether something was sent that nobody at the other end has taken yet."""
    count = array.array("i", [0])
    fcntl.ioctl(outlet, termios.TIOCOUTQ, count)
    return count[0] > 1  # the kernel gives a last byte back only after it has told that a message was taken


def takes(outlet: socket.socket) -> select.epoll:
    """Has an event at first, when messages were taken (always for the last), when the other end is shut."""
    events = select.epoll()
    events.register(outlet, select.EPOLLOUT | select.EPOLLET)
    return events


def copy(header: bytes, source: memoryview, target: memoryview, outlet: socket.socket) -> None:
    """Put the fragment of which `header` was checked into B's tray, once that is free."""
    if untaken(outlet):
        with takes(outlet) as events:
            while untaken(outlet):
                # Not for ever: two threads of B that take at once could leave no event for the last.
                if any(event & select.EPOLLHUP for _, event in events.poll(LOOK_SECONDS)):
                    raise BrokenPipeError("B shut its end of the link")
    target[: len(header)] = header
    target[len(header) :] = source[len(header) :]


def run(
    inlet: socket.socket,
    outlet: socket.socket,
    report_fd: int,
    order: Order,
    rate: int,
    trays: tuple[memoryview, memoryview] | None = None,
) -> None:
    """Move fragments until A's side ends. `rate` is bytes a second, 0 for no limit; `trays` A's and B's."""
    buffer = memoryview(bytearray(MAX_FRAGMENT + 1))
    taken = bytearray(1)
    figures: dict[str, int] = {"fragments": 0, "bytes": 0}
    next_report = allowed_at = time.monotonic()
    while True:
        size = inlet.recv_into(buffer, 0, socket.MSG_PEEK)
        if size == 0 and ended(inlet):
            return
        message, in_tray = buffer[:size], False
        header = bytes(message[: HEADER.size])
        if trays and size == TICKET.size:
            (size,), in_tray = TICKET.unpack(message), True
            header = bytes(trays[0][: HEADER.size])
        reason = order.refusal(header, size, in_tray)
        now = time.monotonic()
        if reason is None:
            if rate:
                allowed_at = max(allowed_at, now - BURST_SECONDS) + size / rate
                if allowed_at > now:
                    select.select([], [], [], allowed_at - now)
            if trays and in_tray:
                copy(header, trays[0][:size], trays[1][:size], outlet)
            outlet.send(message)
            figures["fragments"] += 1
            figures["bytes"] += size
        else:
            figures[reason] = figures.get(reason, 0) + 1
        inlet.recv_into(taken)
        if now >= next_report:
            os.write(report_fd, json.dumps({"status": figures}).encode() + b"\n")
            next_report = now + REPORT_SECONDS


if __name__ == "__main__":
    in_fd, out_fd, report, lane_number, newest, limit, *tray_fds = map(int, sys.argv[1:])
    memories = None
    if tray_fds:
        in_tray = mmap.mmap(tray_fds[0], TRAY_BYTES, prot=mmap.PROT_READ)
        out_tray = mmap.mmap(tray_fds[1], TRAY_BYTES)
        memories = memoryview(in_tray), memoryview(out_tray)
    os.write(report, b'{"ready": true}\n')
    ends = socket.socket(fileno=in_fd), socket.socket(fileno=out_fd)
    run(*ends, report, Order(lane_number, newest), limit, memories)
