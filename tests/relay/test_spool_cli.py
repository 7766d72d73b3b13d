"""`medferry spool` and `medferry quarantine` on spools at rest: what they do, what they refuse."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from relay.cli import app
from relay.spool import Spool
from relay.spool_admin import SpoolAdmin
from tests.relay.spool_kit import begun, opened, scratch, stored, written

ID = {"source": "aaaa0000" + "1" * 24, "refused": "bbbb0000" + "2" * 24}


class State:
    """A state directory with one lane, ``studies``: one object at rest on its sink for two destinations."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.object = ""
        self.others: list[str] = []

    def spool(self, side: str, lane: str = "studies") -> str:
        return os.path.join(self.directory, "lanes", lane, side, "spool")

    def medferry(self, *arguments: str, answer: str | None = None) -> Result:
        """Run a command on this state; its standard output and error, and its exit code."""
        return CliRunner().invoke(app, [*arguments, "--state", self.directory], input=answer)

    def listed(self, *arguments: str) -> list[dict[str, Any]]:
        done = self.medferry("spool", "ls", "--json", *arguments)
        assert done.exit_code == 0
        rows: list[dict[str, Any]] = json.loads(done.stdout)
        return rows

    def deliveries(self) -> dict[str, str]:
        """State and last status of the object's deliveries, by destination, as the sink has them."""
        with SpoolAdmin(self.spool("sink")) as admin:
            return {
                each.destination: f"{each.state.name.lower()} {each.last_status}"
                for each in admin.show(self.object).deliveries
            }


async def _refused(spool: Spool, destination: str, count: int) -> None:
    for _ in range(count):
        spool.park(await spool.feed(destination).next(), destination, 0xA900)


async def _fill(state: State) -> None:
    async with opened(state.spool("sink"), destinations=("pacs", "old")) as spool:
        entries = [await stored(spool, b"%d" % n) for n in range(2)]
        state.object, state.others = entries[0].id, [entries[1].id]
        await _refused(spool, "pacs", 1)
        spool.quarantine(begun(spool, id=ID["refused"]), "structure", "a sequence without an end")
        await written(spool)
    # Started again without the destination ``old``.
    async with opened(state.spool("sink"), destinations=("pacs",)):
        pass
    async with opened(state.spool("source"), destinations=("link",)) as spool:
        state.others.append((await stored(spool)).id)


@pytest.fixture
def state() -> Iterator[State]:
    with scratch() as path:
        made = State(path)
        asyncio.run(_fill(made))
        yield made


def test_listing_by_side_state_and_destination(state: State) -> None:
    assert len(state.listed()) == 3
    assert [row["side"] for row in state.listed("--side", "source")] == ["source"]
    assert [row["id"] for row in state.listed("--only", "parked", "--destination", "pacs")] == [state.object]
    assert len(state.listed("--destination", "old")) == 2
    assert len(state.listed("--limit", "1")) == 2, "of each spool"
    assert "0xA900" in state.medferry("spool", "ls").stdout


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (("--lane", "nope"), "no lane 'nope' below"),
        (("--lane", "nope"), "write one of studies"),
        (("--side", "nope"), "'nope' is not one of 'source', 'sink'"),
        (("--limit", "-1"), "'--limit'"),
    ],
)
@pytest.mark.parametrize("what", ["spool", "quarantine"])
def test_an_option_that_selects_nothing_is_refused(
    state: State, what: str, option: tuple[str, str], words: str
) -> None:
    done = state.medferry(what, "ls", *option)
    assert done.exit_code == 2
    assert words in " ".join(done.stderr.replace("│", " ").split())


@pytest.mark.parametrize(
    "command", [("ls",), ("resend", "--parked"), ("resend", "{id}"), ("drop",), ("drop", "{id}")]
)
def test_a_destination_that_never_was_is_refused_with_those_that_are(
    state: State, command: tuple[str, ...]
) -> None:
    arguments = [each.format(id=state.object) for each in command]
    done = state.medferry("spool", *arguments, "--destination", "nope")
    assert done.exit_code == 2
    assert "write one of link, old, pacs" in " ".join(done.stderr.replace("│", " ").split())
    assert state.deliveries() == {"old": "parked unconfigured", "pacs": f"parked {0xA900}"}


@pytest.mark.parametrize("command", ["spool show", "spool resend", "spool drop", "quarantine show"])
@pytest.mark.parametrize(
    ("id", "words"),
    [("44", "give at least 4 digits of the id"), ("cccc", "no object cccc: see medferry")],
)
def test_an_id_that_is_none_says_why(state: State, command: str, id: str, words: str) -> None:
    done = state.medferry(*command.split(), id)
    assert done.exit_code == 1
    assert words in done.stderr


