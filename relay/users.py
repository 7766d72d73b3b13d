"""Which uids a lane's processes get: three of its own, the same at every start.

Two lanes may face the same two networks in opposite directions, so a source of one and a source of the other
must be as foreign to each other as a source and a sink are. Each lane therefore has a *slot* of three uids.
Who had which is written nowhere but in the owners of the sides' directories: what a removed lane left behind
keeps its slot, and is nobody else's to read.
"""

from __future__ import annotations

import os

ROLES = ("source", "valve", "sink")
"""In the order of the uids of a slot."""


def uid_of(base: int, slot: int, role: str) -> int:
    """The uid of one of a lane's `ROLES`."""
    return base + len(ROLES) * slot + ROLES.index(role)


def slot_of(lanes: str, name: str, base: int, taken: set[int]) -> int:
    """The slot of lane `name`: the one its directory belongs to, else the lowest that nobody has.

    Args:
        lanes: The directory with one directory a lane; it need not exist.
        name: The lane's name.
        base: The first uid of slot 0.
        taken: Slots of lanes that run and may not have a directory yet.
    """
    owned = {entry: _owner_slot(os.path.join(lanes, entry, ROLES[0]), base) for entry in _entries(lanes)}
    own = owned.pop(name, None)
    used = taken | {slot for slot in owned.values() if slot is not None}
    if own is not None and own not in used:
        return own
    return next(slot for slot in range(len(used) + 1) if slot not in used)


def _entries(directory: str) -> list[str]:
    try:
        return os.listdir(directory)
    except FileNotFoundError:
        return []


def _owner_slot(directory: str, base: int) -> int | None:
    try:
        offset = os.stat(directory).st_uid - base
    except (FileNotFoundError, NotADirectoryError):
        return None
    slot, role = divmod(offset, len(ROLES))
    return slot if offset >= 0 and role == 0 else None
