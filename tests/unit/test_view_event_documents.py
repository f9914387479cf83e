"""Documents of view events: as the messages of the channel, with a time and an id of the producer's own."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.contract.entry_id import EntryId
from worker.contract.message_reading import InvalidMessage
from worker.counters.intake.messages import parse_message
from worker.pipelines.model import InvalidRecord, Window
from worker.pipelines.records.view_events import VIEW_EVENTS, ViewEvent, parse

TEN = datetime(2025, 11, 27, 10, tzinfo=UTC)
ARRIVED = EntryId(round(TEN.timestamp() * 1000) + 1500, 0)
WINDOW = Window(VIEW_EVENTS.defaults.accept_past, VIEW_EVENTS.defaults.accept_future)
FULL = {"vodId": "vod_123", "count": 3, "ts": "2025-11-27T10:00:00Z", "event_id": "e-1"}


def read(**changes: Any) -> ViewEvent:
    fields = {name: value for name, value in (FULL | changes).items() if value is not ...}
    return parse(json.dumps(fields).encode(), ARRIVED, WINDOW)


def test_every_field_is_a_column_in_its_order() -> None:
    names = [column.name for column in VIEW_EVENTS.columns]
    row = dict(zip(names, VIEW_EVENTS.row(read()), strict=True))
    assert row == {"time": TEN, "vod_id": "vod_123", "count": 3, "event_id": "e-1"}


def test_an_event_without_a_time_has_that_of_its_arrival() -> None:
    for missing in (..., None):
        assert read(ts=missing, event_id=...).time == TEN.replace(second=1, microsecond=500_000)


@pytest.mark.parametrize("ts", ["2025-11-27T11:00:00.000000999+01:00", 1764237600000, "2025-11-27 10:00:00"])
def test_time_is_rfc_3339_or_milliseconds(ts: object) -> None:
    assert read(ts=ts).time == TEN


def test_fields_are_ignored_that_are_not_of_an_event() -> None:
    assert read(title={"count": [1]}, time="never", vod_id=1) == read()


@pytest.mark.parametrize(
    ("changes", "kind", "text"),
    [
        ({"vodId": ...}, "vod_id", "vodId"),
        ({"vodId": "a\x00b"}, "vod_id", "NUL"),
        ({"count": 0}, "count", "count"),
        ({"count": 10**9 + 1}, "count", "count"),
        ({"count": 1.0}, "count", "count"),
        ({"note": "x" * 65_536}, "too_long", "bytes"),
        ({"ts": ...}, "invalid_field", "needs a `ts`"),
        ({"ts": None}, "invalid_field", "needs a `ts`"),
        ({"ts": 1764237600000.5}, "invalid_field", "ts"),
        ({"ts": "yesterday"}, "invalid_field", "ts"),
        ({"ts": 0}, "time_out_of_range", "ts"),
        ({"ts": "2025-11-27T10:06:00Z"}, "time_out_of_range", "ts"),
        ({"event_id": ""}, "invalid_field", "event_id"),
        ({"event_id": "x" * 257}, "invalid_field", "event_id"),
        ({"event_id": "a\x00b"}, "invalid_field", "NUL"),
        ({"event_id": 1}, "invalid_field", "event_id"),
    ],
)
def test_what_is_not_an_event_is_refused(changes: dict[str, Any], kind: str, text: str) -> None:
    with pytest.raises(InvalidRecord, match=text) as refused:
        read(**changes)
    assert refused.value.error_class == kind


def test_a_field_that_is_there_twice_is_refused() -> None:
    with pytest.raises(InvalidRecord, match="twice") as refused:
        parse(b'{"vodId":"a","vodId":"b","count":1}', ARRIVED, WINDOW)
    assert refused.value.error_class == "duplicate_field"


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)
documents = st.fixed_dictionaries(
    {},
    optional={
        "vodId": st.text(max_size=3) | st.integers() | values,
        "count": st.integers(-1, 10**9 + 1) | values,
        "ts": st.sampled_from([FULL["ts"], 1764237600000]) | values,
        "event_id": st.text(max_size=3) | values,
    },
).map(lambda document: json.dumps(document).encode())


@given(documents | st.binary() | st.builds(lambda raw: b'{"vodId":"a","count":1,' + raw + b"}", st.binary()))
def test_any_bytes_are_an_event_or_refused_as_the_counters_refuse_them(raw: bytes) -> None:
    try:
        counted = parse_message(raw)
    except InvalidMessage:
        counted = None
    try:
        event = parse(raw, ARRIVED, WINDOW)
    except InvalidRecord:
        return
    assert (event.vod_id, event.count) == counted
