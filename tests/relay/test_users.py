"""Slots of uids: a lane keeps its own, and gets nobody else's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from relay import users
from tests.fake_lane.kit import root

BASE = 61_184


def test_three_uids_a_slot() -> None:
    every = [users.uid_of(BASE, slot, role) for slot in range(64) for role in users.ROLES]
    assert every == list(range(BASE, BASE + 192))


def test_the_first_lane_of_all_gets_the_first_slot(tmp_path: Path) -> None:
    assert users.slot_of(str(tmp_path / "lanes"), "one", BASE, set()) == 0


def test_lanes_that_run_keep_theirs(tmp_path: Path) -> None:
    assert users.slot_of(str(tmp_path), "new", BASE, {0, 1, 3}) == 2


@pytest.fixture
def owners(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Owners of source directories, as if they had been given away."""
    table: dict[str, int] = {}

    def owner(directory: str, base: int) -> int | None:
        uid = table.get(Path(directory).parent.name)
        return None if uid is None else (uid - base) // 3

    monkeypatch.setattr(users, "_owner_slot", owner)
    monkeypatch.setattr(users, "_entries", lambda _: list(table))
    return table


def test_a_lane_finds_its_own_again(owners: dict[str, int]) -> None:
    owners |= {"one": BASE, "two": BASE + 3}
    assert users.slot_of("/lanes", "two", BASE, set()) == 1
    assert users.slot_of("/lanes", "one", BASE, {1}) == 0


def test_what_a_removed_lane_left_behind_stays_nobody_elses(owners: dict[str, int]) -> None:
    owners |= {"removed": BASE, "also-removed": BASE + 6}
    assert users.slot_of("/lanes", "new", BASE, set()) == 1
    assert users.slot_of("/lanes", "new", BASE, {1}) == 3


def test_two_lanes_whose_directories_have_one_owner_are_parted(owners: dict[str, int]) -> None:
    owners |= {"one": BASE, "copy-of-one": BASE}
    assert users.slot_of("/lanes", "one", BASE, set()) == 1


@pytest.mark.root
@pytest.mark.skipif(not root(), reason="needs root: run the tests as root")
@pytest.mark.parametrize(("offset", "slot"), [(0, 0), (3, 1), (1, None), (2, None), (-3, None), (300, 100)])
def test_the_owner_of_a_directory_tells_the_slot(tmp_path: Path, offset: int, slot: int | None) -> None:
    directory = tmp_path / "lanes" / "one" / "source"
    directory.mkdir(parents=True)
    os.chown(directory, BASE + offset, BASE + offset)
    expected = 0 if slot is None else slot
    assert users.slot_of(str(tmp_path / "lanes"), "one", BASE, set()) == expected
