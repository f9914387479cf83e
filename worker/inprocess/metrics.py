"""The metrics of an application's Writers, in the application's own registry."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from worker.observability.metrics import RecordMetrics
from worker.pipelines.metrics import BufferMetrics

_unread = CollectorRegistry()
_of_registry: dict[CollectorRegistry, tuple[RecordMetrics, dict[str, BufferMetrics]]] = {}


def metrics_in(registry: CollectorRegistry | None, pipeline: str) -> BufferMetrics:
    """The metrics of a pipeline in this registry; they are made once. None: in one that nobody reads."""
    registry = registry or _unread
    if registry not in _of_registry:
        _of_registry[registry] = RecordMetrics(registry), {}
    records, pipelines = _of_registry[registry]
    if pipeline not in pipelines:
        pipelines[pipeline] = BufferMetrics(records, pipeline)
    return pipelines[pipeline]
