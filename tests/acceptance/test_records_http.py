"""`viewer-worker run` answers `/v1/bars`, `/v1/sessions` and `/v1/metrics`, whatever PIPELINES says."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import uuid4

from tests.support.guarded import on_open_and_guarded_servers
from tests.support.http import get
from tests.support.world import CliWorker, World
from worker.dev.servers import PostgresServer
from worker.errors import ASK_CHECK

Start = Callable[..., CliWorker]


async def url_of(worker: CliWorker) -> str:
    return str(json.loads(await worker.wait_for_log('"started"'))["url"])


@on_open_and_guarded_servers
async def test_worker_answers_bars_sessions_and_metrics(world: World, start: Start) -> None:
    minute = datetime.now(UTC).replace(second=0, microsecond=0)
    insert = "INSERT INTO bars_1m VALUES ('BTC/USD', $1, 1.5, 2, 1, 1.25, 7, 0)"
    for age in (timedelta(minutes=1), timedelta(minutes=2), timedelta(days=2)):
        await world.sql.execute(insert, minute - age)
    await world.sql.execute("INSERT INTO session_events VALUES ('s/1', 'e1', 1, 1, $1)", minute)
    insert = "INSERT INTO metrics VALUES ($1, 'eu/checkout', 'http/5xx', $2)"
    await world.sql.executemany(insert, [(minute - timedelta(seconds=n), n) for n in (30, 90, 7200)])
    url = await url_of(start(world.environment, "run"))

    code, body = await get(f"{url}/v1/bars/BTC%2FUSD")
    times = [text_of(minute - age * timedelta(minutes=1)) for age in (2, 1)]
    assert (code, body["symbol"], [bar["timestamp"] for bar in body["bars"]]) == (200, "BTC/USD", times)
    values = {"open": 1.5, "high": 2, "low": 1, "close": 1.25, "volume": 7, "vwap": 0}
    assert body["bars"][0] == {"timestamp": times[0], **values}
    code, body = await get(f"{url}/v1/bars/BTC%2FUSD?latest=1")
    assert (code, [bar["timestamp"] for bar in body["bars"]]) == (200, times[1:])
    code, body = await get(f"{url}/v1/bars/BTC%2FUSD?from=0&to={round(minute.timestamp() * 1000)}")
    assert (code, len(body["bars"])) == (200, 3)
    assert await get(f"{url}/v1/bars/unknown") == (200, {"symbol": "unknown", "bars": []})
    assert (await get(f"{url}/v1/bars/BTC%2FUSD?form=0"))[0] == 400
    assert (await get(f"{url}/v1/bars/%ff"))[0] == 400

    session = {"sessionId": "s/1", "lastEventId": "e1", "recordedAt": text_of(minute)}
    assert await get(f"{url}/v1/sessions/s%2F1") == (200, session)
    assert (await get(f"{url}/v1/sessions/unknown"))[0] == 404

    metric = f"{url}/v1/metrics/eu%2Fcheckout/http/5xx"
    values = [{"time": text_of(minute - timedelta(seconds=n)), "value": n} for n in (90, 30)]
    assert await get(metric) == (200, {"service": "eu/checkout", "metric": "http/5xx", "values": values})
    code, body = await get(f"{metric}?bucket=1m")
    starts = [text_of(minute - timedelta(minutes=n)) for n in (2, 1)]
    assert (code, [(bucket["time"], bucket["avg"]) for bucket in body["buckets"]]) == (
        200,
        [(starts[0], 90), (starts[1], 30)],
    )
    assert (await get(f"{metric}?bucket=1s"))[0] == 400


def text_of(time: datetime) -> str:
    return time.isoformat().replace("+00:00", "Z")


async def test_missing_table_and_missing_postgres_are_503_with_a_fix(
    redis_url: str, servers_folder: Path, start: Start
) -> None:
    postgres = PostgresServer(servers_folder / f"records-{uuid4().hex[:8]}", options=("fsync=off",))
    postgres.start()
    try:
        async with World(redis_url, postgres.url) as world:
            url = await url_of(start(world.environment, "run"))
            code, body = await get(f"{url}/v1/bars/GOOG")
            assert (code, body["remedy"]) == (503, f"The log of Postgres has the statement. {ASK_CHECK}")
            assert "bars_1m" in body["error"]
            assert (await get(f"{url}/v1/sessions/s"))[0] == 503
            assert await start(world.environment, "migrate").wait() == 0
            assert (await get(f"{url}/v1/sessions/s"))[0] == 404
            postgres.kill()
            for path in ("bars/GOOG?latest=1", "sessions/s", "metrics/a/b", "metrics/a/b?bucket=1m"):
                async with asyncio.timeout(8):
                    code, body = await get(f"{url}/v1/{path}")
                assert code == 503
                assert "DATABASE_URL" in body["remedy"]
    finally:
        postgres.kill()
