"""The command line. Heavy imports live inside the commands, so that `--help` is quick."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from worker.cli import adopt, dev, inspection, publish, run, totals
from worker.cli.exits import EXIT_CONFIG, EXIT_FAILURE, EXIT_UNAVAILABLE, fail

cli = typer.Typer(
    name="viewer-worker",
    help="Takes the views that applications count in Redis and makes them durable in Postgres, each view exactly once.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (
    run.run,
    run.migrate,
    inspection.check,
    adopt.adopt,
    totals.top,
    totals.forget,
    publish.publish,
    inspection.config,
    inspection.healthcheck,
    dev.dev,
):
    cli.command()(command)
cli.command("import")(totals.import_)


@cli.callback(invoke_without_command=True)
def common(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        from worker import __version__

        typer.echo(f"viewer-worker {__version__}")
        raise typer.Exit


def main() -> None:
    """Entry point. Turns the errors that a user can act on into a line on stderr and an exit code."""
    from worker.errors import InvalidSettings, Unavailable, ViewerWorkerError

    try:
        cli()
    except InvalidSettings as error:
        fail(str(error), "", EXIT_CONFIG)
    except Unavailable as error:
        fail(str(error), error.remedy, EXIT_UNAVAILABLE)
    except ViewerWorkerError as error:
        fail(str(error), error.remedy, EXIT_FAILURE)
    except OSError as error:  # what was printed could not be written
        fail(str(error), "", EXIT_FAILURE)
    except KeyboardInterrupt:
        sys.exit(130)
