"""A feed: the objects that wait for one destination, first come first out, at a cost that never grows.

    offered by the spool ──▶ ┌ ready: at most FEED_WINDOW ┐ ──▶ held by whoever delivers ──▶ settled
    page from the index  ──▶ └────────────────────────────┘ ◀── put back

`ready` is only a window on the index: while it is full, or while older objects are still on disk, what is
offered is left for a page to bring. Dropping the window and reading anew from the start is always safe.

Never here: what a delivery is, when to try again.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from itertools import islice

from relay.spool_types import Entry, Status

FEED_WINDOW = 512
"""Objects of one destination kept in memory; about 1 KiB each."""

FEED_PAGE = 256
"""Objects read from the index at once."""


class Feed:
    """Objects waiting for one destination. What `next` hands out is held until done, parked or put back."""

    def __init__(
        self,
        destination: str,
        *,
        read: Callable[[Feed, int, int], None],
        tried: Callable[[Entry, str, Status], Entry],
    ) -> None:
        """Begin behind the index, as if all of it waited.

        Args:
            read: Fetches a page: is called with this feed, the `seq` to read after and a generation number,
                and calls `loaded` with the latter.
            tried: Records a failed attempt and returns the entry that says so.
        """
        self.destination = destination
        self._read = read
        self._tried = tried
        self._ready: deque[Entry] = deque()
        self._held: set[int] = set()
        self._settled: set[int] = set()
        self._waiters: set[asyncio.Future[None]] = set()
        self._cursor = -1
        self._behind = True
        self._missed = False
        self._loading = False
        self._generation = 0
        self._failure: Exception | None = None

    def __repr__(self) -> str:
        more = "+" if self._behind else ""
        return f"<Feed {self.destination} ready={len(self._ready)}{more} held={len(self._held)}>"

    async def next(self) -> Entry:
        """The oldest waiting object that nobody holds; waits for one. May be cancelled.

        Raises:
            SpoolError: The spool cannot go on.
        """
        while (entry := self.next_nowait()) is None:
            if self._failure is not None:
                raise self._failure
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.add(waiter)
            try:
                await waiter
            finally:
                self._waiters.discard(waiter)
        return entry

    def next_nowait(self) -> Entry | None:
        """The oldest waiting object that is in memory, or None (then `next` may still find one on disk)."""
        entry = None
        if self._ready:
            entry = self._ready.popleft()
            self._held.add(entry.seq)
        self._refill()
        return entry

    def peek(self, limit: int) -> tuple[Entry, ...]:
        """Up to `limit` objects that come next, as far as they are in memory; they are not handed out."""
        return tuple(islice(self._ready, limit))

    def put_back(self, entry: Entry, status: Status | None = None) -> None:
        """Give an object back to be handed out first again; with a `status`, count it as a failed attempt."""
        if status is not None:
            entry = self._tried(entry, self.destination, status)
        if entry.seq in self._held:
            self._held.discard(entry.seq)
            self._ready.appendleft(entry)
            self._wake()

    # ---- for the spool -----------------------------------------------------------------------------------

    def offer(self, entry: Entry) -> None:
        """A new object is in custody."""
        if entry.seq > self._cursor and (self._behind or len(self._ready) >= FEED_WINDOW):
            self._behind = self._missed = True
            return
        self._cursor = max(self._cursor, entry.seq)
        self._ready.append(entry)
        self._wake()

    def settle(self, seq: int) -> None:
        """An object is done or parked; nobody holds it."""
        self._held.discard(seq)
        if self._loading:
            self._settled.add(seq)

    def caught_up(self) -> None:
        """Nothing waits in the index that was not offered: for a spool just opened."""
        self._behind = False

    def rewind(self) -> None:
        """Read the index anew: somebody set objects back to waiting."""
        self._generation += 1
        self._loading = False
        self._settled.clear()
        self._ready.clear()
        self._cursor = -1
        self._behind = True
        self._wake()

    def loaded(self, generation: int, page: list[Entry]) -> None:
        """A page that `read` was asked for."""
        if generation != self._generation:
            return
        self._loading = False
        self._behind = self._missed or len(page) == FEED_PAGE
        spoken_for = self._held | self._settled | {entry.seq for entry in self._ready}
        for entry in page:
            self._cursor = max(self._cursor, entry.seq)
            if entry.seq not in spoken_for:
                self._ready.append(entry)
        self._settled.clear()
        self._wake()

    def fail(self, error: Exception) -> None:
        """The spool cannot go on: nobody shall wait any more."""
        self._failure = error
        self._wake()

    def _refill(self) -> None:
        """Ask for the next page before the window runs dry."""
        if self._behind and not self._loading and len(self._ready) <= FEED_WINDOW - FEED_PAGE:
            self._loading = True
            self._missed = False
            self._read(self, self._cursor, self._generation)

    def _wake(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
