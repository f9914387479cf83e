"""What a LogMetricsRequest must be, and the document that it becomes."""

from __future__ import annotations

import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given
from hypothesis import strategies as st

from worker.contract.entry_id import EntryId
from worker.pipelines.model import InvalidRecord, Window
from worker.pipelines.records import metrics
from worker.rpc.analytics.v1.analytics_pb2 import LogMetricsRequest
from worker.rpc.requests import read_metric

ROOT = Path(__file__).parents[2]
NOW = datetime(2026, 11, 28, 10, 0, 0, tzinfo=UTC)
ID = EntryId(int(NOW.timestamp() * 1000) + 3, 0)
WINDOW = Window(86_400, 300)
AT = Timestamp(seconds=int(NOW.timestamp()))


def read(**fields: Any) -> Any:
    request = LogMetricsRequest(**{"service_name": "s", "metric_name": "m", **fields})
    return metrics.parse(read_metric(request.SerializeToString(), NOW, WINDOW), ID, WINDOW)


def test_a_fraction_has_a_field_of_its_own() -> None:
    assert read(value=3).value == 3
    assert read(value=3, double_value=0.5).value == 0.5
    assert read(value=3, double_value=0.0).value == 0
    assert read().value == 0
    assert read(value=-(2**63)).value == -(2.0**63)


def test_nanoseconds_are_cut() -> None:
    at = Timestamp(seconds=AT.seconds, nanos=999_999_999)
    assert read(timestamp=at).time == NOW.replace(microsecond=999_999)
    assert read(timestamp=Timestamp(seconds=AT.seconds - 1, nanos=1999)).time.microsecond == 1


def test_an_unset_time_is_that_of_the_receipt() -> None:
    assert read().time == datetime.fromtimestamp(ID.ms / 1000, UTC)
    with pytest.raises(InvalidRecord):
        read(timestamp=Timestamp())  # 1970 was meant


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"service_name": ""}, "`service_name`"),
        ({"service_name": "s" * 257}, "`service_name`"),
        ({"metric_name": ""}, "`metric_name`"),
        ({"metric_name": "a\x00"}, "`metric_name`"),
        ({"double_value": float("nan")}, "`double_value`"),
        ({"double_value": float("-inf")}, "`double_value`"),
        ({"timestamp": Timestamp(seconds=AT.seconds + 301)}, "`timestamp`"),
        ({"timestamp": Timestamp(seconds=AT.seconds - 90_000)}, "`timestamp`"),
        ({"timestamp": Timestamp(seconds=AT.seconds, nanos=-1)}, "`timestamp`"),
        ({"timestamp": Timestamp(seconds=AT.seconds, nanos=10**9)}, "`timestamp`"),
        ({"timestamp": Timestamp(seconds=2**62)}, "`timestamp`"),
        ({"event_id": "e"}, "`event_id`"),
        ({"event_id": "", "timestamp": AT}, "`event_id`"),
        ({"event_id": "e" * 257, "timestamp": AT}, "`event_id`"),
        ({"event_id": "\x00", "timestamp": AT}, "`event_id`"),
    ],
)
def test_a_wrong_field_is_named(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidRecord, match=named):
        read(**fields)


@pytest.mark.parametrize("message", [b"\xff", b"\n\x02\xff\xfe", b"\x08\x01"])
def test_what_is_not_a_request_is_refused(message: bytes) -> None:
    with pytest.raises(InvalidRecord):
        read_metric(message, NOW, WINDOW)


@given(
    st.builds(
        LogMetricsRequest,
        service_name=st.text(max_size=300),
        metric_name=st.text(min_size=1),
        value=st.integers(-(2**63), 2**63 - 1),
        double_value=st.none() | st.floats(),
        timestamp=st.none()
        | st.builds(
            Timestamp,
            seconds=st.integers(-(2**63), 2**63 - 1) | st.integers(AT.seconds - 86_500, AT.seconds + 310),
            nanos=st.integers(-1, 10**9),
        ),
        event_id=st.none() | st.text(),
    )
)
def test_a_document_is_always_a_valid_record(request: LogMetricsRequest) -> None:
    try:
        document = read_metric(request.SerializeToString(), NOW, WINDOW)
    except InvalidRecord:
        return
    # The entry has the time of Redis, which is not before that of the call where the clocks agree.
    record = metrics.parse(document, EntryId(int(NOW.timestamp() * 1000), 0), WINDOW)
    assert (record.service_name, record.metric_name) == (request.service_name, request.metric_name)


def test_generated_code_is_that_of_the_published_file(tmp_path: Path) -> None:
    """`make proto` writes it again."""
    arguments = ("--proto_path=proto", f"--python_out={tmp_path}", f"--pyi_out={tmp_path}")
    command = [sys.executable, "-m", "grpc_tools.protoc", *arguments, "analytics/v1/analytics.proto"]
    subprocess.run(command, cwd=ROOT, check=True)
    made = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.py*"))
    assert len(made) == 2
    for path in made:
        assert (tmp_path / path).read_text() == (ROOT / "worker/rpc" / path).read_text(), path
