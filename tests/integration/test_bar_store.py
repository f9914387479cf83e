"""A BarStore: real bars come back as they were, the later bar wins, and what does not fit is refused and counted."""

from __future__ import annotations

import asyncio
import json
import math
import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from typing import Any
from urllib.parse import urlsplit

import pytest
from prometheus_client import CollectorRegistry

from tests.support.bars import BTCUSD, EURUSD, GOOG, MINUTE, as_bar, make_bar, read_csv, stored_bars
from tests.support.proxy import Mode, Proxy
from tests.support.written import WrittenRecords, assert_identity
from worker import BarStore, SyncBarStore, WriterStats
from worker.errors import DatabaseUnavailable
from worker.settings.environment import without_settings

ARGUMENTS: dict[str, Any] = {"batch_timeout": 0.02, "retry_delay": 0.01}
REAL = [GOOG, EURUSD]


def make_store(written: WrittenRecords, url: str | None = None, **arguments: Any) -> BarStore:
    return BarStore(url or written.url, **ARGUMENTS | arguments)


@pytest.mark.parametrize("symbol", REAL)
async def test_real_bars_are_read_back_as_they_were(written: WrittenRecords, symbol: str) -> None:
    bars = [as_bar(document) for document in read_csv(symbol)]
    async with make_store(written) as store:
        assert await store.write_bars(bars, timeout=20) == len(bars)
        assert await store.flush(20)
        first, last = bars[0].timestamp, bars[-1].timestamp
        assert await store.get_bars(symbol, first, last) == bars
        # Both ends are included.
        assert await store.get_bars(symbol, bars[10].timestamp, bars[20].timestamp) == bars[10:21]
        second = timedelta(seconds=1)
        assert await store.get_bars(symbol, bars[10].timestamp + second, bars[20].timestamp - second) == bars[11:20]
        assert await store.get_latest_bars(symbol, 7) == bars[-7:]
        assert await store.get_latest_bars(symbol, len(bars) + 1) == bars
        assert await store.get_bars("nobody", first, last) == await store.get_latest_bars("nobody", 5) == []
    assert store.stats == WriterStats(accepted=len(bars), written=len(bars))


@pytest.mark.parametrize("symbol", REAL)
async def test_real_bars_through_a_store_for_threads(written: WrittenRecords, symbol: str) -> None:
    bars = [as_bar(document) for document in read_csv(symbol)]

    def run() -> None:
        with SyncBarStore(written.url, **ARGUMENTS) as store:
            assert store.health()
            assert store.write_bars(bars, timeout=20) == len(bars)
            assert store.flush(20)
            assert store.get_bars(symbol, bars[0].timestamp, bars[-1].timestamp) == bars
            assert store.get_latest_bars(symbol, 7) == bars[-7:]
        assert store.stats == WriterStats(accepted=len(bars), written=len(bars))
        assert not store.health()
        assert store.write_bars(bars[:3]) == 0
        with pytest.raises(DatabaseUnavailable, match="closed"):
            store.get_latest_bars(symbol, 1)

    await asyncio.to_thread(run)


async def test_real_bars_with_fractional_volumes_are_letters(written: WrittenRecords) -> None:
    documents = read_csv(BTCUSD)
    async with make_store(written) as store:
        assert await store.write_bars([as_bar(document) for document in documents]) == len(documents)
        assert await store.write_bars([make_bar("A")]) == 1
    assert store.stats == WriterStats(accepted=len(documents) + 1, written=1, dead=len(documents))
    letters = await written.letters()
    assert [json.loads(letter["payload"])["volume"] for letter in letters] == [each["volume"] for each in documents]
    assert await stored_bars(written.sql) == [make_bar("A")]


async def test_bad_bars_are_letters_and_stop_no_neighbour(written: WrittenRecords) -> None:
    bad = [
        make_bar("x" * 10_000),
        make_bar("a\x00b"),
        make_bar(""),
        make_bar("BAD", open=math.nan),
        make_bar("BAD", high=math.inf),
        make_bar("BAD", vwap=-math.inf),
        make_bar("BAD", high=1, low=2),
        make_bar("BAD", volume=-1),
        make_bar("BAD", volume=2**70),
        make_bar("BAD", timestamp=datetime(1800, 1, 1, tzinfo=UTC)),
    ]
    async with make_store(written) as store:
        for number, bar in enumerate(bad):
            assert await store.write_bars([make_bar(f"{number}"), bar]) == 2
    assert store.stats == WriterStats(accepted=2 * len(bad), written=len(bad), dead=len(bad))
    assert await stored_bars(written.sql) == [make_bar(f"{number}") for number in range(len(bad))]
    letters = await written.letters()
    assert json.loads(letters[0]["payload"])["symbol"] == "x" * 10_000


