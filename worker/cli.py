"""The command line. Heavy imports live inside the commands, so that `--help` is quick."""

from __future__ import annotations

import errno
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from datetime import timedelta

    from worker.counters.flush import Busy, Flushed
    from worker.counters.recovery import Hold
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
    except Exception as error:
        if not _is_database_error(error):
            raise
        from worker.db.errors import describe

        _fail(f"Postgres refused: {describe(error)}", "Check the rights of the user in DATABASE_URL.", EXIT_FAILURE)
    except KeyboardInterrupt:
        sys.exit(130)


def _is_database_error(error: Exception) -> bool:
    return any(kind.__module__.partition(".")[0] in ("sqlalchemy", "asyncpg") for kind in type(error).__mro__)


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
    if not once:
        # Until the worker listens to signals itself there is nothing to drain.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    settings = _settings(env_file, log_level)
    from worker import app

    if once:
        _report_once(app.run_async(app.run_once(settings)))
        return None
    try:
        clean = app.run_async(app.run(settings))
    except OSError as error:
        where = f"{settings.health_check_host}:{settings.health_check_port}"
        name = "HEALTH_CHECK_PORT to a free port" if error.errno == errno.EADDRINUSE else "HEALTH_CHECK_HOST"
        return _fail(f"cannot listen on {where}: {error.strerror}", f"Set {name}.", EXIT_FAILURE)
    raise typer.Exit(0 if clean else EXIT_FAILURE)


def _report_once(outcome: Flushed | Busy | Hold) -> None:
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
    for name, value in settings.shown().items():
        typer.echo(f"{name}={value}")


@cli.command()
def check(
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
    env_file: EnvFile = None,
    log_level: LogLevel = None,
) -> None:
    """Look at everything the worker relies on, and say what to do about what is wrong.

    Exit code 0 when nothing is, 1 when something is, 69 when a server is out of reach.
    """
    settings = _settings(env_file, log_level)
    import json
    from dataclasses import asdict

    from worker import app
    from worker.checkup import Level

    findings = app.run_async(app.check(settings))
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        for finding in findings:
            colour = {Level.OK: "green", Level.WARNING: "yellow", Level.FAILURE: "red"}[finding.level]
            typer.echo(typer.style(f"{finding.level:8}", fg=colour) + f"{finding.name:18}{finding.found}")
            if finding.remedy:
                typer.echo(f"{'':26}{finding.remedy}")
    failed = {finding.name for finding in findings if finding.level is Level.FAILURE}
    raise typer.Exit(EXIT_UNAVAILABLE if failed & {"redis", "postgres"} else EXIT_FAILURE if failed else 0)


@cli.command()
def adopt(
    count_pending: Annotated[
        bool, typer.Option("--count-pending", help="The pending views are new: count them.")
    ] = False,
    discard_pending: Annotated[
        bool, typer.Option("--discard-pending", help="The pending views are in Postgres already: subtract them.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    env_file: EnvFile = None,
    log_level: LogLevel = None,
) -> None:
    """End a hold: show what Redis and Postgres say, and go on from there. Without an option, only show it."""
    if count_pending and discard_pending:
        raise typer.BadParameter("choose one of --count-pending and --discard-pending")
    settings = _settings(env_file, log_level)
    from worker import app

    app.run_async(_adopt(settings, decided=count_pending or discard_pending, discard=discard_pending, yes=yes))


async def _adopt(settings: Settings, *, decided: bool, discard: bool, yes: bool) -> None:
    from worker import app
    from worker.counters.adopt import describe_marker

    async with app.counters_for_a_command(settings) as counters:
        situation = await counters.adoption.look()
        flushes = 0 if situation.source is None else situation.source.last_flush_id
        examples = ", ".join(f"{vod_id}: {count}" for vod_id, count in situation.examples.items())
        typer.echo(f"hold      {situation.hold.cause if situation.hold else 'none: Redis and Postgres agree'}")
        typer.echo(f"marker    {describe_marker(situation.marker)}")
        typer.echo(f"Postgres  {flushes} flushes")
        typer.echo(f"pending   {situation.pending_views} views of {situation.pending_keys} ids")
        if examples:
            typer.echo(f"          {examples}")
        if situation.hold is None or not decided:
            return
        typer.echo(
            f"\n{situation.pending_views} pending views will be "
            + (
                "subtracted in Redis without being counted. Views that were in no flush are lost by it."
                if discard
                else "counted as new. Views that are in Postgres already are counted twice by it."
            )
        )
        if not yes and not (sys.stdin.isatty() and typer.confirm("Go on?")):
            typer.echo("Nothing was changed." + ("" if sys.stdin.isatty() else " Use --yes where nobody can answer."))
            raise typer.Exit(EXIT_FAILURE)
        discarded = await counters.adoption.adopt(situation, discard=discard)
        typer.echo(f"Adopted; {discarded} views discarded. Flushing goes on within one interval.")


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
    from worker.durations import parse_duration

    try:
        return parse_duration(text)
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
