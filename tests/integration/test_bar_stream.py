"""Bars from a Redis stream to their table: real ones, those of a known publisher, bursts, and the later entry wins."""

from __future__ import annotations

import asyncio
import json
import math
import random
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support.bars import BTCUSD, EURUSD, GOOG, MINUTE, BarStream, as_bar, make_bar, make_document, read_csv
from tests.support.world import World
from worker import Bar

SYMBOLS = 10_000
REFUSED = "ALTER TABLE bars_1m ADD CONSTRAINT refused CHECK (volume <> 3)"


@pytest.fixture
def bars(world: World) -> Iterator[BarStream]:
    made = BarStream(world)
    yield made
    made.close()


@pytest.mark.parametrize("symbol", [GOOG, EURUSD])
async def test_real_bars_are_rows_as_they_were(bars: BarStream, symbol: str) -> None:
    documents = read_csv(symbol)
    await bars.add(documents)
    bars.start()
    await bars.carried()
    assert await bars.rows() == [as_bar(document) for document in documents]
    assert await bars.letters() == []


async def test_real_bars_with_fractional_volumes_are_letters_with_their_bytes(bars: BarStream) -> None:
    good = read_csv(GOOG)[:200]
    bad = [json.dumps(document).encode() for document in read_csv(BTCUSD)]
    await bars.add(document for pair in zip(good, bad, strict=False) for document in pair)
    await bars.add(good[len(bad) :])
    bars.start(BARS_DB_WRITE_BATCH_SIZE="50")
    await bars.carried()
    assert await bars.rows() == [as_bar(document) for document in good]
    letters = await bars.letters()
    assert [letter["payload"] for letter in letters] == bad
    assert {(letter["error_class"], letter["error"]) for letter in letters} == {
        ("invalid_field", "`volume` is not a whole number")
    }


async def test_bad_bars_are_letters_and_stop_no_neighbour(bars: BarStream) -> None:
    bad = [
        make_document("x" * 10_000),
        make_document("a\x00b"),
        make_document("BAD", open=math.nan),
        make_document("BAD", high=math.inf),
        make_document("BAD", low=-math.inf),
        make_document("BAD", high=1, low=2),
        make_document("BAD", volume=10**400),
        make_document("BAD", volume=-1),
        make_document("BAD", timestamp="2026-02-30T00:00:00Z"),
    ]
    payloads = [json.dumps(document).encode() for document in bad]
    for number, payload in enumerate(payloads):
        await bars.add([make_document(f"{number}"), payload])
    bars.start()
    await bars.carried()
    assert await bars.rows() == [make_bar(f"{number}") for number in range(len(bad))]
    assert [letter["payload"] for letter in await bars.letters()] == payloads


async def test_the_last_entry_of_a_symbol_and_minute_wins_however_the_stream_is_cut(bars: BarStream) -> None:
    """In one batch and across batches. The greatest value does not win, and the first does not stay."""
    rng = random.Random(1)
    added = [make_document(f"{rng.randrange(20)}", rng.randrange(1, 1000)) for _ in range(3000)]
    await bars.add(added)
    bars.start(BARS_DB_WRITE_BATCH_SIZE="7")
    await bars.carried()
    last = {document["symbol"]: document for document in added}
    assert await bars.rows() == [as_bar(last[symbol]) for symbol in sorted(last)]


async def test_a_bar_that_comes_again_smaller_after_a_kill_replaces_the_first(bars: BarStream) -> None:
    await bars.add(make_document(symbol, 9) for symbol in ("A", "B"))
    worker = bars.start()
    await bars.carried()
    worker.kill()
    await bars.add([make_document("A", 4)])
    bars.start()
    await bars.carried()
    assert await bars.rows() == [make_bar("A", 4), make_bar("B", 9)]


async def test_after_kills_in_the_middle_each_row_is_the_last_entry(bars: BarStream) -> None:
    """A batch that was written before the kill is not written again over newer ones."""
    last: dict[str, int] = {}
    number = 0
    for _ in range(3):
        worker = bars.start(BARS_DB_WRITE_BATCH_SIZE="20")
        for _ in range(10):
            number += 1
            added = {f"{symbol}": 10_000 - number - symbol for symbol in range(100)}
            last |= added
            await bars.add(make_document(symbol, value) for symbol, value in added.items())
            await asyncio.sleep(0.05)
        worker.kill()
    bars.start()
    await bars.carried()
    assert await bars.rows() == [make_bar(symbol, last[symbol]) for symbol in sorted(last)]
    assert await bars.letters() == []