async def test_what_is_not_a_bar_is_refused_and_counted(written: WrittenRecords) -> None:
    async with make_store(written) as store:
        assert await store.write_bars([make_bar("A"), make_bar("B", volume=object()), make_bar("C")]) == 2
    assert store.stats == WriterStats(accepted=2, refused=1, written=2)


async def test_times_of_any_zone_are_the_same_minute(written: WrittenRecords) -> None:
    plus_two = MINUTE.astimezone(timezone(timedelta(hours=2)))
    naive = MINUTE.replace(tzinfo=None)
    async with make_store(written) as store:
        await store.write_bars([make_bar("A", 1, timestamp=plus_two), make_bar("A", 2, timestamp=naive)])
        assert await store.flush(20)
        for time in (MINUTE, plus_two, naive):
            assert await store.get_bars("A", time, time) == [make_bar("A", 2)]
        assert await store.get_bars("A", datetime.min, datetime.max) == [make_bar("A", 2)]
        assert await store.get_bars("A", datetime.max, datetime.min) == []
        assert await store.get_latest_bars("A", 0) == await store.get_latest_bars("A", -1) == []


@pytest.mark.parametrize("batch_size", [1, 3, 1000])
async def test_the_later_bar_wins_in_one_batch_and_across_batches(written: WrittenRecords, batch_size: int) -> None:
    async with make_store(written, batch_size=batch_size) as store:
        assert await store.write_bars([make_bar("A", 5), make_bar("B", 9), make_bar("A", 7), make_bar("A", 2)]) == 4
    assert await stored_bars(written.sql) == [make_bar("A", 2), make_bar("B", 9)]


async def test_a_bar_that_comes_again_smaller_from_another_process_replaces_the_first(written: WrittenRecords) -> None:
    for number in (9, 4):
        async with make_store(written) as store:
            assert await store.write_bars([make_bar("A", number)]) == 1
    assert await stored_bars(written.sql) == [make_bar("A", 4)]


async def test_a_burst_of_ten_thousand_symbols_is_accepted_at_once_and_written(written: WrittenRecords) -> None:
    """With the defaults, and without waiting: as many bars as the queue has places."""
    burst = [make_bar(f"{number:05}", number) for number in range(10_000)]
    async with BarStore(written.url) as store:
        assert await store.write_bars(burst, timeout=0) == len(burst)
    assert store.stats == WriterStats(accepted=len(burst), written=len(burst))
    assert await stored_bars(written.sql) == burst


async def test_an_overflow_is_refused_at_once_and_what_was_accepted_is_written(written: WrittenRecords) -> None:
    burst = [make_bar(f"{number:02}") for number in range(25)]
    async with make_store(written, capacity=10) as store:
        async with written.sql.transaction():
            await written.sql.execute("LOCK TABLE ingest_batches")
            assert await store.write_bars(burst, timeout=0) == 10
            assert not await store.health()
        assert await store.flush(20)
        assert await store.health()
    assert store.stats == WriterStats(accepted=10, refused=15, written=10)
    assert await stored_bars(written.sql) == burst[:10]


async def test_write_bars_waits_for_room(written: WrittenRecords) -> None:
    burst = [make_bar(f"{number:03}") for number in range(100)]
    async with make_store(written, capacity=10, batch_size=5) as store:
        assert await store.write_bars(burst, timeout=20) == 100
    assert await stored_bars(written.sql) == burst


async def test_the_timeout_is_that_of_the_whole_call(written: WrittenRecords) -> None:
    async with make_store(written, capacity=1) as store, written.sql.transaction():
        await written.sql.execute("LOCK TABLE ingest_batches")
        async with asyncio.timeout(10):  # a hundred times 0.2 seconds are more
            assert await store.write_bars((make_bar(f"{number}") for number in range(100)), timeout=0.2) == 1


