"""Reads requests: a LogMetricsRequest becomes the document of a record."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from math import isfinite
from typing import TYPE_CHECKING

import msgspec
from google.protobuf.message import DecodeError

from worker.contract.entry_id import EntryId
from worker.contract.times import EPOCH
from worker.pipelines.model import InvalidRecord
from worker.pipelines.records import fields
from worker.rpc.analytics.v1.analytics_pb2 import LogMetricsRequest

if TYPE_CHECKING:
    from google.protobuf.timestamp_pb2 import Timestamp

    from worker.pipelines.model import Window

# What a valid Timestamp may have: from the year 1 to the year 9999.
_FIRST_SECOND = int((datetime.min.replace(tzinfo=UTC) - EPOCH).total_seconds())
_LAST_SECOND = int((datetime.max.replace(tzinfo=UTC) - EPOCH).total_seconds())
_NANOSECONDS = 10**9


class _Document(msgspec.Struct, omit_defaults=True):
    """As `pipelines.records.metrics` reads it. Without a time it has that of its entry: its receipt."""

    service_name: str
    metric_name: str
    value: float
    time: datetime | None = None
    event_id: str | None = None


_encode = msgspec.json.Encoder().encode


def read_metric(message: bytes, now: datetime, window: Window) -> bytes:
    """The document of a LogMetricsRequest that is received now. Raises InvalidRecord, which names the field.

    A document that this returns is a valid record.
    """
    try:
        request = LogMetricsRequest.FromString(message)
    except DecodeError:
        raise InvalidRecord("not_protobuf", "the message is not a LogMetricsRequest") from None
    fields.check_key(request.service_name, "service_name")
    fields.check_key(request.metric_name, "metric_name")
    value: float = request.double_value if request.HasField("double_value") else request.value
    if not isfinite(value):
        raise InvalidRecord("invalid_field", "`double_value` is not a finite number")
    time = event_id = None
    if request.HasField("timestamp"):
        time = _read_time(request.timestamp)
        fields.check_time(time, EntryId(int(now.timestamp() * 1000), 0), window, "timestamp")
    if request.HasField("event_id"):
        event_id = request.event_id
        fields.check_key(event_id, "event_id")
        if time is None:
            raise InvalidRecord("invalid_field", "`event_id` needs a `timestamp`: a repeated metric must have the same")
    return _encode(_Document(request.service_name, request.metric_name, value, time, event_id))


def _read_time(timestamp: Timestamp) -> datetime:
    """Nanoseconds are cut to microseconds. Raises InvalidRecord."""
    seconds, nanos = timestamp.seconds, timestamp.nanos
    if not (_FIRST_SECOND <= seconds <= _LAST_SECOND and 0 <= nanos < _NANOSECONDS):
        raise InvalidRecord("invalid_field", "`timestamp` is not a valid Timestamp")
    return EPOCH + timedelta(seconds=seconds, microseconds=nanos // 1000)
