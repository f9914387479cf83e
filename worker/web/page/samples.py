"""The last hour of the counters that the page plots, kept in memory."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from worker.observability.logs import get_logger
from worker.observability.readings import Readings
from worker.runtime.waiting import wait_first

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Sequence

    from prometheus_client import CollectorRegistry

    from worker.observability.status import Status
    from worker.runtime.clock import Clock
    from worker.web.page.model import PipelineRow

log = get_logger(__name__)

LOOP = "page samples"
PERIOD_S = 5.0
KEPT = 720
AFTER_MISTAKE_S = 60.0
BEAT_S = 60.0
# Column → metric. All but the pending ones only grow; the page computes rates from them.
VIEW_COLUMNS = {
    "messages": "view_count_updates_total",
    "views": "view_count_flushed_views_total",
    "flushes": "view_count_flushes_total",
    "flushRounds": "view_count_flush_seconds_count",
    "flushSeconds": "view_count_flush_seconds_sum",
    "pendingIds": "view_count_pending_keys",
    "oldestPendingSeconds": "view_count_oldest_pending_seconds",
}


class Samples:
    """One sample every five seconds, of an hour at most.

    A sample is a list with the time in milliseconds since 1970, a number for each of VIEW_COLUMNS, and the number of
    records of each pipeline. `number` counts the samples that were taken.
    """

    def __init__(
        self, registry: CollectorRegistry, pipelines: Sequence[PipelineRow], status: Status, clock: Clock
    ) -> None:
        self._registry = registry
        self._pipelines = pipelines
        self._status = status
        self._clock = clock
        self._kept: deque[list[float]] = deque(maxlen=KEPT)
        self.number = 0

    async def run(self, stop: asyncio.Event) -> None:
        while not stop.is_set():
            pause = PERIOD_S
            try:
                self.take()
            except Exception as error:
                # A mistake here must not end the worker.
                log.error("page sample failed", exc_info=error)
                pause = AFTER_MISTAKE_S
            self._status.expect_beat(LOOP, within=pause + BEAT_S)
            await wait_first(pause, stop)

    def take(self) -> None:
        readings = Readings(self._registry)
        views = [readings.get(metric) for metric in VIEW_COLUMNS.values()]
        records = [pipeline.count_records(readings) for pipeline in self._pipelines]
        self._kept.append([round(self._clock.now().timestamp() * 1000), *views, *records])
        self.number += 1

    def document(self, after: int = 0) -> dict[str, object]:
        """Columns, and the rows after the sample of that number, as far as they are kept."""
        new = min(self.number - after, len(self._kept))
        rows = list(self._kept)[len(self._kept) - new :]
        return {"columns": ["time", *VIEW_COLUMNS, *(pipeline.name for pipeline in self._pipelines)], "rows": rows}
