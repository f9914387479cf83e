"""The flush protocol under crashes, lost replies and restored data.

A state machine over the real code and real servers: three workers stop before and after every command they send, and
continue in any order. Between any two steps, workers are killed or frozen, replies are lost, Redis and Postgres are
restored to older states, and markers and counters are deleted. Workers are also started with the URL of another Redis,
and with the right one again. The invariants are checked after every step.

Three things are simulated. One is Redis's identity (`master_replid`, and whether it started empty): a rewind stands for
a restart from an older copy, so it changes the identity. The other Redis is another key prefix on the same server. And
the messages of the channel reach a listening worker when the machine delivers them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar
from uuid import UUID, uuid4

import asyncpg
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.support.world import InProcessWorker, World, database_url_for
from worker.counters.flush.outcome import Busy, Flushed
from worker.counters.flush.verdict import Hold
from worker.errors import DatabaseUnavailable, RedisUnavailable
from worker.redis.client import History
from worker.settings.environment import load_settings

IDS = ["a", "b", "c"]
WORKERS = 3
GATES = ["before BEGIN", "after read", "before COMMIT", "after COMMIT", "before run", "after run", "the end", "the end"]
TARGET = {"VIEW_TARGET_TABLE": "Vod", "VIEW_TARGET_KEY": "id", "VIEW_TARGET_COLUMN": "viewCount"}
WITH_A_ROW = ["a", "b"]
OWN_TABLES = (
    "view_counts",
    "view_counts_hourly",
    "view_count_flushes",
    "view_count_sources",
    "view_count_lineages",
)
TABLES = (*OWN_TABLES, "Vod")
RIGHT, WRONG = 0, 1
# Mostly the right one.
EITHER = st.sampled_from([RIGHT, RIGHT, RIGHT, WRONG])


@dataclass
class RedisState:
    values: dict[bytes, bytes]
    counted: Counter[str]


class DataSet:
    """One Redis, with the views that were incremented in it."""

    def __init__(self, world: World, *, started_empty: bool) -> None:
        self.world = world
        self.replid, self.started_empty = uuid4().hex, started_empty
        self.counted: Counter[str] = Counter()
        self.states: list[RedisState] = []
        self.workers: set[str] = set()

    def simulate_identity(self, worker: InProcessWorker, before: Callable[[str], Awaitable[None]]) -> None:
        async def probe() -> str:
            await before("probe")
            return self.replid

        async def history() -> History:
            await before("history")
            return History(self.replid, self.started_empty)

        worker.redis.probe = probe  # type: ignore[method-assign]
        worker.redis.history = history  # type: ignore[method-assign]

    async def values(self) -> dict[bytes, bytes]:
        redis, pattern = self.world.redis, b"*" + self.world.keys.pattern
        keys = [key async for key in redis.scan_iter(match=pattern, count=1000)]
        values = await redis.mget(keys) if keys else []
        return {key: value for key, value in zip(keys, values, strict=True) if value is not None}

    async def put(self, values: dict[bytes, bytes]) -> None:
        present = await self.values()
        pipeline = self.world.redis.pipeline(transaction=True)
        if present:
            pipeline.delete(*present)
        if values:
            pipeline.mset(values)
        await pipeline.execute()


class Actor:
    """One worker that stops at every gate: before and after each command to Redis, each BEGIN and each COMMIT."""

    def __init__(self, machine: ProtocolMachine, data_set: DataSet) -> None:
        self._machine = machine
        self.data_set = data_set
        environment = data_set.world.environment | TARGET | {"BATCH_SIZE": "2"}
        self.worker = InProcessWorker(load_settings(environ=environment))
        data_set.workers.add(self.worker.counters.lease._worker_id)
        self._gate_redis()
        self._gate_database()
        self.task: asyncio.Task[Any] | None = None
        self.at = ""
        self.backend: int | None = None
        self.listens = False
        self.undelivered: list[str] = []
        self._arrived = asyncio.Event()
        self._go: asyncio.Future[None] | None = None

    def _gate_redis(self) -> None:
        redis = self.worker.redis
        for name in ("read", "type_of", "types_of", "run"):
            setattr(redis, name, self._gated(name, getattr(redis, name)))
        redis.scan = self._gated_pages(redis.scan)  # type: ignore[method-assign]
        self.data_set.simulate_identity(self.worker, lambda label: self._gate(label, RedisUnavailable))

    def _gated(self, name: str, call: Any) -> Any:
        async def gated(*args: Any) -> Any:
            await self._gate(f"before {name}", RedisUnavailable)
            result = await call(*args)
            await self._gate(f"after {name}", RedisUnavailable)
            return result

        return gated

    def _gated_pages(self, scan: Any) -> Any:
        async def gated(pattern: bytes) -> AsyncIterator[list[bytes]]:
            await self._gate("before scan", RedisUnavailable)
            async for page in scan(pattern):
                await self._gate("after scan", RedisUnavailable)
                yield page

        return gated

    def _gate_database(self) -> None:
        database = self.worker.database
        transaction = database.transaction

        @contextlib.asynccontextmanager
        async def gated() -> AsyncIterator[Any]:
            await self._gate("before BEGIN", DatabaseUnavailable)
            async with transaction() as tx:
                self.backend = (await tx.exec_driver_sql("SELECT pg_backend_pid()")).scalar_one()
                yield tx
                await self._gate("before COMMIT", DatabaseUnavailable)
            self.backend = None
            await self._gate("after COMMIT", DatabaseUnavailable)

        database.transaction = gated  # type: ignore[method-assign]

    async def _gate(self, label: str, error: type[Exception]) -> None:
        self.at = label
        self._go = asyncio.get_running_loop().create_future()
        self._error = error
        self._arrived.set()
        await self._go

    async def _cycle(self) -> Any:
        counters = self.worker.counters
        if not await counters.lease.take():
            return Busy()
        counters.loop.sweep_soon()
        return await counters.loop.cycle()

    def listen(self) -> None:
        """Subscribe again, if this worker believes that it holds the lease."""
        epoch = self.worker.counters.lease.token
        self.undelivered.clear()
        if epoch is not None:
            self.worker.counters.backlog.announced.begin(epoch)
            self.listens = True

    def hear(self) -> None:
        self.worker.counters.backlog.announced.add(Counter(self.undelivered))
        self.undelivered.clear()

    async def step(self, *, fail: bool = False) -> None:
        """Run to the next gate or to the end of the cycle. With `fail`, the current command fails instead."""
        if self.task is None:
            self.task = asyncio.create_task(self._cycle())
        elif self._go is not None and not self._go.done():
            self._arrived.clear()
            if fail:
                self._go.set_exception(self._error(f"injected {self.at}"))
            else:
                self._go.set_result(None)
        await self._until_the_next_gate()

    async def _until_the_next_gate(self) -> None:
        assert self.task is not None
        arrived = asyncio.create_task(self._arrived.wait())
        await asyncio.wait({self.task, arrived}, return_when=asyncio.FIRST_COMPLETED, timeout=30)
        arrived.cancel()
        if self.task.done():
            task, self.task, self.backend = self.task, None, None
            error = task.exception()
            if error is None:
                self._machine.finished(task.result())
            elif not isinstance(error, RedisUnavailable | DatabaseUnavailable):
                raise error

    async def kill(self) -> None:
        """Like kill -9: commands that were sent take effect, and no others follow."""
        if self.backend is not None:
            await self._machine.terminate(self.backend)
        if self.task is not None:
            self.task.cancel()
            with contextlib.suppress(asyncio.CancelledError, RedisUnavailable, DatabaseUnavailable):
                await self.task
        await self.worker.close()


@dataclass
class Allowances:
    """Faults after which a total may be too low. No fault allows it to be too high."""

    rewound: bool = False
    marker_deleted: bool = False
    reset: bool = False
    database_rewound: bool = False
    # Views of the right Redis.
    forgotten: Counter[str] = field(default_factory=Counter)


class ProtocolMachine(RuleBasedStateMachine):
    loop: ClassVar[asyncio.AbstractEventLoop]
    redis_url: ClassVar[str]
    postgres_url: ClassVar[str]
    template: ClassVar[str]
    # In half of the runs no data is lost on either side: these must end exact.
    lossy = False

    def run(self, coroutine: Any) -> Any:
        return self.loop.run_until_complete(coroutine)

    @initialize(lossy=st.booleans(), flushes=st.integers(0, 2))
    def begin(self, lossy: bool, flushes: int) -> None:
        self.lossy = lossy
        # Before it has a marker, the right Redis is not known to be one that was used before.
        self.has_begun = flushes > 0
        self.run(self._begin())
        for _ in range(flushes):
            self.views("a", 3)
            self.views("b", 1)
            self.run_to_the_end(0)

    async def _begin(self) -> None:
        self.name = f"vw_prop_{uuid4().hex[:12]}"
        self.admin = await asyncpg.connect(self.postgres_url)
        await self.admin.execute(f"CREATE DATABASE {self.name} TEMPLATE {self.template}")
        worlds = [World(self.redis_url, database_url_for(self.postgres_url, self.name)) for _ in (RIGHT, WRONG)]
        for world in worlds:
            await world.__aenter__()
        self.world = worlds[RIGHT]
        self.data_sets = [DataSet(worlds[RIGHT], started_empty=False), DataSet(worlds[WRONG], started_empty=True)]
        # Create the row before the workers start: an INSERT would wait for the INSERT of a stopped worker.
        await self.world.sql.execute("INSERT INTO view_count_sources (source) VALUES ('default')")
        await self.world.sql.execute('CREATE TABLE "Vod" (id text PRIMARY KEY, "viewCount" int NOT NULL DEFAULT 0)')
        await self.world.sql.execute('INSERT INTO "Vod" (id) SELECT unnest($1::text[])', WITH_A_ROW)
        # Views, and those that were published. Those that were incremented are in the data sets; a view may be in both.
        self.happened: Counter[str] = Counter()
        self.announced: Counter[str] = Counter()
        self.allowed = Allowances()
        self.database_states: list[dict[str, list[Any]]] = []
        self.actors = [Actor(self, self.data_sets[RIGHT]) for _ in range(WORKERS)]
        self.reader = self.world.worker()
        self.seen_flushes: set[UUID] = set()

    def finished(self, outcome: Any) -> None:
        assert isinstance(outcome, Flushed | Busy | Hold)

    async def terminate(self, backend: int) -> None:
        await self.admin.execute("SELECT pg_terminate_backend($1)", backend)
        while await self.admin.fetchval("SELECT count(*) FROM pg_stat_activity WHERE pid = $1", backend):
            await asyncio.sleep(0.001)

    # What workers do

    @rule(actor=st.integers(0, WORKERS - 1), steps=st.integers(1, 30))
    def step(self, actor: int, steps: int) -> None:
        for _ in range(steps):
            self.run(self.actors[actor].step())

    @rule(actor=st.integers(0, WORKERS - 1), vod_id=st.sampled_from(IDS), gate=st.sampled_from(GATES))
    def flush_up_to(self, actor: int, vod_id: str, gate: str) -> None:
        """Add views, free the lease, and run a worker to the gate, or to the end of its cycle."""
        self._view(self.actors[actor].data_set, vod_id, 2)
        self.run(self._expire())
        for _ in range(60):
            self.run(self.actors[actor].step())
            if self.actors[actor].task is None or self.actors[actor].at == gate:
                break

    @rule(actor=st.integers(0, WORKERS - 1))
    def run_to_the_end(self, actor: int) -> None:
        for _ in range(200):
            self.run(self.actors[actor].step())
            if self.actors[actor].task is None:
                break

    @rule(actor=st.integers(0, WORKERS - 1))
    def fail(self, actor: int) -> None:
        self.run(self.actors[actor].step(fail=True))

    @rule(actor=st.integers(0, WORKERS - 1))
    def kill(self, actor: int) -> None:
        self.run(self.actors[actor].kill())
        self.actors[actor] = Actor(self, self.actors[actor].data_set)

    @precondition(lambda self: self.has_begun)
    @rule(actor=st.integers(0, WORKERS - 1), url=st.sampled_from([RIGHT, WRONG]))
    def restart_with_url(self, actor: int, url: int) -> None:
        self.run(self.actors[actor].kill())
        self.actors[actor] = Actor(self, self.data_sets[url])

    @precondition(lambda self: self.has_begun)
    @rule(
        actor=st.integers(0, WORKERS - 1),
        url=st.sampled_from([RIGHT, WRONG]),
        vod_id=st.sampled_from(IDS),
        gate=st.sampled_from(GATES),
    )
    def take_over(self, actor: int, url: int, vod_id: str, gate: str) -> None:
        """A worker with another URL takes over, after the other Redis was not flushed for five minutes."""
        self.restart_with_url(actor, url)
        self.five_minutes_pass()
        self.flush_up_to(actor, vod_id, gate)

    @rule()
    def five_minutes_pass(self) -> None:
        self.run(self._update("agreed_at = agreed_at - interval '5 minutes'"))

    @rule(actor=st.integers(0, WORKERS - 1))
    def postgres_ends_the_frozen_transaction(self, actor: int) -> None:
        backend = self.actors[actor].backend
        if backend is not None:
            self.run(self.terminate(backend))
            self.actors[actor].backend = None

    @rule()
    def lease_expires(self) -> None:
        self.run(self._expire())

    async def _expire(self) -> None:
        await self._update("lease_until = NULL, lease_holder = NULL")

    async def _update(self, change: str) -> None:
        """Change the source row, unless a worker has locked it."""
        async with self.world.sql.transaction():
            await self.world.sql.execute("SET LOCAL lock_timeout = '50ms'")
            with contextlib.suppress(asyncpg.LockNotAvailableError):
                async with self.world.sql.transaction():
                    await self.world.sql.execute(f"UPDATE view_count_sources SET {change} WHERE source = 'default'")

    # What producers, operators and servers do

    @rule(vod_id=st.sampled_from(IDS), count=st.integers(1, 5), url=EITHER)
    def views(self, vod_id: str, count: int, url: int = RIGHT) -> None:
        self._view(self.data_sets[url], vod_id, count)

    def _view(self, data_set: DataSet, vod_id: str, count: int) -> None:
        self.run(data_set.world.redis.incrby(data_set.world.prefix + vod_id, count))
        self.happened[vod_id] += count
        data_set.counted[vod_id] += count

    @rule(vod_id=st.sampled_from(IDS))
    def view_reported_by_both(self, vod_id: str) -> None:
        self.views(vod_id, 1)
        self._publish(vod_id)

    @rule(vod_id=st.sampled_from(IDS))
    def view_only_published(self, vod_id: str) -> None:
        self.happened[vod_id] += 1
        self._publish(vod_id)

    def _publish(self, vod_id: str) -> None:
        self.announced[vod_id] += 1
        for actor in self.actors:
            if actor.listens:
                actor.undelivered.append(vod_id)

    @rule(actor=st.integers(0, WORKERS - 1))
    def listen(self, actor: int) -> None:
        self.actors[actor].listen()

    @rule(actor=st.integers(0, WORKERS - 1))
    def hear(self, actor: int) -> None:
        self.actors[actor].hear()

    @precondition(lambda self: self.lossy)
    @rule(url=EITHER)
    def snapshot_redis(self, url: int) -> None:
        data_set = self.data_sets[url]
        data_set.states.append(RedisState(self.run(data_set.values()), data_set.counted.copy()))

    @precondition(lambda self: self.lossy)
    @rule(url=EITHER, index=st.integers(0, 100))
    def rewind_redis(self, url: int, index: int) -> None:
        data_set = self.data_sets[url]
        if not data_set.states:
            return
        state = data_set.states[index % len(data_set.states)]
        self.run(data_set.put(state.values))
        data_set.replid, data_set.started_empty = uuid4().hex, False
        self.allowed.rewound = True
        if url == RIGHT:
            self.allowed.forgotten += data_set.counted - state.counted

    @precondition(lambda self: self.lossy and self.has_begun)
    @rule(actor=st.integers(0, WORKERS - 1), vod_id=st.sampled_from(IDS), gate=st.sampled_from(GATES))
    def lagging_replica_is_promoted(self, actor: int, vod_id: str, gate: str) -> None:
        """It lags by a change to the wrong Redis and back."""
        self.views(vod_id, 2)
        self.snapshot_redis(RIGHT)
        self.take_over(actor, WRONG, vod_id, "the end")
        self.stale_epoch_never_writes()  # it sees the last flush only
        self.take_over(actor, RIGHT, vod_id, gate)
        self.rewind_redis(RIGHT, len(self.data_sets[RIGHT].states) - 1)

    @precondition(lambda self: self.lossy)
    @rule(url=EITHER)
    def flushall(self, url: int) -> None:
        self.run(self.data_sets[url].put({}))
        self.allowed.marker_deleted = True

    @precondition(lambda self: self.lossy)
    @rule(url=EITHER)
    def redis_restarts_empty(self, url: int) -> None:
        data_set = self.data_sets[url]
        self.run(data_set.put({}))
        data_set.replid, data_set.started_empty = uuid4().hex, True
        self.allowed.marker_deleted = True

    @precondition(lambda self: self.lossy)
    @rule(url=EITHER)
    def marker_is_deleted_alone(self, url: int) -> None:
        world = self.data_sets[url].world
        self.run(world.redis.delete(world.keys.marker))
        self.allowed.marker_deleted = True

    @precondition(lambda self: self.lossy)
    @rule(url=EITHER, vod_id=st.sampled_from(IDS))
    def user_resets(self, url: int, vod_id: str) -> None:
        world = self.data_sets[url].world
        self.run(world.redis.delete(world.prefix + vod_id))
        self.allowed.reset = True

    @precondition(lambda self: self.lossy)
    @rule()
    def snapshot_database(self) -> None:
        self.database_states.append(self.run(self._rows()))

    @precondition(lambda self: self.lossy and self.database_states)
    @rule(index=st.integers(0, 100))
    def rewind_database(self, index: int) -> None:
        """Restore or clone the database: every connection to the old one is closed."""
        for number in range(WORKERS):
            self.kill(number)
        self.run(self._restore(self.database_states[index % len(self.database_states)]))
        self.allowed.database_rewound = True

    async def _rows(self) -> dict[str, list[Any]]:
        async with self.world.sql.transaction(isolation="repeatable_read"):
            return {table: await self.world.sql.fetch(f'SELECT * FROM "{table}"') for table in TABLES}

    async def _restore(self, rows: dict[str, list[Any]]) -> None:
        async with self.world.sql.transaction():
            for table, records in rows.items():
                await self.world.sql.execute(f'DELETE FROM "{table}"')
                if records:
                    await self.world.sql.copy_records_to_table(
                        table, records=[tuple(record) for record in records], columns=list(records[0].keys())
                    )

    # What must be true after every step

    @invariant()
    def never_more_than_happened(self) -> None:
        views, counted, announced = self.run(self._stored())
        assert views <= self.happened, f"stored {views}, happened {self.happened}"
        assert counted <= self.counted, f"stored {counted}, counted {self.counted}"
        for data_set in self.data_sets if not self.allowed.database_rewound else ():
            assert self.run(self._flushed_from(data_set)) <= data_set.counted
        assert announced <= self.announced, f"stored {announced}, announced {self.announced}"

    @property
    def counted(self) -> Counter[str]:
        return self.data_sets[RIGHT].counted + self.data_sets[WRONG].counted

    async def _flushed_from(self, data_set: DataSet, up_to: int = 2**62) -> Counter[str]:
        """What flushes took from the counters of this Redis."""
        rows = await self.world.sql.fetch(
            "SELECT vod_id, sum(d.counted)::bigint AS n FROM view_count_deltas d JOIN view_count_flushes "
            "USING (source, flush_id) WHERE flush_id <= $1 AND worker_id = ANY($2) GROUP BY 1",
            up_to,
            list(data_set.workers),
        )
        return Counter({row["vod_id"]: row["n"] for row in rows})

    async def _stored(self) -> tuple[Counter[str], Counter[str], Counter[str]]:
        """Totals by id: views, counted views and announced views."""
        rows = await self.world.sql.fetch("SELECT vod_id, views, counted, announced FROM view_counts")
        views, counted, announced = (
            Counter({row["vod_id"]: row[name] for row in rows}) for name in ("views", "counted", "announced")
        )
        return views, counted, announced

    @invariant()
    def application_s_table_has_the_totals(self) -> None:
        rows = self.run(self.world.sql.fetch('SELECT id, "viewCount" FROM "Vod"'))
        views, _, _ = self.run(self._stored())
        assert {row["id"]: row["viewCount"] for row in rows} == {vod_id: views[vod_id] for vod_id in WITH_A_ROW}

    @invariant()
    def tables_agree(self) -> None:
        self.run(self.world.assert_consistent(lineages_may_change=True))

    @invariant()
    def settled_and_pending_views_happened(self) -> None:
        if not self.allowed.database_rewound:
            for data_set in self.data_sets:
                self.run(self._settled_and_pending(data_set))

    async def _settled_and_pending(self, data_set: DataSet) -> None:
        marker = await data_set.world.marker()
        if marker is None:
            return
        last_flush_id = await self.world.sql.fetchval(
            "SELECT last_flush_id FROM view_count_sources WHERE lineage = $1 "
            "UNION ALL SELECT last_flush_id FROM view_count_lineages WHERE lineage = $1",
            marker.lineage,
        )
        if last_flush_id is None:
            return
        known = await data_set.world.pending() + await self._flushed_from(data_set, marker.flush_id)
        assert known <= data_set.counted, f"settled and pending {known}, counted {data_set.counted}"
        if not self.allowed.rewound:
            assert last_flush_id - marker.flush_id <= 1

    @invariant()
    def reader_never_sees_a_dip(self) -> None:
        allowed = self.allowed
        if allowed.rewound or allowed.marker_deleted or allowed.reset or allowed.database_rewound:
            return
        shown = self.run(self.world.pending())
        _, counted, announced = self.run(self._stored())
        shown += counted
        # What a reader of the right Redis can know.
        truth = self.data_sets[RIGHT].counted + self.run(self._flushed_from(self.data_sets[WRONG]))
        assert shown >= truth
        last = self.run(
            self.world.sql.fetchval(
                "SELECT sum(counted)::bigint FROM view_count_deltas WHERE flush_id IN "
                "(SELECT last_flush_id FROM view_count_sources UNION SELECT last_flush_id FROM view_count_lineages)"
            )
        )
        assert shown.total() <= truth.total() + (last or 0)
        # And the answer of `/v1/views` is exact: it accounts for flushed views that are still in the counters.
        for number in self.run(self.reader.counters.display.views(IDS)):
            assert number.views == max(truth[number.vod_id], announced[number.vod_id])

    @invariant()
    def stale_epoch_never_writes(self) -> None:
        row = self.run(
            self.world.sql.fetchrow(
                "SELECT f.nonce, f.worker_id, s.lease_holder FROM view_count_sources s "
                "JOIN view_count_flushes f ON f.flush_id = s.last_flush_id"
            )
        )
        if row is None or row["nonce"] in self.seen_flushes:
            return
        self.seen_flushes.add(row["nonce"])
        assert row["lease_holder"] in (None, row["worker_id"])

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.run(self._teardown())

    async def _teardown(self) -> None:
        try:
            for actor in self.actors:
                await actor.kill()
            await self._after_the_faults()
        finally:
            for data_set in self.data_sets:
                await data_set.world.__aexit__(None, None, None)
            await self.admin.execute(f"DROP DATABASE {self.name} WITH (FORCE)")
            await self.admin.close()

    async def _after_the_faults(self) -> None:
        """A new worker drains everything or holds for a reason; then one with the wrong URL does.

        Totals are exact if no data was lost on either side. The first flush of the wrong Redis may lose the views of
        one flush: that of the right Redis whose settle was not confirmed.
        """
        allowed = self.allowed
        for data_set in self.data_sets:
            if data_set is self.data_sets[WRONG] and not data_set.workers:
                return
            outcome = await self._drain(data_set)
            assert isinstance(outcome, Flushed | Hold)
            if isinstance(outcome, Hold):
                assert allowed.rewound or allowed.marker_deleted or allowed.database_rewound, outcome
                continue
            assert await data_set.world.pending() == Counter()
            views, counted, _ = await self._stored()
            assert views <= self.happened
            assert counted <= self.counted
            if allowed.marker_deleted or allowed.reset or allowed.database_rewound:
                continue
            flushed = await self._flushed_from(data_set)
            if data_set is self.data_sets[RIGHT]:
                assert flushed >= data_set.counted - allowed.forgotten
            elif not allowed.rewound:
                assert flushed >= data_set.counted - await self._unconfirmed()

    async def _drain(self, data_set: DataSet) -> Any:
        async def at_once(_: str) -> None: ...

        await self._expire()
        await self._update("agreed_at = agreed_at - interval '5 minutes'")
        worker = data_set.world.worker(**TARGET)
        data_set.workers.add(worker.counters.lease._worker_id)
        data_set.simulate_identity(worker, at_once)
        return await asyncio.wait_for(worker.cycle(), 20)

    async def _unconfirmed(self) -> Counter[str]:
        rows = await self.world.sql.fetch(
            "SELECT vod_id, sum(counted)::bigint AS n FROM view_count_deltas WHERE flush_id IN "
            "(SELECT last_flush_id FROM view_count_lineages) GROUP BY 1"
        )
        return Counter({row["vod_id"]: row["n"] for row in rows})


# pytest collects the machine through this. The number of examples is limited only to save time.
ProtocolTest = ProtocolMachine.TestCase
ProtocolTest.settings = settings(
    max_examples=int(os.environ.get("PROPERTY_EXAMPLES", "25")),
    stateful_step_count=40,
    deadline=None,
    phases=[Phase.explicit, Phase.generate] + ([] if os.environ.get("PROPERTY_SHRINK") == "no" else [Phase.shrink]),
    derandomize="PROPERTY_EXAMPLES" not in os.environ,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)


@pytest.fixture(autouse=True, scope="session")
def servers(redis_url: str, postgres_url: str, template_database: str) -> Any:
    ProtocolMachine.redis_url = redis_url
    ProtocolMachine.postgres_url = postgres_url
    ProtocolMachine.template = template_database
    ProtocolMachine.loop = asyncio.new_event_loop()
    yield
    ProtocolMachine.loop.close()
