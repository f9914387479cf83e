"""A pipeline as the page shows it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from worker.observability.readings import Readings


@dataclass(frozen=True, slots=True)
class PipelineRow:
    """`name` is that of its check. `stream`: None where it reads a channel."""

    name: str
    pipeline: str
    stream: str | None

    def count_records(self, readings: Readings) -> float:
        """Records that this worker took since its start."""
        if self.stream is None:
            return readings.get("persistence_success_total", pipeline=self.pipeline)
        return readings.get("stream_entries_carried_total", pipeline=self.pipeline, stream=self.stream)

    def document(self, readings: Readings) -> dict[str, object]:
        of_pipeline = {"pipeline": self.pipeline}
        shown: dict[str, object] = {
            "name": self.name,
            "pipeline": self.pipeline,
            "records": self.count_records(readings),
            "queued": readings.get("persistence_queue_depth", **of_pipeline),
            "dropped": readings.get("persistence_dropped_total", **of_pipeline),
        }
        if self.stream is None:
            return shown
        labels = of_pipeline | {"stream": self.stream}
        # Elsewhere the metrics are 0, which would look like an answer: only the worker that reads the stream knows.
        reads = readings.get("viewer_worker_lease_held", lease=self.name) or readings.get("stream_holds", **labels)
        return shown | {
            "stream": self.stream,
            "backlog": readings.get("stream_backlog_entries", **labels) if reads else None,
            "oldestUnreadSeconds": readings.get("stream_oldest_unread_seconds", **labels) if reads else None,
            "lost": readings.get("stream_entries_lost_total", **labels),
            "gaps": readings.get("stream_gaps_total", **labels),
        }
