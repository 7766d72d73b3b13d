"""Slices follow how long encoding threads wait for processors: fewer at once, more again after a while."""

from __future__ import annotations

import os
import threading
import time

import pytest

from rtc.placement import processors
from rtc.slicing import (
    CROWDED_LOOKS,
    LOOK_PICTURES,
    MAX_SLICES,
    ROOMY_LOOKS,
    SLICE_PIXELS,
    Slicing,
    most_slices,
    scheduled,
)

MS = 1_000_000
RATE = 30.0


class Accounts:
    """What the kernel would say of two threads."""

    def __init__(self) -> None:
        self.accounts = {1: (0, 0), 2: (5, 9)}
        self.slicing = Slicing(lambda thread: self.accounts[thread])
        self.slicing.watch(self.accounts)

    def look(self, ran_ns: int, waited_ns: int) -> bool:
        """Encode pictures up to the next look, both threads alike; what the last one said."""
        said = [self.slicing.encoded() for _ in range(LOOK_PICTURES - 1)]
        assert not any(said)
        for thread, (ran, waited) in self.accounts.items():
            self.accounts[thread] = ran + ran_ns // 2, waited + waited_ns // 2
        return self.slicing.encoded()


CROWD = (40 * MS, 40 * MS)
BETWEEN = (40 * MS, 12 * MS)
ROOM = (40 * MS, 4 * MS)


@pytest.fixture
def accounts() -> Accounts:
    return Accounts()


def test_where_nobody_waits_all_slices_are_used(accounts: Accounts) -> None:
    assert not any(accounts.look(*load) for load in (ROOM, BETWEEN) * ROOMY_LOOKS)
    assert accounts.slicing.slices(4, RATE) == 4


def test_where_they_wait_there_is_one(accounts: Accounts) -> None:
    said = [accounts.look(*CROWD) for _ in range(CROWDED_LOOKS)]
    assert said == [False] * (CROWDED_LOOKS - 1) + [True]
    assert accounts.slicing.slices(2, RATE) == 1


def test_a_moments_waiting_changes_nothing(accounts: Accounts) -> None:
    for _ in range(10):
        assert not any(accounts.look(*CROWD) for _ in range(CROWDED_LOOKS - 1))
        assert not accounts.look(*BETWEEN)
    assert accounts.slicing.slices(2, RATE) == 2


def test_slices_come_back_after_a_while(accounts: Accounts) -> None:
    for _ in range(CROWDED_LOOKS):
        accounts.look(*CROWD)
    assert not any(accounts.look(*ROOM) for _ in range(ROOMY_LOOKS - 1))
    assert not accounts.look(*BETWEEN)
    said = [accounts.look(*ROOM) for _ in range(ROOMY_LOOKS)]
    assert said == [False] * (ROOMY_LOOKS - 1) + [True]
    assert accounts.slicing.slices(2, RATE) == 2


@pytest.mark.parametrize(
    ("picture_ms", "rate", "most", "expected"),
    [
        (3, 30.0, 2, 1),  # 720p30
        (7, 30.0, 2, 1),  # 1080p30
        (7, 60.0, 4, 1),
        (9, 60.0, 4, 2),  # more than half of the time between two pictures
        (28, 30.0, 4, 2),  # 2160p30
        (28, 60.0, 4, 4),
        (60, 60.0, 4, 4),  # never more than the picture has use for
    ],
)
def test_a_large_picture_keeps_the_slices_it_needs_to_be_in_time(
    accounts: Accounts, picture_ms: int, rate: float, most: int, expected: int
) -> None:
    ran_ns = picture_ms * LOOK_PICTURES * MS
    for _ in range(CROWDED_LOOKS):
        accounts.look(ran_ns, ran_ns)
    assert accounts.slicing.slices(most, rate) == expected
    # What it took then decides, not what it takes in fewer slices, or that would change to and fro.
    accounts.look(ran_ns // 2, ran_ns)
    assert accounts.slicing.slices(most, rate) == expected


def test_a_new_encoders_looks_begin_anew(accounts: Accounts) -> None:
    for _ in range(2):
        assert not any(accounts.look(*CROWD) for _ in range(CROWDED_LOOKS - 1))
        accounts.accounts = {thread + 2: (0, 10**12) for thread in accounts.accounts}
        accounts.slicing.watch(accounts.accounts)


def test_a_thread_that_ended_says_nothing(accounts: Accounts) -> None:
    assert not any(accounts.look(-90 * MS, -9 * MS) for _ in range(CROWDED_LOOKS + 1))


def test_without_threads_or_an_account_nothing_changes() -> None:
    for threads in ((), (1, 2)):
        one = Slicing(lambda _: (0, 0))
        one.watch(threads)
        assert not any(one.encoded() for _ in range(LOOK_PICTURES * (ROOMY_LOOKS + 1)))
        assert one.slices(3, RATE) == 3


def test_the_kernels_account_of_a_thread() -> None:
    own = threading.get_native_id()
    before = scheduled(own)
    until = time.thread_time() + 0.1
    while time.thread_time() < until:
        pass
    after = scheduled(own)
    if after == (0, 0):
        pytest.skip("a kernel without CONFIG_SCHED_INFO")
    # What it ran since the last tick may not be in it.
    assert after[0] - before[0] >= 70 * MS
    assert after[1] >= before[1]
    assert scheduled(2**22 + 1) == (0, 0)


@pytest.mark.skipif(scheduled(threading.get_native_id()) == (0, 0), reason="no CONFIG_SCHED_INFO")
def test_a_thread_that_shares_a_processor_has_waited() -> None:
    one = {processors()[0]}
    waited = []
    ready = threading.Barrier(2)

    def work() -> None:
        own = threading.get_native_id()
        os.sched_setaffinity(own, one)
        ready.wait(5)
        until = time.thread_time() + 0.2
        while time.thread_time() < until:
            os.urandom(1 << 16)  # without the interpreter's lock
        ran_ns, waited_ns = scheduled(own)
        waited.append(waited_ns / ran_ns)

    both = [threading.Thread(target=work) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert max(waited) > 0.5


@pytest.mark.parametrize(
    ("codec", "width", "height", "cpus", "expected"),
    [
        ("h264", 320, 240, 8, 1),
        ("h264", 640, 360, 8, 1),
        ("h264", 1280, 720, 8, 2),
        ("h264", 1280, 720, 1, 1),
        ("h264", 1920, 1080, 2, 2),
        ("h264", 3840, 2160, 64, MAX_SLICES),
        ("vp8", 1920, 1080, 8, 1),
    ],
)
def test_slices_by_size_and_processors(
    monkeypatch: pytest.MonkeyPatch, codec: str, width: int, height: int, cpus: int, expected: int
) -> None:
    monkeypatch.setattr("rtc.slicing.processors", lambda: list(range(cpus)))
    assert most_slices(codec, width, height) == expected
    assert width * height >= SLICE_PIXELS * expected or expected == 1
