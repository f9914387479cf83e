"""`viewer-worker run` and `migrate`."""

from __future__ import annotations

import errno
import signal
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from worker.cli.exits import EXIT_CONFIG, EXIT_FAILURE, fail
from worker.cli.options import EnvFile, LogLevel, plural, read_settings

if TYPE_CHECKING:
    from worker.counters.flush.outcome import FlushOutcome


def run(
    once: Annotated[bool, typer.Option("--once", help="Flush everything once, then exit.")] = False,
    env_file: EnvFile = None,
    log_level: LogLevel = None,
) -> None:
    """Run the worker until SIGTERM or Ctrl-C. It waits for servers that cannot be reached.

    Settings come from environment variables, such as DATABASE_URL and REDIS_URL.
    Those that are not set there come from the file .env in the working folder, or from --env-file.
    NAME_FILE is the path of a file that has the value of NAME.
    viewer-worker config prints all settings; env.example explains them.
    """
    if not once:
        # Until the worker handles signals itself there is nothing to flush: exit immediately.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    settings = read_settings(env_file, log_level)
    from worker.runtime.event_loop import run_async

    if once:
        if not settings.counts_views:
            fail("--once flushes views, and view_counts is not in PIPELINES", "", EXIT_CONFIG)
        from worker.app import commands

        _report_once(run_async(commands.run_once(settings)))
        return
    from worker.app import serve as app

    try:
        clean = run_async(app.run(settings))
    except OSError as error:
        where = f"{settings.health_check_host}:{settings.health_check_port}"
        name = (
            "HEALTH_CHECK_PORT to a free port"
            if error.errno == errno.EADDRINUSE
            else "HEALTH_CHECK_HOST to an address of this host"
        )
        fail(f"cannot listen on {where}: {error.strerror}", f"Set {name}.", EXIT_FAILURE)
    raise typer.Exit(0 if clean else EXIT_FAILURE)


def _report_once(outcome: FlushOutcome) -> None:
    from worker.counters.flush.outcome import Flushed
    from worker.counters.flush.verdict import Hold

    match outcome:
        case Flushed(_, keys, views):
            typer.echo(f"flushed {views} {plural(views, 'view')} of {keys} {plural(keys, 'id')}")
        case Hold(cause, remedy):
            fail(f"on hold: {cause}", remedy, EXIT_FAILURE)
        case _:
            fail(
                "another worker holds the lease and flushes the views",
                "To flush with this command, stop that worker first.",
                EXIT_FAILURE,
            )


def migrate(
    status: Annotated[
        bool,
        typer.Option("--status", help="Only print the current schema revision and the one that is needed."),
    ] = False,
    env_file: EnvFile = None,
    log_level: LogLevel = None,
) -> None:
    """Create the tables, or bring them up to date. With --status, exit code 0 when they are up to date, else 1."""
    settings = read_settings(env_file, log_level)
    from worker.app import commands
    from worker.runtime.event_loop import run_async

    before, after = run_async(commands.migrate(settings, only_status=status))
    typer.echo(f"database: {before.current or 'no tables'}, needed: {before.head}")
    if status:
        before.require_current()
    elif before.current != after.current:
        typer.echo(f"migrated to {after.current}")
    else:
        typer.echo("nothing to do")
