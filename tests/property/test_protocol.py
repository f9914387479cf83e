"""The flush protocol under crashes, lost replies and restored data.

A state machine over the real code and real servers: three workers stop before and after every command they send, and
continue in any order. Between any two steps, workers are killed or frozen, replies are lost, Redis and Postgres are
restored to older states, and markers and counters are deleted. The invariants are checked after every step.

Two things are simulated. One is Redis's identity (`master_replid`, and whether it started empty): a rewind stands for a
restart from an older copy, so it changes the identity. The other is the channel: its messages reach a listening worker
when the machine delivers them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, ClassVar
from uuid import UUID, uuid4

import asyncpg
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.support.world import InProcessWorker, World, database_url_for
from worker.counters.flush.marker import Marker
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
OWN_TABLES = ("view_counts", "view_count_deltas", "view_counts_hourly", "view_count_flushes", "view_count_sources")
TABLES = (*OWN_TABLES, "Vod")


class Actor:
    """One worker that stops at every gate: before and after each command to Redis, each BEGIN and each COMMIT."""

    def __init__(self, machine: ProtocolMachine) -> None:
        self._machine = machine
        environment = machine.world.environment | TARGET | {"BATCH_SIZE": "2"}
        self.worker = InProcessWorker(load_settings(environ=environment))
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

        async def probe() -> str:
            await self._gate("probe", RedisUnavailable)
            return self._machine.replid

        async def history() -> History:
            await self._gate("history", RedisUnavailable)
            return History(self._machine.replid, self._machine.started_empty)

        redis.probe = probe  # type: ignore[method-assign]
        redis.history = history  # type: ignore[method-assign]

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
class RedisState:
    values: dict[bytes, bytes]
    counted: Counter[str]


@dataclass
class Allowances:
    """Faults after which a total may be too low. No fault allows it to be too high."""

    rewound: bool = False
    marker_deleted: bool = False
    reset: bool = False
    database_rewound: bool = False
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
        self.run(self._begin())
        for _ in range(flushes):
            self.views("a", 3)
            self.views("b", 1)
            self.run_to_the_end(0)

    async def _begin(self) -> None:
        self.name = f"vw_prop_{uuid4().hex[:12]}"
        self.admin = await asyncpg.connect(self.postgres_url)
        await self.admin.execute(f"CREATE DATABASE {self.name} TEMPLATE {self.template}")
        self.world = World(self.redis_url, database_url_for(self.postgres_url, self.name))
        await self.world.__aenter__()
        # Create the row before the workers start: an INSERT would wait for the INSERT of a stopped worker.
        await self.world.sql.execute("INSERT INTO view_count_sources (source) VALUES ('default')")
        await self.world.sql.execute('CREATE TABLE "Vod" (id text PRIMARY KEY, "viewCount" int NOT NULL DEFAULT 0)')
        await self.world.sql.execute('INSERT INTO "Vod" (id) SELECT unnest($1::text[])', WITH_A_ROW)
        # Views, those that were incremented, and those that were published; a view may be in both.
        self.happened: Counter[str] = Counter()
        self.counted: Counter[str] = Counter()
        self.announced: Counter[str] = Counter()
        self.replid, self.started_empty = uuid4().hex, False
        self.allowed = Allowances()
        self.redis_states: list[RedisState] = []
        self.database_states: list[dict[str, list[Any]]] = []
        self.actors = [Actor(self) for _ in range(WORKERS)]
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
        self.views(vod_id, 2)
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
        self.actors[actor] = Actor(self)

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
        expire = "UPDATE view_count_sources SET lease_until = NULL, lease_holder = NULL WHERE source = 'default'"
        async with self.world.sql.transaction():
            await self.world.sql.execute("SET LOCAL lock_timeout = '50ms'")
            with contextlib.suppress(asyncpg.LockNotAvailableError):
                async with self.world.sql.transaction():
                    await self.world.sql.execute(expire)

    # What producers, operators and servers do

    @rule(vod_id=st.sampled_from(IDS), count=st.integers(1, 5))
    def views(self, vod_id: str, count: int) -> None:
        self.run(self.world.redis.incrby(self.world.prefix + vod_id, count))
        self.happened[vod_id] += count
        self.counted[vod_id] += count

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
    @rule()
    def snapshot_redis(self) -> None:
        self.redis_states.append(RedisState(self.run(self._values()), self.counted.copy()))

    @precondition(lambda self: self.lossy and self.redis_states)
    @rule(index=st.integers(0, 100))
    def rewind_redis(self, index: int) -> None:
        state = self.redis_states[index % len(self.redis_states)]
        self.run(self._put(state.values))
        self.replid, self.started_empty = uuid4().hex, False
        self.allowed.rewound = True
        self.allowed.forgotten += self.counted - state.counted

    @precondition(lambda self: self.lossy)
    @rule()
    def flushall(self) -> None:
        self.run(self._put({}))
        self.allowed.marker_deleted = True

    @precondition(lambda self: self.lossy)
    @rule()
    def redis_restarts_empty(self) -> None:
        self.run(self._put({}))
        self.replid, self.started_empty = uuid4().hex, True
        self.allowed.marker_deleted = True

    @precondition(lambda self: self.lossy)
    @rule()
    def marker_is_deleted_alone(self) -> None:
        self.run(self.world.redis.delete(self.world.keys.marker))
        self.allowed.marker_deleted = True

    @precondition(lambda self: self.lossy)
    @rule(vod_id=st.sampled_from(IDS))
    def user_resets(self, vod_id: str) -> None:
        self.run(self.world.redis.delete(self.world.prefix + vod_id))
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

    async def _values(self) -> dict[bytes, bytes]:
        keys = [key async for key in self.world.redis.scan_iter(match=b"*" + self.world.keys.pattern, count=1000)]
        values = await self.world.redis.mget(keys) if keys else []
        return {key: value for key, value in zip(keys, values, strict=True) if value is not None}

    async def _put(self, values: dict[bytes, bytes]) -> None:
        present = await self._values()
        pipeline = self.world.redis.pipeline(transaction=True)
        if present:
            pipeline.delete(*present)
        if values:
            pipeline.mset(values)
        await pipeline.execute()

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
        assert announced <= self.announced, f"stored {announced}, announced {self.announced}"

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
            self.run(self._settled_and_pending())

    async def _settled_and_pending(self) -> None:
        raw = await self.world.redis.get(self.world.keys.marker)
        marker = Marker.parse(raw) if raw else None
        source = await self.world.sql.fetchrow("SELECT * FROM view_count_sources")
        if marker is None or source is None or marker.lineage != source["lineage"]:
            return
        rows = await self.world.sql.fetch(
            "SELECT vod_id, sum(counted)::bigint AS n FROM view_count_deltas WHERE flush_id <= $1 GROUP BY 1",
            marker.flush_id,
        )
        known = await self.world.pending()
        known.update({row["vod_id"]: row["n"] for row in rows})
        assert known <= self.counted, f"settled and pending {known}, counted {self.counted}"
        if not self.allowed.rewound:
            assert source["last_flush_id"] - marker.flush_id <= 1

    @invariant()
    def reader_never_sees_a_dip(self) -> None:
        allowed = self.allowed
        if allowed.rewound or allowed.marker_deleted or allowed.reset or allowed.database_rewound:
            return
        shown = self.run(self.world.pending())
        _, counted, announced = self.run(self._stored())
        shown += counted
        assert shown >= self.counted
        last = self.run(
            self.world.sql.fetchval(
                "SELECT sum(d.counted)::bigint FROM view_count_deltas d "
                "JOIN view_count_sources s ON d.flush_id = s.last_flush_id"
            )
        )
        assert shown.total() <= self.counted.total() + (last or 0)
        # And the answer of `/v1/views` is exact: it accounts for flushed views that are still in the counters.
        for number in self.run(self.reader.counters.display.views(IDS)):
            assert number.views == max(self.counted[number.vod_id], announced[number.vod_id])

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
            await self.world.__aexit__(None, None, None)
            await self.admin.execute(f"DROP DATABASE {self.name} WITH (FORCE)")
            await self.admin.close()

    async def _after_the_faults(self) -> None:
        """A new worker drains everything or holds for a reason. Totals are exact if no data was lost on either side."""
        await self._expire()
        last = self.world.worker(**TARGET)

        async def probe() -> str:
            return self.replid

        async def history() -> History:
            return History(self.replid, self.started_empty)

        last.redis.probe = probe  # type: ignore[method-assign]
        last.redis.history = history  # type: ignore[method-assign]
        outcome = await asyncio.wait_for(last.cycle(), 20)
        assert isinstance(outcome, Flushed | Hold)
        allowed = self.allowed
        if isinstance(outcome, Hold):
            assert allowed.rewound or allowed.marker_deleted or allowed.database_rewound
            return
        assert await self.world.pending() == Counter()
        totals = await self.world.totals()
        assert totals <= self.happened
        if not (allowed.marker_deleted or allowed.reset or allowed.database_rewound):
            _, counted, _ = await self._stored()
            assert counted >= self.counted - allowed.forgotten


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
