"""`medferry spool` and `medferry quarantine`: what waits, what was refused, what an operator does about it.

Works on the spools below a state directory whether the relay runs or not.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import json
import os
import sys
import time
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from relay.errors import SpoolError
from relay.exits import EXIT_FAILED, failing_clearly
from relay.spool_admin import Listed, Quarantined, SpoolAdmin
from relay.spool_types import DeliveryState

spool = typer.Typer(help="Objects in custody: list, show, send again, drop.", no_args_is_help=True)
quarantine = typer.Typer(help="Refused objects: list, show, release, drop.", no_args_is_help=True)


class Which(enum.StrEnum):
    """A side of a lane."""

    SOURCE = "source"
    SINK = "sink"


State = Annotated[str, typer.Option("--state", envvar="MEDFERRY_STATE", help="The relay's state directory.")]
LaneName = Annotated[str | None, typer.Option("--lane", help="Only this lane.")]
SideOption = Annotated[Which | None, typer.Option("--side", help="Only this side.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
AlwaysJson = Annotated[bool, typer.Option("--json", help="Print JSON for scripts, as it does anyway.")]
Id = Annotated[str, typer.Argument(metavar="ID", help="An object's id or the beginning of it.")]
Limit = Annotated[int, typer.Option(help="At most so many.", min=1)]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]

SPOOL_DIRECTORY = "spool"
STATES: dict[str, DeliveryState] = {state.name.lower(): state for state in DeliveryState}


@dataclass(frozen=True, slots=True)
class Place:
    """One side's spool."""

    lane: str
    side: Which
    directory: str

    def __str__(self) -> str:
        return f"lane {self.lane}, {self.side}"


def _unusable(path: str, error: OSError) -> SpoolError:
    reason = os.strerror(error.errno or 0)
    if error.errno in (errno.EACCES, errno.EPERM):
        return SpoolError(f"{path}: {reason}: run this as the user that medferry runs as, or as root")
    return SpoolError(f"{path}: {reason}: name the relay's state directory with --state")


def _wrong(option: str, what: str, known: Collection[str]) -> typer.BadParameter:
    """What an option names is not there; these are."""
    choices = ", ".join(sorted(known)) or "nothing: there is none yet"
    return typer.BadParameter(f"{what}; write one of {choices}", param_hint=option)


def _is_spool(directory: str) -> bool:
    path = os.path.join(directory, "index.db")
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise _unusable(path, error) from None
    return True


def _spools(state: str, lane: str | None, side: Which | None) -> list[Place]:
    """Every spool below `state` that is asked for.

    Raises:
        SpoolError: `state` is no state directory, or not for this user.
        typer.BadParameter: There is no such lane.
    """
    lanes = os.path.join(state, "lanes")
    try:
        names = sorted(os.listdir(lanes))
    except FileNotFoundError:
        raise SpoolError(f"no spools below {state}: name the relay's state directory with --state") from None
    except OSError as error:
        raise _unusable(lanes, error) from None
    if lane is not None and lane not in names:
        raise _wrong("--lane", f"no lane {lane!r} below {state}", names)
    places = [
        Place(name, which, os.path.join(lanes, name, which, SPOOL_DIRECTORY))
        for name in names
        if lane in (None, name)
        for which in Which
        if side in (None, which)
    ]
    return [place for place in places if _is_spool(place.directory)]


def _delivering(places: list[Place], destination: str | None) -> list[Place]:
    """Those of `places` that deliver, or did once, to `destination`; all where it is None.

    Raises:
        typer.BadParameter: None does.
    """
    if destination is None:
        return places
    known: set[str] = set()
    found = []
    for place in places:
        with SpoolAdmin(place.directory) as admin:
            names = admin.destinations()
        known |= names.keys()
        if destination in names:
            found.append(place)
    if not found:
        raise _wrong("--destination", f"no spool here has a destination {destination!r}", known)
    return found


def _holders(id: str, places: list[Place], *, quarantined: bool) -> tuple[str, list[Place]]:
    """The whole id of the one object that `id` begins, and whose spools have it, the sink's first.

    Raises:
        SpoolError: No object, or more than one.
    """
    found: dict[str, list[Place]] = {}
    for place in sorted(places, key=lambda place: place.side):
        with SpoolAdmin(place.directory) as admin:
            whole = admin.full_id(id, quarantined=quarantined)
        if whole is not None:
            found.setdefault(whole, []).append(place)
    if len(found) > 1:
        raise SpoolError(f"more than one object has an id that begins with {id}: give more digits")
    for whole, holders in found.items():
        return whole, holders
    raise SpoolError(f"no object {id}: see medferry {'quarantine' if quarantined else 'spool'} ls")


