"""What a Writer is told by its arguments, and by the environment where an argument is not given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from worker.errors import InvalidSettings, SettingProblem
from worker.observability.logs import get_logger
from worker.settings.environment import load_writer_settings

if TYPE_CHECKING:
    from worker.db.address import DatabaseAddress
    from worker.pipelines.model import RecordType, Window

log = get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class WriterOptions:
    """Durations in seconds. `capacity` is in records, `buffer_bytes` what all Writers of the process hold together."""

    enabled: bool
    database: DatabaseAddress
    recycle: float
    capacity: int
    writers: int
    batch_size: int
    batch_timeout: float
    max_retries: int
    retry_delay: float
    window: Window
    buffer_bytes: int
    shutdown_timeout: float

    @classmethod
    def read(cls, record: RecordType[Any], **arguments: Any) -> WriterOptions:
        """`arguments` are those of a Writer; None: from the environment. Raises InvalidSettings with their names."""
        own = record.defaults
        variables = {
            "database_url": "DATABASE_URL",
            "capacity": own.capacity[0],
            "writers": None if own.writers is None else own.writers[0],
            "batch_size": own.batch_size[0],
            "batch_timeout": own.interval[0],
            "max_attempts" if own.counts_first_try else "max_retries": own.max_retries[0],
            "retry_delay": own.retry_delay[0],
            "enabled": own.enabled,
        }
        given = {
            variable: value
            for name, value in arguments.items()
            if value is not None and (variable := variables[name]) is not None
        }
        try:
            settings = load_writer_settings(record, given)
        except InvalidSettings as error:
            named = {variable: name for name, variable in variables.items() if variable in given}
            problems = [SettingProblem(named.get(it.name, it.name), it.value, it.expected) for it in error.problems]
            raise InvalidSettings(problems) from None
        if settings.database.ignored:
            log.info("ignored parameters of DATABASE_URL", names=list(settings.database.ignored))
        buffer = settings.buffer(record)
        return cls(
            enabled=buffer.enabled,
            database=settings.database,
            recycle=settings.db_conn_max_lifetime.total_seconds(),
            capacity=buffer.capacity,
            writers=buffer.writers,
            batch_size=buffer.batch_size,
            batch_timeout=buffer.interval.total_seconds(),
            max_retries=buffer.max_retries,
            retry_delay=buffer.retry_delay.total_seconds(),
            window=buffer.window,
            buffer_bytes=settings.buffer_max_bytes,
            shutdown_timeout=settings.shutdown_timeout.total_seconds(),
        )
