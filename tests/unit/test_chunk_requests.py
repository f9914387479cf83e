"""The record `chunk_requests`: its fields, and every document that is not one."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.contract.entry_id import EntryId
from worker.pipelines.model import InvalidRecord, Window
from worker.pipelines.records.chunk_requests import CHUNK_REQUESTS, ChunkEvent, parse

TEN = datetime(2025, 11, 27, 10, tzinfo=UTC)
ARRIVED = EntryId(1_764_237_600_000, 0)
DEFAULTS = CHUNK_REQUESTS.defaults
WINDOW = Window(DEFAULTS.accept_past, DEFAULTS.accept_future)
OPTIONAL = ("ip", "referer", "user_agent", "sid", "uid", "event_id")
FULL = {
    "time": "2025-11-27T10:00:00Z",
    "path": "/v/1.ts",
    "ip": "203.0.113.7:4711",
    "referer": "https://example.org/",
    "user_agent": "ünï/1.0",
    "sid": "s",
    "uid": "",
    "event_id": "e-1",
}


def read(document: bytes) -> ChunkEvent:
    return parse(document, ARRIVED, WINDOW)


def document(**changes: Any) -> bytes:
    """A short valid document with other fields, as JSON."""
    return json.dumps({"time": "2025-11-27T10:00:00Z", "path": "/a"} | changes, ensure_ascii=False).encode()


def raw(fields: bytes) -> bytes:
    """A short valid document with further fields, which are JSON already."""
    return b'{"time":"2025-11-27T10:00:00Z","path":"/a",' + fields + b"}"


def test_every_field_is_a_column_in_its_order() -> None:
    event = read(json.dumps(FULL).encode())
    assert event == ChunkEvent(
        time=TEN,
        path="/v/1.ts",
        ip="203.0.113.7",
        referer="https://example.org/",
        user_agent="ünï/1.0",
        sid="s",
        uid="",
        event_id="e-1",
    )
    names = [column.name for column in CHUNK_REQUESTS.columns]
    assert dict(zip(names, CHUNK_REQUESTS.row(event), strict=True)) == FULL | {"time": TEN, "ip": "203.0.113.7"}


@pytest.mark.parametrize("name", OPTIONAL)
def test_optional_field_may_be_missing_or_null(name: str) -> None:
    missing = {key: value for key, value in FULL.items() if key != name}
    for fields in (missing, FULL | {name: None}):
        assert getattr(read(json.dumps(fields).encode()), name) is None


@pytest.mark.parametrize("name", ["time", "path"])
def test_required_field_may_be_neither_missing_nor_null(name: str) -> None:
    missing = {key: value for key, value in FULL.items() if key != name}
    for fields in (missing, FULL | {name: None}):
        with pytest.raises(InvalidRecord, match=name) as caught:
            read(json.dumps(fields).encode())
        assert caught.value.error_class == "invalid_field"


@pytest.mark.parametrize("name", [*FULL])
@pytest.mark.parametrize("value", [True, 1.5, float(ARRIVED.ms), [], {}, ["x"]])
def test_field_of_another_type_is_refused(name: str, value: object) -> None:
    with pytest.raises(InvalidRecord, match=rf"\$\.{name}") as caught:
        read(json.dumps(FULL | {name: value}).encode())
    assert caught.value.error_class == "invalid_field"


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (document(x=1, y={"time": True}), ChunkEvent(time=TEN, path="/a")),
        (document(path=""), ChunkEvent(time=TEN, path="")),
        (document(path="😀"), ChunkEvent(time=TEN, path="😀")),
        (raw(b'"sid":"\\ud83d\\ude00"'), ChunkEvent(time=TEN, path="/a", sid="😀")),
        (raw(b'"sid":"\\\\u0000"'), ChunkEvent(time=TEN, path="/a", sid="\\u0000")),
        (raw(b'"\\u0073id":"escaped"'), ChunkEvent(time=TEN, path="/a", sid="escaped")),
        (raw(b'"path":"/b","sid":"x","sid":null'), ChunkEvent(time=TEN, path="/b")),
        (raw(b'"x":"\\u0000"'), ChunkEvent(time=TEN, path="/a")),
        (raw(b'"x":' + b"1" * 5000), ChunkEvent(time=TEN, path="/a")),
        (raw(b'"x":1e400'), ChunkEvent(time=TEN, path="/a")),
        (b" \n" + document() + b"\r\n", ChunkEvent(time=TEN, path="/a")),
        (document(time=ARRIVED.ms), ChunkEvent(time=TEN, path="/a")),
        (document(ip="-"), ChunkEvent(time=TEN, path="/a")),
        (document(ip="[2001:DB8::1]:443"), ChunkEvent(time=TEN, path="/a", ip="2001:db8::1")),
        (document(event_id="e" * 256), ChunkEvent(time=TEN, path="/a", event_id="e" * 256)),
        (document(event_id="é" * 128), ChunkEvent(time=TEN, path="/a", event_id="é" * 128)),
        (document(path="x" * 65_536), ChunkEvent(time=TEN, path="x" * 65_536)),
        (document(x="x" * 100_000), ChunkEvent(time=TEN, path="/a")),
    ],
    ids=lambda value: repr(value)[:50],
)
def test_valid_document_is_read(found: bytes, expected: ChunkEvent) -> None:
    assert read(found) == expected


NESTED = b"[" * 10_000 + b"]" * 10_000
BAD = {
    "not_json": [
        b"",
        b"hello",
        document()[:-1],
        document() + b"x",
        document() * 2,
        b"\xef\xbb\xbf" + document(),
        raw(b""),
        raw(b'"x":NaN'),
        raw(b'"x":"a\x00b"'),
        raw(b'"sid":"a\x00b"'),
        raw(b'"sid":"\\ud800"'),
        raw(b'"sid":"\\udc00\\ud800"'),
        raw(b'"x":"\\ud800"'),
        raw(b'"x":' + NESTED),
        b'{"a":' * 10_000,
    ],
    "not_utf8": [
        b"\xff\xfe\x00",
        document().decode().encode("utf-16"),
        document(path="é").decode().encode("latin-1"),
        raw(b'"sid":"\xff"'),
        raw(b'"x":"\xff"'),
        raw(b'"\xff":1'),
        raw(b'"sid":"\xed\xa0\x80"'),
        raw(b'"sid":"\xc0\x80"'),
    ],
    "invalid_field": [
        b"[]",
        b"1",
        b"null",
        b'"a"',
        b"true",
        b"{}",
        NESTED,
        document(time="x"),
        document(time=True),
        document(time=1.5),
        document(time=10**30),
        raw(b'"time":' + b"9" * 5000),
        raw(b'"path":1'),
        document(ip="x"),
        document(ip="1.2.3.4\x00"),
        document(path="a\x00b"),
        document(event_id="a\x00b"),
        document(path="x" * 65_537),
        document(user_agent="é" * 32_769),
        document(event_id=""),
        document(event_id="e" * 257),
        document(event_id="é" * 129),
    ],
    "time_out_of_range": [
        document(time=0),
        document(time="1970-01-01T00:00:00Z"),
        document(time="9999-12-31T23:59:59Z"),
        document(time="9999-12-31T23:59:59.999999999-23:59"),
        document(time="0001-01-01T00:00:00+23:59"),
        document(time=ARRIVED.ms // 1000),
        document(time=ARRIVED.ms + 300_001),
        document(time=(TEN - timedelta(days=20 * 365, seconds=1)).isoformat()),
    ],
}


@pytest.mark.parametrize(
    ("error_class", "found"),
    [(error_class, found) for error_class, documents in BAD.items() for found in documents],
    ids=lambda value: repr(value)[:50],
)
def test_invalid_document_is_refused_with_its_class(error_class: str, found: bytes) -> None:
    with pytest.raises(InvalidRecord) as caught:
        read(found)
    assert caught.value.error_class == error_class


@pytest.mark.parametrize("name", ["path", "referer", "user_agent", "sid", "uid", "event_id"])
def test_nul_and_too_long_text_are_refused_in_every_text(name: str) -> None:
    for text in ("\x00", "x" * 65_537):
        with pytest.raises(InvalidRecord, match=name):
            read(document(**{name: text}))


@pytest.mark.parametrize(
    ("name", "value"),
    [("time", "canary"), ("path", "canary\x00"), ("ip", "canary"), ("event_id", "canary" * 50), ("sid", ["canary"])],
)
def test_error_names_the_field_and_has_no_value(name: str, value: object) -> None:
    with pytest.raises(InvalidRecord, match=name) as caught:
        read(document(**{name: value}))
    assert "canary" not in str(caught.value)


def assert_fits(event: ChunkEvent) -> None:
    """A row that Postgres takes: texts that are UTF-8 without NUL, a time with an offset inside the window."""
    assert -WINDOW.past <= (event.time - TEN).total_seconds() <= WINDOW.future
    for text in CHUNK_REQUESTS.row(event)[1:]:
        assert text is None or (len(text.encode()) <= 65_536 and "\x00" not in text)


def read_or_refuse(found: bytes) -> None:
    try:
        assert_fits(read(found))
    except InvalidRecord as error:
        assert error.error_class in BAD


@given(st.binary())
def test_any_bytes_are_a_record_or_refused(found: bytes) -> None:
    read_or_refuse(found)


COMPLETE = json.dumps(FULL, ensure_ascii=False).encode()
places = st.integers(0, len(COMPLETE))
pieces = st.one_of(
    st.binary(max_size=4),
    st.sampled_from(
        [b"\\u0000", b"\\ud800", b"\x00", b"\xed\xa0\x80", b'"', b"\\", b"{", b"}", b"[", b"1e999", b"true"]
    ),
)


@given(st.lists(st.tuples(places, st.integers(0, 8), pieces), min_size=1, max_size=4))
def test_mutated_document_is_a_record_or_refused(mutations: list[tuple[int, int, bytes]]) -> None:
    found = COMPLETE
    for place, length, piece in mutations:
        found = found[:place] + piece + found[place + length :]
    read_or_refuse(found)


texts = st.text(st.characters(exclude_categories=[]), max_size=20)
values = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), texts, st.lists(texts), st.integers(0, 2 * ARRIVED.ms)
)


@given(st.dictionaries(st.sampled_from([*FULL, "x"]), values), st.booleans())
def test_any_values_in_the_fields_are_a_record_or_refused(fields: dict[str, Any], ascii_only: bool) -> None:
    read_or_refuse(json.dumps(FULL | fields, ensure_ascii=ascii_only).encode(errors="surrogatepass"))