async def test_concurrent_writers_lose_nothing_and_each_keeps_its_order(written: WrittenRecords) -> None:
    async def write(store: BarStore, name: int) -> None:
        for number in range(50):
            assert await store.write_bars([make_bar(f"{name}"), make_bar(f"{name} {number}")], timeout=20) == 2
            await asyncio.sleep(0)
        assert await store.write_bars([make_bar(f"{name}", 77)], timeout=20) == 1

    async with make_store(written, batch_size=7) as one, make_store(written, batch_size=11) as other:
        await asyncio.gather(*(write(store, name) for name, store in enumerate((one, other) * 4)))
    for store in (one, other):
        assert_identity(store.stats)
        assert store.stats.accepted == store.stats.written == 4 * 101
    expected = [make_bar(f"{name}", 77) for name in range(8)]
    expected += [make_bar(f"{name} {number}") for name in range(8) for number in range(50)]
    assert await stored_bars(written.sql) == sorted(expected, key=lambda bar: bar.symbol)


async def test_two_stores_that_write_the_same_bars_do_not_deadlock(written: WrittenRecords) -> None:
    burst = [make_bar(f"{number}") for number in range(500)]
    async with make_store(written) as one, make_store(written) as other:
        for _ in range(5):
            wrote = await asyncio.gather(one.write_bars(burst, 20), other.write_bars(burst[::-1], 20))
            assert wrote == [500, 500]
    assert one.stats.written + other.stats.written == 5000
    assert len(await stored_bars(written.sql)) == 500


async def test_a_database_that_is_away_for_a_moment_costs_nothing(written: WrittenRecords) -> None:
    async with Proxy(written.url) as proxy, make_store(written, proxy.url, batch_size=5, max_retries=0) as store:
        assert await store.write_bars([make_bar("A", 1)]) == 1
        assert await store.flush(20)
        proxy.mode = Mode.RESET
        await written.terminate_connections()
        assert await store.write_bars(make_bar(f"{number:02}") for number in range(20)) == 20
        assert not await store.flush(0.2)
        assert not await store.health()
        with pytest.raises(DatabaseUnavailable):
            await store.get_latest_bars("A", 1)
        proxy.mode = Mode.FORWARD
        assert await store.flush(20)
        assert await store.get_latest_bars("A", 1) == [make_bar("A", 1)]
    assert store.stats == WriterStats(accepted=21, written=21)


async def test_close_writes_what_is_left_and_accepts_nothing_more(written: WrittenRecords) -> None:
    store = make_store(written, batch_timeout=60)
    await store.start()
    assert await store.write_bars(make_bar(f"{number:03}") for number in range(300)) == 300
    assert await store.close(20)
    assert await store.close()
    assert await store.write_bars([make_bar("late")]) == 0
    assert not await store.health()
    with pytest.raises(DatabaseUnavailable, match="closed"):
        await store.get_latest_bars("000", 1)
    assert store.stats == WriterStats(accepted=300, refused=1, written=300)
    assert len(await stored_bars(written.sql)) == 300


async def test_close_while_the_database_is_away_ends_and_counts_what_is_left(written: WrittenRecords) -> None:
    async with Proxy(written.url) as proxy:
        proxy.mode = Mode.DROP_ALL
        store = make_store(written, proxy.url)
        await store.start()
        assert await store.write_bars([make_bar("A"), make_bar("B")]) == 2
        assert not await store.close(0.1)
    assert store.stats == WriterStats(accepted=2, unwritten=2)


