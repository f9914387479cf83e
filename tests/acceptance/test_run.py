"""The worker as users run it: a process controlled by its environment and by signals."""

from __future__ import annotations

import asyncio
import json
import random
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import aiohttp
import pytest

from tests.support.guarded import on_guarded_servers, on_open_and_guarded_servers
from tests.support.http import get
from tests.support.world import CliWorker, World
from worker.dev.servers import PostgresServer, ValkeyServer, free_port

Start = Callable[..., CliWorker]
CRASH = Path(__file__).with_name("crash.py")


async def wait_until(condition: Callable[[], Any], timeout: float = 20.0) -> None:
    async with asyncio.timeout(timeout):
        while not await condition():
            await asyncio.sleep(0.05)


async def all_in_postgres(world: World) -> bool:
    return await world.totals() == world.truth and not await world.pending()


async def url_of(worker: CliWorker) -> str:
    line: dict[str, Any] = json.loads(await worker.wait_for_log('"started"'))
    return str(line["url"])


async def lease_held(url: str) -> float:
    async with aiohttp.ClientSession() as session, session.get(f"{url}/metrics") as response:
        found = re.search(r'^viewer_worker_lease_held{lease="view_counts"} (.+)$', await response.text(), re.MULTILINE)
    assert found is not None
    return float(found[1])


@on_open_and_guarded_servers
async def test_incr_is_in_postgres_within_one_interval(world: World, start: Start) -> None:
    worker = start(world.environment | {"BATCH_INTERVAL_MS": "500"}, "run")
    await worker.wait_for_log("marker created")
    started = json.loads(await worker.wait_for_log('"started"'))
    assert urlsplit(started["redis"]).port == urlsplit(world.environment["REDIS_URL"]).port
    assert urlsplit(started["postgres"]).path == urlsplit(world.environment["DATABASE_URL"]).path
    await world.view("vod_123", 1)
    await wait_until(lambda: all_in_postgres(world))
    worker.terminate()
    assert await worker.wait() == 0


async def test_service_links_and_parameters_of_other_drivers_are_logged_and_do_not_stop_the_worker(
    world: World, start: Start
) -> None:
    links = {"DB_PORT": "tcp://10.96.12.3:5432", "REDIS_PORT": "tcp://10.96.12.4:6379", "GRPC_PORT": "tcp://10.0.0.1:1"}
    url = f"{world.environment['DATABASE_URL']}?connection_limit=1&channel_binding=require&keepalives=1"
    worker = start(world.environment | links | {"DATABASE_URL": url, "DB_SSL_MODE": "of another program"}, "run")
    await worker.wait_for_log("marker created")
    noted = {line["event"]: line["names"] for line in map(json.loads, worker.log.splitlines()) if "names" in line}
    assert noted == {
        "not settings but the addresses of Kubernetes services": list(links),
        "ignored parameters of DATABASE_URL": ["connection_limit", "channel_binding", "keepalives"],
    }
    worker.terminate()
    assert await worker.wait() == 0


@on_open_and_guarded_servers
@pytest.mark.parametrize("point", ["before COMMIT", "between COMMIT and settle", "after settle"])
async def test_worker_killed_during_a_flush_counts_each_view_once(world: World, start: Start, point: str) -> None:
    await world.view_many([f"vod_{number % 30}" for number in range(300)])
    for _ in range(3):
        crashed = start(world.environment | {"BATCH_SIZE": "7"}, point, "run", script=CRASH)
        assert await crashed.wait() == -signal.SIGKILL, crashed.log
        await world.expire_lease()
        await world.view_many(["vod_1", "vod_2", "vod_99"])
    worker = start(world.environment, "run", "--once")
    assert await worker.wait() == 0
    await world.assert_exact()


@on_guarded_servers
async def test_kill_9_five_times_under_load_is_exact(world: World, start: Start) -> None:
    rng = random.Random(5)
    loaded = asyncio.Event()

    async def load() -> None:
        while not loaded.is_set():
            await world.view_many([f"vod_{int(rng.paretovariate(0.7)) % 500}" for _ in range(50)])
            await asyncio.sleep(0.005)

    traffic = asyncio.create_task(load())
    environment = world.environment | {"BATCH_INTERVAL_MS": "20", "BATCH_SIZE": "10"}
    for _ in range(5):
        worker = start(environment, "run")
        await worker.wait_for_log("batch flushed")
        await asyncio.sleep(rng.uniform(0.05, 0.5))
        worker.kill()
        await world.expire_lease()
        assert await world.totals() <= world.truth
    loaded.set()
    await traffic
    final = start(environment, "run")
    await wait_until(lambda: all_in_postgres(world))
    final.terminate()
    assert await final.wait() == 0
    await world.assert_exact()
    assert world.truth.total() > 1000