@contextlib.contextmanager
def _holding(
    id: str,
    state: str,
    lane: str | None,
    side: Which | None,
    *,
    quarantined: bool,
    destination: str | None = None,
) -> Iterator[tuple[Place, SpoolAdmin, str]]:
    """The spool that knows the object `id`, with its whole id; of both sides of a lane, the sink's."""
    places = _delivering(_spools(state, lane, side), destination)
    whole, (place, *_) = _holders(id, places, quarantined=quarantined)
    with SpoolAdmin(place.directory) as admin:
        yield place, admin, whole


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _object_row(place: Place, item: Listed) -> dict[str, Any]:
    entry = asdict(item.entry)
    deliveries = {
        delivery.destination: {
            "state": delivery.state.name.lower(),
            "attempts": delivery.attempts,
            "last_status": delivery.last_status,
            "updated_at": delivery.updated_at,
        }
        for delivery in item.deliveries
    }
    return {"lane": place.lane, "side": place.side.value, **entry, "deliveries": deliveries}


def _status_text(status: Any) -> str:
    return f" 0x{status:04X}" if isinstance(status, int) and status else f" {status}" if status else ""


def _table(rows: list[dict[str, Any]], columns: dict[str, str]) -> None:
    table = Table(*columns.values())
    for row in rows:
        table.add_row(*(str(row[key]) for key in columns))
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def _print(rows: list[dict[str, Any]], columns: dict[str, str], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(rows))
    else:
        _table(rows, columns)


@spool.command("ls")
def spool_ls(
    state: State = "./medferry-state",
    lane: LaneName = None,
    side: SideOption = None,
    only: Annotated[str | None, typer.Option("--only", help="waiting, done or parked.")] = None,
    destination: Annotated[str | None, typer.Option(help="Only for this destination.")] = None,
    limit: Limit = 100,
    as_json: Json = False,
) -> None:
    """List objects in custody, oldest first."""
    if only is not None and only not in STATES:
        raise typer.BadParameter(f"write one of {', '.join(STATES)}", param_hint="--only")
    rows = []
    with failing_clearly():
        for place in _delivering(_spools(state, lane, side), destination):
            with SpoolAdmin(place.directory) as admin:
                wanted = STATES[only] if only else None
                listed = admin.ls(state=wanted, destination=destination, limit=limit)
                rows += [_object_row(place, item) for item in listed]
    for row in rows:
        row["when"] = _when(row["stored_at"])
        row["to"] = ", ".join(
            f"{to} {delivery['state']}{_status_text(delivery['last_status'])}"
            for to, delivery in row["deliveries"].items()
        )
    columns = {
        "id": "id",
        "lane": "lane",
        "side": "side",
        "when": "stored",
        "size": "bytes",
        "to": "delivery",
    }
    _print(rows, columns, as_json)


@spool.command("show")
def spool_show(
    id: Id,
    state: State = "./medferry-state",
    lane: LaneName = None,
    side: SideOption = None,
    as_json: AlwaysJson = True,
) -> None:
    """Show one object and how far its deliveries are, as JSON."""
    with failing_clearly(), _holding(id, state, lane, side, quarantined=False) as (place, admin, whole):
        typer.echo(json.dumps(_object_row(place, admin.show(whole)), indent=2))


@spool.command("resend")
def spool_resend(
    id: Annotated[str | None, typer.Argument(metavar="[ID]", help="An object's id.")] = None,
    state: State = "./medferry-state",
    lane: LaneName = None,
    side: SideOption = None,
    destination: Annotated[str | None, typer.Option(help="Only to this destination.")] = None,
    parked: Annotated[bool, typer.Option("--parked", help="All that destinations refused for good.")] = False,
) -> None:
    """Send an object, or all parked ones, again. On the source side it crosses the link again."""
    if (id is None) != parked:
        raise typer.BadParameter("name one ID, or write --parked for all that were refused")
    with failing_clearly():
        if id is not None:
            with _holding(id, state, lane, side, quarantined=False, destination=destination) as (
                place,
                admin,
                whole,
            ):
                _resend(place, admin, whole, destination)
            return
        for place in _delivering(_spools(state, lane, side), destination):
            with SpoolAdmin(place.directory) as admin:
                _resend(place, admin, None, destination)


