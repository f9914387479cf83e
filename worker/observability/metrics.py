"""The table of metrics: every name that this worker exports, with its meaning.

The names are a public contract. No label is an id, so the number of series does not grow with the data.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from prometheus_client import (
    GC_COLLECTOR,
    PLATFORM_COLLECTOR,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
)
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from collections.abc import Iterator

SECONDS = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
RECORDS = (1, 2, 5, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10_000)


class Up:
    """1 while a server answers, else 0. Two gauges, as the name without a prefix may clash with an exporter's."""

    def __init__(self, *gauges: Gauge) -> None:
        self._gauges = gauges

    def set(self, up: int) -> None:
        for gauge in self._gauges:
            gauge.set(up)


class Moment(Collector):
    """A gauge with the Unix time of an event. It has no sample before the first one.

    A 0 there, or the start of the process, would be a time at which nothing happened: alerts compare the time with now.
    """

    def __init__(self, name: str, meaning: str, registry: CollectorRegistry) -> None:
        self._name = name
        self._meaning = meaning
        self._at: float | None = None
        registry.register(self)

    def set_to_current_time(self) -> None:
        self._at = time.time()

    def collect(self) -> Iterator[GaugeMetricFamily]:
        family = GaugeMetricFamily(self._name, self._meaning)
        if self._at is not None:
            family.add_metric([], self._at)
        yield family


