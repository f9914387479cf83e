"""The table of metrics: every name that this worker exports, with its meaning.

The names are a public contract. No label is an id, so the number of series does not grow with the data.
"""

from __future__ import annotations

from prometheus_client import (
    GC_COLLECTOR,
    PLATFORM_COLLECTOR,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
)


class Metrics:
    """All metrics of one worker, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.registry.register(PLATFORM_COLLECTOR)
        self.registry.register(GC_COLLECTOR)

        self.redis_up = self._gauge("redis_up", "1 while Redis answers, else 0.")
        self.postgres_up = self._gauge("postgres_up", "1 while Postgres answers, else 0.")

        self.flushes = self._counter("view_count_flushes_total", "Flushes committed to Postgres.")
        self.flushed_views = self._counter("view_count_flushed_views_total", "Views committed to Postgres.")
        self.flush_failures = self._counter("view_count_flush_failures_total", "Flushes that ended in an error.")
        self.flush_seconds = Histogram(
            "view_count_flush_seconds",
            "Duration of a flush from the probe of Redis to its confirmed settle, in seconds.",
            buckets=(0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
            registry=self.registry,
        )
        self.target_skipped = self._counter(
            "view_count_target_skipped_total",
            "Views not added to the application's own table: it lacks the id, or its row refuses.",
            "reason",
        )
        self.messages = self._counter("view_count_updates_total", "Messages that were counted.")
        self.invalid_messages = self._counter(
            "view_count_updates_invalid_total", "Messages that cannot be counted.", "reason"
        )
        self.announced_dropped = self._counter(
            "view_count_announced_dropped_total",
            "Views announced by messages and never written (lease lost, too many ids): lost unless INCRed too.",
        )
        self.subscription_gaps = self._counter(
            "view_count_subscription_gaps_total",
            "Gaps in which messages may have been missed: reconnects, and takeovers of the lease.",
        )
        self.settle_replays = self._counter(
            "view_count_settle_replays_total",
            "Flushes settled from the ledger, since Redis had not settled them (crash, lost reply, old snapshot).",
        )
        self.marker_losses = self._counter(
            "view_count_marker_losses_total", "Markers that were lost in Redis and created again, by evidence."
        )
        self.pending_keys = self._gauge("view_count_pending_keys", "Counter keys found and not flushed yet.")
        self.oldest_pending_seconds = self._gauge(
            "view_count_oldest_pending_seconds", "Seconds since the oldest pending key was found."
        )
        self.last_agreement = self._gauge(
            "view_count_last_agreement_timestamp_seconds",
            "Unix time of the last moment at which nothing was pending and Redis and Postgres agreed.",
        )
        self.holds = self._gauge("view_count_holds", "1 while flushing is on hold; /health says why. Else 0.")
        self.quarantined_keys = self._gauge(
            "view_count_quarantined_keys", "Counter keys left as they are: their id or value cannot be counted."
        )

    def _counter(self, name: str, meaning: str, *labels: str) -> Counter:
        return Counter(name, meaning, labels, registry=self.registry)

    def _gauge(self, name: str, meaning: str) -> Gauge:
        return Gauge(name, meaning, registry=self.registry)
