"""A MetricStore: a batch is written whole or not at all, and the caller knows which, or that it is not known."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from typing import Any
from uuid import uuid4

import pytest

from tests.support.proxy import Mode, Proxy
from tests.support.written import WrittenRecords
from worker import CommitUnanswered, Metric, MetricStore, SyncMetricStore
from worker.errors import DatabaseRefused, DatabaseUnavailable, InvalidMetric, NotConnected, ViewerWorkerError
from worker.inprocess import metric_store

TEN = datetime(2026, 11, 27, 10, tzinfo=UTC)


def metric(value: float = 1.0, **fields: Any) -> Metric:
    return Metric(**{"time": TEN, "service_name": "checkout", "metric_name": "cpu_usage", "value": value} | fields)


async def values(written: WrittenRecords) -> list[float]:
    return [row["value"] for row in await written.sql.fetch("SELECT value FROM metrics ORDER BY value")]


@pytest.fixture
def small_statements(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a batch has many statements in its transaction."""
    monkeypatch.setattr(metric_store, "ROWS_AT_ONCE", 10)


async def test_metrics_are_rows_as_they_were_given(written: WrittenRecords) -> None:
    batch = [
        metric(0.1, event_id="e"),
        metric(2**60, service_name="ü/\x1f\n", metric_name="\x1e"),
        metric(1e300, time=TEN.astimezone(timezone(timedelta(hours=2)))),
        metric(-0.0, time=TEN.replace(tzinfo=None)),
    ]
    async with MetricStore(written.url) as store:
        assert await store.bulk_insert_metrics(batch) == 4
        assert await store.bulk_insert_metrics([]) == 0
        before = await written.sql.fetchval("SELECT now()")
        assert await store.bulk_insert_metrics(iter([metric(7, metric_name="now", time=None)] * 2)) == 2
    rows = await written.sql.fetch("SELECT * FROM metrics WHERE metric_name <> 'now' ORDER BY value")
    assert [Metric(**row) for row in rows] == [
        metric(each.value, service_name=each.service_name, metric_name=each.metric_name, event_id=each.event_id)
        for each in sorted(batch, key=lambda each: each.value)
    ]
    times = await written.sql.fetch("SELECT DISTINCT time FROM metrics WHERE metric_name = 'now'")
    assert len(times) == 1
    assert abs(times[0]["time"] - before) < timedelta(minutes=1)


@pytest.mark.usefixtures("small_statements")
async def test_a_record_that_the_database_refuses_rolls_the_whole_batch_back(written: WrittenRecords) -> None:
    await written.sql.execute("ALTER TABLE metrics ADD CHECK (value < 100)")
    async with MetricStore(written.url) as store:
        with pytest.raises(DatabaseRefused, match="metrics_value_check"):
            await store.bulk_insert_metrics([metric(number) for number in range(101)])
        assert await values(written) == []
        assert await store.bulk_insert_metrics([metric(number) for number in range(100)]) == 100
    assert await values(written) == list(range(100))
    assert await written.letters() == []


async def test_a_constraint_that_is_checked_at_the_commit_rolls_the_whole_batch_back(written: WrittenRecords) -> None:
    await written.sql.execute(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'not this one'; END $$;"
        "CREATE CONSTRAINT TRIGGER late AFTER INSERT ON metrics DEFERRABLE INITIALLY DEFERRED"
        " FOR EACH ROW WHEN (NEW.value = 2) EXECUTE FUNCTION refuse()"
    )
    async with MetricStore(written.url) as store:
        with pytest.raises(DatabaseRefused, match="not this one"):
            await store.bulk_insert_metrics([metric(1), metric(2)])
    assert await values(written) == []


def bad_metrics() -> Iterator[tuple[object, str]]:
    yield metric(service_name=""), "`service_name` must have 1 to 256 bytes"
    yield metric(service_name="x" * 257), "`service_name` must have 1 to 256 bytes"
    yield metric(metric_name="a\x00b"), "`metric_name` has a NUL"
    yield metric(metric_name="a\ud800"), "`metric_name` is not Unicode"
    yield metric(service_name=b"checkout"), "Expected `str`, got `bytes` - at `$.service_name`"
    yield metric(service_name=uuid4()), "Expected `str`, got `uuid` - at `$.service_name`"
    yield metric(math.nan), "`value` is not a finite number"
    yield metric(-math.inf), "`value` is not a finite number"
    yield metric(value=None), "Expected `float`, got `null` - at `$.value`"
    yield metric(value="1"), "Expected `float`, got `str` - at `$.value`"
    yield metric(value=10**400), "Number out of range - at `$.value`"
    yield metric(time=1), "Expected `datetime | null`, got `int` - at `$.time`"
    yield metric(time="\ud800"), "`time` is not Unicode"
    yield metric(time=datetime(1900, 1, 1, tzinfo=UTC)), "`time` is too far from the time of arrival"
    yield metric(time=datetime.now(UTC) + timedelta(hours=1)), "`time` is too far from the time of arrival"
    yield metric(time=None, event_id="e"), "`event_id` needs a `time`"
    yield metric(event_id=""), "`event_id` must have 1 to 256 bytes"
    yield {"value": 1}, "expected a Metric, got `dict`"


