"""`/v1/views` and `/v1/top`: their answers, and the requests they refuse."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import aiohttp
import pytest
from yarl import URL

from tests.support.fakes import FakeClock, FakeHistories, FakeNumbers
from tests.support.http import get, serving
from worker.contract.times import format_time
from worker.errors import DatabaseUnavailable
from worker.web.history_api import HistoryApi
from worker.web.views_api import ViewsApi

HISTORIES = FakeHistories()
NOW = FakeClock().now()


@pytest.fixture
def numbers() -> FakeNumbers:
    return FakeNumbers()


@pytest.fixture
async def base(numbers: FakeNumbers) -> AsyncIterator[str]:
    async with serving([*HistoryApi(HISTORIES, FakeClock()).routes(), *ViewsApi(numbers).routes()]) as url:
        yield url


@pytest.mark.parametrize(
    ("path", "vod_id"),
    [
        ("vod_1", "vod_1"),
        ("a%2Fb", "a/b"),
        ("/a/b", "/a/b"),
        ("%C3%BC%3F%25", "ü?%"),
        ("a,b", "a,b"),
        ("a%0Ab", "a\nb"),
    ],
)
async def test_one_id_is_answered_with_its_views(base: str, path: str, vod_id: str) -> None:
    code, body = await get(f"{base}/v1/views/{path}")
    assert (code, body) == (200, {"vodId": vod_id, "views": len(vod_id), "pending": 1})


async def test_number_that_is_not_exact_says_so(base: str, numbers: FakeNumbers) -> None:
    numbers.is_exact = False
    assert (await get(f"{base}/v1/views/ab"))[1] == {"vodId": "ab", "views": 2, "pending": 1, "exact": False}
    assert (await get(f"{base}/v1/top"))[1]["exact"] is False


async def test_history_of_an_id_is_answered_by_hour_or_day(base: str) -> None:
    code, body = await get(f"{base}/v1/views/a%2Fb/history")
    assert code == 200
    begin = format_time(NOW - timedelta(days=1))
    assert body == {
        "vodId": "a/b",
        "bucket": "hour",
        "asOf": format_time(NOW),
        "buckets": [{"time": begin, "views": 3}],
    }
    await get(f"{base}/v1/views/a/history?bucket=day")
    assert HISTORIES.asked == ("a", "day", NOW - timedelta(days=30), NOW)
    await get(f"{base}/v1/views/a/history?bucket=day&from=2024-01-01T00:00:00Z&to=2024-01-03T00:00:00Z")
    assert HISTORIES.asked == ("a", "day", datetime(2024, 1, 1, tzinfo=UTC), datetime(2024, 1, 3, tzinfo=UTC))
    code, body = await get(f"{base}/v1/views/a%2Fhistory")
    assert (code, body["vodId"]) == (200, "a/history")


async def test_several_ids_are_answered_in_their_order_without_repeats(base: str) -> None:
    code, body = await get(f"{base}/v1/views?ids=b,a%2Fx,b,,c+%C3%BC&ids=d%2Ce")
    assert code == 200
    assert [entry["vodId"] for entry in body["views"]] == ["b", "a/x", "c ü", "d,e"]


async def test_top_lists_the_most_viewed_ids_of_a_window(base: str) -> None:
    code, body = await get(f"{base}/v1/top?window=1h&limit=2")
    assert code == 200
    times = {"since": "2023-12-31T23:00:00Z", "asOf": "2024-01-01T00:00:00Z"}
    assert body == times | {"top": [{"vodId": "a", "views": 5, "total": 7}] * 2}
    assert len((await get(f"{base}/v1/top"))[1]["top"]) == 10


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/v1/views", "1 to 100 ids"),
        ("/v1/views?ids=" + "a," * 101, "1 to 100 ids"),
        ("/v1/views/" + "x" * 257, "256 bytes"),
        ("/v1/views/a%00b", "NUL"),
        ("/v1/views/%ff", "not UTF-8"),
        ("/v1/views?ids=a,%C3", "not UTF-8"),
        ("/v1/views/a/history?bucket=minute", "bucket: expected hour or day"),
        ("/v1/views/a/history?from=soon", "from: expected"),
        ("/v1/views/a/history?from=2024-01-02T00:00:00Z&to=2024-01-01T00:00:00Z", "not after"),
        ("/v1/views/a/history?from=2020-01-01T00:00:00Z&to=2024-01-01T00:00:00Z", "1500 buckets"),
        ("/v1/views/a/history?limit=1", "unknown parameter"),
        ("/v1/views?ids=a&id=b", "unknown parameter id: expected only ids"),
        ("/v1/views/a?ids=b", "unknown parameter ids: expected none"),
        ("/v1/top?windows=1h", "unknown parameter windows: expected only window, limit"),
        ("/v1/top?window=soon", "window: expected"),
        ("/v1/top?window=-1h", "window: expected"),
        ("/v1/top?limit=0", "limit: expected"),
        ("/v1/top?limit=101", "limit: expected"),
        ("/v1/top?limit=1.5", "limit: expected"),
        ("/v1/top?limit=" + "1" * 5000, "limit: expected"),
        ("/v1/top?limit=%D9%A3", "limit: expected"),
    ],
)
async def test_invalid_request_is_400_with_the_reason(base: str, path: str, expected: str) -> None:
    code, body = await get(base + path)
    assert code == 400
    assert expected in body["error"]


async def test_unavailable_database_is_503_with_the_cause_and_a_fix(base: str, numbers: FakeNumbers) -> None:
    numbers.error = DatabaseUnavailable("no answer in time")
    code, body = await get(f"{base}/v1/views/a")
    assert code == 503
    assert body["error"] == "no answer in time"
    assert "DATABASE_URL" in body["remedy"]


async def test_post_is_not_allowed(base: str) -> None:
    async with aiohttp.ClientSession() as session, session.post(f"{base}/v1/views/a") as response:
        assert response.status == 405


async def test_internal_error_is_500_and_its_text_is_only_logged(
    base: str, numbers: FakeNumbers, caplog: pytest.LogCaptureFixture
) -> None:
    numbers.error = ValueError("a bug")
    async with aiohttp.ClientSession() as session, session.get(f"{base}/v1/views/a") as response:
        assert response.status == 500
        assert response.headers["Server"] == "viewer-worker"
        assert await response.json() == {"error": "a mistake in this program: the log has it"}
    assert "a bug" in caplog.text


async def test_percent_encoding_in_the_path_makes_no_difference(base: str) -> None:
    assert await get(f"{base}/%761/views/a") == await get(f"{base}/v1/views/a")


async def test_idle_connections_do_not_block_new_ones(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.web.server.MAX_CONNECTIONS", 5)
    idle = [await asyncio.open_connection(URL(base).host, URL(base).port) for _ in range(12)]
    assert (await get(f"{base}/livez"))[0] == 200
    assert await idle[0][0].read() == b""
    for _, writer in idle:
        writer.close()


async def test_malformed_request_is_400_and_not_logged(base: str, caplog: pytest.LogCaptureFixture) -> None:
    reader, writer = await asyncio.open_connection(URL(base).host, URL(base).port)
    writer.write(b"\x16\x03\x01 what a port scanner says\r\n\r\n")
    answer = await reader.read()
    assert b" 400 " in answer
    assert b"\r\nServer: viewer-worker\r\n" in answer
    assert json.loads(answer.partition(b"\r\n\r\n")[2]) == {"error": "the request is malformed"}
    writer.close()
    assert not caplog.records
