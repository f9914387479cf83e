"""Records as `/v1/bars`, `/v1/sessions` and `/v1/metrics` read them: what is found, by which index, and the limits."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy.dialects import postgresql

from tests.support.http import get, serving
from tests.support.proxy import Mode, Proxy
from tests.support.world import World
from worker.app.counters import build_counters
from worker.db.address import parse_database_url
from worker.db.read_limit import ReadLimit
from worker.db.record_reads import BAR_SETTINGS, BARS_BETWEEN, LAST_EVENT, LATEST_BARS, RecordReader
from worker.db.session import Database
from worker.errors import DatabaseRefused, DatabaseUnavailable, TooManyReaders
from worker.runtime.clock import SystemClock
from worker.settings.environment import load_settings
from worker.web.records_api import RecordsApi

TEN = datetime(2025, 11, 27, 10, tzinfo=UTC)
MINUTE = timedelta(minutes=1)
EARLIEST, LATEST = datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)


@pytest.fixture
async def database(world: World) -> AsyncIterator[Database]:
    made = Database(parse_database_url(world.database_url))
    yield made
    await made.close()


@pytest.fixture
def reader(database: Database) -> RecordReader:
    return RecordReader(database, ReadLimit())


async def store(world: World, symbol: str, *minutes: int) -> None:
    rows = [(symbol, TEN + minute * MINUTE, 1.5, 2.5, 0.5, minute, 2**63 - 1, 0.0) for minute in minutes]
    await world.sql.executemany("INSERT INTO bars_1m VALUES ($1, $2, $3, $4, $5, $6, $7, $8)", rows)


def minutes_of(rows: Any) -> list[float]:
    return [(row["timestamp"] - TEN) / MINUTE for row in rows]


async def test_bars_of_a_range_are_those_of_the_symbol_with_both_ends(world: World, reader: RecordReader) -> None:
    await store(world, "B", 3, 1, 2, 0, 4)
    for other in ("A", "BA", "b", "C"):
        await store(world, other, 1, 2)
    found = await reader.bars("B", TEN + MINUTE, TEN + 3 * MINUTE, 100)
    assert minutes_of(found) == [1, 2, 3]
    assert found[0] == {
        "symbol": "B",
        "timestamp": TEN + MINUTE,
        "open": 1.5,
        "high": 2.5,
        "low": 0.5,
        "close": 1,
        "volume": 2**63 - 1,
        "vwap": 0,
    }
    assert minutes_of(await reader.bars("B", EARLIEST, LATEST, 2)) == [0, 1]
    assert minutes_of(await reader.bars("B", TEN + MINUTE, TEN, 100)) == []
    assert minutes_of(await reader.bars("unknown", EARLIEST, LATEST, 100)) == []


async def test_latest_bars_are_the_newest_in_ascending_order(world: World, reader: RecordReader) -> None:
    await store(world, "B", 3, 1, 2)
    await store(world, "A", 8)
    await store(world, "C", 9)
    assert minutes_of(await reader.latest_bars("B", 2)) == [2, 3]
    assert minutes_of(await reader.latest_bars("B", 100)) == [1, 2, 3]
    assert minutes_of(await reader.latest_bars("unknown", 100)) == []


async def test_bars_leave_out_times_that_python_does_not_have(world: World, reader: RecordReader) -> None:
    await store(world, "B", 1)
    for time in ("20000-01-01", "0044-03-15 BC", "infinity", "-infinity"):
        await world.sql.execute(f"INSERT INTO bars_1m VALUES ('B', '{time}', 1, 1, 1, 1, 1, 1)")
    assert minutes_of(await reader.latest_bars("B", 100)) == [1]
    assert minutes_of(await reader.bars("B", EARLIEST, LATEST, 100)) == [1]


async def test_any_text_is_a_symbol_and_a_session(world: World, database: Database) -> None:
    texts = ["a/b", "ü?%#", "\U0001f4b9", "'; DROP TABLE bars_1m --", "a\nb", "%", "_", "x" * 256, " ", "\\"]
    for text in texts:
        await store(world, text, 1)
        await world.sql.execute("INSERT INTO session_events VALUES ($1, $2, 1, 2, $3)", text, f"of {text}", TEN)
    async with serving(RecordsApi(RecordReader(database, ReadLimit()), SystemClock()).routes()) as url:
        for text in texts:
            quoted = "".join(f"%{byte:02x}" for byte in text.encode())
            code, body = await get(f"{url}/v1/bars/{quoted}?latest=1000")
            assert (code, body["symbol"], len(body["bars"])) == (200, text, 1)
            code, body = await get(f"{url}/v1/sessions/{quoted}")
            assert (code, body["lastEventId"], body["recordedAt"]) == (200, f"of {text}", "2025-11-27T10:00:00Z")
        assert (await get(f"{url}/v1/sessions/unknown"))[0] == 404


async def store_values(world: World, *times_and_values: tuple[datetime, float | None], metric: str = "cpu") -> None:
    await world.sql.executemany(
        "INSERT INTO metrics VALUES ($1, 'checkout', $2, $3)",
        [(time, metric, value) for time, value in times_and_values],
    )


async def test_values_of_a_range_are_those_of_the_metric_with_both_ends(world: World, reader: RecordReader) -> None:
    await store_values(world, *((TEN + n * MINUTE, n) for n in (3, 1, 2, 0, 4)), (TEN + MINUTE, None))
    await store_values(world, (TEN + MINUTE, 99), metric="CPU")
    await world.sql.execute("INSERT INTO metrics VALUES ($1, 'cpu', 'checkout', 98)", TEN + MINUTE)
    found = await reader.metric_values("checkout", "cpu", TEN + MINUTE, TEN + 3 * MINUTE, 100)
    assert sorted(found, key=str) == sorted(
        [(TEN + n * MINUTE, n) for n in (1, 2, 3)] + [(TEN + MINUTE, None)], key=str
    )
    assert [time for time, _ in found] == sorted(time for time, _ in found)
    assert await reader.metric_values("checkout", "cpu", EARLIEST, LATEST, 1) == [(TEN, 0)]
    assert await reader.metric_values("checkout", "cpu", LATEST, EARLIEST, 100) == []
    assert await reader.metric_values("unknown", "cpu", EARLIEST, LATEST, 100) == []


async def test_buckets_begin_at_multiples_of_their_width_and_have_the_values_of_the_range(
    world: World, reader: RecordReader
) -> None:
    second = timedelta(seconds=1)
    before = datetime(1969, 12, 31, 23, 59, 59, tzinfo=UTC)
    await world.sql.execute("SET TIME ZONE 'Asia/Kathmandu'")
    await store_values(world, (TEN, 1), (TEN + 59 * second, 4), (TEN + MINUTE, 5), (TEN + 5 * MINUTE, -7), (before, 8))
    await store_values(world, (TEN + 3 * MINUTE, None), (TEN, None))
    await store_values(world, (TEN, 99), metric="CPU")

    async def buckets(width: timedelta, first: datetime = EARLIEST, last: datetime = LATEST) -> list[tuple[Any, ...]]:
        found = await reader.metric_buckets("checkout", "cpu", first, last, width, 1e290)
        assert [list(row) for row in found] == [["start", "count", "min", "max", "sum"]] * len(found)
        return [tuple(row.values()) for row in found]

    minutes = [(TEN, 2, 1, 4, 5), (TEN + MINUTE, 1, 5, 5, 5), (TEN + 5 * MINUTE, 1, -7, -7, -7)]
    assert await buckets(MINUTE) == [(before - 59 * second, 1, 8, 8, 8), *minutes]
    assert await buckets(MINUTE, TEN + second, TEN + MINUTE) == [(TEN, 1, 4, 4, 4), minutes[1]]
    assert await buckets(timedelta(days=1), TEN) == [(TEN.replace(hour=0), 4, -7, 5, 3)]
    week = timedelta(days=7)
    assert [row[0] for row in await buckets(week)] == [datetime(1969, 12, 25, tzinfo=UTC), TEN.replace(hour=0)]
    assert await buckets(MINUTE, LATEST, EARLIEST) == []


async def test_numbers_of_any_size_have_buckets(world: World, database: Database) -> None:
    """Postgres raises an error where a sum of finite numbers is infinite."""
    nan, infinity = float("nan"), float("inf")
    for minute, values in enumerate(
        [(1.7e308, 1.7e308), (-1.7e308, 1.0), (nan, 1.0), (infinity, 1.0), (5e-324, 1e200)]
    ):
        await store_values(world, *((TEN + minute * MINUTE, value) for value in values))
    for time in ("20000-01-01", "0044-03-15 BC", "infinity", "-infinity"):
        await world.sql.execute(f"INSERT INTO metrics VALUES ('{time}', 'checkout', 'cpu', 1)")
    ends = "from=0001-01-01T00:00:00Z&to=9999-12-31T23:59:59.999999Z"
    async with serving(RecordsApi(RecordReader(database, ReadLimit()), SystemClock()).routes()) as url:
        code, body = await get(f"{url}/v1/metrics/checkout/cpu?{ends}")
        assert (code, len(body["values"])) == (200, 10)
        code, body = await get(
            f"{url}/v1/metrics/checkout/cpu?bucket=1m&from=2025-11-27T10:00:00Z&to=2025-11-27T11:00:00Z"
        )
        assert code == 200
        code, century = await get(f"{url}/v1/metrics/checkout/cpu?bucket=100y&{ends.replace('0001', '0100')}")
        assert (code, [bucket["count"] for bucket in century["buckets"]]) == (200, [10])
    assert [tuple(bucket.values())[1:] for bucket in body["buckets"]] == [
        (2, 1.7e308, 1.7e308, None, None),
        (2, -1.7e308, 1, None, None),
        (2, 1, None, None, None),
        (2, 1, None, None, None),
        (2, 5e-324, 1e200, 5e199, 1e200),
    ]


@pytest.mark.parametrize(
    ("query", "count", "truncated"),
    [
        ("from=0001-01-01T00:00:00Z&to=9999-12-31T23:59:59.999999Z", 1500, True),
        ("to=0001-01-01T00:00:00Z", 0, None),
        ("from=9999-12-31T23:59:59.999999Z&to=9999-12-31T23:59:59.999999Z", 0, None),
    ],
)
async def test_ends_of_the_calendar_are_answered(
    world: World, database: Database, query: str, count: int, truncated: bool | None
) -> None:
    await store(world, "B", *range(1600))
    async with serving(RecordsApi(RecordReader(database, ReadLimit()), SystemClock()).routes()) as url:
        code, body = await get(f"{url}/v1/bars/B?{query}")
    assert (code, len(body["bars"]), body.get("truncated")) == (200, count, truncated)


async def test_missing_tables_are_reported(redis_url: str, empty_database_url: str) -> None:
    database = Database(parse_database_url(empty_database_url))
    reader = RecordReader(database, ReadLimit())
    with pytest.raises(DatabaseRefused, match="bars_1m"):
        await reader.latest_bars("A", 1)
    with pytest.raises(DatabaseRefused, match="session_events"):
        await reader.last_event("s")
    with pytest.raises(DatabaseRefused, match="metrics"):
        await reader.metric_values("s", "m", TEN, TEN, 1)
    await database.close()


async def test_readers_of_records_and_of_views_share_one_limit(world: World) -> None:
    settings = load_settings(environ=world.environment | {"DB_MAX_CONNECTIONS": "3"})
    worker, limit = world.worker(), ReadLimit()
    counters = build_counters(settings, worker.database, worker.redis, worker.status, worker.metrics, limit)
    reader = RecordReader(worker.database, limit)
    async with world.sql.transaction():
        await world.sql.execute("LOCK TABLE bars_1m, metrics IN ACCESS EXCLUSIVE MODE")
        readers = [reader.bars("A", TEN, TEN, 1), reader.metric_buckets("s", "m", TEN, TEN, MINUTE, 1.0)]
        waiting = [asyncio.create_task(read) for read in readers]  # type: ignore[arg-type]
        await asyncio.sleep(0.2)
        # Both turns are taken for the second that the locks may be waited for.
        one = asyncio.create_task(counters.display.views(["a"]))
        await asyncio.sleep(0.2)
        assert not one.done()
        many = [counters.display.views(["a"]) for _ in range(60)]
        outcomes = await asyncio.gather(*many, return_exceptions=True)
        assert sum(isinstance(outcome, TooManyReaders) for outcome in outcomes) >= 10
        assert {type(each) for each in await asyncio.gather(*waiting, return_exceptions=True)} == {DatabaseUnavailable}
        assert [shown.views for shown in await one] == [0]


async def test_reader_gives_up_on_a_silent_database(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.db.read_limit.ANSWER_S", 0.2)
    async with Proxy(world.database_url) as proxy:
        database = Database(parse_database_url(proxy.url))
        reader = RecordReader(database, ReadLimit())
        await reader.last_event("s")
        proxy.mode = Mode.DROP_ALL
        async with asyncio.timeout(8):
            with pytest.raises(DatabaseUnavailable, match="no answer in time"):
                await reader.latest_bars("A", 1)
        await database.close()


ROWS = 100_000
# A third of all bars, and all of them older than those of the others.
DELISTED = "DELISTED"


@pytest.fixture(params=[3, 3000], ids="{} symbols".format)
async def many_bars(world: World, request: pytest.FixtureRequest) -> World:
    await world.sql.execute(
        f"""
        INSERT INTO bars_1m
        SELECT CASE WHEN n < {ROWS // 3} THEN '{DELISTED}' ELSE 'S' || n % {request.param} END,
               timestamptz '{TEN}' + n * interval '1 minute', 1, 1, 1, 1, 1, 1
        FROM generate_series(1, {ROWS}) n
        """
    )
    return world


@pytest.mark.parametrize("statistics", ["no statistics", "analyzed"])
@pytest.mark.parametrize("mode", ["force_custom_plan", "force_generic_plan"])
async def test_bars_are_read_by_their_key_and_never_sorted(many_bars: World, statistics: str, mode: str) -> None:
    """However large the table, and whatever the planner knows: only bars that are answered are read."""
    if statistics == "analyzed":
        await many_bars.sql.execute("ANALYZE bars_1m")
    last = TEN + ROWS * MINUTE
    for symbol in (DELISTED, "S1", "unknown"):
        for first in (TEN, last - timedelta(days=1)):
            assert_read_by_key(
                await explain(many_bars, mode, BARS_BETWEEN, of_symbol=symbol, first=first, last=last, at_most=1501)
            )
        for count in (1, 1000):
            assert_read_by_key(await explain(many_bars, mode, LATEST_BARS, of_symbol=symbol, at_most=count))


def assert_read_by_key(plan: dict[str, Any]) -> None:
    assert plan["Node Type"] == "Limit"
    (scan,) = plan["Plans"]
    assert (scan["Node Type"], scan.get("Index Name")) == ("Index Scan", "bars_1m_pkey")
    assert scan.get("Rows Removed by Filter", 0) == 0
    assert scan["Shared Hit Blocks"] + scan["Shared Read Blocks"] < 5000


async def test_session_is_read_by_its_key(world: World) -> None:
    await world.sql.execute(
        "INSERT INTO session_events SELECT 's' || n, 'e', 1, 1, now() FROM generate_series(1, 50000) n"
    )
    await world.sql.execute("ANALYZE session_events")
    plan = await explain(world, "auto", LAST_EVENT, of_session="s1")
    assert (plan["Node Type"], plan["Index Name"]) == ("Index Scan", "session_events_pkey")


async def explain(world: World, mode: str, statement: Any, **parameters: Any) -> dict[str, Any]:
    """The plan of a prepared statement, as the worker runs it, with what it read."""
    dialect = postgresql.asyncpg.dialect()  # type: ignore[no-untyped-call]
    settings, compiled = BAR_SETTINGS.compile(dialect=dialect), statement.compile(dialect=dialect)
    async with world.sql.transaction():
        await world.sql.execute(f"SET LOCAL plan_cache_mode = {mode}")
        await world.sql.fetchrow(str(settings), *(settings.params[name] for name in settings.positiontup))
        await world.sql.execute(f"PREPARE explained AS {compiled}")
        values = [(compiled.params | parameters)[name] for name in compiled.positiontup]
        literals = ", ".join(str(value) if isinstance(value, int) else f"'{value}'" for value in values)
        explained = f"EXPLAIN (ANALYZE, BUFFERS, TIMING OFF, FORMAT JSON) EXECUTE explained ({literals})"
        plan: dict[str, Any] = json.loads(await world.sql.fetchval(explained))[0]["Plan"]
        await world.sql.execute("DEALLOCATE explained")
    return plan