async def test_an_invalid_record_is_named_and_nothing_is_sent(written: WrittenRecords) -> None:
    async with Proxy(written.url) as proxy, MetricStore(proxy.url) as store:
        for bad, text in bad_metrics():
            with pytest.raises(InvalidMetric) as raised:
                await store.bulk_insert_metrics([metric(), metric(), bad])  # type: ignore[list-item]
            assert raised.value.index == 2
            assert str(raised.value).startswith(f"metric 2 of the batch: {text}")
            assert isinstance(raised.value, ValueError)
            assert isinstance(raised.value, ViewerWorkerError)
        assert proxy.connections == 0


@pytest.mark.usefixtures("small_statements")
async def test_an_event_id_that_comes_again_makes_no_row_and_is_not_counted(written: WrittenRecords) -> None:
    batch = [metric(number, event_id=f"e{number}" if number % 2 else None) for number in range(50)]
    async with MetricStore(written.url) as store:
        assert await store.bulk_insert_metrics([*batch, batch[1], batch[49]]) == 50
        assert await store.bulk_insert_metrics(batch) == 25
        assert await store.bulk_insert_metrics([batch[1]]) == 0
        other_time = TEN + timedelta(seconds=1)
        assert await store.bulk_insert_metrics([metric(99, event_id="e1", time=other_time)]) == 1
    assert len(await values(written)) == 76


@pytest.mark.usefixtures("small_statements")
async def test_batches_of_the_same_event_ids_in_another_order_do_not_deadlock(written: WrittenRecords) -> None:
    batch = [metric(number, event_id=f"{number}") for number in range(1000)]
    async with MetricStore(written.url) as one, MetricStore(written.url) as other:
        counts = await asyncio.gather(one.bulk_insert_metrics(batch), other.bulk_insert_metrics(batch[::-1]))
    assert sum(counts) == 1000
    assert await values(written) == list(range(1000))


@pytest.mark.parametrize("lands", [True, False])
async def test_a_commit_without_an_answer_is_reported_and_may_be_repeated(written: WrittenRecords, lands: bool) -> None:
    batch = [metric(number, event_id=f"{number}") for number in range(5)]
    async with Proxy(written.url) as proxy, MetricStore(proxy.url) as store:
        if lands:
            proxy.lose_answer_to(b"COMMIT")
        else:
            proxy.cut_before(b"COMMIT")
        with pytest.raises(CommitUnanswered, match="may be written or not") as raised:
            await store.bulk_insert_metrics(batch)
        assert raised.value.written.rows == 5
        assert isinstance(raised.value, DatabaseUnavailable)
        assert len(await values(written)) == (5 if lands else 0)
        proxy.lose_answer_to(b"no such request")
        proxy.cut_before(None)
        proxy.mode = Mode.FORWARD
        assert await store.bulk_insert_metrics(batch) == (0 if lands else 5)
    assert await values(written) == list(range(5))


@pytest.mark.usefixtures("small_statements")
async def test_a_connection_that_breaks_before_the_commit_wrote_nothing(written: WrittenRecords) -> None:
    async with Proxy(written.url) as proxy, MetricStore(proxy.url) as store:
        assert await store.bulk_insert_metrics([metric(1)]) == 1
        proxy.cut_before(b"INSERT INTO metrics")
        with pytest.raises(DatabaseUnavailable) as raised:
            await store.bulk_insert_metrics([metric(number, event_id="new statement") for number in range(100)])
        assert not isinstance(raised.value, CommitUnanswered)
        proxy.cut_before(None)
        await written.terminate_connections()
        proxy.mode = Mode.RESET
        with pytest.raises(NotConnected):
            await store.bulk_insert_metrics([metric(3)])
    assert await values(written) == [1]


async def test_close_waits_for_running_calls_and_cuts_those_that_take_too_long(written: WrittenRecords) -> None:
    store = MetricStore(written.url)
    async with written.sql.transaction():
        await written.sql.execute("LOCK TABLE metrics")
        running = asyncio.create_task(store.bulk_insert_metrics([metric(1)]))
        await written.wait_until(lambda: waits_for_lock(written))
        closing = asyncio.create_task(store.close())
        await asyncio.sleep(0)
        with pytest.raises(DatabaseUnavailable, match="closed"):
            await store.bulk_insert_metrics([metric(2)])
        assert not closing.done()
    assert await closing
    assert await running == 1
    stuck = MetricStore(written.url)
    async with written.sql.transaction():
        await written.sql.execute("LOCK TABLE metrics")
        # More than there are connections.
        calls = [asyncio.create_task(stuck.bulk_insert_metrics([metric(3)])) for _ in range(4)]
        await written.wait_until(lambda: waits_for_lock(written))
        assert not await stuck.close(0)
        for call in calls:
            assert type(call.exception()) is DatabaseUnavailable
    assert await store.close()
    assert await values(written) == [1]


async def waits_for_lock(written: WrittenRecords) -> bool:
    return bool(await written.sql.fetchval("SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted)"))


async def test_threads_insert_batches(written: WrittenRecords) -> None:
    def run() -> None:
        with SyncMetricStore(written.url) as store:
            assert store.bulk_insert_metrics(metric(number) for number in range(3)) == 3
            with pytest.raises(InvalidMetric, match="metric 0"):
                store.bulk_insert_metrics([metric(math.nan)])
        with pytest.raises(DatabaseUnavailable, match="closed"):
            store.bulk_insert_metrics([metric(9)])
        assert store.close()

    await asyncio.to_thread(run)
    assert await values(written) == [0, 1, 2]


async def test_missing_table_is_refused(empty_database_url: str) -> None:
    async with MetricStore(empty_database_url) as store:
        with pytest.raises(DatabaseRefused, match="metrics"):
            await store.bulk_insert_metrics([metric()])
