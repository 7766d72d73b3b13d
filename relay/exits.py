"""How every medferry command ends: its exit status, and an error of ours as a message instead of a trace."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import typer

from relay.errors import ConfigError, MedferryError

EXIT_FAILED, EXIT_WRONG, EXIT_UNWELL = 1, 2, 3


@contextlib.contextmanager
def failing_clearly() -> Iterator[None]:
    """Turn our own errors into a message and an exit status."""
    try:
        yield
    except ConfigError as error:
        for problem in error.problems:
            typer.echo(problem, err=True)
        raise typer.Exit(EXIT_WRONG) from None
    except MedferryError as error:
        typer.echo(f"medferry: {error}", err=True)
        raise typer.Exit(EXIT_FAILED) from None
