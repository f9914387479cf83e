"""`viewer-worker dev`: the worker on embedded servers, with traffic, a kill -9, and a pass/fail report."""

from __future__ import annotations

import asyncio
import signal
import time
from collections import Counter
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import redis.asyncio as aioredis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from rich.console import Console
from rich.control import Control
from rich.segment import ControlType
from sqlalchemy import any_, bindparam, select
from sqlalchemy.dialects.postgresql import ARRAY, TEXT

from worker.contract.keys import DEFAULT_PREFIX
from worker.contract.message import DEFAULT_CHANNEL
from worker.db import schema
from worker.db.address import parse_database_url
from worker.db.session import Database
from worker.db.tables import view_counts
from worker.dev.process import WorkerProcess
from worker.dev.records import Records, count_events, make_records
from worker.dev.report import Line, Views, event_line, print_report
from worker.dev.servers import PostgresServer, Server, ValkeyServer
from worker.dev.servers_only import locked
from worker.dev.viewers import Audience, Reported, Viewers
from worker.errors import ViewerWorkerError
from worker.runtime.waiting import wait_first

ENDLESS_KILL_AFTER_S = 10.0
# Records a second, for each view a second.
RECORDS_PER_VIEW = {"chunk_requests": 0.25, "bars_1m": 0.1, "session_events": 0.1, "metrics": 0.05}
DRAIN_TIMEOUT_S = 20.0


@dataclass(frozen=True, slots=True)
class Sample:
    """Sums over the INCRed ids at one moment: views sent, stored in Postgres and pending in Redis.

    `lost`: views confirmed before the look that are neither stored nor pending. `double`: more stored than sent.
    """

    sent: int
    stored: int
    pending: int
    lost: int
    double: int