async def test_dashboard_sees_the_queue_and_the_writes(written: WrittenRecords) -> None:
    registry = CollectorRegistry()

    def selected(series: str, **labels: str) -> float | None:
        return registry.get_sample_value(series, {"pipeline": "bars_1m", **labels})

    async with make_store(written, registry=registry, capacity=50, batch_size=10) as store:
        assert selected("timescale_write_total", status="success") == 0
        assert selected("timescale_write_errors_total", error_type="queue_full") == 0
        async with written.sql.transaction():
            await written.sql.execute("LOCK TABLE ingest_batches")
            assert await store.write_bars((make_bar(f"{number}") for number in range(60)), timeout=0) == 50
            assert selected("timescale_write_queue_depth") == 50
            assert selected("timescale_write_total", status="error") == 10
            assert selected("timescale_write_errors_total", error_type="queue_full") == 10
    assert selected("timescale_write_queue_depth") == 0
    assert selected("timescale_write_total", status="success") == 50
    assert selected("timescale_write_batch_size_sum", operation="write") == 50
    assert selected("timescale_write_batch_size_count", operation="write") == 5
    assert selected("timescale_write_latency_seconds_count", operation="write") == 5
    assert selected("timescale_write_errors_total", error_type="write_failed") == 0


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Sets a variable; none of the worker's is set otherwise."""
    for name in set(os.environ) - set(without_settings(os.environ)):
        monkeypatch.delenv(name)
    return monkeypatch.setenv


async def test_settings_are_read_by_their_names(
    written: WrittenRecords, environment: Callable[[str, str], None]
) -> None:
    place = urlsplit(written.url)
    environment("DB_HOST", str(place.hostname))
    environment("DB_PORT", str(place.port or 5432))
    environment("DB_USER", str(place.username))
    environment("DB_PASSWORD", place.password or "none")
    environment("DB_NAME", place.path.removeprefix("/"))
    environment("DB_SSL_MODE", "disable")
    environment("DB_MAX_CONNECTIONS", "25")
    environment("DB_MAX_IDLE_CONNS", "5")
    environment("DB_CONN_MAX_LIFETIME", "5m")
    environment("BARS_DB_WRITE_BATCH_SIZE", "4")
    environment("BARS_DB_WRITE_INTERVAL", "20ms")
    environment("BARS_DB_WRITE_QUEUE_SIZE", "12")
    environment("BARS_DB_MAX_RETRIES", "2")
    environment("BARS_DB_RETRY_DELAY", "10ms")
    async with BarStore() as store:
        assert await store.write_bars((make_bar(f"{number:02}") for number in range(20)), timeout=0) == 12
    assert store.stats == WriterStats(accepted=12, refused=8, written=12)
    assert await written.tickets() == 3


async def test_parent_and_child_of_a_fork_each_write_what_they_were_given(written: WrittenRecords) -> None:
    program = """
from datetime import UTC, datetime
from worker import Bar, SyncBarStore

def bar(symbol):
    return Bar(symbol=symbol, timestamp=datetime(2026, 11, 27, 10, tzinfo=UTC), open=1, high=1, low=1, close=1,
               volume=1, vwap=1)

store = SyncBarStore(batch_timeout=30.0)
assert store.write_bars([bar("before")]) == 1
if not (pid := os.fork()):
    assert store.stats.accepted == 0
    assert store.write_bars([bar("child")]) == 1
    assert store.flush(20)
    assert [each.symbol for each in store.get_latest_bars("child", 1)] == ["child"]
    sys.exit()
assert store.write_bars([bar("parent")]) == 1
assert os.waitpid(pid, 0)[1] == 0
assert store.flush(20)
print(store.stats.accepted, store.stats.written)
"""
    assert await written.run(program) == ("2 2\n", "")
    assert await stored_bars(written.sql) == [make_bar(symbol) for symbol in ("before", "child", "parent")]


async def test_the_child_of_a_fork_does_not_read_by_the_connections_of_its_parent(written: WrittenRecords) -> None:
    program = """
from datetime import UTC, datetime
from worker import Bar, BarStore

async def read(store):
    found = [each.symbol for each in await store.get_latest_bars("A", 1)]
    return found, await store.write_bars([]), await store.close()

async def main():
    async with BarStore(batch_timeout=0.02) as store:
        await store.write_bars([Bar(symbol="A", timestamp=datetime(2026, 11, 27, 10, tzinfo=UTC), open=1, high=1, low=1,
                                    close=1, volume=1, vwap=1)])
        assert await store.flush(20) and await store.get_latest_bars("A", 1)
        if not (pid := os.fork()):
            def run(): print(asyncio.run(read(store)), flush=True)
            thread = threading.Thread(target=run)
            thread.start()
            thread.join()
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        for _ in range(3): assert await store.get_latest_bars("A", 1)

asyncio.run(main())
"""
    assert await written.run(program) == ("(['A'], 0, True)\n", "")
