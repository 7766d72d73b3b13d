"""Memory is given out again when, and only when, nobody has a view of it."""

from __future__ import annotations

import numpy as np

from relay.memory import MAX_KEPT, Memories


def test_memory_that_nobody_sees_is_given_out_again() -> None:
    memories = Memories()
    first = memoryview(memories.take(100))
    known = id(first.obj)
    del first
    assert id(memories.take(100)) == known


def test_any_view_keeps_it() -> None:
    memories = Memories()
    piece = memoryview(memories.take(100))[10:20]
    array = np.frombuffer(memoryview(memories.take(100))[5:], np.uint8)[3:]
    assert memories.take(100) is not piece.obj
    assert len({id(memories.take(100)) for _ in range(5)} & {id(piece.obj)}) == 0
    array_memory = array.__array_interface__["data"][0]
    fresh = np.frombuffer(memories.take(100), np.uint8).__array_interface__["data"][0]
    assert not fresh <= array_memory < fresh + 100


def test_too_small_memory_is_given_up() -> None:
    memories = Memories()
    for size in range(10, 1000, 10):
        assert len(memories.take(size)) == size
    assert repr(memories) == "<Memories kept=1>"
    assert len(memories.take(20)) == 990


def test_what_is_kept_is_bounded() -> None:
    memories = Memories()
    held = [memoryview(memories.take(10)) for _ in range(MAX_KEPT * 3)]
    assert len({id(view.obj) for view in held}) == MAX_KEPT * 3
    assert repr(memories) == f"<Memories kept={MAX_KEPT}>"
