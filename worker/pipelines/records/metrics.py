"""Metrics of services, as they log them (seed 003)."""

from __future__ import annotations

from datetime import datetime
from math import isfinite
from typing import TYPE_CHECKING

import msgspec

from worker.pipelines.model import Column, Defaults, InvalidRecord, RecordType, append
from worker.pipelines.records import fields

if TYPE_CHECKING:
    from worker.contract.entry_id import EntryId
    from worker.pipelines.model import Window


class Metric(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """One value. The fields are the columns of the table, in their order.

    `time` None: when a MetricStore takes it; not for a metric with an `event_id`.
    """

    time: datetime | None = None
    service_name: str
    metric_name: str
    value: float
    event_id: str | None = None


class _Document(msgspec.Struct, gc=False):
    service_name: str
    metric_name: str
    value: float
    time: str | int | None = None
    event_id: str | None = None


_decode = msgspec.json.Decoder(_Document).decode


def parse(document: bytes, entry_id: EntryId, window: Window) -> Metric:
    """A metric without a time has that of its arrival. Raises InvalidRecord."""
    found = fields.decode(_decode, document)
    fields.check_key(found.service_name, "service_name")
    fields.check_key(found.metric_name, "metric_name")
    fields.check_id(found.event_id, "event_id")
    if found.event_id is not None and found.time is None:
        raise InvalidRecord("invalid_field", "`event_id` needs a `time`: a repeated metric must have the same")
    if not isfinite(found.value):
        raise InvalidRecord("invalid_field", "`value` is not a finite number")
    time = fields.time_of(entry_id) if found.time is None else fields.parse_time(found.time, "time")
    fields.check_time(time, entry_id, window, "time")
    return Metric(
        time=time,
        service_name=found.service_name,
        metric_name=found.metric_name,
        value=found.value,
        event_id=found.event_id,
    )


METRICS = RecordType(
    name="metrics",
    columns=(
        Column("time", "timestamptz"),
        Column("service_name", "text"),
        Column("metric_name", "text"),
        Column("value", "double precision"),
        Column("event_id", "text"),
    ),
    time="time",
    rule=append(),
    parse=parse,
    row=msgspec.structs.astuple,
    defaults=Defaults(
        batch_size=("METRICS_BATCH_SIZE", 1000),
        interval=("METRICS_FLUSH_INTERVAL", 1.0),
        max_retries=("METRICS_MAX_RETRIES", 3),
        retry_delay=("METRICS_RETRY_DELAY", 0.1),
        capacity=("METRICS_CHANNEL_BUFFER", 10_000),
    ),
    stamp=fields.stamp,
)
