"""Makes the parts of the page, and connects them."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING

from worker.app.pipelines import name_streams
from worker.pipelines.records.view_events import VIEW_EVENTS
from worker.runtime.clock import SystemClock
from worker.web.page.lookups import LOOP as LOOKUPS
from worker.web.page.lookups import Lookups
from worker.web.page.model import PipelineRow
from worker.web.page.page import Page
from worker.web.page.samples import LOOP as SAMPLES
from worker.web.page.samples import Samples
from worker.web.page.state import Identity, State

if TYPE_CHECKING:
    from worker.counters.display import Display
    from worker.db.record_reads import RecordReader
    from worker.observability.metrics import Metrics
    from worker.observability.status import Status
    from worker.runtime.supervisor import Loop
    from worker.settings.model import Settings
    from worker.web.health import Health


@dataclass(frozen=True, slots=True)
class LivePage:
    """The page, and the loops that collect what it shows."""

    page: Page
    samples: Samples
    lookups: Lookups

    def loops(self) -> dict[str, Loop]:
        return {SAMPLES: self.samples, LOOKUPS: self.lookups}


def build_page(
    settings: Settings, health: Health, status: Status, metrics: Metrics, display: Display, records: RecordReader
) -> LivePage:
    """Nothing is read yet."""
    clock = SystemClock()
    pipelines = [PipelineRow(name, record.name, stream) for record, stream, name in name_streams(settings)]
    if settings.stores_messages:
        pipelines.append(PipelineRow(VIEW_EVENTS.name, VIEW_EVENTS.name, None))
    lookups = Lookups(display if settings.counts_views else None, records, status, clock)
    samples = Samples(metrics.registry, pipelines, status, clock)
    state = State(
        identity=_identify(settings),
        health=health,
        status=status,
        registry=metrics.registry,
        pipelines=pipelines,
        lookups=lookups,
        clock=clock,
        started=clock.monotonic(),
    )
    return LivePage(Page(state, samples, lookups, clock), samples, lookups)


def _identify(settings: Settings) -> Identity:
    return Identity(
        host=socket.gethostname(),
        pid=os.getpid(),
        flush_interval=settings.batch_interval_ms / 1000,
        counts_views=settings.counts_views,
        facts={
            "source": settings.view_source_name,
            "redis": settings.redis.place,
            "postgres": settings.database.place,
        },
    )
