"""`medferry spool` and `medferry quarantine`: what waits, what was refused, what an operator does about it.

Works on the spools below a state directory whether the relay runs or not.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from relay.errors import SpoolError
from relay.exits import failing_clearly
from relay.spool_admin import Listed, Quarantined, SpoolAdmin
from relay.spool_types import DeliveryState

spool = typer.Typer(help="Objects in custody: list, show, send again.", no_args_is_help=True)
quarantine = typer.Typer(help="Refused objects: list, show, release, drop.", no_args_is_help=True)

State = Annotated[str, typer.Option("--state", envvar="MEDFERRY_STATE", help="The relay's state directory.")]
LaneName = Annotated[str | None, typer.Option("--lane", help="Only this lane.")]
SideOption = Annotated[str | None, typer.Option("--side", help="Only source or sink.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
Id = Annotated[str, typer.Argument(metavar="ID", help="An object's id or the beginning of it.")]
Limit = Annotated[int, typer.Option(help="At most so many.")]

SPOOL_DIRECTORY = "spool"
STATES: dict[str, DeliveryState] = {state.name.lower(): state for state in DeliveryState}


def _spools(state: str, lane: str | None, side: str | None) -> Iterator[tuple[str, str, str]]:
    """Lane, side and directory of every spool below `state` that is asked for."""
    lanes = os.path.join(state, "lanes")
    try:
        names = sorted(os.listdir(lanes))
    except OSError:
        raise SpoolError(f"no spools below {state}: name the relay's state directory with --state") from None
    for name in names:
        for which in ("source", "sink"):
            directory = os.path.join(lanes, name, which, SPOOL_DIRECTORY)
            wanted = lane in (None, name) and side in (None, which)
            if wanted and os.path.exists(os.path.join(directory, "index.db")):
                yield name, which, directory


@contextlib.contextmanager
def _holding(
    id: str, state: str, lane: str | None, side: str | None, *, quarantined: bool
) -> Iterator[tuple[str, str, SpoolAdmin]]:
    """The one spool that knows the object `id`; both sides of a lane know it, so the sink is taken first."""
    for name, which, directory in sorted(_spools(state, lane, side), key=lambda found: found[1]):
        with SpoolAdmin(directory) as admin:
            try:
                _ = admin.quarantine_show(id) if quarantined else admin.show(id)
            except SpoolError:
                continue
            yield name, which, admin
            return
    raise SpoolError(f"no object {id}: see medferry {'quarantine' if quarantined else 'spool'} ls")


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _object_row(name: str, side: str, item: Listed) -> dict[str, Any]:
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
    return {"lane": name, "side": side, **entry, "deliveries": deliveries}


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
        for name, which, directory in _spools(state, lane, side):
            with SpoolAdmin(directory) as admin:
                wanted = STATES[only] if only else None
                listed = admin.ls(state=wanted, destination=destination, limit=limit)
                rows += [_object_row(name, which, item) for item in listed]
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
) -> None:
    """Show one object and how far its deliveries are, as JSON."""
    with failing_clearly(), _holding(id, state, lane, side, quarantined=False) as (name, which, admin):
        typer.echo(json.dumps(_object_row(name, which, admin.show(id)), indent=2))


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
            with _holding(id, state, lane, side, quarantined=False) as (name, which, admin):
                count = admin.resend(id, destination=destination)
                typer.echo(f"{count} deliveries of lane {name}, {which}, wait again")
            return
        for name, which, directory in _spools(state, lane, side):
            with SpoolAdmin(directory) as admin:
                count = admin.resend(destination=destination, parked_only=True)
                typer.echo(f"{count} deliveries of lane {name}, {which}, wait again")


def _quarantine_row(name: str, side: str, item: Quarantined) -> dict[str, Any]:
    return {"lane": name, "side": side, **asdict(item), "when": _when(item.quarantined_at)}


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
        for name, which, directory in _spools(state, lane, side):
            with SpoolAdmin(directory) as admin:
                rows += [_quarantine_row(name, which, item) for item in admin.quarantine_ls(limit=limit)]
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
) -> None:
    """Show one refused object, as JSON."""
    with failing_clearly(), _holding(id, state, lane, side, quarantined=True) as (name, which, admin):
        typer.echo(json.dumps(_quarantine_row(name, which, admin.quarantine_show(id)), indent=2))


@quarantine.command("release")
def quarantine_release(
    id: Id,
    state: State = "./medferry-state",
    lane: LaneName = None,
    side: SideOption = None,
) -> None:
    """Let a refused object pass after all. The side that refused it takes it in; the other still checks."""
    with failing_clearly(), _holding(id, state, lane, side, quarantined=True) as (name, which, admin):
        item = admin.release(id)
        typer.echo(f"{item.id} of lane {name}, {which}, is released; it goes on when the relay runs")


@quarantine.command("drop")
def quarantine_drop(
    id: Id,
    state: State = "./medferry-state",
    lane: LaneName = None,
    side: SideOption = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Remove a refused object for good."""
    with failing_clearly(), _holding(id, state, lane, side, quarantined=True) as (name, which, admin):
        if not yes:
            typer.confirm(f"Remove {id} of lane {name}, {which}, for good?", abort=True)
        typer.echo(f"{admin.drop_quarantined(id).id} is removed")
