"""`viewer-worker adopt`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from worker.cli.exits import EXIT_FAILURE
from worker.cli.options import EnvFile, LogLevel, plural, read_settings
from worker.observability.printable import printable

if TYPE_CHECKING:
    from worker.settings.model import Settings

WAYS_OUT = """
Flushing is on hold. Views keep accumulating in Redis, none is lost. First check whether Redis and Postgres can be
made to agree again (docs/protocol.md, "When flushing is on hold"). Otherwise choose what to do with the pending views:
  --count-pending     they were never flushed: count them (for example, the database was recreated)
  --discard-pending   they are already in Postgres: subtract them in Redis"""


def adopt(
    count_pending: Annotated[
        bool, typer.Option("--count-pending", help="End the hold, and count the pending views as new.")
    ] = False,
    discard_pending: Annotated[
        bool,
        typer.Option(
            "--discard-pending",
            help="End the hold, and subtract the pending views in Redis: they are already in Postgres.",
        ),
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation.")] = False,
    env_file: EnvFile = None,
    log_level: LogLevel = None,
) -> None:
    """Show why flushing is on hold and which views are pending. With --count-pending or --discard-pending, end it."""
    if count_pending and discard_pending:
        raise typer.BadParameter("give --count-pending or --discard-pending, not both")
    settings = read_settings(env_file, log_level)
    from worker.runtime.event_loop import run_async

    run_async(_adopt(settings, decided=count_pending or discard_pending, discard=discard_pending, yes=yes))


async def _adopt(settings: Settings, *, decided: bool, discard: bool, yes: bool) -> None:
    from worker.app import commands
    from worker.counters.adopt import describe_marker

    async with commands.open_counters(settings) as counters:
        situation = await counters.adoption.look()
        flushes, views, ids = situation.row.last_flush_id, situation.pending_views, len(situation.pending)
        examples = ", ".join(f"{printable(vod_id)}: {count}" for vod_id, count in situation.largest.items())
        typer.echo(f"hold      {situation.hold.cause if situation.hold else 'none: Redis and Postgres agree'}")
        typer.echo(f"marker    {describe_marker(situation.marker)}")
        typer.echo(f"Postgres  {flushes} {plural(flushes, 'flush', 'flushes')}")
        typer.echo(f"pending   {views} {plural(views, 'view')} of {ids} {plural(ids, 'id')}")
        if examples:
            typer.echo(f"          {examples}")
        if situation.hold is None:
            return
        if not decided:
            typer.echo(WAYS_OUT)
            return
        typer.echo(
            f"\n{views} pending {plural(views, 'view')} will be "
            + (
                "subtracted in Redis without being counted. Views that were never flushed will be lost."
                if discard
                else "counted as new. Views that are already in Postgres will be counted twice."
            )
        )
        if not yes and not (sys.stdin.isatty() and typer.confirm("Continue?")):
            typer.echo("Nothing was changed." + ("" if sys.stdin.isatty() else " Without a terminal, use --yes."))
            raise typer.Exit(EXIT_FAILURE)
        discarded = await counters.adoption.adopt(situation, discard=discard)
        done = f"Adopted; {discarded} {plural(discarded, 'view')} discarded."
        typer.echo(f"{done} Flushing resumes within half a minute.")
