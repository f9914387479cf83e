"""`viewer-worker dev`: the main job on embedded servers, with traffic, a kill -9, and a verdict."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import redis.asyncio as aioredis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from rich.console import Console
from sqlalchemy import any_, bindparam, select
from sqlalchemy.dialects.postgresql import ARRAY, TEXT

from worker.db import schema
from worker.db.address import parse_database_url
from worker.db.session import Database
from worker.db.tables import view_counts
from worker.dev.servers import PostgresServer, Server, ValkeyServer, die_with_parent, free_port
from worker.dev.viewers import Viewers
from worker.engine.waiting import wait_first
from worker.errors import ViewerWorkerError
from worker.settings import Settings

PREFIX = "vod:views:"
IDS = [f"demo_{number:04}" for number in range(1, 1001)]
INTERVAL_MS = 1000
ENDLESS_KILL_AFTER_S = 10.0
DRAIN_TIMEOUT_S = 20.0


@dataclass(frozen=True, slots=True)
class Sample:
    """One look at all three sides. `lost` and `double` compare with what was surely sent before, at most sent after."""

    sent: int
    stored: int
    pending: int
    lost: int
    double: int


class Demo:
    """`rate` views a second for `duration` seconds (None: until Ctrl-C); data and logs in `folder`."""

    def __init__(self, folder: Path, rate: int, duration: float | None) -> None:
        self._folder = folder.resolve()
        self._rate = rate
        self._duration = duration
        self._console = Console(highlight=False, soft_wrap=True)
        self._stop = asyncio.Event()
        self._started = time.monotonic()

    async def run(self) -> bool:
        """True when every id in Postgres has exactly the views that were sent. Raises ViewerWorkerError."""
        self._folder.mkdir(parents=True, exist_ok=True)
        async with AsyncExitStack() as stack:
            self._lock_folder(stack)
            self._handle_signals()
            self._say("Starting embedded Redis (Valkey) and Postgres …")
            valkey = self._start(stack, ValkeyServer(self._folder / "redis"))
            postgres = self._start(stack, PostgresServer(self._folder / "postgres"))
            database = Database(parse_database_url(postgres.url))
            stack.push_async_callback(database.close)
            await schema.upgrade(database)
            client = aioredis.from_url(valkey.url, retry=Retry(NoBackoff(), 0))
            stack.push_async_callback(client.aclose)
            before = await _totals(database) + await _pending(client)
            worker = WorkerProcess(self._folder, valkey.url, postgres.url)
            stack.callback(worker.kill)
            worker.start()
            self._say_where(valkey, postgres, worker)
            viewers = Viewers(client, PREFIX, IDS, self._rate, random.Random())
            traffic = asyncio.create_task(viewers.run(self._stop), name="viewers")
            stack.callback(traffic.cancel)
            await self._watch(viewers, database, client, worker, before.total())
            await traffic
            self._say("Traffic stopped; the worker takes the rest, and is stopped (SIGTERM) …")
            await self._drained(client)
            code = worker.stop()
            return self._verdict(viewers, before, await _totals(database), await _pending(client), worker.kills, code)

    async def _watch(
        self, viewers: Viewers, database: Database, client: aioredis.Redis, worker: WorkerProcess, before: int
    ) -> None:
        """Print the live line until the end, and kill the worker once on the way."""
        start = time.monotonic()
        kill_at = start + (self._duration / 3 if self._duration else ENDLESS_KILL_AFTER_S)
        end = start + self._duration if self._duration else float("inf")
        flushed = False
        while time.monotonic() < end and not self._stop.is_set():
            await wait_first(min(0.5, max(0.0, end - time.monotonic())), self._stop)
            sample = await _sample(viewers, database, client, before)
            if sample.stored and not flushed:
                flushed = True
                self._say(f"First views in Postgres {time.monotonic() - self._started:.1f} s after the start.")
            self._live(sample)
            if not worker.kills and time.monotonic() >= kill_at:
                self._say(f"kill -9 {worker.pid}  ← the worker dies in mid-traffic, and is started again", style="bold")
                worker.kill()
                worker.start()
            elif worker.exit_code is not None:
                raise ViewerWorkerError(f"the worker ended by itself with exit code {worker.exit_code}: {worker.log}")
        self._stop.set()

    async def _drained(self, client: aioredis.Redis) -> None:
        """Wait until nothing is pending; a worker that was just started may have to wait for the lease of the dead."""
        deadline = time.monotonic() + DRAIN_TIMEOUT_S
        while await _pending(client) and time.monotonic() < deadline:
            await asyncio.sleep(0.1)

    def _verdict(
        self,
        viewers: Viewers,
        before: Counter[str],
        stored: Counter[str],
        pending: Counter[str],
        kills: int,
        code: int,
    ) -> bool:
        wrong = {}
        lost = double = 0
        for vod_id in IDS:
            least = before[vod_id] + viewers.acknowledged[vod_id]
            if not least <= stored[vod_id] <= least + viewers.indeterminate[vod_id]:
                wrong[vod_id] = (least, stored[vod_id])
                lost += max(0, least - stored[vod_id] - pending[vod_id])
                double += max(0, stored[vod_id] - least - viewers.indeterminate[vod_id])
        self._console.print()
        rows = (
            ("sent", viewers.acknowledged.total()),
            ("in Postgres", stored.total() - before.total()),
            ("pending", pending.total()),
            ("lost", lost),
            ("double", double),
        )
        for name, value in rows:
            self._console.print(f"  {name:<12}{value:>12,}")
        if viewers.indeterminate:
            self._console.print(f"  {'unconfirmed':<12}{viewers.indeterminate.total():>12,}  (may have counted or not)")
        for vod_id, (expected, found) in list(wrong.items())[:10]:
            self._console.print(f"  [red]{vod_id}: expected {expected:,}, found {found:,}[/]")
        self._console.print()
        told = f"{len(IDS):,} ids compared, worker killed {kills} time(s)"
        if wrong or pending or code:
            self._console.print(
                f"[bold red]DIFFERENT[/]: {len(wrong)} ids differ; {told}, it ended with exit code {code}."
            )
            return False
        self._console.print(f"[bold green]EXACT[/]: each view counted once; {told}.")
        return True

    def _live(self, sample: Sample) -> None:
        line = (
            f"sent {sample.sent:>9,}   in Postgres {sample.stored:>9,}   pending {sample.pending:>7,}"
            f"   lost {sample.lost}   double {sample.double}"
        )
        if self._console.is_terminal:
            self._console.print(f"\r{line}\x1b[K", end="")
        else:
            self._console.print(line)

    def _say(self, text: str, style: str | None = None) -> None:
        self._console.print(("\r\x1b[K" if self._console.is_terminal else "") + text, style=style)

    def _say_where(self, valkey: Server, postgres: Server, worker: WorkerProcess) -> None:
        self._say(f"  Redis     {valkey.url}")
        self._say(f"  Postgres  {postgres.url}")
        self._say(f"  worker    {worker.url}/health   /metrics   log: {_relative(worker.log)}")
        self._say(f"  settings  {_relative(worker.env_file)}")

    def _start(self, stack: AsyncExitStack, server: Server) -> Server:
        server.start()
        stack.callback(server.stop)
        return server

    def _lock_folder(self, stack: AsyncExitStack) -> None:
        lock = stack.enter_context((self._folder / "lock").open("w"))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ViewerWorkerError(f"another `viewer-worker dev` is at work in {self._folder}") from None

    def _handle_signals(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, self._stop.set)


class WorkerProcess:
    """The worker as its own process, as in production: it is only told by its environment and by signals."""

    def __init__(self, folder: Path, redis_url: str, database_url: str) -> None:
        self.log = folder / "worker.log"
        self.env_file = folder / "worker.env"
        self.kills = 0
        self._port = 3003 if _is_free(3003) else free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self.env_file.write_text(
            f"REDIS_URL={redis_url}\nDATABASE_URL={database_url}\nBATCH_INTERVAL_MS={INTERVAL_MS}\n"
            f"HEALTH_CHECK_HOST=127.0.0.1\nHEALTH_CHECK_PORT={self._port}\n"
        )
        self.log.unlink(missing_ok=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def pid(self) -> int:
        return self._running().pid

    @property
    def exit_code(self) -> int | None:
        return self._running().poll()

    def start(self) -> None:
        # Settings of the surrounding shell would win over the file.
        own = {name.upper() for name in Settings.model_fields}
        environment = {name: value for name, value in os.environ.items() if name.removesuffix("_FILE") not in own}
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "worker", "run", "--env-file", str(self.env_file)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
                preexec_fn=die_with_parent(signal.SIGTERM),
            )

    def kill(self) -> None:
        """kill -9, if it still runs."""
        process = self._running()
        if process.poll() is None:
            self.kills += 1
            process.kill()
            process.wait()

    def stop(self) -> int:
        """SIGTERM, as a platform does it; returns the exit code."""
        process = self._running()
        process.terminate()
        return process.wait()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise RuntimeError("not started")
        return self._process


def _is_free(port: int) -> bool:
    with socket.socket() as probe, contextlib.suppress(OSError):
        probe.bind(("127.0.0.1", port))
        return True
    return False


def _relative(path: Path) -> str:
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


async def _totals(database: Database) -> Counter[str]:
    ids = bindparam("ids", IDS, type_=ARRAY(TEXT))
    query = select(view_counts.c.vod_id, view_counts.c.views).where(view_counts.c.vod_id == any_(ids))
    async with database.transaction() as tx:
        return Counter({row.vod_id: row.views for row in await tx.execute(query)})


async def _pending(client: aioredis.Redis) -> Counter[str]:
    values = await client.mget([PREFIX + vod_id for vod_id in IDS])
    return +Counter({vod_id: int(value or 0) for vod_id, value in zip(IDS, values, strict=True)})


async def _sample(viewers: Viewers, database: Database, client: aioredis.Redis, before: int) -> Sample:
    """Redis first, then Postgres: in this order their sum never misses a view that is just being moved."""
    surely = viewers.acknowledged.total()
    pending = (await _pending(client)).total()
    stored = (await _totals(database)).total() - before
    sent = viewers.sent
    return Sample(sent, stored, pending, max(0, surely - pending - stored), max(0, stored - sent))
