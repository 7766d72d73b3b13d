"""How `medferry status` shows a relay to a person, and when it counts as well.

Takes the supervisor's JSON apart and prints tables. Never asks a process itself.
"""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

GOOD, BAD, PENDING = "green", "red", "yellow"
_COLOURS = {"running": GOOD, "ready": GOOD, "starting": PENDING, "draining": PENDING}

RESTARTS_UNWELL = 3
STABLE_SECONDS = 60.0
"""A process that was started again so often, and lately, is shown as not well."""


def well(state: dict[str, Any]) -> bool:
    """Whether every lane runs, no link is silent or lossy, and every destination is reachable."""
    return not complaints(state)


def complaints(state: dict[str, Any]) -> list[str]:
    """What an operator should look at, one sentence each."""
    found = [f"lane {name} is not started: {why}" for name, why in state["not_started"].items()]
    for lane in state["lanes"]:
        name = lane["name"]
        if lane["state"] != "running":
            found.append(f"lane {name} is {lane['state']}")
        for part in ("source", "valve", "sink"):
            restarts = lane[part]["restarts"]
            if restarts >= RESTARTS_UNWELL and lane[part]["up_seconds"] < STABLE_SECONDS:
                found.append(
                    f"lane {name}: its {part} was started again {restarts} times, lately; see its log"
                )
        link = lane["sink"]["figures"].get("link", {})
        if link.get("silent"):
            found.append(f"lane {name}: nothing crosses the link, not even heartbeats")
        if link.get("missing"):
            found.append(f"lane {name}: {link['missing']} fragments were lost on the link")
        refused = sum(link.get("refused", {}).values())
        if refused:
            found.append(f"lane {name}: the sink refused {refused} fragments; look at its log")
        for side in ("source", "sink"):
            found += [f"lane {name}: {text}" for text in lane[side]["figures"].get("complaints", [])]
    return found


def print_status(state: dict[str, Any], console: Console) -> None:
    """Print the whole state for a person."""
    console.print(
        f"relay [bold]{state['relay']}[/] is {_coloured(state['state'])}, "
        f"up {duration(state['up_seconds'])}, pid {state['pid']}; {state['claim']}"
    )
    for lane in state["lanes"]:
        _print_lane(lane, console)
    problems = complaints(state)
    for problem in problems:
        console.print(f"[red]![/] {escape(_plain(problem))}", highlight=False)
    if not problems:
        console.print("[green]All is well.[/]")


def _coloured(word: str) -> str:
    return f"[{_COLOURS.get(word, BAD)}]{word}[/]"


def duration(seconds: float) -> str:
    """``42 s``, ``3 min``, ``2 h 5 min``, ``4 d 3 h``."""
    minutes, hours, days = int(seconds // 60), int(seconds // 3600), int(seconds // 86_400)
    if minutes < 1:
        return f"{seconds:.0f} s"
    if hours < 1:
        return f"{minutes} min"
    if days < 1:
        return f"{hours} h {minutes % 60} min"
    return f"{days} d {hours % 24} h"


def _print_lane(lane: dict[str, Any], console: Console) -> None:
    title = (
        f"lane {lane['name']} ({lane['kind']}{', lab' if lane['lab'] else ''}) is {_coloured(lane['state'])}"
    )
    processes = Table(title=title, title_justify="left")
    for column in ("process", "state", "pid", "up", "restarts", "uid", "network", "no new privileges"):
        processes.add_column(column)
    for name in ("source", "valve", "sink"):
        part, isolation = lane[name], lane[name]["isolation"]
        uid = isolation["uid"] + (" (own)" if isolation["own uid"] else " (shared)")
        processes.add_row(
            name,
            _coloured(part["state"]),
            str(part["pid"] or "-"),
            duration(part["up_seconds"]),
            str(part["restarts"]),
            uid,
            isolation["network namespace"],
            "yes" if isolation["no new privileges"] else "no",
        )
    console.print(processes)
    _print_figures(lane, console)


def _print_figures(lane: dict[str, Any], console: Console) -> None:
    """The figures of both sides as one table; a table of them (per stream, per destination) as rows of it."""
    table = Table("figure", "source", "sink", show_header=True)
    columns = [dict(_flat(lane[side]["figures"])) for side in ("source", "sink")]
    for name in dict.fromkeys([*columns[0], *columns[1]]):
        table.add_row(
            *(escape(_plain(str(text))) for text in (name, *(item.get(name, "") for item in columns)))
        )
    console.print(table)


def _plain(text: str) -> str:
    """A worker's word for a terminal: nothing in it moves the cursor or changes colours."""
    return "".join(character if character.isprintable() else "?" for character in text)


def _flat(figures: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for name, value in figures.items():
        if name == "complaints":
            continue
        if isinstance(value, dict):
            if {"p50_ms", "p99_ms"} <= value.keys():
                shown = f"p50 {value['p50_ms']} p99 {value['p99_ms']} max {value['max_ms']} ms"
                rows.append((prefix + name, f"{shown} (of {value['count']:.0f})"))
            else:
                rows += _flat(value, f"{prefix}{name} ")
        elif isinstance(value, list):
            rows.append((prefix + name, ", ".join(str(item) for item in value) or "none"))
        else:
            rows.append((prefix + name, value))
    return rows
