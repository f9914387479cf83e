"""How a command ends when it does not end well."""

from __future__ import annotations

import sys
from typing import NoReturn

import typer

# Beyond 0, 1 and 2 they are those of sysexits.h.
EXIT_FAILURE = 1
EXIT_UNAVAILABLE = 69
EXIT_CONFIG = 78


def fail(message: str, remedy: str, code: int) -> NoReturn:
    """End the process with a line on stderr, a second one if there is a remedy, and this exit code."""
    typer.echo(f"viewer-worker: {message}" + (f"\n{remedy}" if remedy else ""), err=True)
    sys.exit(code)
