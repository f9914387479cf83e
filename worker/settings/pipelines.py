"""The settings of each pipeline, made from its record: `<PIPELINE>_STREAM` and so on, and names of its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, Field

from worker.contract.durations import parse_duration
from worker.pipelines.model import RecordType, Window
from worker.pipelines.records import RECORD_TYPES

DEFAULT_FIELD = "data"
DEFAULT_GROUP = "viewer-worker"


def _duration(value: object) -> object:
    return parse_duration(value) if isinstance(value, str) else value


def _streams(value: object) -> object:
    names = tuple(name.strip() for name in value.split(",")) if isinstance(value, str) else value
    if not isinstance(names, tuple) or not all(names) or len(set(names)) != len(names):
        raise ValueError("one or more names of streams, separated by commas, each once")
    return names


Duration = Annotated[timedelta, BeforeValidator(_duration), Field(gt=timedelta(), le=timedelta(days=36_500))]
Streams = Annotated[tuple[str, ...], BeforeValidator(_streams)]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeliverySettings:
    """How the records of one pipeline are written. `capacity`: how many may wait to be written."""

    window: Window
    capacity: int
    batch_size: int
    interval: timedelta
    max_retries: int
    retry_delay: timedelta


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineSettings(DeliverySettings):
    """The settings of one pipeline. `keep` and `retention`: None is for ever."""

    streams: tuple[str, ...]
    field: str
    group: str
    keep: timedelta | None
    retention: timedelta | None


@dataclass(frozen=True, slots=True, kw_only=True)
class BufferSettings(DeliverySettings):
    """The settings of an application's Writer of one pipeline."""

    writers: int
    enabled: bool


def read_pipeline(settings: BaseModel, record: RecordType[Any]) -> PipelineSettings:
    """The settings of the pipeline of this record."""
    name = record.name
    return PipelineSettings(
        **_read_delivery(settings, record),
        streams=getattr(settings, f"{name}_stream"),
        field=getattr(settings, f"{name}_stream_field"),
        group=getattr(settings, f"{name}_stream_group"),
        keep=getattr(settings, f"{name}_stream_keep"),
        retention=getattr(settings, f"{name}_retention"),
    )


def read_buffer(settings: BaseModel, record: RecordType[Any]) -> BufferSettings:
    """The settings of the Writer of this record."""
    own = record.defaults
    return BufferSettings(
        **_read_delivery(settings, record),
        writers=1 if own.writers is None else getattr(settings, own.writers[0].lower()),
        enabled=own.enabled is None or getattr(settings, own.enabled.lower()),
    )


def _read_delivery(settings: BaseModel, record: RecordType[Any]) -> dict[str, Any]:
    own = record.defaults
    past, future = (getattr(settings, f"{record.name}_accept_{side}") for side in ("past", "future"))
    tries = getattr(settings, own.max_retries[0].lower())
    return {
        "window": Window(past.total_seconds(), future.total_seconds()),
        "capacity": getattr(settings, own.capacity[0].lower()),
        "batch_size": getattr(settings, own.batch_size[0].lower()),
        "interval": getattr(settings, own.interval[0].lower()),
        "max_retries": tries - own.counts_first_try,
        "retry_delay": getattr(settings, own.retry_delay[0].lower()),
    }


def _fields(record: RecordType[Any]) -> Iterator[tuple[str, Any]]:
    name = record.name
    yield from _writer_fields(record)
    yield f"{name}_stream", (Streams, Field((name,)))
    yield f"{name}_stream_field", (str, Field(DEFAULT_FIELD, min_length=1))
    yield f"{name}_stream_group", (str, Field(DEFAULT_GROUP, min_length=1))
    yield f"{name}_stream_keep", (Duration | None, Field(None))
    yield f"{name}_retention", (Duration | None, Field(None))


def _writer_fields(record: RecordType[Any]) -> Iterator[tuple[str, Any]]:
    own, name = record.defaults, record.name
    yield f"{name}_accept_past", (Duration, Field(timedelta(seconds=own.accept_past)))
    yield f"{name}_accept_future", (Duration, Field(timedelta(seconds=own.accept_future)))
    yield own.batch_size[0].lower(), (int, Field(own.batch_size[1], ge=1, le=10_000))
    yield own.interval[0].lower(), (Duration, Field(timedelta(seconds=own.interval[1])))
    yield own.max_retries[0].lower(), (int, Field(own.max_retries[1], ge=int(own.counts_first_try), le=100))
    yield own.retry_delay[0].lower(), (Duration, Field(timedelta(seconds=own.retry_delay[1])))
    yield own.capacity[0].lower(), (int, Field(own.capacity[1], ge=1, le=10_000_000))
    if own.writers is not None:
        yield own.writers[0].lower(), (int, Field(own.writers[1], ge=1, le=64))
    if own.enabled is not None:
        yield own.enabled.lower(), (bool, Field(True))


def make_writer_fields(record: RecordType[Any]) -> dict[str, Any]:
    """Field → type and default, for an application's Writer of this record."""
    return dict(_writer_fields(record))


def make_fields() -> dict[str, Any]:
    """Field → type and default, for all pipelines."""
    return {field: made for record in RECORD_TYPES.values() for field, made in _fields(record)}
