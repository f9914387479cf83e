"""Documents of metrics: every form that is accepted, and what is not."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest

from worker.contract.entry_id import EntryId
from worker.pipelines.model import InvalidRecord, Window
from worker.pipelines.records.metrics import METRICS, Metric, parse

TEN = datetime(2025, 11, 27, 10, tzinfo=UTC)
ARRIVED = EntryId(round(TEN.timestamp() * 1000) + 1500, 0)
WINDOW = Window(METRICS.defaults.accept_past, METRICS.defaults.accept_future)
FULL = {
    "time": "2025-11-27T10:00:00Z",
    "service_name": "checkout",
    "metric_name": "cpu_usage",
    "value": 0.75,
    "event_id": "e-1",
}


def read(**changes: Any) -> Metric:
    fields = {name: value for name, value in (FULL | changes).items() if value is not ...}
    return parse(json.dumps(fields).encode(), ARRIVED, WINDOW)


def test_every_field_is_a_column_in_its_order() -> None:
    names = [column.name for column in METRICS.columns]
    assert dict(zip(names, METRICS.row(read()), strict=True)) == FULL | {"time": TEN}


def test_a_metric_without_a_time_has_that_of_its_arrival() -> None:
    for missing in (..., None):
        assert read(time=missing, event_id=...).time == TEN.replace(second=1, microsecond=500_000)


@pytest.mark.parametrize("value", [0, -1, 2**53, 1e300, -0.0, 2**63 - 1])
def test_any_finite_number_is_a_value(value: float) -> None:
    assert read(value=value).value == float(value)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"service_name": ""}, "service_name"),
        ({"service_name": ...}, "service_name"),
        ({"metric_name": "x" * 257}, "metric_name"),
        ({"metric_name": "a\x00b"}, "NUL"),
        ({"value": "1"}, "value"),
        ({"value": None}, "value"),
        ({"value": True}, "value"),
        ({"value": float("nan")}, "JSON"),
        ({"time": ..., "event_id": "e"}, "event_id"),
        ({"event_id": ""}, "event_id"),
        ({"time": "yesterday"}, "time"),
        ({"time": 0}, "time"),
        ({"time": "2025-11-27T10:06:00Z"}, "time"),
    ],
)
def test_what_is_not_a_metric_is_refused(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidRecord, match=text):
        read(**changes)
