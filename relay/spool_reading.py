"""Reading an object in custody, once, from the beginning of its data set to its end.

    file ──▶ page cache ──read_into──▶ buffers
                 └── what is behind is given back, where nobody reads it after us

A long object fills the page cache with pages that nobody asks for again, and the machine has to find, clear
and take back as many for the next one; pages that were just given back are warm, and there at once. With
objects of 268 MB that is half of all the relay's work (docs/performance.md).

Never here: what is done with the bytes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from relay.spool_files import let_go

BEHIND_BYTES = 8 << 20
"""Given back at a time. A shorter object is left to the cache: others reuse its pages soon enough."""


class Reading:
    """The open file `fd` from byte `offset` on. `last` says that nobody is to read the file after this."""

    def __init__(self, fd: int, offset: int, *, last: bool) -> None:
        self._fd = fd
        self._at = offset
        self._kept_from = offset
        self._last = last

    def __repr__(self) -> str:
        return f"<Reading at={self._at} kept from={self._kept_from}>"

    def read_into(self, buffers: Sequence[memoryview]) -> int:
        """Fill `buffers`, at most `spool_files.MAX_GATHER`, one after the other with the bytes that come
        next; their count, less than there is room for only near the end.

        Raises:
            OSError: The disk failed.
        """
        behind = self._at - self._kept_from
        if self._last and behind >= BEHIND_BYTES:
            let_go(self._fd, self._kept_from, behind)
            self._kept_from = self._at
        count = os.preadv(self._fd, buffers, self._at)
        self._at += count
        return count