async def test_bars_as_a_known_publisher_writes_them_are_rows(world: World) -> None:
    """By Go's encoding/json, in the field `bar` of the stream `bars.finalized`."""
    documents = [
        b'{"symbol":"AAPL","timestamp":"2025-11-27T10:00:00.123456789+05:30","open":150,"high":151.5,"low":149.25,'
        b'"close":151,"volume":36494.0,"vwap":150.33333333333334}',
        b'{"symbol":"BRK.B","timestamp":"2025-11-27T10:01:00Z","open":1e-7,"high":4.2e+21,"low":0,"close":1,'
        b'"volume":0,"vwap":0}',
    ]
    bars = BarStream(world, "bars.finalized", "bar")
    try:
        await bars.add(documents)
        # A field beside it changes nothing.
        await world.redis.xadd(bars.name, {"source": "ingest", "bar": json.dumps(make_document("MSFT", 7))})
        bars.count += 1
        bars.start()
        await bars.carried()
    finally:
        bars.close()
    assert await bars.letters() == []
    assert await bars.rows() == [
        Bar(
            symbol="AAPL",
            timestamp=datetime(2025, 11, 27, 4, 30, 0, 123456, tzinfo=UTC),
            open=150,
            high=151.5,
            low=149.25,
            close=151,
            volume=36494,
            vwap=150.33333333333334,
        ),
        Bar(
            symbol="BRK.B",
            timestamp=datetime(2025, 11, 27, 10, 1, tzinfo=UTC),
            open=1e-7,
            high=4.2e21,
            low=0,
            close=1,
            volume=0,
            vwap=0,
        ),
        make_bar("MSFT", 7),
    ]


async def test_bursts_of_ten_thousand_symbols_a_minute_are_rows(bars: BarStream) -> None:
    bars.start()
    expected = []
    for minute in range(2):
        at = MINUTE + timedelta(minutes=minute)
        await bars.add(make_document(f"{number:05}", number, timestamp=at.isoformat()) for number in range(SYMBOLS))
        expected += [make_bar(f"{number:05}", number, timestamp=at) for number in range(SYMBOLS)]
    await bars.carried()
    assert await bars.rows() == sorted(expected, key=lambda bar: (bar.symbol, bar.timestamp))


async def test_queries_of_a_dashboard_have_numbers(bars: BarStream) -> None:
    """What a query selects by the labels of the plan: there is a series from the start, and it counts bars."""
    await bars.world.sql.execute("ALTER TABLE bars_1m RENAME TO hidden")
    worker = bars.start()
    url = json.loads(await worker.wait_for_log('"started"'))["url"] + "/metrics"
    assert await selected(url, "timescale_write_total", status="success") == 0
    assert await selected(url, "timescale_write_total", status="error") == 0
    await bars.add(make_document(f"{number}") for number in range(25))
    async with asyncio.timeout(20):
        while not await selected(url, "timescale_write_errors_total", error_type="write_failed"):
            await asyncio.sleep(0.1)
    assert await selected(url, "timescale_write_total", status="error")
    await bars.world.sql.execute("ALTER TABLE hidden RENAME TO bars_1m")
    await bars.carried()
    async with asyncio.timeout(20):
        while await selected(url, "timescale_write_total", status="success") != 25:
            await asyncio.sleep(0.1)
    assert await selected(url, "timescale_write_batch_size_sum", operation="write") == 25
    writes = await selected(url, "timescale_write_latency_seconds_count", operation="write")
    assert writes >= 1
    assert await selected(url, "timescale_write_latency_seconds_bucket", operation="write", le="+Inf") == writes
    assert await selected(url, "timescale_write_queue_depth") == 0


async def selected(url: str, series: str, **labels: str) -> float:
    """The sum of the samples that a query `series{labels}` selects; there must be one."""

    def read() -> str:
        with urllib.request.urlopen(url, timeout=10) as response:
            return str(response.read().decode())

    found = [
        sample.value
        for family in text_string_to_metric_families(await asyncio.to_thread(read))
        for sample in family.samples
        if sample.name == series and labels.items() <= sample.labels.items()
    ]
    assert found, f"{series} {labels}"
    return sum(found)


async def test_replay_inserts_a_bar_where_there_is_none_and_replaces_one_only_when_told_to(bars: BarStream) -> None:
    await bars.world.sql.execute(REFUSED)
    await bars.add(make_document(symbol, 3) for symbol in ("absent", "there"))
    bars.start()
    await bars.carried()
    await bars.add([make_document("there", 5)])
    await bars.carried()
    await bars.world.sql.execute("ALTER TABLE bars_1m DROP CONSTRAINT refused")
    assert await bars.rows() == [make_bar("there", 5)]

    assert await replayed(bars, status=1) == "1 row written, 1 refused again, 0 not valid"
    assert await bars.rows() == [make_bar("absent", 3), make_bar("there", 5)]
    (left,) = await bars.letters()
    assert (json.loads(left["payload"]), left["sqlstate"]) == (make_document("there", 3), "23505")

    assert await replayed(bars, "--overwrite", status=0) == "1 row written, 0 refused again, 0 not valid"
    assert await bars.rows() == [make_bar("absent", 3), make_bar("there", 3)]
    assert await bars.letters() == []


async def replayed(bars: BarStream, *options: str, status: int) -> str:
    """What `dead-letters replay` prints."""
    command = bars.start("dead-letters", "replay", *options)
    assert await command.wait() == status, command.log
    assert command.process.stdout is not None
    return command.process.stdout.read().decode().strip()
