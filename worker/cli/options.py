"""Options that several commands share, and helpers to read arguments and print results."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from datetime import timedelta

    from worker.settings.model import Settings

EnvFile = Annotated[
    Path | None,
    typer.Option(
        "--env-file", help="Read settings from this file instead of .env. Environment variables win over the file."
    ),
]
LogLevel = Annotated[str | None, typer.Option("--log-level", help="Log level: debug, info, warning or error.")]


def read_settings(env_file: Path | None, log_level: str | None) -> Settings:
    """Read the settings and configure logging. Raises InvalidSettings."""
    import os

    from worker.observability.logs import configure_logs, get_logger
    from worker.settings.environment import load_settings, misspelt, read_dotenv, service_links

    settings = load_settings(env_file, log_level=log_level)
    configure_logs(settings.log_level, settings.log_format)
    variables = {**read_dotenv(env_file), **os.environ}
    for name, setting in misspelt(variables).items():
        get_logger(__name__).warning("unknown variable", name=name, did_you_mean=setting)
    if links := service_links(variables):
        get_logger(__name__).info("not settings but the addresses of Kubernetes services", names=links)
    return settings


def plural(number: int, word: str, words: str | None = None) -> str:
    """Return `word` when `number` is 1, else its plural: `words`, or `word` with an s."""
    return word if number == 1 else words or f"{word}s"


def wrong(message: str, *names: str) -> typer.BadParameter:
    """The error for a wrong value of the options or arguments with these names. Exit code 2."""
    return typer.BadParameter(message, param_hint=list(names))


def duration(text: str, name: str) -> timedelta:
    """Parse the value of the option `name`, such as 20s. Raises BadParameter."""
    from worker.contract.durations import parse_duration

    try:
        return parse_duration(text)
    except ValueError as error:
        raise wrong(f"expected {error}", name) from None


def parse_id(text: str) -> str:
    """Check the argument ID. Raises BadParameter."""
    from worker.contract.ids import InvalidId, decode_id

    try:
        return decode_id(text.encode("utf-8", "surrogateescape"))
    except InvalidId as error:
        raise wrong(str(error), "ID") from None
