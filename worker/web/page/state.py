"""The document that the page shows: `/health`, and the numbers of this worker."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from worker.observability.readings import Readings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from prometheus_client import CollectorRegistry

    from worker.observability.status import Status
    from worker.runtime.clock import Clock
    from worker.web.health import Health
    from worker.web.page.lookups import Lookups
    from worker.web.page.model import PipelineRow

# Field → metric.
VIEW_NUMBERS = {
    "pendingIds": "view_count_pending_keys",
    "oldestPendingSeconds": "view_count_oldest_pending_seconds",
    "flushedViews": "view_count_flushed_views_total",
    "dropped": "view_count_announced_dropped_total",
    "quarantinedKeys": "view_count_quarantined_keys",
}
LAST_AGREEMENT = "view_count_last_agreement_timestamp_seconds"


@dataclass(frozen=True, slots=True)
class Identity:
    """What the page shows of a worker besides its numbers. `facts` are names and addresses, without any secret."""

    host: str
    pid: int
    flush_interval: float
    counts_views: bool
    facts: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    identity: Identity
    health: Health
    status: Status
    registry: CollectorRegistry
    pipelines: Sequence[PipelineRow]
    lookups: Lookups
    clock: Clock
    started: float

    def document(self) -> dict[str, object]:
        readings = Readings(self.registry)
        return {
            "health": self.health.health().body,
            "stopping": self.status.stopping,
            "worker": {
                "host": self.identity.host,
                "pid": self.identity.pid,
                "uptimeSeconds": round(self.clock.monotonic() - self.started),
                **self.identity.facts,
            },
            "views": self._views(readings) if self.identity.counts_views else None,
            "pipelines": [pipeline.document(readings) for pipeline in self.pipelines],
            "lookups": self.lookups.found,
        }

    def _views(self, readings: Readings) -> dict[str, object]:
        agreed = readings.find(LAST_AGREEMENT)
        return {
            "flushIntervalSeconds": self.identity.flush_interval,
            "lastAgreementMs": None if agreed is None else round(agreed * 1000),
            "invalidMessages": readings.total("view_count_updates_invalid_total"),
            **{field: readings.get(metric) for field, metric in VIEW_NUMBERS.items()},
        }
