"""The benchmark's own storage SCU reads the answers it is given."""

from __future__ import annotations

import struct

import pytest

from perf.client import NotUnderstood, status_of


def response(message_id: int, status: int) -> bytes:
    """A C-STORE response's command, as PS3.7 §9.3.1.2 orders it."""
    elements = ((0x0100, 0x8001), (0x0120, message_id), (0x0800, 0x0101), (0x0900, status))
    return b"".join(struct.pack("<HHIH", 0, element, 2, value) for element, value in elements)


@pytest.mark.parametrize("message_id", [1, 0x0208, 0x0209, 0x0900, 0xFFFF])
@pytest.mark.parametrize("status", [0, 0xA700, 0x0209])
def test_the_status_is_the_status_whatever_the_message_is_called(message_id: int, status: int) -> None:
    assert status_of(response(message_id, status)) == status


@pytest.mark.parametrize("command", [b"", response(1, 0)[:-1], response(1, 0)[:-10]])
def test_an_answer_without_a_status_is_not_understood(command: bytes) -> None:
    with pytest.raises(NotUnderstood):
        status_of(command)
