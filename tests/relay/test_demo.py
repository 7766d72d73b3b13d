"""What the demo says: pages that can be opened while it runs, and how to let it run on."""

from __future__ import annotations

import asyncio
import os
import pty
import re
import signal
import sys
from pathlib import Path

import aiohttp
import pytest

from tests.product import REPOSITORY

pytestmark = [pytest.mark.slow, pytest.mark.timeout(170)]


async def demo(directory: Path, *arguments: str) -> tuple[asyncio.subprocess.Process, asyncio.StreamReader]:
    """Start the demo in a terminal of its own; what it prints there."""
    ours, theirs = pty.openpty()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "relay.cli", "demo", "--seconds", "3", *arguments),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "TERM": "xterm", "COLUMNS": "120"},
    )
    os.close(theirs)
    printed = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(printed), os.fdopen(ours, "rb"))
    return process, printed


async def text_until(printed: asyncio.StreamReader, words: bytes) -> str:
    """What is printed up to these words."""
    async with asyncio.timeout(120):
        return (await printed.readuntil(words)).decode()


async def test_in_a_terminal_it_says_how_to_keep_it(tmp_path: Path) -> None:
    process, printed = await demo(tmp_path)
    text = await text_until(printed, b"demo --keep")
    assert "Watch the camera on side B" in text
    assert await process.wait() == 0


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
async def test_a_kept_demo_shows_its_camera_on_the_page_that_it_names(
    tmp_path: Path, ending: signal.Signals
) -> None:
    process, printed = await demo(tmp_path, "--keep")
    await text_until(printed, b"run on")
    text = await text_until(printed, b"?stream=camera")
    found = re.search(r"http://127\.0\.0\.1:\d+/", text)
    assert found is not None
    try:
        async with aiohttp.ClientSession(found[0]) as http:
            pictures: list[int] = []
            async with asyncio.timeout(20):
                while len(set(pictures)) < 3:
                    async with http.get("streams") as answer:
                        [stream] = (await answer.json())["streams"]
                    pictures.append(stream["pictures"])
                    await asyncio.sleep(0.05)
            assert (stream["name"], stream["live"]) == ("camera", True)
        another, said = await demo(tmp_path)
        await text_until(said, b"already: end it")
        assert await another.wait() == 1
        assert process.returncode is None
    finally:
        process.send_signal(ending)
        async with asyncio.timeout(30):
            await process.wait()
    async with aiohttp.ClientSession() as http:
        with pytest.raises(aiohttp.ClientConnectionError):
            await http.get(found[0])
