"""`viewer-worker adopt`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from worker.cli.exits import EXIT_FAILURE
from worker.cli.options import EnvFile, LogLevel, printable, read_settings

if TYPE_CHECKING:
    from worker.settings.model import Settings

WAYS_OUT = """
Flushing is on hold, and views keep accumulating in Redis. Look first whether both sides can be made to fit again
(docs/protocol.md, "When flushing is on hold"). Otherwise say what the pending views are:
  --count-pending     they are in no flush: count them (a database that was created anew)
  --discard-pending   they are in Postgres already: subtract them in Redis"""


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
    settings = read_settings(env_file, log_level)
    from worker.runtime.event_loop import run_async

    run_async(_adopt(settings, decided=count_pending or discard_pending, discard=discard_pending, yes=yes))


async def _adopt(settings: Settings, *, decided: bool, discard: bool, yes: bool) -> None:
    from worker.app import commands
    from worker.counters.adopt import describe_marker

    async with commands.counters_for_a_command(settings) as counters:
        situation = await counters.adoption.look()
        flushes = situation.source.last_flush_id
        examples = ", ".join(f"{printable(vod_id)}: {count}" for vod_id, count in situation.largest.items())
        typer.echo(f"hold      {situation.hold.cause if situation.hold else 'none: Redis and Postgres agree'}")
        typer.echo(f"marker    {describe_marker(situation.marker)}")
        typer.echo(f"Postgres  {flushes} flushes")
        typer.echo(f"pending   {situation.pending_views} views of {len(situation.pending)} ids")
        if examples:
            typer.echo(f"          {examples}")
        if situation.hold is None:
            return
        if not decided:
            typer.echo(WAYS_OUT)
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
