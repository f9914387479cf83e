"""The metrics of an application's Writers, in the application's registry."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import pytest
from prometheus_client import REGISTRY, CollectorRegistry

from tests.support.written import event
from worker import SyncWriter, Writer
from worker.inprocess.metrics import metrics_in
from worker.observability.metrics import RecordMetrics
from worker.pipelines.metrics import WriteMetrics
from worker.pipelines.model import Written

NOWHERE = "postgresql://nobody@127.0.0.1:1/none"


def read(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    return registry.get_sample_value(name, {"pipeline": "chunk_requests", **labels})


def make(registry: CollectorRegistry | None, **arguments: Any) -> Writer[Any]:
    return Writer.chunk_requests(NOWHERE, registry=registry, **arguments)


def test_the_queue_and_its_capacity_are_those_of_all_writers_of_a_registry() -> None:
    registry = CollectorRegistry()
    first, second = make(registry, capacity=5), make(registry, capacity=3)
    first.send(event(1))
    second.send(event(2))
    second.send(event(3))
    assert read(registry, "persistence_queue_depth") == 3
    assert read(registry, "persistence_queue_capacity") == 8
    assert read(registry, "timescale_write_queue_depth") == 3
    assert read(registry, "persistence_retry_queue_depth") == 0
    del second
    gc.collect()
    assert read(registry, "persistence_queue_depth") == 1
    assert read(registry, "persistence_queue_capacity") == 5
    assert first.held == 1


def test_a_full_buffer_is_counted_as_such() -> None:
    registry = CollectorRegistry()
    writer = make(registry, capacity=2)
    assert [writer.send(event(number)) for number in range(5)] == [True, True, False, False, False]
    assert read(registry, "persistence_queue_full_total") == 3
    assert read(registry, "persistence_dropped_total") == 3
    assert read(registry, "timescale_write_total", status="error") == 3
    assert read(registry, "timescale_write_errors_total", error_type="queue_full") == 3


async def test_what_is_refused_after_the_shutdown_is_dropped_but_not_for_want_of_room() -> None:
    registry = CollectorRegistry()
    writer = make(registry)
    assert writer.send(event(1))
    assert not await writer.shutdown()
    assert not writer.send(event(2))
    assert read(registry, "persistence_queue_full_total") == 0
    assert read(registry, "persistence_dropped_total") == 2  # one was left, one refused
    assert read(registry, "persistence_queue_depth") == 0


async def test_what_is_tried_again_is_counted_while_it_waits() -> None:
    registry = CollectorRegistry()
    async with make(registry, writers=2, batch_size=1) as writer:
        for number in range(3):
            writer.send(event(number))
        async with asyncio.timeout(10):
            while read(registry, "persistence_retry_queue_depth") != 2:
                await asyncio.sleep(0)
        assert read(registry, "persistence_queue_depth") == 3
        failed = read(registry, "persistence_failure_total")
        assert failed is not None
        assert failed >= 2
        await writer.shutdown(0)
    assert read(registry, "persistence_retry_queue_depth") == 0
    assert read(registry, "timescale_write_queue_depth") == 0
    dropped, unknown = read(registry, "persistence_dropped_total"), read(registry, "persistence_unknown_total")
    assert dropped is not None
    assert unknown is not None
    assert dropped + unknown == 3


def test_writers_that_write_at_the_same_time_are_counted_apart() -> None:
    registry = CollectorRegistry()
    records = RecordMetrics(registry)
    first, second = WriteMetrics(records, "chunk_requests"), WriteMetrics(records, "chunk_requests")
    first.writing(5, again=False)
    second.writing(3, again=False)
    assert read(registry, "timescale_write_queue_depth") == 8
    second.failed(3)
    assert read(registry, "timescale_write_queue_depth") == 5
    first.written(Written(rows=5), 0.1, None)
    assert read(registry, "timescale_write_queue_depth") == 0


@pytest.mark.parametrize("kind", [Writer, SyncWriter])
def test_without_a_registry_none_is_touched(kind: Any) -> None:
    before = list(REGISTRY._names_to_collectors)
    writers = [kind.chunk_requests(NOWHERE) for _ in range(2)]
    assert [writer.send(event(1)) for writer in writers] == [True, True]
    assert list(REGISTRY._names_to_collectors) == before
    for writer in writers:
        if isinstance(writer, SyncWriter):
            assert not writer.shutdown(0)


def test_a_registry_has_one_set_of_metrics() -> None:
    first, second = CollectorRegistry(), CollectorRegistry()
    assert metrics_in(first, "chunk_requests") is metrics_in(first, "chunk_requests")
    assert metrics_in(first, "chunk_requests") is not metrics_in(second, "chunk_requests")
