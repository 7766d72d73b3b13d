"""A storage SCU on one blocking socket: small enough to time a relay without being timed itself.

It speaks just enough of the upper layer (PS3.8 §9.3) and of DIMSE (PS3.7 §9.3) to open an association,
verify, store and release, and trusts its peer to answer in order. It is independent of pynetdicom and of
medferry, so neither's habits show in the figures. Not for use with peers that are not under test.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Sequence
from types import TracebackType

APPLICATION_CONTEXT = "1.2.840.10008.3.1.1.1"
VERIFICATION = "1.2.840.10008.1.1"
IMPLICIT_LE = "1.2.840.10008.1.2"
EXPLICIT_LE = "1.2.840.10008.1.2.1"
CT_IMAGE_STORAGE = "1.2.840.10008.5.1.4.1.1.2"
IMPLEMENTATION_CLASS = "2.25.311111111111111111111111111111111111111"

MAX_PDU = 131072
"""Bytes we let the peer put into one P-DATA-TF."""

MAX_ANSWER = 1 << 20
"""Bytes of one PDU that a peer under test may send. Its answers are a few hundred."""

TIMEOUT_SECONDS = 60.0
"""For one answer."""

_C_STORE_RQ, _C_ECHO_RQ = 0x0001, 0x0030
_NO_DATA_SET, _DATA_SET = 0x0101, 0x0000


class NotUnderstood(Exception):
    """The peer under test answered something other than success."""


def _item(kind: int, value: bytes) -> bytes:
    return struct.pack(">BxH", kind, len(value)) + value


def _padded_uid(text: str) -> bytes:
    raw = text.encode()
    return raw + b"\0" * (len(raw) % 2)


def _element(element: int, value: bytes) -> bytes:
    """A command element: group 0000, implicit VR little endian (PS3.7 §6.3.1)."""
    return struct.pack("<HHI", 0, element, len(value)) + value


def _command(*elements: bytes) -> bytes:
    body = b"".join(elements)
    return _element(0x0000, struct.pack("<I", len(body))) + body


def _us(number: int) -> bytes:
    return struct.pack("<H", number)


def status_of(command: bytes) -> int:
    """The status (0000,0900) of a response message (PS3.7 §E.1).

    Read element by element: the status' tag is found elsewhere too, as in message 0x0209.

    Raises:
        NotUnderstood: It has none.
    """
    at = 0
    while at + 8 <= len(command):
        group, element, length = struct.unpack_from("<HHI", command, at)
        if (group, element, length) == (0, 0x0900, 2) and at + 10 <= len(command):
            return int.from_bytes(command[at + 8 : at + 10], "little")
        at += 8 + length
    raise NotUnderstood("a response without a status")


class Client:
    """One association. A context manager: opened on entry, released on exit.

    Args:
        address: Host and port of the peer.
        called: Its AE title.
        contexts: Abstract syntax and transfer syntaxes of each presentation context to propose.
        calling: Our AE title.
    """

    def __init__(
        self,
        address: tuple[str, int],
        called: str,
        contexts: Sequence[tuple[str, Sequence[str]]],
        calling: str = "BENCH",
    ) -> None:
        self._contexts = contexts
        self._message_id = 0
        self._peer_max_pdu = 16384
        self.accepted: dict[str, int] = {}
        self.socket = socket.create_connection(address, timeout=TIMEOUT_SECONDS)
        try:
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._request(called, calling)
        except BaseException:
            self.socket.close()
            raise

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.release()
        finally:
            self.socket.close()

    def _request(self, called: str, calling: str) -> None:
        parts = [_item(0x10, APPLICATION_CONTEXT.encode())]
        for number, (abstract, transfers) in enumerate(self._contexts):
            inner = _item(0x30, abstract.encode()) + b"".join(_item(0x40, t.encode()) for t in transfers)
            parts.append(_item(0x20, struct.pack(">Bxxx", 2 * number + 1) + inner))
        user = _item(0x51, struct.pack(">I", MAX_PDU)) + _item(0x52, IMPLEMENTATION_CLASS.encode())
        parts.append(_item(0x50, user))
        titles = called.ljust(16).encode() + calling.ljust(16).encode()
        self._send_pdu(0x01, struct.pack(">Hxx", 1) + titles + bytes(32) + b"".join(parts))
        kind, body = self._receive_pdu()
        if kind != 0x02:
            raise NotUnderstood(f"association not accepted: PDU type {kind:#04x}, {body[:8].hex()}")
        self._read_acceptance(body)

    def _read_acceptance(self, body: bytes) -> None:
        at = 68
        while at + 4 <= len(body):
            kind, length = struct.unpack_from(">BxH", body, at)
            value = body[at + 4 : at + 4 + length]
            if kind == 0x21 and value[2] == 0:
                self.accepted.setdefault(self._contexts[value[0] // 2][0], value[0])
            elif kind == 0x50 and value[:1] == b"\x51":
                announced = struct.unpack_from(">I", value, 4)[0]
                self._peer_max_pdu = min(announced or MAX_PDU, MAX_PDU)
            at += 4 + length

    def _send_pdu(self, kind: int, body: bytes) -> None:
        self.socket.sendall(struct.pack(">BxI", kind, len(body)) + body)

    def _receive_exactly(self, count: int) -> bytes:
        received = b""
        while len(received) < count:
            piece = self.socket.recv(count - len(received))
            if not piece:
                raise NotUnderstood("the peer closed the connection")
            received += piece
        return received

    def _receive_pdu(self) -> tuple[int, bytes]:
        kind, length = struct.unpack(">BxI", self._receive_exactly(6))
        if length > MAX_ANSWER:
            raise NotUnderstood(f"an answer of {length} bytes")
        return kind, self._receive_exactly(length)

    def _status(self) -> int:
        """The status of the next response message. Responses have no data set."""
        command = b""
        last = False
        while not last:
            kind, body = self._receive_pdu()
            if kind != 0x04:
                raise NotUnderstood(f"PDU type {kind:#04x} instead of a response")
            at = 0
            while at < len(body):
                length, _, control = struct.unpack_from(">IBB", body, at)
                command += body[at + 6 : at + 4 + length]
                last = bool(control & 0x02)
                at += 4 + length
        return status_of(command)

    def _context(self, abstract: str) -> int:
        context = self.accepted.get(abstract)
        if context is None:
            raise NotUnderstood(f"no presentation context accepted for {abstract}")
        return context

    def _next_id(self) -> bytes:
        self._message_id = self._message_id % 0xFFFF + 1
        return _us(self._message_id)

    def echo(self) -> int:
        """C-ECHO; nanoseconds from the first byte sent to the response's last."""
        command = _command(
            _element(0x0002, _padded_uid(VERIFICATION)),
            _element(0x0100, _us(_C_ECHO_RQ)),
            _element(0x0110, self._next_id()),
            _element(0x0800, _us(_NO_DATA_SET)),
        )
        pdv = struct.pack(">IBB", len(command) + 2, self._context(VERIFICATION), 0x03) + command
        started = time.monotonic_ns()
        self._send_pdu(0x04, pdv)
        status = self._status()
        if status:
            raise NotUnderstood(f"C-ECHO status {status:#06x}")
        return time.monotonic_ns() - started

    def store(self, sop_class: str, sop_instance: str, data: bytes | bytearray | memoryview) -> int:
        """C-STORE of a whole data set; the response's status. Command and data leave in one stream."""
        context = self._context(sop_class)
        command = _command(
            _element(0x0002, _padded_uid(sop_class)),
            _element(0x0100, _us(_C_STORE_RQ)),
            _element(0x0110, self._next_id()),
            _element(0x0700, _us(0)),
            _element(0x0800, _us(_DATA_SET)),
            _element(0x1000, _padded_uid(sop_instance)),
        )
        head = struct.pack(">BxIIBB", 0x04, len(command) + 6, len(command) + 2, context, 0x03) + command
        step = self._peer_max_pdu - 6
        for at in range(0, len(data), step):
            piece = data[at : at + step]
            control = 0x02 if at + step >= len(data) else 0x00
            head += struct.pack(">BxIIBB", 0x04, len(piece) + 6, len(piece) + 2, context, control)
            self._gather(head, piece)
            head = b""
        return self._status()

    def _gather(self, head: bytes, piece: bytes | bytearray | memoryview) -> None:
        sent = self.socket.sendmsg([head, piece])
        if sent < len(head):
            self.socket.sendall(head[sent:])
            sent = len(head)
        if sent < len(head) + len(piece):
            self.socket.sendall(memoryview(piece)[sent - len(head) :])

    def release(self) -> None:
        """A-RELEASE, waiting for the peer's answer."""
        self._send_pdu(0x05, bytes(4))
        kind, _ = self._receive_pdu()
        if kind != 0x06:
            raise NotUnderstood(f"PDU type {kind:#04x} instead of a release")