@on_open_and_guarded_servers
async def test_two_processes_at_once_are_exact(world: World, start: Start) -> None:
    workers = [start(world.environment | {"BATCH_SIZE": "5"}, "run") for _ in range(2)]
    for _ in range(50):
        await world.view_many([f"vod_{number}" for number in range(40)])
        await asyncio.sleep(0.02)
    await wait_until(lambda: all_in_postgres(world))
    for worker in workers:
        worker.terminate()
    assert [await worker.wait() for worker in workers] == [0, 0]
    await world.assert_exact()


@on_open_and_guarded_servers
async def test_sigterm_flushes_what_is_pending(world: World, start: Start) -> None:
    worker = start(world.environment | {"BATCH_INTERVAL_MS": "3600000"}, "run")
    await worker.wait_for_log('"lease taken"')
    await world.view_many(["a", "b", "b"])
    worker.terminate()
    assert await worker.wait() == 0
    await world.assert_exact()


@on_guarded_servers
async def test_sigterm_during_a_flush_with_a_slow_database_ends_within_the_deadline(world: World, start: Start) -> None:
    worker = start(world.environment | {"SHUTDOWN_TIMEOUT": "1s"}, "run")
    await worker.wait_for_log('"view_counts ok"')
    async with world.sql.transaction():
        await world.sql.execute("LOCK TABLE view_counts")  # the flush hangs in its upsert
        await world.view_many(["a", "b", "b"])
        await wait_until(lambda: _waits_for_lock(world))
        began = time.monotonic()
        worker.terminate()
        assert await worker.wait() == 1
        assert time.monotonic() - began < 8
        assert "drain deadline passed" in worker.log
    assert await world.totals() == Counter()
    assert await start(world.environment, "run", "--once").wait() == 0
    await world.assert_exact()


async def _waits_for_lock(world: World) -> bool:
    return bool(
        await world.sql.fetchval(
            "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'view_counts'::regclass"
        )
    )


@on_open_and_guarded_servers
async def test_second_signal_ends_immediately(world: World, start: Start) -> None:
    worker = start(world.environment | {"SHUTDOWN_TIMEOUT": "1m"}, "run")
    await worker.wait_for_log('"view_counts ok"')
    async with world.sql.transaction():
        await world.sql.execute("LOCK TABLE view_counts")
        await world.view("a")
        await wait_until(lambda: _waits_for_lock(world))
        worker.terminate()
        await worker.wait_for_log('"stopping"')
        worker.terminate()
        assert await worker.wait() == 128 + signal.SIGTERM
    assert await start(world.environment, "run", "--once").wait() == 0
    await world.assert_exact()


async def test_worker_starts_without_servers_and_flushes_when_they_are_up(
    servers_folder: Path, start: Start, tmp_path: Path
) -> None:
    valkey = ValkeyServer(servers_folder / f"late-redis-{uuid4().hex[:8]}")
    postgres = PostgresServer(servers_folder / f"late-postgres-{uuid4().hex[:8]}", options=("fsync=off",))
    environment = {
        "REDIS_URL": valkey.url,
        "DATABASE_URL": postgres.url,
        "BATCH_INTERVAL_MS": "100",
        "HEALTH_CHECK_HOST": "127.0.0.1",
        "HEALTH_CHECK_PORT": "0",
        "HEALTH_GRACE": "1s",
        "MIGRATE_ON_START": "true",
    }
    worker = start(environment, "run")
    url = await url_of(worker)
    code, body = await get(f"{url}/health")
    assert (code, body["status"]) == (200, "degraded")
    await asyncio.sleep(1.5)
    code, body = await get(f"{url}/health")
    assert (code, body["status"]) == (503, "unhealthy")
    assert "REDIS_URL" in body["checks"]["redis"]["remedy"]
    assert "DATABASE_URL" in body["checks"]["postgres"]["remedy"]
    assert (await get(f"{url}/livez"))[0] == 200
    assert (await get(f"{url}/readyz"))[0] == 503
    try:
        valkey.start()
        postgres.start()
        async with World(valkey.url, postgres.url, prefix="vod:views:") as world:
            await world.view("vod_1", 3)
            await worker.wait_for_log("batch flushed")
            await wait_until(lambda: all_in_postgres(world))
            assert (await get(f"{url}/readyz"))[0] == 200
            assert (await get(f"{url}/health"))[1]["status"] == "healthy"

            assert await lease_held(url) == 1
            valkey.kill()
            await wait_until(lambda: _is(url, "redis", "failing"))
            assert await lease_held(url) == 0
            valkey.start()
            postgres.kill()
            await wait_until(lambda: _is(url, "postgres", "failing"))
            postgres.start()
            await wait_until(lambda: _is(url, "view_counts", "ok"))
            await wait_until(lambda: _is(url, "postgres", "ok"))
        worker.terminate()
        assert await worker.wait() == 0
    finally:
        valkey.kill()
        postgres.kill()


