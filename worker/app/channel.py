"""Makes the parts that store the messages of VIEW_CHANNEL as view events, and connects them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from worker.db.lease import Lease
from worker.db.positions import ChannelLease
from worker.observability.throttle import Throttle
from worker.pipelines.batcher import Batcher
from worker.pipelines.buffer import Buffer, ByteBudget
from worker.pipelines.buffer_writer import LOG_PERIOD_S, BufferWriter
from worker.pipelines.delivery import Delivery
from worker.pipelines.metrics import BufferMetrics
from worker.pipelines.records.view_events import VIEW_EVENTS
from worker.pipelines.sources.channel import ChannelReceiver
from worker.redis.listener import Listener, listen_timeout
from worker.runtime.clock import SystemClock
from worker.runtime.worker_id import new_worker_id

if TYPE_CHECKING:
    import asyncio
    from uuid import UUID

    from worker.db.session import Database
    from worker.observability.metrics import Metrics
    from worker.observability.status import Status
    from worker.pipelines.sink import PostgresSink
    from worker.redis.client import RedisClient
    from worker.runtime.supervisor import Loop
    from worker.settings.model import Settings

# Names of loops and checks.
LISTENER = VIEW_EVENTS.name
WRITER = f"{VIEW_EVENTS.name} writer"
LEASE = f"{VIEW_EVENTS.name} lease"
CHECKS = (LISTENER, WRITER)
# Longer than monitors take to see that a server is back: the holder of the lease has messages that nobody else heard.
PATIENCE_S = 6.0


@dataclass(frozen=True, slots=True)
class ChannelPipeline:
    """The loops of one channel: the listener, its lease, and the writer of what is heard."""

    listener: LeasedListener
    lease: Lease[UUID]
    writer: BufferWriter

    def loops(self) -> dict[str, Loop]:
        return {LISTENER: self.listener, LEASE: self.lease, WRITER: self.writer}


@dataclass(frozen=True, slots=True)
class LeasedListener:
    """Releases the lease when it has ended, so that another replica listens at once."""

    listener: Listener[UUID]
    lease: Lease[UUID]

    async def run(self, stop: asyncio.Event) -> None:
        try:
            await self.listener.run(stop)
        finally:
            await self.lease.release_or_expire()


def build_channel(
    settings: Settings,
    database: Database,
    redis: RedisClient,
    status: Status,
    metrics: Metrics,
    sink: PostgresSink[Any],
) -> ChannelPipeline:
    """Nothing is read or written yet. `status` has checks for the listener and for the writer."""
    clock = SystemClock()
    own = settings.buffer(VIEW_EVENTS)
    row = ChannelLease(settings.view_source_name, settings.view_channel, VIEW_EVENTS.name)
    # Not shared out as the streams' leases are: a gap would be longer.
    lease = Lease(database, row, new_worker_id(), status, loop=LEASE, patience=PATIENCE_S)
    metrics.lease_held.labels(VIEW_EVENTS.name).set_function(lambda: lease.is_usable)
    buffered = BufferMetrics(metrics.records, VIEW_EVENTS.name)
    budget = ByteBudget(settings.buffer_max_bytes)
    # A full buffer must not wait for a batch that is not.
    batch_size = min(own.batch_size, own.capacity)
    buffer = Buffer(
        Batcher(batch_size, own.interval.total_seconds()),
        batch_size=batch_size,
        capacity=own.capacity,
        budget=budget,
        monotonic=clock.monotonic,
        on_due=lambda: writer.source.wake(),
    )
    writer = BufferWriter(
        name=WRITER,
        record=VIEW_EVENTS,
        window=own.window,
        buffer=buffer,
        delivery=Delivery(
            sink,
            buffered.make_write_metrics(),
            clock,
            max_retries=own.max_retries,
            retry_delay=own.retry_delay.total_seconds(),
        ),
        metrics=buffered,
        status=status,
        clock=clock,
    )
    listener = Listener(
        name=LISTENER,
        redis=redis,
        channel=settings.view_channel,
        lease=lease,
        receiver=ChannelReceiver(
            pipeline=VIEW_EVENTS.name,
            buffer=buffer,
            capacity=own.capacity,
            budget=budget,
            lease=lease,
            is_first=lambda token: token == row.first_token,
            metrics=buffered,
            gaps=metrics.event_gaps,
            clock=clock,
            warnings=Throttle(LOG_PERIOD_S, clock.monotonic),
        ),
        status=status,
        drain_timeout=listen_timeout(settings.shutdown_timeout.total_seconds()),
    )
    return ChannelPipeline(LeasedListener(listener, lease), lease, writer)
