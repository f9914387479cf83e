"""What every command takes: where its settings are read from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from worker.settings import Settings

EnvFile = Annotated[Path | None, typer.Option("--env-file", help="Read settings from this file instead of .env.")]
LogLevel = Annotated[str | None, typer.Option("--log-level", help="debug, info, warning or error.")]


def read_settings(env_file: Path | None, log_level: str | None) -> Settings:
    """Read the settings and set up the log. Raises InvalidSettings."""
    from worker.observability.logs import configure_logs
    from worker.settings import load_settings

    settings = load_settings(env_file, log_level=log_level)
    configure_logs(settings.log_level)
    return settings
