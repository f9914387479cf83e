"""Commands about the totals: `viewer-worker top`, `import` and `forget`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from worker.cli.exits import EXIT_CONFIG, EXIT_FAILURE, fail
from worker.cli.options import EnvFile, LogLevel, duration, printable, read_settings


def top(
    window: Annotated[str, typer.Option("--window", metavar="DURATION", help="How far back: 1h, 24h, 30d.")] = "24h",
    limit: Annotated[int, typer.Option("--limit", min=1, max=100)] = 10,
    env_file: EnvFile = None,
    log_level: LogLevel = None,
) -> None:
    """Show the ids that were viewed most in the window, counted in whole hours, and their totals by now."""
    since = duration(window)
    settings = read_settings(env_file, log_level)
    from worker.app import commands
    from worker.db.counters.reads import Top
    from worker.runtime.event_loop import run_async

    async def look() -> Top:
        async with commands.counters_for_a_command(settings) as counters:
            return await counters.display.top(since, limit)

    found = run_async(look())
    typer.echo(f"since {found.since:%Y-%m-%d %H:%M} UTC\n")
    if not found.entries:
        typer.echo("no views")
        return
    typer.echo(f"{'views':>12}  {'total':>12}  id")
    for entry in found.entries:
        typer.echo(f"{entry.views:>12,}  {entry.total:>12,}  {printable(entry.vod_id)}")


def import_(
    from_target: Annotated[
        bool, typer.Option("--from-target", help="From the table that VIEW_TARGET_TABLE names.")
    ] = False,
    env_file: EnvFile = None,
    log_level: LogLevel = None,
) -> None:
    """Start from the totals that the application already has. Each id is taken over once, so it may be repeated."""
    if not from_target:
        raise typer.BadParameter("say where from: --from-target")
    settings = read_settings(env_file, log_level)
    from worker.app import commands
    from worker.runtime.event_loop import run_async

    if settings.view_target is None:
        fail("VIEW_TARGET_TABLE is not set", "Set VIEW_TARGET_TABLE, _KEY and _COLUMN.", EXIT_CONFIG)

    async def import_all() -> None:
        rows = ids = views = 0
        async for page in commands.import_totals(settings):
            rows, ids, views = rows + page.rows, ids + page.ids, views + page.views
            if sys.stderr.isatty():
                typer.echo(f"\r{rows:,} rows", err=True, nl=False)
        if sys.stderr.isatty():
            typer.echo("\r\x1b[K", err=True, nl=False)
        taken = f"{ids:,} totals taken over, {views:,} views more than ours had"
        typer.echo(f"{rows:,} rows of {settings.view_target}: {taken}")

    run_async(import_all())


def forget(
    vod_id: Annotated[str, typer.Argument(metavar="ID")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    env_file: EnvFile = None,
    log_level: LogLevel = None,
) -> None:
    """Remove an id: its total, its history, its pending views. What is viewed later counts anew from zero.

    The application's own table is left as it is. The ledger keeps what was flushed until VIEW_LEDGER_RETENTION.
    """
    settings = read_settings(env_file, log_level)
    from worker.app import commands
    from worker.contract.ids import decode_id
    from worker.runtime.event_loop import run_async

    checked = decode_id(vod_id.encode("utf-8", "surrogateescape"))

    async def run() -> None:
        async with commands.counters_for_a_command(settings) as counters:
            (shown,) = await counters.display.views([checked])
            typer.echo(f"{printable(checked)}: {shown.stored:,} views in Postgres, {shown.pending:,} pending")
            if not yes and not (sys.stdin.isatty() and typer.confirm("Forget them?")):
                typer.echo(
                    "Nothing was changed." + ("" if sys.stdin.isatty() else " Use --yes where nobody can answer.")
                )
                raise typer.Exit(EXIT_FAILURE)
            gone = await counters.forgetting.forget(checked)
            typer.echo(f"Forgotten: {gone.stored:,} views in Postgres, {gone.pending:,} pending.")

    run_async(run())
