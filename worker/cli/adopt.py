"""`viewer-worker adopt`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from worker.cli.exits import EXIT_FAILURE
from worker.cli.options import EnvFile, LogLevel, plural, read_settings, wrong
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
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON. To end a hold, it needs --yes.")] = False,
    env_file: EnvFile = None,
    log_level: LogLevel = None,
) -> None:
    """Show why flushing is on hold and which views are pending. With --count-pending or --discard-pending, end it."""
    if count_pending and discard_pending:
        raise wrong("give one of them", "--count-pending", "--discard-pending")
    decided = count_pending or discard_pending
    if as_json and decided and not yes:
        raise wrong("give --yes too: there is no question in JSON", "--json")
    settings = read_settings(env_file, log_level)
    from worker.runtime.event_loop import run_async

    if as_json:
        typer.echo(run_async(_adopt_as_json(settings, decided=decided, discard=discard_pending)))
    else:
        run_async(_adopt(settings, decided=decided, discard=discard_pending, yes=yes))


async def _adopt_as_json(settings: Settings, *, decided: bool, discard: bool) -> str:
    """The situation as it was found. `discarded` is null unless a hold was ended."""
    import json

    from worker.app import commands
    from worker.counters.adopt import describe_marker

    async with commands.open_counters(settings, changes=True) as counters:
        situation = await counters.adoption.look()
        hold, discarded = situation.hold, None
        if hold is not None and decided:
            discarded = await counters.adoption.adopt(situation, discard=discard)
    document = {
        "hold": None if hold is None else {"cause": hold.cause, "remedy": hold.remedy},
        "marker": None if situation.marker is None else describe_marker(situation.marker),
        "flushes": situation.row.last_flush_id,
        "pending_views": situation.pending_views,
        "pending_ids": len(situation.pending),
        "largest": situation.largest,
        "discarded": discarded,
    }
    return json.dumps(document, indent=2)


async def _adopt(settings: Settings, *, decided: bool, discard: bool, yes: bool) -> None:
    from worker.app import commands
    from worker.counters.adopt import describe_marker

    async with commands.open_counters(settings, changes=True) as counters:
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