def test_an_id_of_two_objects_in_two_lanes_is_refused(state: State) -> None:
    async def another() -> None:
        async with opened(state.spool("sink", "second")) as spool:
            spool.quarantine(begun(spool, id="bbbb0000" + "3" * 24), "structure")

    asyncio.run(another())
    done = state.medferry("quarantine", "show", "bbbb")
    assert done.exit_code == 1
    assert "more than one object has an id that begins with bbbb: give more digits" in done.stderr
    assert state.medferry("quarantine", "show", "bbbb", "--lane", "studies").exit_code == 0


@pytest.mark.parametrize("more", [(), ("--json",)])
def test_showing_is_json_with_and_without_saying_so(state: State, more: tuple[str, ...]) -> None:
    shown = json.loads(state.medferry("spool", "show", state.object[:12], *more).stdout)
    assert (shown["id"], shown["lane"], shown["side"]) == (state.object, "studies", "sink")
    shown = json.loads(state.medferry("quarantine", "show", "bbbb", *more).stdout)
    assert (shown["id"], shown["reason"], shown["side"]) == (ID["refused"], "structure", "sink")


def test_a_state_of_another_user_is_no_empty_state(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only root and its owner see what is in a side's directory."""
    stat = os.stat

    def denied(path: str, *arguments: Any, **options: Any) -> os.stat_result:
        if str(path).endswith("index.db"):
            raise PermissionError(13, "Permission denied", path)
        return stat(path, *arguments, **options)

    monkeypatch.setattr("relay.spool_cli.os.stat", denied)
    for command in (("spool", "ls"), ("quarantine", "ls"), ("spool", "show", state.object)):
        done = state.medferry(*command)
        assert done.exit_code == 1
        assert "Permission denied: run this as the user that medferry runs as" in done.stderr


def test_a_directory_that_is_no_state(state: State) -> None:
    done = CliRunner().invoke(app, ["spool", "ls", "--state", state.directory + "-absent"])
    assert done.exit_code == 1
    assert "name the relay's state directory with --state" in done.stderr


def test_sending_again_names_what_nobody_delivers(state: State) -> None:
    done = state.medferry("spool", "resend", "--parked", "--side", "sink")
    assert done.exit_code == 0
    assert done.stdout == "1 deliveries of lane studies, sink, wait again\n"
    assert "nothing is sent to old, which is not configured; 2 deliveries stay parked" in done.stderr
    assert "medferry spool drop --destination old" in done.stderr
    assert state.deliveries() == {"old": "parked unconfigured", "pacs": f"waiting {0xA900}"}


def test_sending_again_to_nobody_fails(state: State) -> None:
    done = state.medferry("spool", "resend", state.object, "--destination", "old")
    assert (done.exit_code, done.stdout) == (1, "")
    assert "nothing is sent to old, which is not configured; 1 deliveries stay parked" in done.stderr


def test_dropping_asks_and_leaves_all_as_it_is_without_a_yes(state: State) -> None:
    before = state.deliveries()
    done = state.medferry("spool", "drop", "--destination", "old", answer="n\n")
    assert done.exit_code == 1
    assert "Give up 2 deliveries to old (lane studies, sink)?" in done.output
    assert state.deliveries() == before


def test_dropping_what_is_parked_for_a_destination(state: State) -> None:
    done = state.medferry("spool", "drop", "--destination", "old", "--yes")
    assert (done.exit_code, done.stdout) == (0, "2 deliveries to old (lane studies, sink) are dropped\n")
    assert state.deliveries() == {"old": "done dropped", "pacs": f"parked {0xA900}"}
    done = state.medferry("spool", "drop", "--destination", "old", "--yes")
    assert done.exit_code == 1
    assert "nothing of what waits for old is parked" in done.stderr


def test_dropping_one_object(state: State) -> None:
    done = state.medferry("spool", "drop", state.object[:10], answer="y\ny\n")
    assert done.exit_code == 0
    assert f"Give up 1 deliveries to pacs (lane studies, sink) of {state.object}?" in done.output
    assert state.deliveries() == {"old": "done dropped", "pacs": "done dropped"}
    assert len(state.listed("--only", "parked")) == 1, "the other one"


def test_what_waits_or_is_unnamed_is_not_dropped(state: State) -> None:
    waiting = state.others[1]
    done = state.medferry("spool", "drop", waiting, "--yes")
    assert done.exit_code == 1
    assert f"nothing of object {waiting} is parked" in done.stderr
    assert state.medferry("spool", "drop", "--yes").exit_code == 2
