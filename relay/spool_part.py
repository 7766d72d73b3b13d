"""A part: the file of an object that is being received, and the running hash of its data set.

Never here: fsync, the index, bounds on more than one object.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

from relay.records import Buffer


class Part:
    """A file in ``parts/``. `size` is bytes of data set so far. Made by `Spool.begin` and `Spool.reopen`."""

    id: str
    size: int
    data_offset: int

    def write(self, buffers: Sequence[Buffer]) -> None:
        """Append `buffers`, gathered in as few system calls as there can be, and hash them.

        Raises:
            SpoolFull: ``disk``, or ``object`` when it would become longer than one object may be. What was
                there before is still there; abandon or quarantine it.
        """
        raise NotImplementedError

    @property
    def sha256(self) -> str:
        """Lower hex SHA-256 of the data set so far."""
        raise NotImplementedError

    def view(self) -> AbstractContextManager[memoryview]:
        """The data set as a read-only memoryview over the file's pages, valid inside the ``with`` only."""
        raise NotImplementedError

    def abandon(self) -> None:
        """Remove the file. Nothing to do once the object is in custody, quarantined or abandoned."""
        raise NotImplementedError
