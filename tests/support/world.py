"""One Redis prefix, one database, any number of workers, and checks of what they wrote."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import TracebackType
from typing import Any
from uuid import uuid4

import asyncpg
import redis.asyncio as aioredis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from sqlalchemy import text

from tests.support.forked import ForkedProcess
from worker.app.counters import ViewCounters, build_counters
from worker.contract.keys import Keys
from worker.counters.flush.marker import Marker
from worker.db.session import Database
from worker.dev.servers import Server
from worker.observability.metrics import Metrics
from worker.observability.status import SERVERS, Status
from worker.redis.client import RedisClient
from worker.runtime.clock import SystemClock
from worker.settings.environment import load_settings, without_settings
from worker.settings.model import Settings

DEFAULT_PREFIX = "vod:views:"
# Valkey's options. By default a primary waits five seconds for more replicas before it synchronises the first.
SYNCHRONISE_AT_ONCE = ("--repl-diskless-sync-delay", "0")


def database_url_for(postgres_url: str, name: str) -> str:
    """The URL of another database on the same server."""
    scheme, rest = postgres_url.split("://", 1)
    location, _, query = rest.partition("?")
    host = location.split("/", 1)[0]
    return f"{scheme}://{host}/{name}" + (f"?{query}" if query else "")


class InProcessWorker:
    """The real parts of one worker, driven step by step by a test."""

    def __init__(self, settings: Settings, database: Database | None = None) -> None:
        self.database = database or Database(settings.database)
        self.redis = RedisClient(settings.redis)
        self.metrics = Metrics()
        self.status = Status(SystemClock().monotonic, (*SERVERS, "view_counts", "messages"))
        self.counters: ViewCounters = build_counters(settings, self.database, self.redis, self.status, self.metrics)

    async def cycle(self) -> Any:
        """Take the lease, as if it had expired, and run one cycle with a sweep due."""
        async with self.database.transaction() as tx:
            await tx.execute(text("UPDATE view_count_sources SET lease_until = NULL, lease_holder = NULL"))
        await self.counters.lease.take()
        return await self.sweep_and_flush()

    async def sweep_and_flush(self) -> Any:
        """Run one cycle with a sweep due. The worker already holds the lease."""
        self.counters.loop.sweep_soon()
        return await self.counters.loop.cycle()

    async def cycle_until_done(self) -> Any:
        """Like the loop: try again while another worker is flushing."""
        from worker.counters.flush.flusher import Busy

        while isinstance(outcome := await self.cycle(), Busy):
            await asyncio.sleep(0.01)
        return outcome

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[None]:
        """Listen as a running worker with the lease does: sum up messages until the block ends."""
        for check in SERVERS:
            self.status.ok(check)
        await self.counters.lease.take()
        stop = asyncio.Event()
        task = asyncio.create_task(self.counters.listener.run(stop))
        try:
            await self.wait_until(lambda: self.status.checks["messages"].facts.get("role") == "listening")
            yield
        finally:
            stop.set()
            await asyncio.wait_for(task, 10)

    async def wait_until(self, condition: Callable[[], Any]) -> None:
        """Wait until `condition` is true, for example because messages have arrived."""
        async with asyncio.timeout(10):
            while not condition():
                await asyncio.sleep(0.01)

    def metric(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(name, labels) or 0.0

    async def close(self) -> None:
        await self.database.close()
        await self.redis.close()


class World:
    def __init__(self, redis_url: str, database_url: str, prefix: str | None = None, **settings: str) -> None:
        self.redis_url = redis_url
        self.database_url = database_url
        self.prefix = prefix or f"test:{uuid4().hex[:8]}:"
        self.keys = Keys(self.prefix.encode())
        self.stream = "chunk_requests" if prefix == DEFAULT_PREFIX else f"chunk_requests {self.prefix}"
        self.environment = {
            "REDIS_URL": redis_url,
            "DATABASE_URL": database_url,
            "VIEW_KEY_PREFIX": self.prefix,
            # With the default prefix, the channels have their default names, too.
            "VIEW_CHANNEL": "view_count_updates" if prefix == DEFAULT_PREFIX else f"updates {self.prefix}",
            "VIEW_TOTALS_CHANNEL": "view_counts" if prefix == DEFAULT_PREFIX else f"totals {self.prefix}",
            "CHUNK_REQUESTS_STREAM": self.stream,
            "BATCH_INTERVAL_MS": "100",
            "HEALTH_CHECK_HOST": "127.0.0.1",
            "HEALTH_CHECK_PORT": "0",
            "GRPC_PORT": "0",
            **settings,
        }
        self.truth: Counter[str] = Counter()
        self._workers: list[InProcessWorker] = []

    async def __aenter__(self) -> World:
        self.connect_redis()
        self.sql = await asyncpg.connect(self.database_url)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        for worker in self._workers:
            await worker.close()
        self.sql.terminate()
        await self.disconnect_redis()

    def connect_redis(self) -> None:
        self.redis = aioredis.from_url(self.redis_url, retry=Retry(NoBackoff(), 0))

    async def disconnect_redis(self) -> None:
        """Delete the test's keys, as the Redis may be shared, and disconnect."""
        await self.redis.connection_pool.disconnect()  # the test may have restarted the server
        async for key in self.redis.scan_iter(match=b"*" + self.keys.pattern, count=1000):
            await self.redis.delete(key)
        await self.redis.delete(self.stream)
        await self.redis.aclose()

    async def restart_redis(self, server: Server) -> None:
        server.start()
        await self.redis.connection_pool.disconnect()

    def worker(self, **settings: str) -> InProcessWorker:
        worker = InProcessWorker(load_settings(environ=self.environment | settings))
        self._workers.append(worker)
        return worker

    async def view(self, vod_id: str, count: int = 1) -> None:
        await self.redis.incrby(self.prefix + vod_id, count)
        self.truth[vod_id] += count

    async def view_many(self, vod_ids: list[str]) -> None:
        pipeline = self.redis.pipeline(transaction=False)
        for vod_id in vod_ids:
            pipeline.incr(self.prefix + vod_id)
        await pipeline.execute()
        self.truth.update(vod_ids)

    async def announce(self, vod_id: str, count: int = 1) -> None:
        """Publish the message of a view only. The caller keeps `truth` up to date."""
        await self.publish(json.dumps({"vodId": vod_id, "count": count}))

    async def publish(self, message: str | bytes) -> None:
        await self.redis.publish(self.environment["VIEW_CHANNEL"], message)

    async def totals(self) -> Counter[str]:
        return Counter({row["vod_id"]: row["views"] for row in await self.sql.fetch("SELECT * FROM view_counts")})

    async def pending(self) -> Counter[str]:
        found: Counter[str] = Counter()
        async for key in self.redis.scan_iter(match=f"{self.prefix}*", count=1000):
            found[key.decode().removeprefix(self.prefix)] = int(await self.redis.get(key) or 0)
        return found

    async def marker(self) -> Marker | None:
        raw = await self.redis.get(self.keys.marker)
        return None if raw is None else Marker.parse(raw)

    async def source(self) -> asyncpg.Record:
        row = await self.sql.fetchrow("SELECT * FROM view_count_sources")
        assert row is not None
        return row

    async def expire_lease(self) -> None:
        """Expire the lease, as after eight seconds without a renewal by its holder."""
        await self.sql.execute("UPDATE view_count_sources SET lease_until = now() - interval '1 second'")

    async def five_minutes_later(self) -> None:
        """From now on a worker with another Redis may take the source over."""
        await self.sql.execute("UPDATE view_count_sources SET agreed_at = agreed_at - interval '5 minutes'")

    async def assert_exact(self, *, lineages_may_change: bool = False) -> None:
        """Check that every view is in Postgres once, ledger, history and headers agree, and nothing is pending."""
        assert await self.totals() == self.truth
        assert await self.pending() == Counter()
        await self.assert_consistent(lineages_may_change=lineages_may_change)

    async def assert_consistent(self, *, lineages_may_change: bool = False) -> None:
        """Check that totals, ledger, history and headers agree. They do so at any moment."""
        wrong = await self.sql.fetch(
            """
            WITH history AS (
                SELECT vod_id, views FROM view_counts_hourly
                UNION ALL
                SELECT vod_id, views FROM view_count_deltas NATURAL JOIN view_count_sources
                WHERE flush_id > rolled_up_id
            )
            SELECT vod_id, t.views, l.views AS ledger, h.views AS history
            FROM (SELECT vod_id, views - coalesce(imported, 0) AS views FROM view_counts) t
            FULL JOIN (SELECT vod_id, sum(views)::bigint AS views FROM view_count_deltas GROUP BY 1) l USING (vod_id)
            FULL JOIN (SELECT vod_id, sum(views)::bigint AS views FROM history GROUP BY 1) h USING (vod_id)
            WHERE coalesce(t.views, 0) <> coalesce(l.views, 0) OR coalesce(t.views, 0) <> coalesce(h.views, 0)
            """
        )
        assert wrong == []
        gaps = await self.sql.fetch(
            """
            SELECT flush_id FROM (
                SELECT f.flush_id, f.keys, f.views, f.prev_nonce,
                       lag(f.flush_id, 1, 0::bigint) OVER w AS before,
                       lag(f.nonce) OVER w AS nonce_before,
                       cardinality(f.vod_ids) AS rows, (SELECT sum(change) FROM unnest(f.changes) change) AS sum
                FROM view_count_flushes f WINDOW w AS (PARTITION BY f.source ORDER BY f.flush_id)
            ) x
            WHERE flush_id <> before + 1 OR keys <> rows OR views <> sum OR (prev_nonce <> nonce_before AND NOT $1)
            """,
            lineages_may_change,
        )
        assert gaps == []


