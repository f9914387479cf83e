"""`viewer-worker streams`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from worker.cli.exits import EXIT_FAILURE, fail
from worker.cli.options import EnvFile, LogLevel, plural, read_settings
from worker.observability.printable import printable

if TYPE_CHECKING:
    from worker.pipelines.sources.stream.adjust import Adjustment, StreamState
    from worker.settings.model import Settings


def streams(
    set_: Annotated[
        tuple[str, str] | None,
        typer.Option(
            "--set",
            metavar="STREAM POSITION",
            help="Continue after this position: the id of an entry, 0 (the beginning), $ (the end), group:NAME.",
            show_default=False,
        ),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Set the position without asking.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the streams as JSON.")] = False,
    env_file: EnvFile = None,
    log_level: LogLevel = None,
) -> None:
    """Show how far each stream is carried, what waits, what was lost, and why it is on hold.

    With --set: end a hold, or skip or repeat entries. It also works before the first start.
    """
    settings = read_settings(env_file, log_level)
    from worker.runtime.event_loop import run_async

    run_async(_show(settings, as_json=as_json) if set_ is None else _set(settings, *set_, yes=yes))


async def _show(settings: Settings, *, as_json: bool) -> None:
    import json

    from worker.app import commands

    async with commands.open_adjustments(settings) as adjustments:
        states = [await adjustment.look() for adjustment in adjustments.values()]
    if as_json:
        typer.echo(json.dumps([_describe(state) for state in states], indent=2))
        return
    width = max(len(state.stream) for state in states)
    typer.echo(f"{'stream':<{width}}  {'position':<22} {'waiting':>10} {'lost':>8} {'gaps':>5}  carried")
    for state in states:
        waiting = "?" if state.backlog is None else f"{state.backlog:,}"
        row = state.row
        carried = "yes" if state.pipeline in settings.pipelines else "not in PIPELINES"
        typer.echo(
            f"{printable(state.stream):<{width}}  {row.last!s:<22} {waiting:>10}"
            f" {row.lost:>8,} {row.gaps:>5,}  {carried}"
        )
        for line in (state.problem, state.remedy):
            if line:
                typer.echo(f"{'':<{width}}  {line}")


def _describe(state: StreamState) -> dict[str, object]:
    row = state.row
    return {
        "stream": state.stream,
        "pipeline": state.pipeline,
        "position": str(row.last),
        "waiting": state.backlog,
        "lost": row.lost,
        "gaps": row.gaps,
        "problem": state.problem,
        "remedy": state.remedy,
    }


async def _set(settings: Settings, stream: str, target: str, *, yes: bool) -> None:
    from worker.app import commands
    from worker.errors import PositionNotSet

    async with commands.open_adjustments(settings) as adjustments:
        if stream not in adjustments:
            known = f"Known: {', '.join(map(printable, adjustments))}."
            fail(f"--set: no pipeline reads the stream {printable(stream)}", known, EXIT_FAILURE)
        try:
            await _set_one(adjustments[stream], target, yes=yes)
        except PositionNotSet as error:
            fail(f"--set: {error}", error.remedy, EXIT_FAILURE)


async def _set_one(adjustment: Adjustment, target: str, *, yes: bool) -> None:
    change = await adjustment.preview(target)
    amount = f"{'more than ' if change.more else ''}{change.entries:,} {plural(change.entries, 'entry', 'entries')}"
    typer.echo(f"from {change.before} to {change.after}: {amount} between")
    if change.after > change.before:
        typer.echo(f"{amount} will not be carried.")
    elif change.after < change.before:
        typer.echo(f"{amount} will be carried again, those with an event_id once.")
    if not yes and not (sys.stdin.isatty() and typer.confirm("Continue?")):
        typer.echo("Nothing was changed." + ("" if sys.stdin.isatty() else " Use --yes where nobody can answer."))
        raise typer.Exit(EXIT_FAILURE)
    await adjustment.set(change)
    typer.echo("Set. The worker continues there within half a minute.")
