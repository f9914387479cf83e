"""Documents of bars: those that known publishers write, and those that are refused."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest

from worker.contract.entry_id import EntryId
from worker.pipelines.model import InvalidRecord, Window
from worker.pipelines.records.bars_1m import BARS_1M, Bar, parse

TEN = datetime(2025, 11, 27, 10, tzinfo=UTC)
ARRIVED = EntryId(round(TEN.timestamp() * 1000) + 61_000, 0)
WINDOW = Window(BARS_1M.defaults.accept_past, BARS_1M.defaults.accept_future)
FULL = {
    "symbol": "GOOG",
    "timestamp": "2025-11-27T10:00:00Z",
    "open": 100.5,
    "high": 101,
    "low": 99.25,
    "close": 100,
    "volume": 36494,
    "vwap": 100.1,
}


def read(document: bytes) -> Bar:
    return parse(document, ARRIVED, WINDOW)


def document(**changes: Any) -> bytes:
    return json.dumps(FULL | changes).encode()


def raw(name: str, value: str) -> bytes:
    """With a value that `json` does not write."""
    return document(**{name: "@"}).replace(b'"@"', value.encode())


def test_every_field_is_a_column_in_its_order() -> None:
    names = [column.name for column in BARS_1M.columns]
    assert dict(zip(names, BARS_1M.row(read(document())), strict=True)) == FULL | {"timestamp": TEN}


@pytest.mark.parametrize(
    "written",
    [
        document(timestamp="2025-11-27T15:30:00.000000000+05:30"),
        document(timestamp=round(TEN.timestamp() * 1000)),
        document(volume=36494.0),
        raw("volume", "3.6494e4"),
        document(more={"a": [1]}, trades=7),
    ],
)
def test_one_bar_is_written_in_several_ways(written: bytes) -> None:
    assert read(written) == read(document())


@pytest.mark.parametrize(
    ("written", "field", "value"),
    [
        (document(vwap=0), "vwap", 0.0),
        (document(volume=0), "volume", 0),
        (document(volume=2**63 - 1), "volume", 2**63 - 1),
        (document(open=-37.63, high=-37.63, low=-40.32, close=-40), "open", -37.63),
        (document(high=1, low=1, open=1, close=1), "high", 1.0),
        (document(symbol="ß" * 128), "symbol", "ß" * 128),
    ],
)
def test_extreme_bars_are_accepted(written: bytes, field: str, value: object) -> None:
    assert getattr(read(written), field) == value


@pytest.mark.parametrize(
    ("written", "error_class", "text"),
    [
        (document(high=99, low=100), "invalid_field", "`high` is less than `low`"),
        (document(symbol=""), "invalid_field", "symbol"),
        (document(symbol="x" * 10_000), "invalid_field", "256 bytes"),
        (document(symbol="a\x00b"), "invalid_field", "NUL"),
        (document(symbol=None), "invalid_field", "symbol"),
        (document(volume=-1), "invalid_field", "negative"),
        (document(volume=0.3), "invalid_field", "whole number"),
        (document(volume=2**63), "invalid_field", "2^63"),
        (raw("volume", "1e300"), "invalid_field", "2^63"),
        (raw("volume", "1" + "0" * 400), "invalid_field", "2^63"),
        (raw("volume", "-1" + "0" * 400), "invalid_field", "negative"),
        (raw("open", "1" + "0" * 400), "invalid_field", "open"),
        (raw("volume", "9223372036854775807.0"), "invalid_field", "2^63"),
        (document(volume="36494"), "invalid_field", "volume"),
        (raw("open", "NaN"), "not_json", "JSON"),
        (raw("open", "Infinity"), "not_json", "JSON"),
        (raw("high", "1e999"), "", ""),
        (raw("close", "-1e999"), "", ""),
        (document(close="100"), "invalid_field", "close"),
        (document(close=None), "invalid_field", "close"),
        (document(close=True), "invalid_field", "close"),
        (document(timestamp="2025-11-27"), "invalid_field", "timestamp"),
        (document(timestamp="9999-12-31T00:00:00Z"), "time_out_of_range", "timestamp"),
        (document(timestamp="1890-01-01T00:00:00Z"), "time_out_of_range", "timestamp"),
        (json.dumps({key: value for key, value in FULL.items() if key != "vwap"}).encode(), "invalid_field", "vwap"),
        (b"[]", "invalid_field", ""),
        (b"", "not_json", ""),
    ],
)
def test_what_is_not_a_bar_is_refused(written: bytes, error_class: str, text: str) -> None:
    with pytest.raises(InvalidRecord) as caught:
        read(written)
    assert error_class in caught.value.error_class
    assert text in str(caught.value)
