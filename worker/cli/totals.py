"""Commands about the totals: `viewer-worker top`, `import` and `forget`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from worker.cli.exits import EXIT_CONFIG, EXIT_FAILURE, fail
from worker.cli.options import EnvFile, LogLevel, duration, parse_id, plural, read_settings, wrong
from worker.observability.printable import printable

if TYPE_CHECKING:
    from worker.db.counters.reads import Bucket

BAR_WIDTH = 40
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def top(
    window: Annotated[
        str, typer.Option("--window", metavar="DURATION", help="How far back, such as 1h, 24h or 30d.")
    ] = "24h",
    limit: Annotated[int, typer.Option("--limit", min=1, max=100, help="How many ids to show.")] = 10,
    as_json: AsJson = False,
    env_file: EnvFile = None,
    log_level: LogLevel = None,
) -> None:
    """Show the most-viewed ids of the window (in whole hours), with their current totals."""
    since = duration(window, "--window")
    settings = read_settings(env_file, log_level)
    from worker.app import commands
    from worker.db.counters.reads import Top
    from worker.runtime.event_loop import run_async
    from worker.web.views_api import top_document

    async def look() -> Top:
        async with commands.open_counters(settings) as counters:
            return await counters.display.top(since, limit)

    found = run_async(look())
    if as_json:
        typer.echo(json.dumps(top_document(found), ensure_ascii=False))
        return
    typer.echo(f"from {found.since:%Y-%m-%d %H:%M} to {found.as_of:%Y-%m-%d %H:%M:%S} UTC\n")
    if not found.entries:
        typer.echo("no views")
        return
    typer.echo(f"{'views':>12}  {'total':>12}  id")
    for entry in found.entries:
        typer.echo(f"{entry.views:>12,}  {entry.total:>12,}  {printable(entry.vod_id)}")
    if not found.is_exact:
        typer.echo("\nRedis and Postgres contradict each other (see viewer-worker adopt): totals may be wrong.")


class Buckets(StrEnum):
    HOUR = "hour"
    DAY = "day"


def history(
    vod_id: Annotated[str, typer.Argument(metavar="ID", help="The id.")],
    bucket: Annotated[Buckets, typer.Option("--bucket", help="One line for each hour or day, in UTC.")] = Buckets.HOUR,
    window: Annotated[
        str,
        typer.Option("--window", metavar="DURATION", help="How far back, such as 24h or 30d. [default: 24h or 30d]"),
    ] = "",
    as_json: AsJson = False,
    env_file: EnvFile = None,
    log_level: LogLevel = None,
) -> None:
    """Show when an id was viewed. Hours and days without views are left out."""
    checked = parse_id(vod_id)
    back = duration(window or ("24h" if bucket is Buckets.HOUR else "30d"), "--window")
    settings = read_settings(env_file, log_level)
    from worker.app import commands
    from worker.runtime.event_loop import run_async
    from worker.web.history_api import history_document

    async def look() -> tuple[datetime, Sequence[Bucket]]:
        now = datetime.now(UTC)
        async with commands.open_counters(settings) as counters:
            return await counters.display.history(checked, bucket.value, now - back, now)

    as_of, found = run_async(look())
    if as_json:
        typer.echo(json.dumps(history_document(checked, bucket.value, as_of, found), ensure_ascii=False))
        return
    typer.echo(f"{printable(checked)}, up to {as_of:%Y-%m-%d %H:%M:%S} UTC\n")
    if not found:
        typer.echo("no views")
    most = max((each.views for each in found), default=0)
    for each in found:
        bar = "█" * round(BAR_WIDTH * each.views / most)
        typer.echo(f"{each.start:%Y-%m-%d %H:%M}  {each.views:>12,}  {bar}".rstrip())


def import_(
    from_target: Annotated[
        bool, typer.Option("--from-target", help="Import from the table that VIEW_TARGET_TABLE names.")
    ] = False,
    env_file: EnvFile = None,
    log_level: LogLevel = None,
) -> None:
    """Import the totals that the application already has. Each id is imported once, so the command can be repeated."""
    if not from_target:
        raise wrong("required: it names the source of the totals", "--from-target")
    settings = read_settings(env_file, log_level)
    from worker.app import commands
    from worker.runtime.event_loop import run_async

    if settings.view_target is None:
        fail(
            "VIEW_TARGET_TABLE is not set",
            "Set VIEW_TARGET_TABLE, VIEW_TARGET_KEY and VIEW_TARGET_COLUMN.",
            EXIT_CONFIG,
        )

    async def import_all() -> None:
        rows = ids = views = 0
        async for page in commands.import_totals(settings):
            rows, ids, views = rows + page.rows, ids + page.ids, views + page.views
            if sys.stderr.isatty():
                typer.echo(f"\r{rows:,} {plural(rows, 'row')}", err=True, nl=False)
        if sys.stderr.isatty():
            typer.echo("\r\x1b[K", err=True, nl=False)
        imported = f"{ids:,} {plural(ids, 'total')} imported, {views:,} {plural(views, 'view')} added"
        typer.echo(f"{rows:,} {plural(rows, 'row')} of {settings.view_target}: {imported}")

    run_async(import_all())


def forget(
    vod_id: Annotated[str, typer.Argument(metavar="ID", help="The id to remove.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation.")] = False,
    env_file: EnvFile = None,
    log_level: LogLevel = None,
) -> None:
    """Remove an id: its total, its history and its pending views. Later views of it count from zero.

    The application's own table does not change. The ledger keeps the id's flushed views until VIEW_LEDGER_RETENTION.
    """
    checked = parse_id(vod_id)
    settings = read_settings(env_file, log_level)
    from worker.app import commands
    from worker.runtime.event_loop import run_async

    async def run() -> None:
        async with commands.open_counters(settings, changes=True) as counters:
            if not await counters.forgetting.knows(checked):
                fail(f"there is no id {printable(checked)}: no total, no history, no counter", "", EXIT_FAILURE)
            (shown,) = await counters.display.views([checked])
            stored = f"{shown.stored:,} {plural(shown.stored, 'view')} in Postgres"
            typer.echo(f"{printable(checked)}: {stored}, {shown.pending:,} pending")
            if not yes and not (sys.stdin.isatty() and typer.confirm("Forget them?")):
                typer.echo("Nothing was changed." + ("" if sys.stdin.isatty() else " Without a terminal, use --yes."))
                raise typer.Exit(EXIT_FAILURE)
            gone = await counters.forgetting.forget(checked)
            stored = f"{gone.stored:,} {plural(gone.stored, 'view')} in Postgres"
            typer.echo(f"Forgotten: {stored}, {gone.pending:,} pending.")

    run_async(run())
