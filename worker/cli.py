"""The command line. Heavy imports live inside the commands, so that `--help` is quick."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from datetime import timedelta

    from worker.settings import Settings

# Exit codes beyond 0, 1 and 2 are those of sysexits.h.
EXIT_FAILURE = 1
EXIT_UNAVAILABLE = 69
EXIT_CONFIG = 78

cli = typer.Typer(
    name="viewer-worker",
    help="Takes the views that applications count in Redis and makes them durable in Postgres, each view exactly once.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

EnvFile = Annotated[Path | None, typer.Option("--env-file", help="Read settings from this file instead of .env.")]
LogLevel = Annotated[str | None, typer.Option("--log-level", help="debug, info, warning or error.")]


def main() -> None:
    """Entry point. Turns the errors that a user can act on into a line on stderr and an exit code."""
    from worker.errors import InvalidSettings, Unavailable, ViewerWorkerError

    try:
        cli()
    except InvalidSettings as error:
        _fail(str(error), "", EXIT_CONFIG)
    except Unavailable as error:
        _fail(str(error), error.remedy, EXIT_UNAVAILABLE)
    except ViewerWorkerError as error:
        _fail(str(error), error.remedy, EXIT_FAILURE)
    except KeyboardInterrupt:
        sys.exit(130)


def _fail(message: str, remedy: str, code: int) -> None:
    typer.echo(f"viewer-worker: {message}" + (f"\n{remedy}" if remedy else ""), err=True)
    sys.exit(code)


def _settings(env_file: Path | None, log_level: str | None) -> Settings:
    from worker.observability.logs import configure_logs
    from worker.settings import load_settings

    settings = load_settings(env_file, log_level=log_level)
    configure_logs(settings.log_level)
    return settings


@cli.callback(invoke_without_command=True)
def common(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        from worker import __version__

        typer.echo(f"viewer-worker {__version__}")
        raise typer.Exit


@cli.command()
def run(
    once: Annotated[bool, typer.Option("--once", help="One full flush, then exit.")] = False,
    env_file: EnvFile = None,
    log_level: LogLevel = None,
) -> None:
    """Run the worker until SIGTERM or Ctrl-C. Servers that are missing are waited for."""
    settings = _settings(env_file, log_level)
    from worker import app

    if once:
        _report_once(app.run_async(app.run_once(settings)))
        return None
    try:
        clean = app.run_async(app.run(settings))
    except OSError as error:
        where = f"{settings.health_check_host}:{settings.health_check_port}"
        return _fail(f"cannot listen on {where}: {error.strerror}", "Set HEALTH_CHECK_PORT to a free port.", 1)
    raise typer.Exit(0 if clean else EXIT_FAILURE)


def _report_once(outcome: Any) -> None:
    from worker.counters.flush import Flushed
    from worker.counters.recovery import Hold

    match outcome:
        case Flushed(_, keys, views):
            typer.echo(f"flushed {views} views of {keys} ids")
        case Hold(cause, remedy):
            _fail(f"on hold: {cause}", remedy, EXIT_FAILURE)
        case _:
            _fail("another worker holds the lease and does the flushing", "Leave it to it, or stop it.", EXIT_FAILURE)


@cli.command()
def migrate(
    status: Annotated[bool, typer.Option("--status", help="Only say what the database has and needs.")] = False,
    env_file: EnvFile = None,
    log_level: LogLevel = None,
) -> None:
    """Create the tables, or bring them up to date. With --status: exit code 0 when they are, 1 when not."""
    settings = _settings(env_file, log_level)
    from worker import app

    before, after = app.run_async(app.migrate(settings, only_status=status))
    typer.echo(f"database: {before.current or 'no tables'}, needed: {before.head}")
    if status:
        before.require_current()
    elif before.current != after.current:
        typer.echo(f"migrated to {after.current}")
    else:
        typer.echo("nothing to do")


@cli.command()
def config(env_file: EnvFile = None, log_level: LogLevel = None) -> None:
    """Print the effective settings, secrets masked."""
    settings = _settings(env_file, log_level)
    idle = settings.without_effect()
    for name, value in settings.shown().items():
        typer.echo(f"{name}={value}" + ("  # no effect in this version" if name in idle else ""))


@cli.command()
def healthcheck(env_file: EnvFile = None, log_level: LogLevel = None) -> None:
    """Ask the running worker's /livez; for a container's HEALTHCHECK. Exit code 0 when it answers well, else 1."""
    import http.client

    settings = _settings(env_file, log_level)
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.health_check_host, settings.health_check_host)  # noqa: S104
    connection = http.client.HTTPConnection(host, settings.health_check_port, timeout=3)
    try:
        connection.request("GET", "/livez")
        response = connection.getresponse()
        typer.echo(response.read().decode())
    except (OSError, http.client.HTTPException) as error:
        return _fail(f"no answer from {host}:{settings.health_check_port} ({type(error).__name__})", "", EXIT_FAILURE)
    raise typer.Exit(0 if response.status == 200 else EXIT_FAILURE)


def _duration(text: str) -> timedelta:
    from worker.settings import parse_duration

    try:
        return parse_duration(text)  # type: ignore[return-value]
    except ValueError as error:
        raise typer.BadParameter(f"expected {error}") from None


@cli.command()
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
        return _fail(f"{error.name} is not installed", "Run: pip install 'viewer-worker[dev]'", EXIT_FAILURE)
    raise typer.Exit(0 if exact else EXIT_FAILURE)