class _Family:
    """Makes metrics in one registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry

    def _counter(self, name: str, meaning: str, *labels: str) -> Counter:
        return Counter(name, meaning, labels, registry=self.registry)

    def _gauge(self, name: str, meaning: str, *labels: str) -> Gauge:
        return Gauge(name, meaning, labels, registry=self.registry)

    def _histogram(self, name: str, meaning: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(name, meaning, labels, buckets=buckets, registry=self.registry)


class Metrics(_Family):
    """All metrics of one worker, in a registry of its own."""

    def __init__(self) -> None:
        super().__init__(CollectorRegistry())
        ProcessCollector(registry=self.registry)
        self.registry.register(PLATFORM_COLLECTOR)
        self.registry.register(GC_COLLECTOR)
        self._add_worker()
        self._add_views()
        self.records = RecordMetrics(self.registry)
        self._add_streams()

    def _add_worker(self) -> None:
        self.build_info = self._gauge("viewer_worker_build_info", "1, with the version as its label.", "version")
        self.lease_held = self._gauge(
            "viewer_worker_lease_held", "1 while this worker holds the lease and can use both servers, else 0.", "lease"
        )
        self.redis_up = self._add_up("redis_up", "1 while Redis answers, else 0.")
        self.postgres_up = self._add_up("postgres_up", "1 while Postgres answers, else 0.")
        self._add_grpc()

    def _add_up(self, name: str, meaning: str) -> Up:
        return Up(self._gauge(name, meaning), self._gauge(f"viewer_worker_{name}", meaning))

    def _add_grpc(self) -> None:
        """By the names that gRPC servers commonly have."""
        labels = ("grpc_type", "grpc_service", "grpc_method")
        self.calls_started = self._counter("grpc_server_started_total", "Calls that came in.", *labels)
        self.calls_handled = self._counter(
            "grpc_server_handled_total", "Calls that were answered or cancelled, by status.", *labels, "grpc_code"
        )
        self.call_seconds = self._histogram(
            "grpc_server_handling_seconds", "Duration of a call in the server, in seconds.", SECONDS, *labels
        )

    def _add_views(self) -> None:
        self.flushes = self._counter("view_count_flushes_total", "Flushes committed to Postgres.")
        self.flushed_views = self._counter("view_count_flushed_views_total", "Views committed to Postgres.")
        self.flush_failures = self._counter("view_count_flush_failures_total", "Flushes that ended in an error.")
        self.flush_seconds = self._histogram(
            "view_count_flush_seconds",
            "Duration of a flush from the probe of Redis to its confirmed settle, in seconds.",
            SECONDS,
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
        self.event_gaps = self._counter(
            "view_event_gaps_total",
            "Gaps in which view_events may have missed messages: reconnects, and takeovers of the channel's lease.",
        )
        self.settle_replays = self._counter(
            "view_count_settle_replays_total",
            "Flushes settled from the ledger, since Redis had not settled them (crash, lost reply, old snapshot).",
        )
        self.marker_losses = self._counter(
            "view_count_marker_losses_total", "Markers that were lost in Redis and created again, by evidence."
        )
        self.history_behind_seconds = self._gauge(
            "view_count_history_behind_seconds",
            "Age of the oldest flush that is not in the hourly history; 0 while all are.",
        )
        self.history_failures = self._counter(
            "view_count_history_failures_total", "Updates of the hourly history that ended in an error."
        )
        self.pending_keys = self._gauge(
            "view_count_pending_keys",
            "Ids whose views are not flushed yet: found by the sweep, or announced by messages.",
        )
        self.oldest_pending_seconds = self._gauge(
            "view_count_oldest_pending_seconds", "Seconds since the oldest of these was found or announced."
        )
        self.last_agreement = Moment(
            "view_count_last_agreement_timestamp_seconds",
            "Unix time of the last moment at which nothing was pending and Redis and Postgres agreed.",
            self.registry,
        )
        self.holds = self._gauge("view_count_holds", "1 while flushing is on hold; /health says why. Else 0.")
        self.quarantined_keys = self._gauge(
            "view_count_quarantined_keys", "Counter keys left as they are: their id or value cannot be counted."
        )

    def _add_streams(self) -> None:
        labels = ("pipeline", "stream")
        self.entries_carried = self._counter("stream_entries_carried_total", "Entries carried to Postgres.", *labels)
        self.entries_lost = self._counter(
            "stream_entries_lost_total", "Entries that were deleted or trimmed before they were carried.", *labels
        )
        self.stream_gaps = self._counter(
            "stream_gaps_total", "Moments at which entries may have been lost, their number unknown.", *labels
        )
        self.backlog = self._gauge(
            "stream_backlog_entries",
            "Entries that are not carried yet. Only the replica that reads the stream reports it; others report 0.",
            *labels,
        )
        self.oldest_unread = self._gauge(
            "stream_oldest_unread_seconds",
            "Age of the oldest entry that is not carried yet. Reported as stream_backlog_entries is.",
            *labels,
        )
        self.stream_holds = self._gauge("stream_holds", "1 while the stream is on hold; /health says why.", *labels)


class RecordMetrics(_Family):
    """Metrics of the records of all pipelines of one process."""

    def __init__(self, registry: CollectorRegistry) -> None:
        super().__init__(registry)
        self.records_in_flight = self._gauge(
            "persistence_queue_depth", "Records that are buffered or being written.", "pipeline"
        )
        self.record_capacity = self._gauge(
            "persistence_queue_capacity", "The limit of persistence_queue_depth, where a buffer has one.", "pipeline"
        )
        self.record_batches = self._histogram(
            "persistence_batch_size", "Records in a batch that was written.", RECORDS, "pipeline"
        )
        self.records_written = self._counter("persistence_success_total", "Records written as rows.", "pipeline")
        self.records_failed = self._counter(
            "persistence_failure_total", "Records whose write failed. They are tried again.", "pipeline"
        )
        self.records_retried = self._counter("persistence_retry_total", "Records that are written again.", "pipeline")
        self.records_exhausted = self._counter(
            "persistence_retry_exhausted_total", "Records whose tries are used up.", "pipeline"
        )
        self.records_repeated = self._counter(
            "persistence_repeated_total", "Records that were there already, with their event_id.", "pipeline"
        )
        self.records_unknown = self._counter(
            "persistence_unknown_total",
            "Records of an application whose commit had no answer until the end.",
            "pipeline",
        )
        self.workers_stopped = self._counter(
            "persistence_worker_stopped_total",
            "Records of an application refused after a shutdown, and tasks of its Writers that ended by a mistake.",
            "pipeline",
        )
        self.records_coalesced = self._counter(
            "persistence_coalesced_total",
            "Records of an application that a newer one of the same key replaced before they were written.",
            "pipeline",
        )
        self.records_pausing = self._gauge(
            "persistence_retry_queue_depth", "Records of an application that wait for their next try.", "pipeline"
        )
        self.queue_full = self._counter(
            "persistence_queue_full_total", "Records that were refused because too many wait.", "pipeline"
        )
        self.records_dropped = self._counter(
            "persistence_dropped_total",
            "Records that are neither rows nor dead letters: refused, left at a shutdown, or impossible to keep.",
            "pipeline",
        )
        self.dead_letters = self._counter("persistence_dead_letters_total", "Records kept as dead letters.", "pipeline")
        self.record_latency = self._histogram(
            "persistence_latency_seconds",
            "From the arrival of a batch's oldest record to its commit.",
            SECONDS,
            "pipeline",
        )
        self.writes = self._counter(
            "timescale_write_total", "Records whose write succeeded or failed.", "pipeline", "status"
        )
        self.write_errors = self._counter(
            "timescale_write_errors_total", "Records whose write failed, by error.", "pipeline", "error_type"
        )
        self.write_seconds = self._histogram(
            "timescale_write_latency_seconds", "Duration of a write at the database.", SECONDS, "pipeline", "operation"
        )
        self.write_queue_depth = self._gauge(
            "timescale_write_queue_depth", "Records being written; of an application, those that wait, too.", "pipeline"
        )
        self.write_batches = self._histogram(
            "timescale_write_batch_size", "Records in a write.", RECORDS, "pipeline", "operation"
        )