def _resend(place: Place, admin: SpoolAdmin, id: str | None, destination: str | None) -> None:
    """Send one object or all parked ones again; say what stays because nobody delivers it."""
    count = admin.resend(id, destination=destination, parked_only=id is None)
    unserved = {name for name, served in admin.destinations().items() if not served}
    if destination is not None:
        unserved &= {destination}
    if destination not in unserved:
        typer.echo(f"{count} deliveries of {place}, wait again")
    parked = admin.parked(id)
    for name in sorted(unserved):
        if name in parked or name == destination:
            typer.echo(
                f"{place}: nothing is sent to {name}, which is not configured; {parked.get(name, 0)} "
                f"deliveries stay parked: configure {name} again, or "
                f"medferry spool drop --destination {name}",
                err=True,
            )
    if destination in unserved:
        raise typer.Exit(EXIT_FAILED)


@spool.command("drop")
def spool_drop(
    id: Annotated[str | None, typer.Argument(metavar="[ID]", help="An object's id.")] = None,
    state: State = "./medferry-state",
    lane: LaneName = None,
    side: SideOption = None,
    destination: Annotated[str | None, typer.Option(help="Only for this destination.")] = None,
    yes: Yes = False,
) -> None:
    """Give up parked deliveries, of one object or of all to a destination: nobody will get them from here.

    What is left of an object is removed when `spool.retention_seconds` are over; until then it can be sent
    again. The relay's log names every object that was dropped.
    """
    if id is None and destination is None:
        raise typer.BadParameter("name one ID, or all that is parked for one --destination")
    with failing_clearly():
        places = _delivering(_spools(state, lane, side), destination)
        whole = None
        if id is not None:
            whole, places = _holders(id, places, quarantined=False)
        parked = [(place, name, n) for place in places for name, n in _parked(place, whole, destination)]
        if not parked:
            what = f"object {id}" if id is not None else f"what waits for {destination}"
            raise SpoolError(f"nothing of {what} is parked, and nothing else can be dropped: see spool ls")
        for place, name, count in parked:
            if not yes:
                typer.confirm(
                    f"Give up {count} deliveries to {name} ({place}){f' of {whole}' if whole else ''}?",
                    abort=True,
                )
            with SpoolAdmin(place.directory) as admin:
                typer.echo(
                    f"{admin.drop(whole, destination=name)} deliveries to {name} ({place}) are dropped"
                )


def _parked(place: Place, id: str | None, destination: str | None) -> list[tuple[str, int]]:
    """Destinations for which something is parked in one spool, and how much."""
    with SpoolAdmin(place.directory) as admin:
        return [(name, n) for name, n in admin.parked(id).items() if destination in (None, name)]


def _quarantine_row(place: Place, item: Quarantined) -> dict[str, Any]:
    when = _when(item.quarantined_at)
    return {"lane": place.lane, "side": place.side.value, **asdict(item), "when": when}


@quarantine.command("ls")
def quarantine_ls(
    state: State = "./medferry-state",
    lane: LaneName = None,
    side: SideOption = None,
    limit: Limit = 100,
    as_json: Json = False,
) -> None:
    """List refused objects and why."""
    rows = []
    with failing_clearly():
        for place in _spools(state, lane, side):
            with SpoolAdmin(place.directory) as admin:
                rows += [_quarantine_row(place, item) for item in admin.quarantine_ls(limit=limit)]
    columns = {
        "id": "id",
        "lane": "lane",
        "side": "side",
        "when": "since",
        "reason": "reason",
        "detail": "detail",
    }
    _print(rows, columns, as_json)


@quarantine.command("show")
def quarantine_show(
    id: Id,
    state: State = "./medferry-state",
    lane: LaneName = None,
    side: SideOption = None,
    as_json: AlwaysJson = True,
) -> None:
    """Show one refused object, as JSON."""
    with failing_clearly(), _holding(id, state, lane, side, quarantined=True) as (place, admin, whole):
        typer.echo(json.dumps(_quarantine_row(place, admin.quarantine_show(whole)), indent=2))


@quarantine.command("release")
def quarantine_release(
    id: Id,
    state: State = "./medferry-state",
    lane: LaneName = None,
    side: SideOption = None,
) -> None:
    """Let a refused object pass after all. The side that refused it takes it in; the other still checks."""
    with failing_clearly(), _holding(id, state, lane, side, quarantined=True) as (place, admin, whole):
        item = admin.release(whole)
        typer.echo(f"{item.id} of {place}, is released; it goes on when the relay runs")


@quarantine.command("drop")
def quarantine_drop(
    id: Id,
    state: State = "./medferry-state",
    lane: LaneName = None,
    side: SideOption = None,
    yes: Yes = False,
) -> None:
    """Remove a refused object for good."""
    with failing_clearly(), _holding(id, state, lane, side, quarantined=True) as (place, admin, whole):
        if not yes:
            typer.confirm(f"Remove {whole} of {place}, for good?", abort=True)
        typer.echo(f"{admin.drop_quarantined(whole).id} is removed")
