"""Exit codes, and how a command ends with an error."""

from __future__ import annotations

import sys
from typing import NoReturn

import typer

# Codes above 2 are those of sysexits.h.
EXIT_FAILURE = 1
EXIT_UNAVAILABLE = 69
EXIT_CONFIG = 78


def fail(message: str, remedy: str, code: int) -> NoReturn:
    """Print the message and the fix (`remedy`, may be empty) on stderr, and exit with this code."""
    typer.echo(f"viewer-worker: {message}" + (f"\n{remedy}" if remedy else ""), err=True)
    sys.exit(code)
