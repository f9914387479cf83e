"""Structured logs: JSON lines, or readable lines on a terminal. The libraries' own loggers go the same way."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Any, TextIO

import structlog

if TYPE_CHECKING:
    from structlog.typing import EventDict, Processor


def configure_logs(level: str, stream: TextIO = sys.stderr) -> None:
    """Send all logs of the process to `stream`: console lines when it is a terminal, else one JSON object a line.

    Logs go to stderr; stdout is for what a command prints.
    """
    terminal = stream.isatty()
    shared: list[Processor] = [structlog.stdlib.add_log_level]
    if terminal:
        shared.append(structlog.processors.TimeStamper(fmt="%H:%M:%S", utc=False))
    else:
        shared += [structlog.stdlib.add_logger_name, structlog.processors.TimeStamper(fmt="iso", utc=True)]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(foreign_pre_chain=shared, processors=_last_steps(terminal))
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # Their info lines help only to debug these libraries.
    for chatty in ("sqlalchemy", "asyncio", "aiohttp", "alembic"):
        logging.getLogger(chatty).setLevel(max(logging.WARNING, root.level))


def _last_steps(terminal: bool) -> list[Processor]:
    strip = structlog.stdlib.ProcessorFormatter.remove_processors_meta
    if terminal:
        # No local variables in tracebacks: they may hold passwords.
        plain = structlog.dev.plain_traceback
        return [strip, structlog.dev.ConsoleRenderer(exception_formatter=plain)]
    return [strip, structlog.processors.format_exc_info, _first_things_first, structlog.processors.JSONRenderer()]


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
