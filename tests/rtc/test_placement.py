"""Threads of an encoder are bound apart where they take all processors, and nothing else is bound."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest

from rtc import placement
from rtc.encode import VideoEncoder, VideoProfile
from rtc.placement import give_way, one_slice_each, processors

needs_two = pytest.mark.skipif(len(processors()) < 2, reason="needs two processors")


class Waiting:
    """Threads that wait."""

    def __init__(self) -> None:
        self._end = threading.Event()
        self.threads: list[threading.Thread] = []

    def start(self) -> int:
        thread = threading.Thread(target=self._end.wait)
        thread.start()
        self.threads.append(thread)
        assert thread.native_id is not None
        return thread.native_id

    def end(self) -> None:
        self._end.set()
        for thread in self.threads:
            thread.join()


@pytest.fixture
def waiting() -> Iterator[Waiting]:
    made = Waiting()
    yield made
    made.end()


@needs_two
def test_as_many_slices_as_processors_get_one_each(waiting: Waiting) -> None:
    own = processors()
    before = waiting.start()
    with one_slice_each(len(own)) as started:
        bound = [waiting.start() for _ in own]
    after = waiting.start()
    assert started == sorted(bound)
    assert sorted(next(iter(os.sched_getaffinity(thread))) for thread in bound) == own
    assert all(len(os.sched_getaffinity(thread)) == 1 for thread in bound)
    for free in (before, after, 0):
        assert sorted(os.sched_getaffinity(free)) == own


def test_a_thread_that_gives_way_preempts_nobody_nor_do_its_slices(waiting: Waiting) -> None:
    policies: list[int] = []

    def encode() -> None:
        give_way()
        before = {int(name) for name in os.listdir("/proc/self/task")}
        encoder = VideoEncoder(VideoProfile(codec="h264", bitrate=1_000_000), 1280, 720)
        new = {int(name) for name in os.listdir("/proc/self/task")} - before
        assert len(new) >= encoder.slices or encoder.slices == 1
        policies.extend(map(os.sched_getscheduler, [0, *new]))

    bystander = waiting.start()
    thread = threading.Thread(target=encode)
    thread.start()
    thread.join()
    assert set(policies) == {os.SCHED_BATCH}
    assert [os.sched_getscheduler(each) for each in (bystander, 0)] == [os.SCHED_OTHER] * 2


def test_with_processors_to_spare_nothing_is_bound(waiting: Waiting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "processors", lambda: [0, 1, 2])
    with one_slice_each(2) as started:
        thread = waiting.start()
    assert started == [thread]
    assert sorted(os.sched_getaffinity(thread)) == processors()


@needs_two
def test_an_encoder_that_fails_to_open_leaves_the_turn_to_others() -> None:
    with pytest.raises(RuntimeError), one_slice_each(len(processors())):
        raise RuntimeError
    with one_slice_each(len(processors())):
        pass


@needs_two
def test_an_encoders_own_threads_are_apart() -> None:
    before = {int(name) for name in os.listdir("/proc/self/task")}
    encoder = VideoEncoder(VideoProfile(codec="h264", bitrate=1_000_000), 1280, 720)
    new = {int(name) for name in os.listdir("/proc/self/task")} - before
    assert set(encoder.threads) == new
    if encoder.slices < len(processors()):
        pytest.skip("processors to spare: nothing is bound")
    assert len(new) >= encoder.slices
    assert all(len(os.sched_getaffinity(thread)) == 1 for thread in new)
