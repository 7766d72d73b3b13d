"""A feed: the objects that wait for one destination, first come first out, at a cost that never grows.

Never here: what a delivery is, when to try again.
"""

from __future__ import annotations

from relay.spool_types import Entry, Status


class Feed:
    """Objects waiting for one destination. What `next` hands out is held until done, parked or put back."""

    destination: str

    async def next(self) -> Entry:
        """The oldest waiting object that nobody holds; waits for one. May be cancelled."""
        raise NotImplementedError

    def next_nowait(self) -> Entry | None:
        """The oldest waiting object that is in memory, or None (then `next` may still find one on disk)."""
        raise NotImplementedError

    def peek(self, limit: int) -> tuple[Entry, ...]:
        """Up to `limit` objects that come next, as far as they are in memory; they are not handed out."""
        raise NotImplementedError

    def put_back(self, entry: Entry, status: Status | None = None) -> None:
        """Give an object back to be handed out first again; with a `status`, count it as a failed attempt."""
        raise NotImplementedError