async def _is(url: str, check: str, state: str) -> bool:
    return bool((await get(f"{url}/health"))[1]["checks"][check]["status"] == state)


async def test_sigterm_without_servers_ends_cleanly(start: Start) -> None:
    nowhere = f"127.0.0.1:{free_port()}"
    worker = start(
        {
            "REDIS_URL": f"redis://{nowhere}",
            "DATABASE_URL": f"postgresql://u:p@{nowhere}/x",
            "HEALTH_CHECK_PORT": "0",
        },
        "run",
    )
    await worker.wait_for_log(' failing"')
    worker.terminate()
    assert await worker.wait(10) == 0
    assert "pending views stay in Redis" in worker.log


async def test_missing_schema_is_reported_and_waited_for(redis_url: str, empty_database_url: str, start: Start) -> None:
    async with World(redis_url, empty_database_url) as world:
        worker = start(world.environment, "run")
        await worker.wait_for_log('"schema failing"')
        url = await url_of(worker)
        code, body = await get(f"{url}/readyz")
        assert code == 503
        assert body["checks"]["schema"]["remedy"] == "Run: viewer-worker migrate"
        await world.view("vod_1", 2)
        assert await start(world.environment, "migrate").wait() == 0
        await wait_until(lambda: all_in_postgres(world))
        assert (await get(f"{url}/readyz"))[0] == 200


@on_guarded_servers
async def test_hold_is_degraded_not_ready_and_explained(world: World, start: Start) -> None:
    assert await start(world.environment, "run", "--once").wait() == 0
    await world.redis.set(world.keys.marker, "garbage")
    worker = start(world.environment, "run")
    await worker.wait_for_log('"view_counts on hold"')
    url = await url_of(worker)
    code, body = await get(f"{url}/health")
    assert (code, body["status"]) == (200, "degraded")
    assert body["checks"]["view_counts"]["cause"] == "the marker in Redis cannot be read"
    assert (await get(f"{url}/readyz"))[0] == 503
    worker.terminate()
    assert await worker.wait() == 0
    once = start(world.environment, "run", "--once")
    assert await once.wait() == 1
    assert "on hold: the marker in Redis cannot be read" in once.log


@on_open_and_guarded_servers
async def test_occupied_port_prevents_the_start(world: World, start: Start) -> None:
    first = start(world.environment, "run")
    port = (await url_of(first)).rpartition(":")[2]
    second = start(world.environment | {"HEALTH_CHECK_PORT": port}, "run")
    assert await second.wait() == 1
    assert f"cannot listen on 127.0.0.1:{port}" in second.log
    assert "Traceback" not in second.log


@on_guarded_servers
async def test_standby_takes_over_after_a_crash_and_at_once_after_a_clean_stop(world: World, start: Start) -> None:
    first = start(world.environment, "run")
    await first.wait_for_log('"lease taken"')
    second = start(world.environment, "run")
    await second.wait_for_log("standing by")
    first.kill()
    await world.view("a", 3)
    await second.wait_for_log('"lease taken"', timeout=12)
    await wait_until(lambda: all_in_postgres(world))
    third = start(world.environment, "run")
    await third.wait_for_log("standing by")
    second.terminate()
    assert await second.wait() == 0
    await world.view("a", 4)
    await third.wait_for_log('"lease taken"', timeout=4)
    await wait_until(lambda: all_in_postgres(world))
    await world.assert_exact()


async def test_sigterm_during_the_start_ends_cleanly(world: World, start: Start) -> None:
    worker = start(world.environment, "run", program=[sys.executable, "-m", "worker"])
    while not _catches(worker.process.pid, signal.SIGTERM):  # it has not loaded much more by then
        await asyncio.sleep(0.005)
    worker.terminate()
    assert await worker.wait() == 0


def _catches(pid: int, number: signal.Signals) -> bool:
    mask = re.search(r"^SigCgt:\s+(\w+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert mask is not None
    return bool(int(mask[1], 16) >> (number - 1) & 1)
