"""Spare files: empty when taken, used again when given back, and never one that somebody else still has."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

import pytest

from relay import spool_spares
from relay.spool_files import Directory
from relay.spool_spares import ENOUGH, MAX_SPARES, Spares
from tests.relay.spool_kit import (
    LIMITS,
    begun,
    deliver,
    facts,
    folders,
    header,
    names,
    opened,
    scratch,
    stored,
    written,
)


@pytest.fixture
def directory() -> Iterator[Directory]:
    with folders() as held:
        yield held


@pytest.fixture
def spares(directory: Directory) -> Iterator[Spares]:
    made = Spares(directory)
    yield made
    made.close()


def put(directory: Directory, name: str, data: bytes) -> None:
    """A file in ``objects/``."""
    with open(os.open(name, os.O_CREAT | os.O_WRONLY, 0o600, dir_fd=directory.objects), "wb") as file:
        file.write(data)


def test_there_are_as_many_as_there_should_be_and_each_is_taken_once(spares: Spares) -> None:
    spares.fill()
    assert len(spares) == ENOUGH
    taken = [spares.take() for _ in range(ENOUGH + 1)]
    assert taken[-1] is None
    whole = [spare for spare in taken if spare is not None]
    assert len({spare.name for spare in whole}) == ENOUGH
    for spare in whole:
        assert os.fstat(spare.fd).st_size == 0
        os.close(spare.fd)


def test_what_is_given_back_is_empty(spares: Spares) -> None:
    spares.fill()
    spare = spares.take()
    assert spare is not None
    os.write(spare.fd, b"of a patient")
    spares.give(spare)
    assert len(spares) == ENOUGH
    assert os.fstat(spare.fd).st_size == 0


def test_a_removed_object_becomes_an_empty_spare(directory: Directory, spares: Spares) -> None:
    put(directory, "object", b"of a patient")
    inode = os.stat("object", dir_fd=directory.objects).st_ino
    spares.recycle("object", directory.objects)
    spare = spares.take()
    assert spare is not None
    with pytest.raises(FileNotFoundError):
        os.stat("object", dir_fd=directory.objects)
    assert (os.fstat(spare.fd).st_ino, os.fstat(spare.fd).st_size) == (inode, 0)
    os.close(spare.fd)


def test_an_object_that_is_gone_already_is_no_error(directory: Directory, spares: Spares) -> None:
    spares.recycle("object", directory.objects)
    assert len(spares) == 0


def test_a_file_of_which_somebody_keeps_a_link_is_left_to_them(directory: Directory, spares: Spares) -> None:
    put(directory, "object", b"data")
    os.link("object", "kept", src_dir_fd=directory.objects, dst_dir_fd=directory.root)
    spares.recycle("object", directory.objects)
    assert len(spares) == 0
    assert os.stat("kept", dir_fd=directory.root).st_size == 4


def test_there_are_never_too_many(directory: Directory, spares: Spares) -> None:
    for number in range(MAX_SPARES + 10):
        put(directory, f"object-{number}", b"data")
        spares.recycle(f"object-{number}", directory.objects)
    assert len(spares) == MAX_SPARES
    assert os.listdir(directory.objects) == []


def test_what_an_earlier_process_left_is_emptied_and_used(directory: Directory, spares: Spares) -> None:
    spares.fill()
    spare = spares.take()
    assert spare is not None
    os.write(spare.fd, b"half an object")
    os.close(spare.fd)
    put(directory, "stray", b"x")
    os.rename("stray", "stray", src_dir_fd=directory.objects, dst_dir_fd=directory.spares)
    later = Spares(directory)
    try:
        assert later.adopt() == 2
        assert len(later) == ENOUGH
        assert "stray" not in os.listdir(directory.spares)
        first = later.take()
        assert first is not None
        assert os.fstat(first.fd).st_size == 0
        later.give(first)
        later.fill()
        assert len(set(os.listdir(directory.spares))) == ENOUGH
    finally:
        later.close()


async def test_a_spool_uses_its_files_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the first lap no file is made: custody, delivery and removal go round."""
    monkeypatch.setattr(spool_spares, "ENOUGH", 4)
    made = []
    real = os.open

    def watching(path: str, flags: int, *rest: object, **other: object) -> int:
        if flags & os.O_CREAT and not str(path).endswith("journal"):
            made.append(path)
        return real(path, flags, *rest, **other)  # type: ignore[arg-type]

    with scratch() as path:
        async with opened(path, replace(LIMITS, retention_seconds=0.0)) as spool:
            for lap in range(5):
                if lap == 1:
                    monkeypatch.setattr(os, "open", watching)
                for number in range(4):
                    await stored(spool, b"%d %d" % (lap, number))
                await deliver(spool, 4)
                await written(spool)
                assert await spool.sweep() == 4
            monkeypatch.undo()
        assert made == []
        assert names(path, "objects") == []


async def test_without_spares_objects_are_taken_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool_spares, "ENOUGH", 0)
    with scratch() as path:
        async with opened(path) as spool:
            parts = [begun(spool, b"%d" % number) for number in range(3)]
            part = spool.begin(header(), id="ab" * 16)
            part.write([b"x"])
            for each in (*parts, part):
                await spool.commit(each, facts())
            assert len(names(path, "objects")) == 4
