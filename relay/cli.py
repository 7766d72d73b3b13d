"""The command line: `medferry run`, `check`, `status`, `doctor`, `demo`, `bench`, `spool`, `quarantine`.

Readable by default, ``--json`` for scripts. Exit status: 0 done, 1 it could not be done (the message says
why), 2 the command or the configuration is wrong, 3 `status` found a relay that is not well.
"""

from __future__ import annotations

import signal
import sys

if sys.argv[1:2] == ["run"]:
    # The imports below take a quarter of a second, in which SIGHUP would end the relay. It waits instead for
    # the supervisor, which lets it through once it can read the file again.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})

import asyncio
import json
import os
from typing import Annotated

import typer
from rich.console import Console

from relay import config
from relay.bench_cli import bench
from relay.confine import possible
from relay.errors import ConfigError
from relay.exits import EXIT_UNWELL, EXIT_WRONG, failing_clearly
from relay.log import FORMATS, LEVELS, configure
from relay.spool_cli import quarantine, spool
from relay.status import print_status, well
from relay.supervisor import CLAIM, LogSettings, Supervisor, ask

app = typer.Typer(
    name="medferry",
    help="Carries DICOM studies and live media one way between two networks that must not be joined.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(bench, name="bench")
app.add_typer(spool, name="spool")
app.add_typer(quarantine, name="quarantine")

ConfigFile = Annotated[str, typer.Argument(metavar="FILE", help="The configuration, in TOML.")]
StateDirectory = Annotated[
    str, typer.Option("--state", envvar="MEDFERRY_STATE", help="The relay's state directory.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]


@app.command()
def run(
    file: ConfigFile,
    log_style: Annotated[str, typer.Option("--log", help="text or json.")] = "text",
    log_level: Annotated[str, typer.Option("--log-level", help="debug, info, warning or error.")] = "info",
) -> None:
    """Run a relay in the foreground. SIGTERM drains, SIGHUP reads FILE again."""
    if log_style not in FORMATS:
        raise typer.BadParameter("write text or json", param_hint="--log")
    if log_level not in LEVELS:
        raise typer.BadParameter(f"write one of {', '.join(LEVELS)}", param_hint="--log-level")
    configure(log_style, log_level)
    with failing_clearly():
        settings = config.read(file)
        logs = LogSettings("json" if log_style == "json" else "text", log_level)
        asyncio.run(Supervisor(os.path.abspath(file), settings, logs).run())


@app.command()
def check(file: ConfigFile, as_json: Json = False) -> None:
    """Check a configuration without running it: every error, with what to write instead."""
    problems: list[str] = []
    try:
        settings = config.read(file)
        problems = [f"{file}: {problem}" for problem in config.unreadable(settings)]
    except ConfigError as error:
        problems = list(error.problems)
    if as_json:
        typer.echo(json.dumps({"ok": not problems, "problems": problems}))
    elif problems:
        for problem in problems:
            typer.echo(problem, err=True)
    else:
        typer.echo(f"{file}: ok, {len(settings.lanes)} lane(s)")
    raise typer.Exit(EXIT_WRONG if problems else 0)


@app.command()
def status(state: StateDirectory = "./medferry-state", as_json: Json = False) -> None:
    """Show lanes, figures, latencies and the isolation in force. Exit status 3 if something is not well."""
    with failing_clearly():
        answer = ask(state)
    if as_json:
        typer.echo(json.dumps(answer))
    else:
        print_status(answer, Console())
    raise typer.Exit(0 if well(answer) else EXIT_UNWELL)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what isolation this host, and this user, can give."""
    measures = possible()
    if as_json:
        typer.echo(json.dumps({"claim": CLAIM, "measures": measures}))
        return
    typer.echo(f"On one machine medferry claims: {CLAIM}.")
    for name, available in measures.items():
        typer.echo(f"  {'yes' if available else 'no ':<4} {name}")
    if not all(measures.values()):
        typer.echo("Run as root for what is missing.")


@app.command()
def demo(
    seconds: Annotated[float, typer.Option(min=3, max=600, help="How long the camera runs.")] = 8,
    keep: Annotated[bool, typer.Option(help="Let relay and camera run on afterwards, until Ctrl-C.")] = False,
) -> None:
    """Run a relay on loopback and send studies and a camera through it."""
    # The one place where the core's command reaches into the adapters, and only when asked to.
    from relay.demo import show

    with failing_clearly():
        raise typer.Exit(asyncio.run(show(seconds, keep)))


def main() -> None:
    """Entry of the `medferry` command."""
    app()


if __name__ == "__main__":
    main()
