"""What an operator released from quarantine: read it from end to end, then let it in like any other object.

`spool_admin` only marks a row; the worker, who owns the files and can read their headers, does it here.

Never here: whether it should be released.
"""

from __future__ import annotations

import asyncio
import os
from typing import Protocol

from relay.errors import MedferryError, SpoolError
from relay.spool_bridge import Bridge
from relay.spool_files import Directory
from relay.spool_index import Admitted
from relay.spool_recovery import Judged, judge
from relay.spool_types import Describe

MAX_DETAIL_CHARS = 500
"""Characters of what is said about a refused object: some lines of a table."""


class Door(Protocol):
    """How a whole file comes in."""

    def has(self, id: str) -> bool:
        """Whether an object of this id is or was in custody."""

    def let_in(self, id: str, name: str, folder: int, fd: int, judged: Judged) -> None:
        """Take the file `name` of `folder`, open as `fd`, into custody; `fd` is the door's from here on."""


class Releases:
    """Admits released objects whenever `look` is set; `run` is a task."""

    def __init__(self, directory: Directory, describe: Describe, bridge: Bridge, door: Door) -> None:
        self.look = asyncio.Event()
        self._directory = directory
        self._describe = describe
        self._bridge = bridge
        self._door = door

    async def run(self) -> None:
        """Until cancelled, or until the spool fails."""
        while True:
            await self.look.wait()
            self.look.clear()
            for id, name in await self._bridge.job(lambda index: index.quarantined(released=True)):
                try:
                    await self._admit(id, name)
                except (MedferryError, OSError) as error:
                    self._bridge.check()
                    await self._refuse(id, f"cannot be released: {error}"[:MAX_DETAIL_CHARS])

    async def _refuse(self, id: str, why: str) -> None:
        await self._bridge.job(lambda index: index.refuse_release(id, why))

    async def _admit(self, id: str, name: str) -> None:
        if self._door.has(id):
            raise SpoolError("an object of this id is in custody already")
        folder = self._directory.quarantine
        judged = await asyncio.to_thread(judge, name, folder, self._describe)
        if self._door.has(id):
            raise SpoolError("an object of this id came into custody meanwhile")
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=folder)
        self._door.let_in(id, name, folder, fd, judged)
        self._bridge.put(Admitted(id))
