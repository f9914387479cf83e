"""What commands take: where their settings are read from, and durations."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from datetime import timedelta

    from worker.settings.model import Settings

EnvFile = Annotated[Path | None, typer.Option("--env-file", help="Read settings from this file instead of .env.")]
LogLevel = Annotated[str | None, typer.Option("--log-level", help="debug, info, warning or error.")]


def read_settings(env_file: Path | None, log_level: str | None) -> Settings:
    """Read the settings and set up the log. Raises InvalidSettings."""
    import os

    from worker.observability.logs import configure_logs, get_logger
    from worker.settings.environment import load_settings, misspelt, read_dotenv

    settings = load_settings(env_file, log_level=log_level)
    configure_logs(settings.log_level)
    for name, setting in misspelt({**os.environ, **read_dotenv(env_file)}).items():
        get_logger(__name__).warning("unknown variable", name=name, did_you_mean=setting)
    return settings


def printable(vod_id: str) -> str:
    """An id may hold anything, control characters of a terminal too."""
    return vod_id if vod_id.isprintable() else vod_id.encode("unicode_escape").decode()


def duration(text: str) -> timedelta:
    """Read an argument such as 20s. Raises BadParameter."""
    from worker.contract.durations import parse_duration

    try:
        return parse_duration(text)
    except ValueError as error:
        raise typer.BadParameter(f"expected {error}") from None
