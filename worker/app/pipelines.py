"""Makes the parts of the pipelines, and connects them: a pipeline for each stream, and one for the channel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from worker.app.channel import CHECKS, ChannelPipeline, build_channel
from worker.db.lease import Lease
from worker.db.positions import StreamPosition
from worker.db.record_retention import RecordRetention
from worker.db.tickets import TicketRetention
from worker.db.upsert import RecordTable
from worker.observability.status import State
from worker.pipelines.delivery import Delivery
from worker.pipelines.metrics import StreamMetrics, WriteMetrics
from worker.pipelines.pipeline import Pipeline
from worker.pipelines.records import RECORD_TYPES
from worker.pipelines.records.view_events import VIEW_EVENTS
from worker.pipelines.retention import LOOP as RETENTION
from worker.pipelines.retention import PipelineRetention, Retention
from worker.pipelines.sink import PostgresSink
from worker.pipelines.sources.stream.adjust import Adjustment
from worker.pipelines.sources.stream.look import Looker
from worker.pipelines.sources.stream.source import StreamReading, StreamSource
from worker.runtime.clock import SystemClock
from worker.runtime.worker_id import new_worker_id

if TYPE_CHECKING:
    from uuid import UUID

    from worker.db.session import Database
    from worker.observability.metrics import Metrics
    from worker.observability.status import Status
    from worker.pipelines.model import RecordType
    from worker.redis.client import RedisClient
    from worker.runtime.supervisor import Loop
    from worker.settings.model import Settings
    from worker.settings.pipelines import PipelineSettings


@dataclass(frozen=True, slots=True)
class StreamPipeline:
    """The loops of one stream: the pipeline, and its lease."""

    pipeline: Pipeline[Any]
    lease: Lease[UUID]

    @property
    def name(self) -> str:
        return self.pipeline.name


@dataclass(frozen=True, slots=True)
class Pipelines:
    """All streams, the channel (None: it is not stored), and what deletes old rows of their tables."""

    streams: list[StreamPipeline]
    channel: ChannelPipeline | None
    retention: PipelineRetention

    def loops(self) -> dict[str, Loop]:
        """Name → loop; none where there is nothing to carry."""
        loops: dict[str, Loop] = {RETENTION: self.retention} if self.streams or self.channel else {}
        for stream in self.streams:
            loops |= {stream.name: stream.pipeline, f"{stream.name} lease": stream.lease}
        return loops if self.channel is None else loops | self.channel.loops()


def name_checks(settings: Settings) -> tuple[str, ...]:
    """The names of the pipelines' checks."""
    return (*(name for _, _, name in name_streams(settings)), *(CHECKS if settings.stores_messages else ()))


def name_streams(settings: Settings) -> list[tuple[RecordType[Any], str, str]]:
    """Record, stream and name, for each stream.

    The name is that of the loop and the check: the pipeline's, or `pipeline:stream` where the pipeline has several.
    """
    return [
        (record, stream, record.name if len(streams) == 1 else f"{record.name}:{stream}")
        for record in settings.records
        for streams in [settings.pipeline(record).streams]
        for stream in streams
    ]


def build_pipelines(
    settings: Settings, database: Database, redis: RedisClient, status: Status, metrics: Metrics
) -> Pipelines:
    """Nothing is read or written yet. `status` has the checks of `name_checks`."""
    held: set[Lease[UUID]] = set()
    streams = [
        _build(settings, record, stream, name, database, redis, status, metrics, held)
        for record, stream, name in name_streams(settings)
    ]
    tables: list[Retention] = [
        RecordRetention(record.name, record.time, age)
        for record in settings.records
        if (age := settings.pipeline(record).retention) is not None
    ]
    channel = None
    if settings.stores_messages:
        sink = make_sink(settings, database, VIEW_EVENTS)
        channel = build_channel(settings, database, redis, status, metrics, sink)
        tables.append(TicketRetention())
    retention = PipelineRetention(
        database=database, status=status, tables=tables, letters=settings.dead_letter_retention
    )
    return Pipelines(streams, channel, retention)


def make_adjustments(settings: Settings, database: Database, redis: RedisClient) -> dict[str, Adjustment]:
    """Stream → its Adjustment, for all pipelines, whether they are carried or not."""
    return {
        stream: Adjustment(
            database=database,
            position=StreamPosition(settings.view_source_name, stream, record.name),
            looker=Looker(connection=redis.stream_connection(), stream=stream, group=settings.pipeline(record).group),
            pipeline=record.name,
        )
        for record in RECORD_TYPES.values()
        for stream in settings.pipeline(record).streams
    }


def make_sink(
    settings: Settings, database: Database, record: RecordType[Any], *, replaces: bool = True
) -> PostgresSink[Any]:
    """`replaces`: as for RecordTable."""
    table = RecordTable(record, future=settings.pipeline(record).window.future, replaces=replaces)
    return PostgresSink(database, record, table)


def _build(
    settings: Settings,
    record: RecordType[Any],
    stream: str,
    name: str,
    database: Database,
    redis: RedisClient,
    status: Status,
    metrics: Metrics,
    held: set[Lease[UUID]],
) -> StreamPipeline:
    clock = SystemClock()
    own = settings.pipeline(record)
    position = StreamPosition(settings.view_source_name, stream, record.name)
    lease = Lease(database, position, new_worker_id(), status, loop=f"{name} lease", held=held)

    def is_on_hold() -> bool:
        return status.checks[name].state is State.HOLD

    source = StreamSource(
        database=database,
        position=position,
        lease=lease,
        looker=Looker(
            connection=redis.stream_connection(),
            stream=stream,
            group=own.group,
            keep_ms=None if own.keep is None else round(own.keep.total_seconds() * 1000),
        ),
        waiting=redis.stream_connection(),
        reading=_make_reading(record, own),
        observer=StreamMetrics(metrics, clock, record.name, stream, reads=lambda: lease.is_usable or is_on_hold()),
        new_mark=lambda: uuid4().hex,
    )
    delivery = Delivery(
        make_sink(settings, database, record),
        WriteMetrics(metrics.records, record.name),
        clock,
        max_retries=own.max_retries,
        retry_delay=own.retry_delay.total_seconds(),
    )
    metrics.stream_holds.labels(record.name, stream).set_function(is_on_hold)
    metrics.lease_held.labels(name).set_function(lambda: lease.is_usable)
    pipeline = Pipeline(
        name=name,
        source=source,
        delivery=delivery,
        lease=lease,
        status=status,
        clock=clock,
        interval=own.interval.total_seconds(),
    )
    return StreamPipeline(pipeline, lease)


def _make_reading(record: RecordType[Any], own: PipelineSettings) -> StreamReading[Any]:
    return StreamReading(
        record=record,
        field=own.field.encode(),
        window=own.window,
        batch_size=own.batch_size,
        settings_prefix=record.name.upper(),
    )
