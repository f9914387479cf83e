"""Commands that only read: `viewer-worker config`, `check` and `healthcheck`."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Annotated

import typer

from worker.cli.exits import EXIT_FAILURE, EXIT_UNAVAILABLE, fail
from worker.cli.options import EnvFile, LogLevel, plural, read_settings

if TYPE_CHECKING:
    from worker.app.checkup import Level


def config(env_file: EnvFile = None, log_level: LogLevel = None) -> None:
    """Print the effective settings. Secrets are masked."""
    settings = read_settings(env_file, log_level)
    for name, value in settings.redacted().items():
        typer.echo(f"{name}={value}")


def check(
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
    env_file: EnvFile = None,
    log_level: LogLevel = None,
) -> None:
    """Check everything the worker relies on, and print how to fix what is wrong.

    Exit code 0 when no check fails, 1 when one fails, 69 when a server cannot be reached. Warnings do not count.
    """
    settings = read_settings(env_file, log_level)
    import json
    from dataclasses import asdict

    from worker.app import commands
    from worker.app.checkup import Level
    from worker.runtime.event_loop import run_async

    findings = run_async(commands.check(settings))
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        for finding in findings:
            colour = {Level.OK: "green", Level.WARNING: "yellow", Level.FAILURE: "red"}[finding.level]
            typer.echo(typer.style(f"{finding.level:8}", fg=colour) + f"{finding.name:18}{finding.found}")
            if finding.remedy:
                typer.echo(f"{'':26}{finding.remedy}")
        typer.echo(_summary(Counter(finding.level for finding in findings)))
    failed = {finding.name for finding in findings if finding.level is Level.FAILURE}
    raise typer.Exit(EXIT_UNAVAILABLE if failed & {"redis", "postgres"} else EXIT_FAILURE if failed else 0)


def _summary(levels: Counter[Level]) -> str:
    from worker.app.checkup import Level

    failures, warnings = levels[Level.FAILURE], levels[Level.WARNING]
    found = f"{failures} {plural(failures, 'failure')}, {warnings} {plural(warnings, 'warning')}"
    return f"\n{levels.total()} checks: {found if failures or warnings else 'all ok'}"


def healthcheck(env_file: EnvFile = None, log_level: LogLevel = None) -> None:
    """Ask the running worker's /livez, for a container's HEALTHCHECK. Exit code 0 when it is alive, else 1."""
    import http.client

    settings = read_settings(env_file, log_level)
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.health_check_host, settings.health_check_host)  # noqa: S104
    connection = http.client.HTTPConnection(host, settings.health_check_port, timeout=3)
    try:
        connection.request("GET", "/livez")
        response = connection.getresponse()
        typer.echo(response.read().decode())
    except (OSError, http.client.HTTPException) as error:
        fail(f"no answer from {host}:{settings.health_check_port} ({type(error).__name__})", "", EXIT_FAILURE)
    raise typer.Exit(0 if response.status == 200 else EXIT_FAILURE)