class Demo:
    """Sends `rate` views per second for `duration` seconds (None: until Ctrl-C). Data and logs are in `folder`."""

    def __init__(self, folder: Path, audience: Audience, rate: int, duration: float | None) -> None:
        self._folder = folder.resolve()
        self._audience = audience
        self._rate = rate
        self._duration = duration
        self._console = Console(highlight=False, soft_wrap=True)
        self._stop = asyncio.Event()
        self._started = time.monotonic()

    async def run(self) -> bool:
        """Run the demo. Returns True when it passed.

        That is: in Postgres, each INCRed id has exactly the views sent and no other id has more than were sent; nothing
        is pending; each record has the row that it must have; and the worker ended with exit code 0.

        Raises ViewerWorkerError.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        async with AsyncExitStack() as stack:
            stack.enter_context(locked(self._folder))
            self._handle_signals()
            self._print("Starting embedded Redis (Valkey) and Postgres …")
            valkey = self._start(stack, ValkeyServer(self._folder / "redis"))
            postgres = self._start(stack, PostgresServer(self._folder / "postgres"))
            database = Database(parse_database_url(postgres.url))
            stack.push_async_callback(database.close)
            await schema.upgrade(database)
            client = aioredis.from_url(valkey.url, retry=Retry(NoBackoff(), 0))
            stack.push_async_callback(client.aclose)
            viewers = Viewers(client, DEFAULT_PREFIX, DEFAULT_CHANNEL, self._audience, self._rate)
            before = await self._totals(database) + await self._pending(client)
            worker = WorkerProcess(self._folder, valkey.url, postgres.url)
            stack.callback(worker.kill)
            began = datetime.now(UTC)
            worker.start()
            self._print_addresses(valkey, postgres, worker)
            rates = {pipeline: self._rate * share for pipeline, share in RECORDS_PER_VIEW.items()}
            records = make_records(client, worker.grpc_target, rates)
            traffic = asyncio.gather(viewers.run(self._stop), *(each.run(self._stop) for each in records))
            stack.callback(traffic.cancel)
            await self._watch(viewers, database, client, worker, before)
            await traffic
            self._print("Traffic stopped. Waiting until the worker has flushed the rest, then stopping it (SIGTERM) …")
            await self._drained(client, database, records)
            code = worker.stop()
            lines = await self._report(viewers, before, database, client, records, await count_events(database, began))
            unconfirmed = viewers.indeterminate.total()
            return print_report(self._console, lines, unconfirmed, worker.kills, code)

    async def _watch(
        self, viewers: Viewers, database: Database, client: aioredis.Redis, worker: WorkerProcess, before: Counter[str]
    ) -> None:
        """Print the live line until the end, and kill the worker once in the meantime."""
        start = time.monotonic()
        kill_at = start + (self._duration / 3 if self._duration else ENDLESS_KILL_AFTER_S)
        end = start + self._duration if self._duration else float("inf")
        flushed = False
        while time.monotonic() < end and not self._stop.is_set():
            await wait_first(min(0.5, max(0.0, end - time.monotonic())), self._stop)
            sample = await self._sample(viewers, database, client, before)
            if sample.stored and not flushed:
                flushed = True
                self._print(f"First views in Postgres {time.monotonic() - self._started:.1f} s after the start.")
            self._live(sample)
            if not worker.kills and time.monotonic() >= kill_at:
                self._print(f"kill -9 {worker.pid}  ← the worker is killed under load and restarted", style="bold")
                worker.kill()
                worker.start()
            elif worker.exit_code is not None:
                raise ViewerWorkerError(f"the worker exited with code {worker.exit_code}; its log: {worker.log}")
        self._stop.set()

    async def _drained(self, client: aioredis.Redis, database: Database, records: list[Records]) -> None:
        """Wait until nothing is pending. A restarted worker may have to wait until the killed one's lease expires."""
        deadline = time.monotonic() + DRAIN_TIMEOUT_S
        while time.monotonic() < deadline:
            found = [await each.find(database) for each in records]
            if not await self._pending(client) and not any(each.wrong for each in found):
                return
            await asyncio.sleep(0.1)

    async def _report(
        self,
        viewers: Viewers,
        before: Counter[str],
        database: Database,
        client: aioredis.Redis,
        records: list[Records],
        events: Counter[str],
    ) -> list[Line]:
        stored = await self._totals(database)
        stored.subtract(before)
        views = Views(
            viewers.reported_by, viewers.acknowledged, viewers.indeterminate, stored, await self._pending(client)
        )
        published = {vod_id: viewers.sent[vod_id] for vod_id in viewers.ids(Reported.BOTH, Reported.PUBLISH)}
        return [
            *views.lines(),
            event_line(Counter(published), events),
            *[each.line(await each.find(database)) for each in records],
        ]

    async def _totals(self, database: Database) -> Counter[str]:
        ids = bindparam("ids", list(self._audience.ids), type_=ARRAY(TEXT))
        query = select(view_counts.c.vod_id, view_counts.c.views).where(view_counts.c.vod_id == any_(ids))
        async with database.transaction() as tx:
            return Counter({row.vod_id: row.views for row in await tx.execute(query)})

    async def _pending(self, client: aioredis.Redis) -> Counter[str]:
        ids = self._audience.ids
        values = await client.mget([DEFAULT_PREFIX + vod_id for vod_id in ids])
        return +Counter({vod_id: int(value or 0) for vod_id, value in zip(ids, values, strict=True)})

    async def _sample(
        self, viewers: Viewers, database: Database, client: aioredis.Redis, before: Counter[str]
    ) -> Sample:
        """Read Redis first, then Postgres: in this order the sum never misses views that a flush is moving."""
        ids = viewers.ids(Reported.BOTH, Reported.INCR)
        confirmed = _of(viewers.acknowledged, ids)
        pending = _of(await self._pending(client), ids)
        stored = _of(await self._totals(database), ids) - _of(before, ids)
        sent = _of(viewers.sent, ids)
        return Sample(sent, stored, pending, max(0, confirmed - pending - stored), max(0, stored - sent))

    def _live(self, sample: Sample) -> None:
        line = (
            f"sent {sample.sent:>9,}   in Postgres {sample.stored:>9,}   pending {sample.pending:>7,}"
            f"   lost {sample.lost}   double {sample.double}"
        )
        if self._console.is_terminal:
            self._clear_line()
            self._console.print(line, end="")
        else:
            self._console.print(line)

    def _print(self, text: str, style: str | None = None) -> None:
        if self._console.is_terminal:
            self._clear_line()
        self._console.print(text, style=style)

    def _clear_line(self) -> None:
        # Not with print(): it removes carriage returns.
        self._console.control(Control((ControlType.CARRIAGE_RETURN,), (ControlType.ERASE_IN_LINE, 2)))

    def _print_addresses(self, valkey: Server, postgres: Server, worker: WorkerProcess) -> None:
        self._print(f"  Redis     {valkey.url}")
        self._print(f"  Postgres  {postgres.url}")
        self._print(f"  worker    {worker.url}/   /health   /metrics   log: {_relative(worker.log)}")
        self._print(f"  gRPC      {worker.grpc_target}")
        self._print(f"  settings  {_relative(worker.env_file)}")

    def _start(self, stack: AsyncExitStack, server: Server) -> Server:
        server.start()
        stack.callback(server.stop)
        return server

    def _handle_signals(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, self._stop.set)


def _relative(path: Path) -> str:
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def _of(views: Counter[str], ids: list[str]) -> int:
    return sum(views[vod_id] for vod_id in ids)
