"""`viewer-worker dev`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from worker.cli.exits import EXIT_FAILURE, fail

if TYPE_CHECKING:
    from datetime import timedelta


def dev(
    for_: Annotated[
        str | None, typer.Option("--for", metavar="DURATION", help="Stop after this time (20s, 5m).")
    ] = None,
    rate: Annotated[int, typer.Option("--rate", min=1, max=50_000, help="Views a second to send.")] = 2000,
    folder: Annotated[Path, typer.Option("--data", help="Where servers and logs are kept.")] = Path(".dev"),
) -> None:
    """Try it out: embedded Redis and Postgres, a worker, demo viewers, a kill -9, and a verdict at the end.

    The verdict compares what was sent with what is in Postgres, id by id; exit code 1 on any difference.
    """
    duration = _duration(for_).total_seconds() if for_ else None
    from worker.app import run_async
    from worker.dev.demo import Demo
    from worker.observability.logs import configure_logs

    configure_logs("warning")
    try:
        exact = run_async(Demo(folder, rate, duration).run())
    except ModuleNotFoundError as error:
        fail(f"{error.name} is not installed", "Run: pip install 'viewer-worker[dev]'", EXIT_FAILURE)
    raise typer.Exit(0 if exact else EXIT_FAILURE)


def _duration(text: str) -> timedelta:
    from worker.settings import parse_duration

    try:
        return parse_duration(text)  # type: ignore[return-value]
    except ValueError as error:
        raise typer.BadParameter(f"expected {error}") from None
