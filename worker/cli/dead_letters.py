"""`viewer-worker dead-letters`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from worker.cli.exits import EXIT_FAILURE, fail
from worker.cli.options import EnvFile, LogLevel, duration, plural, read_settings, wrong
from worker.observability.printable import printable

if TYPE_CHECKING:
    from worker.db.dead_letters import LetterFilter, StoredLetter
    from worker.settings.model import Settings

dead_letters = typer.Typer(help="Look at records that could not become rows, write them again, or delete them.")

Pipeline = Annotated[str | None, typer.Option("--pipeline", help="Only letters of this pipeline.")]
ErrorClass = Annotated[str | None, typer.Option("--class", help="Only letters of this error class.")]
OlderThan = Annotated[
    str | None, typer.Option("--older-than", metavar="DURATION", help="Only letters older than this.")
]
Ids = Annotated[list[int] | None, typer.Argument(metavar="[ID]...", help="Only these letters.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print as JSON.")]


def _filter(ids: list[int] | None, pipeline: str | None, error_class: str | None, older: str | None) -> LetterFilter:
    from worker.db.dead_letters import LetterFilter

    age = None if older is None else duration(older, "--older-than")
    return LetterFilter(tuple(ids) if ids else None, pipeline, error_class, age)


def _unknown(pipeline: str | None) -> str:
    """The message for a pipeline that this version does not have; empty for the others."""
    from worker.pipelines.records import RECORD_TYPES

    if pipeline is None or pipeline in RECORD_TYPES:
        return ""
    return f"this version has no pipeline {printable(pipeline)}; it has {', '.join(RECORD_TYPES)}"


def _note_unknown(pipeline: str | None) -> None:
    """Not an error where letters are listed or purged: they may be those of a pipeline that an older version had."""
    if message := _unknown(pipeline):
        typer.echo(message, err=True)


@dead_letters.command("list")
def list_(
    pipeline: Pipeline = None,
    error_class: ErrorClass = None,
    older_than: OlderThan = None,
    limit: Annotated[int, typer.Option("--limit", min=1, max=10_000, help="At most so many letters.")] = 50,
    as_json: AsJson = False,
    env_file: EnvFile = None,
    log_level: LogLevel = None,
) -> None:
    """List dead letters, the oldest first, and how many there are of each class."""
    settings = read_settings(env_file, log_level)
    wanted = _filter(None, pipeline, error_class, older_than)
    from worker.app import commands
    from worker.runtime.event_loop import run_async

    letters, counts = run_async(commands.list_letters(settings, wanted, limit))
    if not letters:
        _note_unknown(pipeline)
    if as_json:
        _print_json([_describe(letter) for letter in letters])
        return
    for letter in letters:
        typer.echo(
            f"{letter.id:>8}  {letter.received_at:%Y-%m-%d %H:%M:%S}  {printable(letter.origin)}  "
            f"{letter.error_class}: {printable(letter.error)}"
        )
    for (name, kind), count in counts.items():
        typer.echo(f"{count:>8,}  {name} {kind}")
    if not counts:
        typer.echo("no dead letters")


@dead_letters.command()
def show(
    letter_id: Annotated[int, typer.Argument(metavar="ID")],
    as_json: AsJson = False,
    env_file: EnvFile = None,
    log_level: LogLevel = None,
) -> None:
    """Show one letter with its original bytes."""
    settings = read_settings(env_file, log_level)
    wanted = _filter([letter_id], None, None, None)
    from worker.app import commands
    from worker.runtime.event_loop import run_async

    letters, _ = run_async(commands.list_letters(settings, wanted, 1))
    if not letters:
        fail(f"there is no letter {letter_id}", "", EXIT_FAILURE)
    if as_json:
        _print_json(_describe(letters[0]))
        return
    for name, value in _describe(letters[0]).items():
        if value is not None:
            typer.echo(f"{name:<12}{printable(str(value))}")


@dead_letters.command()
def replay(
    ids: Ids = None,
    pipeline: Pipeline = None,
    error_class: ErrorClass = None,
    older_than: OlderThan = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Also replace rows that are there, such as bars that came since.")
    ] = False,
    env_file: EnvFile = None,
    log_level: LogLevel = None,
) -> None:
    """Write letters to their table, and delete those that became rows. Without a filter: all letters.

    Exit code 1 when some did not become rows. Those stay as letters. It stops when the table refuses more than a
    thousand letters in a row.
    """
    settings = read_settings(env_file, log_level)
    wanted = _filter(ids, pipeline, error_class, older_than)
    if message := _unknown(pipeline):
        raise wrong(message, "--pipeline")
    from worker.runtime.event_loop import run_async

    raise typer.Exit(EXIT_FAILURE if run_async(_replay(settings, wanted, overwrite=overwrite)) else 0)


async def _replay(settings: Settings, wanted: LetterFilter, *, overwrite: bool) -> bool:
    """True when some letters did not become rows."""
    from rich.console import Console
    from rich.progress import Progress

    from worker.app import commands

    console = Console(stderr=True)
    total = await commands.count_letters(settings, wanted)
    rows, refused, invalid = 0, 0, dict[int, str]()
    try:
        with Progress(console=console, disable=not console.is_terminal) as progress:
            bar = progress.add_task("replaying", total=total)
            async for done in commands.replay_letters(settings, wanted, overwrite=overwrite):
                rows, refused = rows + done.rows, refused + done.refused
                invalid |= done.invalid
                progress.advance(bar, done.rows + done.refused + len(done.invalid))
    finally:  # also where the table or a server ends it
        for letter_id, cause in list(invalid.items())[:10]:
            typer.echo(f"{letter_id:>8}  {printable(cause)}")
        typer.echo(f"{rows:,} {plural(rows, 'row')} written, {refused:,} refused again, {len(invalid):,} not valid")
    return bool(refused or invalid)


@dead_letters.command()
def purge(
    ids: Ids = None,
    pipeline: Pipeline = None,
    error_class: ErrorClass = None,
    older_than: OlderThan = None,
    yes: Annotated[bool, typer.Option("--yes", help="Delete them. Without it: only count them.")] = False,
    env_file: EnvFile = None,
    log_level: LogLevel = None,
) -> None:
    """Delete letters. Without --yes it only prints how many would be deleted."""
    settings = read_settings(env_file, log_level)
    wanted = _filter(ids, pipeline, error_class, older_than)
    from worker.app import commands
    from worker.runtime.event_loop import run_async

    if not yes:
        count = run_async(commands.count_letters(settings, wanted))
        typer.echo(f"{count:,} {plural(count, 'letter')} would be deleted. Use --yes to delete.")
    else:
        count = run_async(commands.purge_letters(settings, wanted))
        typer.echo(f"{count:,} {plural(count, 'letter')} deleted")
    if not count:
        _note_unknown(pipeline)


def _describe(letter: StoredLetter) -> dict[str, Any]:
    return {
        "id": letter.id,
        "pipeline": letter.pipeline,
        "received_at": letter.received_at.isoformat(),
        "origin": letter.origin,
        "error_class": letter.error_class,
        "sqlstate": letter.sqlstate,
        "error": letter.error,
        # What is not UTF-8 is escaped: dead_letters.payload has the bytes.
        "payload": letter.payload.decode(errors="backslashreplace"),
    }


def _print_json(value: object) -> None:
    import json

    json.dump(value, sys.stdout, indent=2)
    typer.echo()
