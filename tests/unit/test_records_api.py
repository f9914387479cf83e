"""`/v1/bars`, `/v1/sessions` and `/v1/metrics`: their answers, and the requests they refuse."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import aiohttp
import pytest
from yarl import URL

from tests.support.fakes import FakeClock, FakeRecords
from tests.support.http import get, serving
from worker.errors import DatabaseRefused, DatabaseUnavailable, TooManyReaders
from worker.web.records_api import RecordsApi

NOW = FakeClock().now()
DAY = timedelta(days=1)
TEN = datetime(2025, 11, 27, 10, tzinfo=UTC)
EARLIEST, LATEST = datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)


@pytest.fixture
def records() -> FakeRecords:
    return FakeRecords()


@pytest.fixture
async def base(records: FakeRecords) -> AsyncIterator[str]:
    async with serving(RecordsApi(records, FakeClock()).routes()) as url:
        yield url


async def test_bars_are_answered_with_all_values(base: str) -> None:
    code, body = await get(f"{base}/v1/bars/GOOG?from=2025-11-27T10:00:00Z&to=2025-11-27T10:01:00Z")
    values = {"open": 1.5, "high": 2.0, "low": 1.0, "close": 1.25, "volume": 36494, "vwap": 0.0}
    assert code == 200
    assert body == {
        "symbol": "GOOG",
        "bars": [{"timestamp": "2025-11-27T10:00:00Z", **values}, {"timestamp": "2025-11-27T10:01:00Z", **values}],
    }


@pytest.mark.parametrize(
    ("query", "first", "last"),
    [
        ("", NOW - DAY, NOW),
        ("?from=2025-11-27T10:00:00Z", TEN, NOW),
        ("?to=2025-11-27T10:00:00Z", TEN - DAY, TEN),
        ("?to=2025-11-27T10:00:00Z&from=2025-11-27T10:00:00Z", TEN, TEN),
        ("?from=1764237600000&to=1764237600001", TEN, TEN + timedelta(milliseconds=1)),
        ("?from=-1&to=0", datetime(1969, 12, 31, 23, 59, 59, 999_000, UTC), datetime(1970, 1, 1, tzinfo=UTC)),
        ("?from=2025-11-27T15:30:00%2B05:30", TEN, NOW),
        ("?from=2025-11-27+10:00:00.123456789", TEN.replace(microsecond=123_456), NOW),
        ("?to=0001-01-01T00:00:00Z", EARLIEST, EARLIEST),
        ("?from=0001-01-01T00:00:00Z&to=9999-12-31T23:59:59.999999Z", EARLIEST, LATEST),
    ],
)
async def test_range_is_parsed(base: str, records: FakeRecords, query: str, first: datetime, last: datetime) -> None:
    records.stored = 0
    assert await get(f"{base}/v1/bars/GOOG{query}") == (200, {"symbol": "GOOG", "bars": []})
    assert records.asked == [("GOOG", first, last, 1501)]


@pytest.mark.parametrize(("stored", "truncated"), [(1440, None), (1500, None), (1501, True), (9999, True)])
async def test_more_than_1500_bars_are_truncated(
    base: str, records: FakeRecords, stored: int, truncated: bool | None
) -> None:
    records.stored = stored
    _, body = await get(f"{base}/v1/bars/GOOG?from=0")
    assert len(body["bars"]) == min(stored, 1500)
    assert body.get("truncated") is truncated
    assert body["bars"][0]["timestamp"] == "1970-01-01T00:00:00Z"


@pytest.mark.parametrize("count", [1, 1000])
async def test_latest_bars_are_answered(base: str, records: FakeRecords, count: int) -> None:
    code, body = await get(f"{base}/v1/bars/GOOG?latest={count}")
    assert (code, len(body["bars"]), records.asked) == (200, 1, [("GOOG", count)])


async def test_number_that_json_does_not_have_is_null(base: str, records: FakeRecords) -> None:
    records.values |= {"open": math.nan, "high": math.inf, "low": -math.inf}
    async with aiohttp.ClientSession() as session, session.get(f"{base}/v1/bars/GOOG?latest=1") as response:
        body = json.loads(await response.text(), parse_constant=pytest.fail)
    assert [body["bars"][0][name] for name in ("open", "high", "low", "close")] == [None, None, None, 1.25]


@pytest.mark.parametrize(
    ("path", "key"),
    [
        ("GOOG", "GOOG"),
        ("BTC%2FUSD", "BTC/USD"),
        ("BTC/USD", "BTC/USD"),
        ("/a//b/", "/a//b/"),
        ("%C3%BC%3F%25%23%26", "ü?%#&"),
        ("a%0Ab%0D%1B%7F", "a\nb\r\x1b\x7f"),
        ("a+b", "a+b"),
        ("a%2Bb%20c", "a+b c"),
        ("%7B%7D'%22%3B--", "{}'\";--"),
        ("..%2f..%2fetc", "../../etc"),
        ("%252F", "%2F"),
        ("%F0%9F%92%B9", "\U0001f4b9"),
        ("%C3%9F" * 128, "ß" * 128),
        ("x" * 256, "x" * 256),
    ],
    ids=lambda value: ascii(value)[:30],
)
async def test_any_symbol_and_any_session_can_be_asked_for(
    base: str, records: FakeRecords, path: str, key: str
) -> None:
    code, body = await get(f"{base}/v1/bars/{path}?latest=1")
    assert (code, body["symbol"]) == (200, key)
    code, body = await get(f"{base}/v1/sessions/{path}")
    assert (code, body["sessionId"]) == (200, key)
    assert records.asked == [(key, 1), (key,)]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("", "is empty"),
        ("/", "is empty"),
        ("/" + "x" * 257, "256 bytes"),
        ("/" + "%C3%9F" * 129, "256 bytes"),
        ("/a%00b", "NUL"),
        ("/%ff", "not UTF-8"),
        ("/a%C3", "not UTF-8"),
        ("/%ED%A0%80", "not UTF-8"),
    ],
)
async def test_invalid_key_is_400_with_the_reason(base: str, records: FakeRecords, path: str, expected: str) -> None:
    for endpoint, name in (("bars", "symbol"), ("sessions", "session id")):
        code, body = await get(f"{base}/v1/{endpoint}{path}")
        assert (code, records.asked) == (400, [])
        assert body["error"].startswith(f"the {name} ")
        assert expected in body["error"]


async def test_raw_bytes_that_are_not_utf8_are_400(base: str, records: FakeRecords) -> None:
    reader, writer = await asyncio.open_connection(URL(base).host, URL(base).port)
    writer.write(b"GET /v1/bars/\xff HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert b" 400 " in await reader.readline()
    writer.close()
    assert records.asked == []


TIME = "expected a time in RFC 3339"


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("from=yesterday", f"from: {TIME}"),
        ("from=", f"from: {TIME}"),
        ("to", f"to: {TIME}"),
        ("to=2025-11-27", f"to: {TIME}"),
        ("to=2025-11-27T10:00:00+05:30", "%2B"),
        ("to=%ff", f"to: {TIME}"),
        ("to=%00", f"to: {TIME}"),
        ("to=" + "9" * 15, f"to: {TIME}"),
        ("to=" + "9" * 5000, f"to: {TIME}"),
        ("to=%D9%A3", f"to: {TIME}"),
        ("to=1.5", f"to: {TIME}"),
        ("to=NaN", f"to: {TIME}"),
        ("to=0001-01-01T00:00:00%2B01:00", f"to: {TIME}"),
        ("from=9999-12-31T23:59:59-01:00", f"from: {TIME}"),
        ("from=2&to=1", "from: expected a time that is not after `to`"),
        ("from=1&from=2", "from: expected once"),
        ("latest=0", "latest: expected a number from 1 to 1000"),
        ("latest=1001", "latest: expected a number from 1 to 1000"),
        ("latest=", "latest: expected a number"),
        ("latest", "latest: expected a number"),
        ("latest=-1", "latest: expected a number"),
        ("latest=1.5", "latest: expected a number"),
        ("latest=" + "1" * 5000, "latest: expected a number"),
        ("latest=%D9%A3", "latest: expected a number"),
        ("latest=1&from=0", "latest: expected without"),
        ("latest=1&to=0", "latest: expected without"),
        ("limit=5", "unknown parameter limit: expected only from, to, latest"),
        ("From=0", "unknown parameter From"),
        ("=", "unknown parameter"),
        ("%ff%0a%1b=1", "unknown parameter \\\\xff\\n\\x1b:"),
        ("x" * 5000, "unknown parameter xxx"),
    ],
    ids=lambda value: value[:30],
)
async def test_invalid_parameter_is_400_by_name(base: str, records: FakeRecords, query: str, expected: str) -> None:
    code, body = await get(f"{base}/v1/bars/GOOG?{query}")
    assert (code, records.asked) == (400, [])
    assert expected in body["error"]
    assert len(body["error"]) < 150


async def test_session_is_answered_with_its_last_event(base: str) -> None:
    code, body = await get(f"{base}/v1/sessions/s1")
    assert code == 200
    assert body == {"sessionId": "s1", "lastEventId": "e1", "recordedAt": "2024-01-01T00:00:00.250000Z"}


async def test_unknown_session_is_404(base: str) -> None:
    assert await get(f"{base}/v1/sessions/unknown") == (404, {"error": "no event of this session is stored"})


async def test_session_has_no_parameters(base: str) -> None:
    code, body = await get(f"{base}/v1/sessions/s1?latest=1")
    assert (code, body) == (400, {"error": "unknown parameter latest: expected none"})


async def test_values_of_a_metric_are_answered(base: str) -> None:
    code, body = await get(f"{base}/v1/metrics/checkout/cpu_usage?from=2025-11-27T10:00:00Z&to=2025-11-27T10:01:00Z")
    assert code == 200
    assert body == {
        "service": "checkout",
        "metric": "cpu_usage",
        "values": [{"time": "2025-11-27T10:00:00Z", "value": 0.5}, {"time": "2025-11-27T10:01:00Z", "value": 0.5}],
    }


async def test_buckets_of_a_metric_are_answered(base: str) -> None:
    code, body = await get(
        f"{base}/v1/metrics/checkout/cpu_usage?from=2025-11-27T10:00:00Z&bucket=60s&to=1764237700000"
    )
    facts = {"count": 4, "min": -1.0, "max": 2.5, "avg": 0.75, "sum": 3.0}
    assert code == 200
    assert body == {
        "service": "checkout",
        "metric": "cpu_usage",
        "bucket": "60s",
        "buckets": [{"time": "2025-11-27T10:00:00Z", **facts}, {"time": "2025-11-27T10:01:00Z", **facts}],
    }


HOUR = timedelta(hours=1)


@pytest.mark.parametrize(
    ("query", "asked"),
    [
        ("", (NOW - HOUR, NOW, 1501)),
        ("?to=2025-11-27T10:00:00Z", (TEN - HOUR, TEN, 1501)),
        ("?to=0001-01-01T00:00:00Z", (EARLIEST, EARLIEST, 1501)),
        ("?bucket=1m", (NOW - HOUR, NOW, timedelta(minutes=1))),
        ("?bucket=%202.5s", (NOW - HOUR, NOW, timedelta(seconds=2.5))),
        ("?bucket=1000ms&from=0&to=1499999", (datetime(1970, 1, 1, tzinfo=UTC), ..., timedelta(seconds=1))),
        ("?bucket=1d&from=9999-12-31T23:59:59.999999Z", (LATEST, NOW, DAY)),
        ("?bucket=50y&from=1000-01-01T00:00:00Z&to=9999-12-31T23:59:59.999999Z", (..., LATEST, 50 * 365 * DAY)),
    ],
)
async def test_range_and_bucket_of_a_metric_are_parsed(
    base: str, records: FakeRecords, query: str, asked: tuple[object, ...]
) -> None:
    records.stored = 0
    code, body = await get(f"{base}/v1/metrics/checkout/cpu_usage{query}")
    assert (code, body.get("values", body.get("buckets"))) == (200, [])
    (found,) = records.asked
    assert found[:2] == ("checkout", "cpu_usage")
    assert [each for each, expected in zip(found[2:], asked, strict=True) if expected is not ...] == [
        expected for expected in asked if expected is not ...
    ]


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("bucket=999ms", "bucket: expected one second or more"),
        ("bucket=0s", "bucket: expected a duration"),
        ("bucket=1", "bucket: expected a duration"),
        ("bucket", "bucket: expected a duration"),
        ("bucket=1M", "bucket: expected a duration"),
        ("bucket=101y", "bucket: expected a duration"),
        ("bucket=%D9%A3s", "bucket: expected a duration"),
        ("bucket=" + "9" * 5000 + "s", "bucket: expected a duration"),
        ("bucket=1s", "bucket: expected at most 1500 buckets"),
        ("bucket=1s&from=0&to=1500000", "bucket: expected at most 1500 buckets"),
        ("bucket=50y&from=0001-01-01T00:00:00Z", "bucket: expected a bucket that begins in the year 1"),
        ("bucket=1m&bucket=1m", "bucket: expected once"),
        ("from=2&to=1", "from: expected a time that is not after `to`"),
        ("latest=5", "unknown parameter latest: expected only from, to, bucket"),
    ],
    ids=lambda value: value[:30],
)
async def test_invalid_parameter_of_a_metric_is_400_by_name(
    base: str, records: FakeRecords, query: str, expected: str
) -> None:
    code, body = await get(f"{base}/v1/metrics/checkout/cpu_usage?{query}")
    assert (code, records.asked) == (400, [])
    assert body["error"].startswith(expected)


@pytest.mark.parametrize(("stored", "truncated"), [(1500, None), (1501, True), (9999, True)])
async def test_more_than_1500_values_are_truncated(
    base: str, records: FakeRecords, stored: int, truncated: bool | None
) -> None:
    records.stored = stored
    _, body = await get(f"{base}/v1/metrics/checkout/cpu_usage?from=0")
    assert (len(body["values"]), body.get("truncated")) == (1500, truncated)
    assert body["values"][0]["time"] == "1970-01-01T00:00:00Z"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None])
async def test_value_that_json_does_not_have_is_null(base: str, records: FakeRecords, value: float | None) -> None:
    records.value = value
    async with aiohttp.ClientSession() as session, session.get(f"{base}/v1/metrics/a/b") as response:
        body = json.loads(await response.text(), parse_constant=pytest.fail)
    assert body["values"][0]["value"] is None


@pytest.mark.parametrize(
    ("low", "high", "total", "expected"),
    [
        (1.0, math.nan, 3.0, (1.0, None, None, None)),
        (math.nan, math.nan, None, (None, None, None, None)),
        (-math.inf, 1.0, 3.0, (None, 1.0, None, None)),
        (1.0, math.inf, 3.0, (1.0, None, None, None)),
        (1.0, 1e290, 3.0, (1.0, 1e290, None, None)),
        (-1e290, 1.0, 3.0, (-1e290, 1.0, None, None)),
        (-1e289, 1e289, 3e289, (-1e289, 1e289, 7.5e288, 3e289)),
    ],
)
async def test_sum_and_average_of_a_bucket_are_null_where_they_are_not_finite(
    base: str, records: FakeRecords, low: float, high: float, total: float | None, expected: tuple[float | None, ...]
) -> None:
    records.bucket |= {"min": low, "max": high, "sum": total}
    async with aiohttp.ClientSession() as session, session.get(f"{base}/v1/metrics/a/b?bucket=1m") as response:
        body = json.loads(await response.text(), parse_constant=pytest.fail)
    assert tuple(body["buckets"][0][name] for name in ("min", "max", "avg", "sum")) == expected


@pytest.mark.parametrize(
    ("path", "service", "metric"),
    [
        ("checkout/cpu_usage", "checkout", "cpu_usage"),
        ("checkout/http/5xx", "checkout", "http/5xx"),
        ("checkout//x/", "checkout", "/x/"),
        ("eu%2Fcheckout/http%2F5xx", "eu/checkout", "http/5xx"),
        ("%C3%BC%3F/%25%23%26", "ü?", "%#&"),
        ("a+b/c%2Bd%20e", "a+b", "c+d e"),
        ("a%0Ab/%F0%9F%92%B9", "a\nb", "\U0001f4b9"),
        ("x" * 256 + "/" + "y" * 256, "x" * 256, "y" * 256),
    ],
    ids=lambda value: ascii(value)[:30],
)
async def test_first_slash_separates_service_and_metric(
    base: str, records: FakeRecords, path: str, service: str, metric: str
) -> None:
    code, body = await get(f"{base}/v1/metrics/{path}")
    assert (code, body["service"], body["metric"]) == (200, service, metric)
    assert records.asked[0][:2] == (service, metric)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("", "the service is empty"),
        ("/", "the service is empty"),
        ("//cpu", "the service is empty"),
        ("/checkout", "the metric is empty"),
        ("/checkout/", "the metric is empty"),
        ("/checkout%2Fcpu", "the metric is empty"),
        ("/" + "x" * 257 + "/cpu", "the service has more than 256 bytes"),
        ("/checkout/a%00b", "the metric has a NUL byte"),
        ("/%ff/cpu", "the service is not UTF-8"),
    ],
)
async def test_invalid_service_or_metric_is_400(base: str, records: FakeRecords, path: str, expected: str) -> None:
    assert await get(f"{base}/v1/metrics{path}") == (400, {"error": expected})
    assert records.asked == []


ALL = ["bars/GOOG", "bars/GOOG?latest=1", "sessions/s1", "metrics/a/b", "metrics/a/b?bucket=1m"]


@pytest.mark.parametrize("path", ALL)
@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (DatabaseUnavailable("no answer in time"), "DATABASE_URL"),
        (DatabaseRefused('relation "bars_1m" does not exist'), "viewer-worker check"),
        (TooManyReaders(), ""),
    ],
)
async def test_unavailable_database_is_503_with_the_cause_and_a_fix(
    base: str, records: FakeRecords, path: str, error: DatabaseUnavailable, remedy: str
) -> None:
    records.error = error
    code, body = await get(f"{base}/v1/{path}")
    assert (code, body["error"]) == (503, str(error))
    assert remedy in body["remedy"]


@pytest.mark.parametrize("path", ALL)
async def test_post_is_not_allowed_and_head_is(base: str, path: str) -> None:
    async with aiohttp.ClientSession() as session:
        async with session.post(f"{base}/v1/{path}") as response:
            assert response.status == 405
        async with session.head(f"{base}/v1/{path}") as response:
            assert (response.status, response.headers["Cache-Control"]) == (200, "no-store")
