"""P-DATA-TF PDUs as they are written (PS3.8 §9.3.5).

    ┌ 04 │ 00 │ length u32 ┬ PDV: length u32 │ context id u8 │ control u8 │ fragment … ┬ PDV … ┐

The control header's bit 0 says command (1) or data set (0), bit 1 says last fragment (PS3.8 Annex E). One PDV
to a PDU is what every implementation reads. The reader is part of `association.py`: reading depends on state.

Never here: I/O, what a fragment means.
"""

from __future__ import annotations

from struct import Struct

P_DATA = 0x04
PDV_OVERHEAD = 6
"""Bytes of a PDU's length that are not fragment: the PDV's own length, context id and control header."""

COMMAND = 0x01
LAST = 0x02

MIN_PDU_LENGTH = 16
"""The least "maximum length" a peer may announce to be served: room for a PDV's head and ten bytes."""

UNLIMITED_PDU_LENGTH = 256 * 1024
"""What is sent to a peer that announces 0, "no limit": above it the headers' share no longer matters."""

_HEADER = Struct(">BxLLBB")
HEADER_BYTES = _HEADER.size


def header(context_id: int, control: int, size: int) -> bytes:
    """The twelve bytes before a fragment of `size` bytes that has a PDU of its own."""
    return _HEADER.pack(P_DATA, size + PDV_OVERHEAD, size + 2, context_id, control)


def command(context_id: int, data: bytes, max_length: int) -> bytes:
    """A whole command set in as many PDUs as the peer's `max_length` asks for."""
    room = max_length - PDV_OVERHEAD
    if len(data) <= room:
        return header(context_id, COMMAND | LAST, len(data)) + data
    pieces: list[bytes] = []
    for start in range(0, len(data), room):
        piece = data[start : start + room]
        control = COMMAND | LAST if start + room >= len(data) else COMMAND
        pieces += (header(context_id, control, len(piece)), piece)
    return b"".join(pieces)


def effective_length(announced: int, cap: int = UNLIMITED_PDU_LENGTH) -> int:
    """The longest PDU to send to a peer that announced `announced` (0: no limit).

    It is even, since fragments have to be (PS3.8 §E.1).
    """
    return min(announced, cap) & ~1 if announced else cap
