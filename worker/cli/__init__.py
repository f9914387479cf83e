"""The command line. Commands import heavy modules only when they run, so that `--help` is fast."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from worker.cli import adopt, dead_letters, dev, inspection, publish, run, streams, totals
from worker.cli.exits import EXIT_CONFIG, EXIT_FAILURE, EXIT_UNAVAILABLE, fail
from worker.cli.standard_streams import prepare_streams

cli = typer.Typer(
    name="viewer-worker",
    help="Move the views that applications count in Redis to Postgres, each view exactly once.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
for command in (
    run.run,
    run.migrate,
    inspection.check,
    adopt.adopt,
    totals.top,
    totals.history,
    totals.forget,
    streams.streams,
    publish.publish,
    inspection.config,
    inspection.healthcheck,
    dev.dev,
):
    cli.command()(command)
cli.command("import")(totals.import_)
cli.add_typer(dead_letters.dead_letters, name="dead-letters")


@cli.callback(invoke_without_command=True)
def common(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        from worker import __version__

        typer.echo(f"viewer-worker {__version__}")
        raise typer.Exit


def main() -> None:
    """Entry point. Prints errors that a user can fix on stderr, and sets the exit code."""
    prepare_streams()
    from worker.errors import InvalidSettings, Unavailable, ViewerWorkerError

    try:
        cli()
    except InvalidSettings as error:
        fail(str(error), "", EXIT_CONFIG)
    except Unavailable as error:
        fail(str(error), error.remedy, EXIT_UNAVAILABLE)
    except ViewerWorkerError as error:
        fail(str(error), error.remedy, EXIT_FAILURE)
    except OSError as error:  # the output could not be written: a full disk, a closed pipe
        fail(str(error), "", EXIT_FAILURE)
    except KeyboardInterrupt:
        sys.exit(130)
