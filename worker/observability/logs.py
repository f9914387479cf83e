"""Structured logs: JSON lines, or readable lines. The libraries' own loggers go the same way."""

from __future__ import annotations

import io
import logging
import sys
from typing import TYPE_CHECKING, Any, Literal, TextIO

import structlog

if TYPE_CHECKING:
    from structlog.typing import EventDict, Processor

LogFormat = Literal["auto", "json", "console"]


def configure_logs(level: str, log_format: LogFormat = "auto", stream: TextIO = sys.stderr) -> None:
    """Send all logs of the process to `stream`: as console lines, or as one JSON object a line, in UTF-8.

    `auto`: console lines if `stream` is a terminal, else JSON. Logs go to stderr; stdout is for what a command prints.
    """
    terminal = stream.isatty()
    console = terminal if log_format == "auto" else log_format == "console"
    shared: list[Processor] = [structlog.stdlib.add_log_level]
    if console:
        shared.append(structlog.processors.TimeStamper(fmt="%H:%M:%S", utc=False))
    else:
        shared += [structlog.stdlib.add_logger_name, structlog.processors.TimeStamper(fmt="iso", utc=True)]
        if isinstance(stream, io.TextIOWrapper):
            # JSON is UTF-8 whatever the locale. Lone surrogates cannot be encoded; their escape is valid in JSON.
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(foreign_pre_chain=shared, processors=_last_steps(console, colors=terminal))
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # Their info lines help only to debug these libraries.
    for chatty in ("sqlalchemy", "asyncio", "aiohttp", "alembic"):
        logging.getLogger(chatty).setLevel(max(logging.WARNING, root.level))


def _last_steps(console: bool, *, colors: bool) -> list[Processor]:
    strip = structlog.stdlib.ProcessorFormatter.remove_processors_meta
    if console:
        # No local variables in tracebacks: they may hold passwords.
        plain = structlog.dev.plain_traceback
        return [strip, structlog.dev.ConsoleRenderer(colors=colors, exception_formatter=plain)]
    to_json = structlog.processors.JSONRenderer(ensure_ascii=False)
    return [strip, structlog.processors.format_exc_info, _first_things_first, to_json]


def _first_things_first(_logger: object, _method: str, event: EventDict) -> EventDict:
    """Time, level and event come first: a line is read from the left."""
    leading = {name: event.pop(name) for name in ("timestamp", "level", "event") if name in event}
    return {**leading, **event}


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    """A logger as `configure_logs`, or an application that imports this package, configured structlog.

    Where nobody did, lines go to the standard logger of this name, with their fields as text.
    """
    logger: structlog.stdlib.BoundLogger = structlog.wrap_logger(
        logging.getLogger(name), processors=[_process], wrapper_class=structlog.stdlib.BoundLogger
    )
    return logger


def _process(logger: Any, method: str, event: EventDict) -> Any:
    if not structlog.is_configured():
        return _as_text(logger, method, event)
    result: Any = event
    for processor in structlog.get_config()["processors"]:
        result = processor(logger, method, result)
    return result


def _as_text(logger: logging.Logger, method: str, event: EventDict) -> tuple[tuple[str, str], dict[str, Any]]:
    structlog.stdlib.filter_by_level(logger, method, event)
    options = {"exc_info": event.pop("exc_info")} if "exc_info" in event else {}
    text = str(event.pop("event"))
    return ("%s", " ".join([text, *(f"{name}={value!r}" for name, value in event.items())])), options
