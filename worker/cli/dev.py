"""`viewer-worker dev`."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Annotated

import typer

from worker.cli.exits import EXIT_FAILURE, fail
from worker.cli.options import duration


def dev(
    for_: Annotated[
        str | None, typer.Option("--for", metavar="DURATION", help="Stop after this time (20s, 5m).")
    ] = None,
    rate: Annotated[int, typer.Option("--rate", min=1, max=50_000, help="Views a second to send.")] = 2000,
    servers_only: Annotated[
        bool, typer.Option("--servers-only", help="Only lend the two servers, until Ctrl-C.")
    ] = False,
    traffic: Annotated[
        Path | None, typer.Option("--traffic", metavar="FILE", help="Views from this access log (combined format).")
    ] = None,
    folder: Annotated[Path, typer.Option("--data", help="Where servers and logs are kept.")] = Path(".dev"),
) -> None:
    """Try it out: embedded Redis and Postgres, a worker, demo viewers, a kill -9, and a verdict at the end.

    Some ids are INCRed and PUBLISHed, some only INCRed, some only PUBLISHed. The verdict compares what was sent with
    what is in Postgres, id by id; exit code 1 when an id that was INCRed differs, or any id has too many.
    """
    seconds = duration(for_).total_seconds() if for_ else None
    from worker.dev.demo import Demo
    from worker.dev.servers_only import run_servers
    from worker.dev.viewers import Audience, Popular, Recorded
    from worker.observability.logs import configure_logs
    from worker.runtime.event_loop import run_async

    configure_logs("warning")
    try:
        if servers_only:
            return run_async(run_servers(folder.resolve(), typer.echo))
        audience: Audience = Recorded(traffic) if traffic is not None else Popular(random.Random())
        exact = run_async(Demo(folder, audience, rate, seconds).run())
    except ModuleNotFoundError as error:
        fail(f"{error.name} is not installed", "Run: pip install 'viewer-worker[demo]'", EXIT_FAILURE)
    raise typer.Exit(0 if exact else EXIT_FAILURE)
