"""P-DATA-TF PDUs as they are written (PS3.8 §9.3.5).

    ┌ 04 │ 00 │ length u32 ┬ PDV: length u32 │ context id u8 │ control u8 │ fragment … ┬ PDV … ┐

The control header's bit 0 says command (1) or data set (0), bit 1 says last fragment (PS3.8 Annex E). One PDV
to a PDU is what every implementation reads. The reader is part of `association.py`: reading depends on state.

A data set's PDUs are made in memory that has their headers in it already: what is between them is filled by
one read, and all of it leaves in one piece. To peers that take 16 KiB at a time (DCMTK's default) an object
of 0.5 MB is 33 PDUs.

Never here: I/O, what a fragment means.
"""

from __future__ import annotations

import mmap
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


class DataBatch:
    """Memory for PDUs of a data set that follow each other, each but the last as long as the peer takes.

    ┌ header │ gap ┬ header │ gap ┬ … ┐     gaps() ─▶ filled by a read ─▶ pdus() ─▶ sent
    """

    def __init__(self, max_length: int, capacity: int, max_pdus: int) -> None:
        """
        Args:
            max_length: Of a PDU to this peer, `effective_length`.
            capacity: Bytes of data set to hold at most; room for one PDU is made all the same.
            max_pdus: PDUs to hold at most.
        """
        self._room = max_length - PDV_OVERHEAD
        self._stride = HEADER_BYTES + self._room
        count = max(min(capacity // self._room, max_pdus), 1)
        self.capacity = count * self._room
        """Bytes of data set that it holds."""
        # Mapped, since pages behind what a small object needs are never touched then.
        self._memory = memoryview(mmap.mmap(-1, count * self._stride))
        self._gaps = [
            self._memory[start + HEADER_BYTES : start + self._stride]
            for start in range(0, len(self._memory), self._stride)
        ]
        self._context_id = 0
        self._headed = 0
        """PDUs from the first on whose headers are there: whole ones of `_context_id`, not the last."""

    def __repr__(self) -> str:
        return f"<DataBatch of {self.capacity} bytes in PDUs of {self._room + PDV_OVERHEAD}>"

    def gaps(self, size: int) -> list[memoryview]:
        """Where the next `size` bytes of a data set belong, 1 to `capacity`, in order."""
        whole, rest = divmod(size, self._room)
        found = self._gaps[:whole]
        if rest:
            found.append(self._gaps[whole][:rest])
        return found

    def pdus(self, context_id: int, size: int, *, last: bool) -> memoryview:
        """The PDUs around the `size` bytes in the gaps, 1 to `capacity`, valid until they are filled again.

        `last` says that the data set ends with them.
        """
        whole, rest = divmod(size, self._room)
        if context_id != self._context_id:
            self._context_id, self._headed = context_id, 0
        while self._headed < whole:
            self._head(self._headed, 0, self._room)
            self._headed += 1
        end = whole * self._stride + (HEADER_BYTES + rest if rest else 0)
        final = whole if rest else whole - 1
        if rest or last:
            self._head(final, LAST if last else 0, rest or self._room)
            self._headed = min(self._headed, final)
        return self._memory[:end]

    def _head(self, number: int, control: int, size: int) -> None:
        at = number * self._stride
        self._memory[at : at + HEADER_BYTES] = header(self._context_id, control, size)
