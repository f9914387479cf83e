"""`viewer-worker dev`."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Annotated

import typer

from worker.cli.exits import EXIT_FAILURE, fail
from worker.cli.options import duration


def dev(
    for_: Annotated[
        str | None,
        typer.Option("--for", metavar="DURATION", help="Stop after this time, such as 20s or 5m; otherwise at Ctrl-C."),
    ] = None,
    rate: Annotated[int, typer.Option("--rate", min=1, max=50_000, help="How many views to send per second.")] = 2000,
    servers_only: Annotated[
        bool, typer.Option("--servers-only", help="Only start the two servers, until Ctrl-C.")
    ] = False,
    traffic: Annotated[
        Path | None,
        typer.Option("--traffic", metavar="FILE", help="Send the views of this access log (combined format)."),
    ] = None,
    folder: Annotated[Path, typer.Option("--data", help="Folder for the servers' data and the logs.")] = Path(".dev"),
) -> None:
    """Run a demo: embedded Redis and Postgres, a worker, generated views, a kill -9, and a pass/fail report at the end.

    Some ids are INCRed and PUBLISHed, some only INCRed, some only PUBLISHed.
    The report compares the views sent with the views in Postgres, id by id, and the records of each pipeline with its
    rows. Exit code 1 when an INCRed id differs, an id has too many views, views stay pending, a row differs, or the
    worker fails.
    """
    # The demo calls over gRPC, and starts processes. gRPC need not work in these.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    seconds = duration(for_, "--for").total_seconds() if for_ else None
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
        fail(f"{error.name} is not installed", "Run: pip install 'viewer-worker[demo,grpc]'", EXIT_FAILURE)
    raise typer.Exit(0 if exact else EXIT_FAILURE)
