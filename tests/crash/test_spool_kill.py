"""kill -9 of a process that takes objects in: what it said is in custody is there once, whole, and delivered.

child: begin · write · commit or seal ──"id sha256"──▶ parent: kill at a random moment, open, compare
"""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
import time

import pytest

from tests.relay.spool_kit import data_of, names, opened, sha256, written

CHILD = """
import asyncio, os, sys
from dataclasses import replace
from tests.relay.spool_kit import *
from relay.spool import Spool

async def one(spool, how):
    while True:
        part = spool.begin(header())
        for _ in range(1 + os.urandom(1)[0] % 4):
            part.write([os.urandom(5000)])
        entry = spool.seal(part, facts()) if how == "seal" else await spool.commit(part, facts())
        os.write(1, f"{entry.id} {entry.sha256}\\n".encode())
        await asyncio.sleep(0)

async def drain(spool):
    feed = spool.feed("pacs")
    while True:
        entry = await feed.next()
        spool.done(entry, "pacs")

async def main():
    limits = replace(LIMITS, journal_bytes=1 << 20 if sys.argv[2] == "journal" else 0)
    async with opened(sys.argv[1], limits, resumable=True) as spool:
        works = [one(spool, sys.argv[2]) for _ in range(3)]
        if sys.argv[3] == "drain":
            works.append(drain(spool))
        await asyncio.gather(*works)

asyncio.run(main())
"""

QUICK = 6
SLOW = 200


def killed(directory: str, how: str, drain: bool, seconds: float) -> dict[str, str]:
    """Id and hash of all that a child said is in custody before it was killed."""
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, directory, how, "drain" if drain else "keep"], stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    with child, child.stdout as stdout:
        first = stdout.readline()
        time.sleep(seconds)
        child.kill()
        lines = [first, *stdout.read().splitlines(keepends=True)]
    whole = [line.decode() for line in lines if line.endswith(b"\n")]
    return dict(line.split() for line in whole)


async def rounds(directory: str, count: int, seed: int) -> None:
    dice = random.Random(seed)
    said: dict[str, str] = {}
    for turn in range(count):
        how = ("commit", "seal", "journal")[turn % 3]
        said |= await asyncio.to_thread(killed, directory, how, False, dice.random() * 0.2)
        if dice.random() < 0.2:
            os.unlink(os.path.join(directory, "index.db"))
        async with opened(directory) as spool:
            assert spool.recovered.missing == spool.recovered.torn == 0
            there = {name.split(".")[0]: name.split(".")[1] for name in names(directory, "objects")}
            assert said.items() <= there.items()
            assert spool.stats().waiting["pacs"] == len(there)
    async with opened(directory) as spool:
        fed = [await spool.feed("pacs").next() for _ in range(len(there))]
        assert len({entry.id for entry in fed}) == len(there)
        assert {entry.id: entry.sha256 for entry in fed} == there
        for entry in fed:
            assert sha256(data_of(spool, entry)) == entry.sha256


def test_what_was_acknowledged_survives_kills(tmp_path: os.PathLike[str]) -> None:
    asyncio.run(rounds(os.path.join(tmp_path, "spool"), QUICK, 1))


@pytest.mark.slow
def test_what_was_acknowledged_survives_many_kills(tmp_path: os.PathLike[str]) -> None:
    asyncio.run(rounds(os.path.join(tmp_path, "spool"), SLOW, 2))


def test_a_kill_while_delivering_leaves_each_object_in_one_state(tmp_path: os.PathLike[str]) -> None:
    directory = os.path.join(tmp_path, "spool")
    said = killed(directory, "journal", True, 0.3)

    async def look() -> None:
        async with opened(directory) as spool:
            assert all(spool.has(id) for id in said)
            await written(spool)
            stats = spool.stats()
            assert stats.undelivered_objects == stats.waiting["pacs"]
            assert stats.undelivered_objects + stats.retained_objects == len(names(directory, "objects"))

    asyncio.run(look())