class CliWorker:
    """`viewer-worker …` as a process. Its log is kept for assertion messages.

    `script` is a Python file that runs instead of it; `program` is the beginning of a command line that starts it.
    """

    def __init__(
        self,
        environment: dict[str, str],
        *arguments: str,
        script: Path | None = None,
        program: list[str] | None = None,
    ) -> None:
        self._log_path = Path(os.environ.get("TMPDIR", "/tmp")) / f"viewer-worker-{uuid4().hex}.log"
        environment = clean_environment() | environment
        self.process: subprocess.Popen[bytes] | ForkedProcess
        with self._log_path.open("wb") as log:
            if program is None:
                self.process = ForkedProcess(arguments, environment, log, script)
            else:
                self.process = subprocess.Popen(
                    [*program, *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    env=environment,
                    start_new_session=True,
                )

    @property
    def log(self) -> str:
        return self._log_path.read_text()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    async def wait(self, timeout: float = 30.0) -> int:
        return await asyncio.to_thread(self.process.wait, timeout)

    async def wait_for_log(self, text: str, timeout: float = 30.0) -> str:
        """Wait for a log line that contains `text`, and return the first one."""
        async with asyncio.timeout(timeout):
            while True:
                for line in self.log.splitlines():
                    if text in line:
                        return line
                if self.process.poll() is not None:
                    raise AssertionError(f"ended with {self.process.returncode} before {text!r}: {self.log}")
                await asyncio.sleep(0.02)

    def close(self) -> None:
        if self.process.poll() is None:
            self.kill()
        if self.process.stdout is not None:
            self.process.stdout.close()
        self._log_path.unlink(missing_ok=True)


def clean_environment() -> dict[str, str]:
    """The environment of this process without any setting of the worker."""
    return without_settings(os.environ)
