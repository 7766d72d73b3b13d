"""The inbox: who may wait wakes nobody, who may not wakes at once, and nothing is ever left lying."""

from __future__ import annotations

import threading
import time

from relay.spool_inbox import Inbox

LONG = 3600.0
SOON = 5.0


def test_items_come_in_order_and_none_is_none() -> None:
    inbox: Inbox[int] = Inbox()
    assert inbox.take() is None
    for number in range(3):
        inbox.put(number, 0.0)
    assert [inbox.take() for _ in range(4)] == [0, 1, 2, None]


def test_an_item_that_is_there_already_is_not_slept_over() -> None:
    inbox: Inbox[int] = Inbox()
    inbox.put(1, time.monotonic() + LONG)
    inbox.wait_until(time.monotonic() + LONG)
    assert inbox.take() == 1


def test_what_is_due_by_itself_ends_the_sleep() -> None:
    inbox: Inbox[int] = Inbox()
    inbox.wait_until(time.monotonic() - 1.0)
    assert inbox.take() is None


def sleeping(inbox: Inbox[int], due: float) -> tuple[threading.Thread, threading.Event]:
    """A thread that sleeps in `wait_until`, and an event that it sets when it is awake again."""
    awake = threading.Event()

    def sleep() -> None:
        inbox.wait_until(due)
        awake.set()

    thread = threading.Thread(target=sleep)
    thread.start()
    while inbox._wakes_at != due:
        threading.Event().wait(0.001)
    return thread, awake


def test_an_item_that_may_wait_wakes_nobody_and_one_that_may_not_does() -> None:
    inbox: Inbox[int] = Inbox()
    due = time.monotonic() + LONG
    thread, awake = sleeping(inbox, due)
    inbox.put(1, due + 1)
    assert not inbox._wake.is_set()
    inbox.put(2, 0.0)
    assert awake.wait(SOON)
    thread.join()
    assert [inbox.take(), inbox.take()] == [1, 2]


def test_nothing_is_left_lying_however_the_two_meet() -> None:
    """Ten thousand items that may not wait, put while the taker goes to sleep and wakes: each is taken."""
    inbox: Inbox[int] = Inbox()
    taken: list[int] = []
    count = 10_000

    def take() -> None:
        while len(taken) < count:
            inbox.wait_until(time.monotonic() + LONG)
            while (item := inbox.take()) is not None:
                taken.append(item)

    thread = threading.Thread(target=take)
    thread.start()
    for number in range(count):
        inbox.put(number, 0.0)
    thread.join(60)
    assert not thread.is_alive()
    assert taken == list(range(count))
