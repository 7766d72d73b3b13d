"""The parts of a spool: which objects are being written, and which of an earlier process may go on.

    memory ──▶ part, while it is short            (a spool with a journal)
                 │
    spares/<n> ──┴▶ part ┬▶ stays there until it is whole        (an object that nobody would resume)
                         └▶ parts/<id>, where a later process finds it

Never here: what becomes of a part that is whole.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from relay.errors import MedferryError, SpoolError
from relay.spool_files import FILE_MODE, Directory, discard, is_part_name, spool_error
from relay.spool_part import Part, PartFile
from relay.spool_room import Room
from relay.spool_spares import Spare, Spares
from relay.spool_types import MAX_HEADER_BYTES, Describe


class Parts:
    """All open parts by id. Their count is bounded by the room of the spool."""

    def __init__(
        self,
        directory: Directory,
        room: Room,
        spares: Spares,
        describe: Describe,
        *,
        resumable: bool,
        in_memory: bool,
    ) -> None:
        self.resumable: dict[str, int] = {}
        """Parts of an earlier process: bytes of data set there, by id."""
        self._directory = directory
        self._room = room
        self._spares = spares
        self._describe = describe
        self._kept = resumable
        """Whether parts are to be found again by a later process."""
        self._in_memory = in_memory
        self._open: dict[str, Part] = {}

    def __contains__(self, id: str) -> bool:
        return id in self._open

    def begin(self, header: bytes, id: str | None, size: int, *, at_once: bool) -> Part:
        """See `Spool.begin`."""
        if not 0 < len(header) <= MAX_HEADER_BYTES:
            raise ValueError(f"a header has 1 to {MAX_HEADER_BYTES} bytes, not {len(header)}")
        self._room.check_new(size)
        given = id is not None
        id = id or os.urandom(16).hex()
        if not is_part_name(id):
            raise ValueError("an object's id is 32 lower hex digits")
        kept = self._kept and not at_once
        memory = bytearray(header) if self._in_memory else None
        part = self._start(id, given, lambda: self._new_file(id, kept), memory, len(header), size)
        if memory is None:
            self._write_header(part, header)
        return part

    def _write_header(self, part: Part, header: bytes) -> None:
        try:
            written = os.pwrite(part.fileno(), header, 0)
        except OSError as error:
            part.abandon()
            raise spool_error(error, f"writing object {part.id}") from error
        if written != len(header):
            part.abandon()
            raise SpoolError(f"writing object {part.id}: the disk took only half of a header")

    def _new_file(self, id: str, kept: bool) -> PartFile:
        """An empty file for an object. It has the object's name if it is to be found."""
        named = self._directory.parts
        leftover = self.resumable.pop(id, None) is not None
        spare = None if leftover else self._spares.take()
        if spare is None:
            return PartFile(id, named, self._open_file(id, os.O_CREAT | os.O_TRUNC))
        if not kept:
            return PartFile(spare.name, self._directory.spares, spare.fd)
        try:
            os.rename(spare.name, id, src_dir_fd=self._directory.spares, dst_dir_fd=named)
        except OSError:
            self._spares.give(spare)
            raise
        return PartFile(id, named, spare.fd)

    def _open_file(self, name: str, flags: int) -> int:
        return os.open(name, flags | os.O_RDWR | os.O_CLOEXEC, FILE_MODE, dir_fd=self._directory.parts)

    def reopen(self, id: str) -> Part:
        """See `Spool.reopen`."""
        if id not in self.resumable:
            raise SpoolError(f"there is no part {id} to continue")
        size = self.resumable[id]
        try:
            offset = self._describe(self._read_header(id)).data_offset
        except MedferryError as error:
            raise SpoolError(f"part {id} cannot be continued: {error}") from error
        part = self._start(id, True, lambda: self._old_file(id), None, offset, size)
        try:
            part.rehash(size)
        except OSError as error:
            self.close(part)
            raise spool_error(error, f"reading part {id}") from error
        return part

    def _old_file(self, id: str) -> PartFile:
        fd = self._open_file(id, 0)
        del self.resumable[id]
        return PartFile(id, self._directory.parts, fd)

    def _start(
        self,
        id: str,
        given: bool,
        open_file: Callable[[], PartFile],
        memory: bytearray | None,
        data_offset: int,
        declared: int,
    ) -> Part:
        if id in self._open:
            raise SpoolError(f"object {id} is being written already")
        self._room.take(data_offset + declared)
        try:
            part = Part(
                id=id,
                given_id=given,
                open_file=open_file,
                memory=memory,
                data_offset=data_offset,
                declared=declared,
                room=self._room,
                leave=self._abandon,
            )
        except OSError as error:
            self._room.give(data_offset + declared)
            raise spool_error(error, f"opening object {id}") from error
        self._room.part_objects += 1
        self._open[id] = part
        return part

    def _read_header(self, id: str) -> bytes:
        try:
            fd = os.open(id, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._directory.parts)
        except OSError as error:
            raise spool_error(error, f"reading part {id}") from error
        try:
            return os.pread(fd, MAX_HEADER_BYTES, 0)
        finally:
            os.close(fd)

    def take(self, part: Part) -> PartFile | bytearray | None:
        """The part is not a part any more; its file, or its bytes, are the caller's (`Part.release`)."""
        taken = part.release()
        del self._open[part.id]
        self._room.part_objects -= 1
        return taken

    def close(self, part: Part) -> None:
        """The part is not a part any more, or not in this process; its file stays."""
        taken = self.take(part)
        if isinstance(taken, PartFile):
            os.close(taken.fd)

    def close_all(self) -> None:
        """Close every part; the files stay."""
        for part in list(self._open.values()):
            self.close(part)

    def _abandon(self, part: Part) -> None:
        file = self.take(part)
        if not isinstance(file, PartFile):
            return
        if file.folder != self._directory.spares:
            os.close(file.fd)
            discard(file.name, file.folder)
            return
        try:
            self._spares.give(Spare(file.name, file.fd))
        except OSError as error:
            raise spool_error(error, f"giving up object {part.id}") from error
