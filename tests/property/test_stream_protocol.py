"""Streams under crashes, lost replies, changed servers and restored data: each entry becomes a row exactly once.

A state machine over the real code and real servers: three workers stop before and after every command of a look, every
BEGIN and every COMMIT, and continue in any order. While one of them commits a batch and reads the next, the two go on
in any order, too. Between any two steps, workers are killed or frozen, answers are lost, entries are added, deleted
and trimmed, and each example has some of the faults in `FAULTS`. The invariants are checked after every step.

A server is a key here. A connection stays with the server to which it was opened; a new one goes where the name points.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, ClassVar
from uuid import uuid4

import asyncpg
import pytest
import redis.asyncio as aioredis
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from tests.support import streams
from tests.support.streams import BEGAN_MS, GROUP, Row, Stored, StreamWorker, read_stored
from tests.support.world import World, database_url_for
from worker.contract.entry_id import BEGINNING, EntryId
from worker.errors import DatabaseUnavailable, RedisUnavailable
from worker.pipelines.model import Idle, OnHold
from worker.pipelines.sources.stream.adjust import Adjustment, Change
from worker.runtime.backoff import Backoff

# After ten examples, Hypothesis mostly changes the ones before a little. The number is limited only to save time.
EXAMPLES_PER_SEED = 10
_given = os.environ.get("PROPERTY_EXAMPLES")
_first = 0 if _given is None else random.randrange(2**32)
SEEDS = range(_first, _first + int(_given or 30) // EXAMPLES_PER_SEED)
WORKERS = 3
BACKLOG = 10
TABLES = ("stream_positions", "chunk_requests", "dead_letters")
DOCUMENTS = {"good": streams.good, "poison": streams.poison, "refused": streams.refused}
ACTORS = st.integers(0, WORKERS - 1)
TURNS = st.integers(0, 1)
KINDS = st.lists(st.sampled_from(["good", "good", "good", "poison", "refused"]), min_size=1, max_size=5)
# Each fault, and the events that it consists of.
FAULTS = {
    # Redis restarts from an older copy, or the key is restored from one.
    "rewind": ["redis_goes_back", "redis_goes_to_and_fro"],
    # The name moves to a replica, which may lag, and back. Old connections stay where they are.
    "failover": ["a_replica_is_promoted", "name_moves_back"],
    # The name moves to another Redis, and back.
    "elsewhere": ["name_moves_to_a_new_redis", "name_moves_back"],
    "delete": ["stream_is_deleted"],
    "destroy": ["group_is_destroyed"],
    # Another program reads with our group, or deletes our consumer.
    "stranger": ["stranger_in_our_group"],
    "restore": ["database_is_restored"] * 2,
}
# In half of the examples, no data is lost on either side: these must end exact.
SOME_FAULTS = st.one_of(st.just(frozenset()), st.frozensets(st.sampled_from(sorted(FAULTS)), min_size=1, max_size=3))
# What each hold needs to have happened.
HOLDS = {
    "several consumers": {"stranger"},
    "another program's consumer": {"stranger"},
    "another database": {"rewind", "failover", "elsewhere", "restore", "stranger", "half set"},
    "this is not the stream that was carried": {
        *("rewind", "failover", "elsewhere", "delete", "destroy", "stranger", "half set"),
    },
    "may be carried already": {"rewind", "failover"},
}
WRITE_GATES = ["write: before BEGIN", "write: before COMMIT", "write: after COMMIT"]
LOOK_GATES = ["before the look", "before XRANGE", "before the second look", "after the look"]
IDLE = "idle"
GATES = st.sampled_from([*WRITE_GATES, *WRITE_GATES, *LOOK_GATES, IDLE, IDLE, IDLE, IDLE])
WORK = ["carry_up_to"] * 4 + ["take_over"] * 2 + ["run_until_idle"] * 2 + ["step"] * 2 + ["fail_at", "meet"]
FAILS = ["at once", "late"]
INDEX = st.integers(0, 4)
EVENTS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "step": {"actor": ACTORS, "steps": st.integers(1, 20), "turn": TURNS, "fails": st.sampled_from(["", *FAILS])},
    "fail_at": {
        "actor": ACTORS,
        "kinds": KINDS,
        "gate": st.sampled_from(WRITE_GATES + LOOK_GATES),
        "fails": st.sampled_from(FAILS),
        "turn": TURNS,
    },
    "late_commit_lands": {"rolls_back": st.booleans()},
    "carry_up_to": {"actor": ACTORS, "kinds": KINDS, "gate": GATES, "turn": TURNS},
    "take_over": {"actor": ACTORS, "gate": GATES, "turn": TURNS},
    "run_until_idle": {"actor": ACTORS, "renews": st.booleans(), "turn": TURNS},
    "meet": {
        "actor": ACTORS,
        "what": st.sampled_from(["is killed", "loses its transaction", "loses its lease", "renews"]),
    },
    "add": {"kinds": KINDS, "same_ms": st.booleans()},
    "remove": {"index": INDEX, "trim": st.booleans()},
    "another_group_reads": {"count": st.integers(1, 3), "acknowledge": st.booleans()},
    "redis_goes_back": {"index": INDEX, "restart": st.booleans()},
    "redis_goes_to_and_fro": {
        "actor": ACTORS,
        "kinds": KINDS,
        "gate": st.sampled_from(["write: before BEGIN", *LOOK_GATES, IDLE]),
        "then": st.sampled_from(["", "the newer copy returns", "its clock is late"]),
    },
    "a_replica_is_promoted": {"index": INDEX, "lags": st.booleans()},
    "name_moves_to_a_new_redis": {},
    "name_moves_back": {"index": INDEX},
    "stream_is_deleted": {},
    "group_is_destroyed": {},
    "stranger_in_our_group": {"what": st.sampled_from(["joins", "reads", "leaves", "deletes our consumer"])},
    "database_is_restored": {"index": INDEX},
    "operator_sets_the_position": {"crashes": st.booleans()},
}

_kind: ContextVar[str] = ContextVar("_kind", default="read")
_gated: ContextVar[bool] = ContextVar("_gated", default=True)


class AnswerIsLost(Exception):
    """COMMIT is sent, and takes effect later."""


@dataclass(frozen=True)
class Late:
    """A transaction whose COMMIT takes effect later. `kind` says what it is for."""

    actor: Actor
    transaction: Any
    backend: int | None
    kind: str


@dataclass(eq=False)
class Gate:
    """Where a worker stands. `error`: what it gets if the command before or after the gate fails."""

    label: str
    error: type[Exception] | None
    go: asyncio.Future[None]


class Actor:
    """One worker. It goes on from gate to gate; while it reads ahead, it stands at two gates."""

    def __init__(self, machine: StreamMachine) -> None:
        self._machine = machine
        self.worker = StreamWorker(machine.environment)
        self.task: asyncio.Task[Any] | None = None
        self.gates: list[Gate] = []
        self.backend: int | None = None
        self.outcome: Any = None
        self.is_cut = False
        self.is_dead = False
        self._server: Server | None = None
        self._branches = 0
        self._moved = asyncio.Event()
        self._gate_everything()

    def _gate_everything(self) -> None:
        pipeline, source, lease = self.worker.pipeline, self.worker.source, self.worker.lease
        pipeline.interval = 0.0
        pipeline._look_again = Backoff(0, 0)
        self._send_now = self.worker.connection.send
        self.worker.connection.send = self._send
        self._begin = self.worker.database.transaction
        self.worker.database.transaction = self._transaction
        source.wait = self._wait
        source._offer_mark = _as_kind("offer", source._offer_mark)
        source.read = self._noted(source.read)
        source.read_ahead = self._branch(source.read_ahead)
        pipeline.delivery.deliver = self._branch(pipeline.delivery.deliver)
        pipeline.delivery._sink.write = _as_kind("write", pipeline.delivery._sink.write)
        lease.take = _as_kind("take", lease.take)
        lease.release = _as_kind("release", lease.release)

    def _branch(self, call: Callable[[Any], Awaitable[Any]]) -> Any:
        async def branch(batch: Any) -> Any:
            self._branches += 1
            try:
                return await call(batch)
            finally:
                self._branches -= 1
                self._moved.set()

        return branch

    def _noted(self, read: Callable[[], Awaitable[Any]]) -> Any:
        async def noted() -> Any:
            self.outcome = None
            self.outcome = await read()
            self._machine.check_outcome(self.outcome)
            return self.outcome

        return noted

    async def _wait(self, _: float) -> None:
        await self._gate(IDLE)

    async def _send(self, commands: Sequence[Any], timeout: float) -> list[Any]:
        """Send one command after the other, to the server of this connection."""
        replies: list[Any] = []
        try:
            for number, command in enumerate(commands):
                if len(commands) == len(LOOK_GATES) - 1:
                    await self._gate(LOOK_GATES[number], RedisUnavailable)
                self._raise_if_cut()
                if self.worker.connection._connection is None:
                    self._server = self._machine.active
                replies += await self._send_now([self._named(command)], timeout)
            if len(commands) == len(LOOK_GATES) - 1:
                await self._gate(LOOK_GATES[-1], RedisUnavailable)
        except BaseException:
            await self.worker.connection.drop()
            raise
        return replies

    def _named(self, command: Sequence[Any]) -> tuple[Any, ...]:
        assert self._server is not None
        return tuple(self._server.key if part == self._machine.world.stream else part for part in command)

    def _raise_if_cut(self) -> None:
        if self.is_cut:
            self.is_cut = False
            raise RedisUnavailable("the server closed the connection")

    @contextlib.asynccontextmanager
    async def _transaction(self) -> AsyncIterator[Any]:
        kind, transaction = _kind.get(), self._begin()
        await self._gate(f"{kind}: before BEGIN", DatabaseUnavailable)
        try:
            tx = await transaction.__aenter__()
            if _gated.get():
                self.backend = (await tx.exec_driver_sql("SELECT pg_backend_pid()")).scalar_one()
            yield tx
            await self._gate(f"{kind}: before COMMIT", DatabaseUnavailable)
        except AnswerIsLost:
            self._machine.late.append(Late(self, transaction, self.backend, kind))
            raise DatabaseUnavailable("injected: COMMIT is on its way") from None
        except BaseException as error:
            if not await transaction.__aexit__(type(error), error, error.__traceback__):
                raise
        else:
            await transaction.__aexit__(None, None, None)
        finally:
            if _gated.get():
                self.backend = None
        await self._gate(f"{kind}: after COMMIT", DatabaseUnavailable)

    async def _gate(self, label: str, error: type[Exception] | None = None) -> None:
        if self.is_dead:
            raise asyncio.CancelledError
        if _gated.get():
            gate = Gate(label, error, asyncio.get_running_loop().create_future())
            self.gates.append(gate)
            self._moved.set()
            await gate.go

    def stands_at(self, label: str) -> bool:
        return any(gate.label == label for gate in self.gates)

    @property
    def locks_the_row(self) -> bool:
        return any(gate.label.endswith("before COMMIT") and gate.label != "read: before COMMIT" for gate in self.gates)

    async def _cycle(self) -> None:
        """What `Pipeline.run` repeats."""
        lease = self.worker.lease
        if lease.token is None and not await lease.take():
            return
        self.worker.source.reset()
        await self.worker.pipeline._carry(asyncio.Event())

    async def step(self, turn: int = 0, fails: str = "") -> bool:
        """Run to the next gate, or to the end of the cycle. False if it only waits for the lock of the row.

        `fails`: the current command does so, `at once`, or `late`: a COMMIT that takes effect after the worker gave it
        up. `turn` chooses between the commit and the reading ahead.
        """
        if self.task is None:
            self.task = asyncio.create_task(self._cycle())
            self.task.add_done_callback(lambda _: self._moved.set())
        else:
            free = [gate for gate in self.gates if not self._is_blocked(gate)]
            if not free:
                return False
            gate = free[turn % len(free)]
            self.gates.remove(gate)
            if fails == "late" and gate.label.endswith("before COMMIT"):
                gate.go.set_exception(AnswerIsLost())
            elif fails and gate.error is not None:
                gate.go.set_exception(gate.error(f"injected {gate.label}"))
            else:
                gate.go.set_result(None)
        await self._until_it_stands()
        return True

    def _is_blocked(self, gate: Gate) -> bool:
        """The claim, and the release of the lease, would wait for the row."""
        return (
            gate.label in ("write: before BEGIN", "release: before BEGIN", "offer: before BEGIN")
            and self._machine.row_is_locked()
        )

    async def _until_it_stands(self) -> None:
        assert self.task is not None
        async with asyncio.timeout(30):
            while True:
                for _ in range(3):
                    await asyncio.sleep(0)
                if self.task.done() or len(self.gates) >= max(1, self._branches):
                    break
                self._moved.clear()
                await self._moved.wait()
        if self.task.done():
            task, self.task = self.task, None
            error = task.exception()
            if error is not None and not isinstance(error, RedisUnavailable | DatabaseUnavailable):
                raise error

    async def run_up_to(self, label: str, turn: int = 0) -> None:
        """Run to the gate, or until it is idle, holds no lease, or waits for a lock."""
        for _ in range(1000):
            if not await self.step(turn) or self.task is None or self.stands_at(label) or self.stands_at(IDLE):
                return
        raise AssertionError("it never becomes idle")

    async def renew(self) -> None:
        """What the loop of the lease does at any time. In a task of its own."""
        _gated.set(False)
        with contextlib.suppress(DatabaseUnavailable):
            await self.worker.lease.take()

    async def set_position(self, to: EntryId, *, crashes: bool) -> None:
        """What `streams --set` does, or the first half of it."""
        source, connection = self.worker.source, self.worker.connection
        adjustment = Adjustment(
            database=self.worker.database, position=source._position, looker=source._looker, pipeline="chunk_requests"
        )

        async def send(commands: Sequence[Any], timeout: float) -> list[Any]:
            if crashes and commands[0][0] == "EVAL":
                raise RedisUnavailable("injected")
            self._server = self._machine.active
            return await self._send_now([self._named(command) for command in commands], timeout)

        _gated.set(False)
        connection.send = send
        try:
            with contextlib.suppress(RedisUnavailable):
                await adjustment.set(Change(to, to, 0, more=False))
        finally:
            connection.send = self._send
            await connection.drop()

    async def kill(self) -> None:
        """Like kill -9: commands that were sent take effect, and no others follow."""
        # Where the session ends, its error hides the cancellation.
        self.is_dead = True
        if self.backend is not None:
            await self._machine.terminate(self.backend)
        if self.task is not None:
            self.task.cancel()
            with contextlib.suppress(asyncio.CancelledError, RedisUnavailable, DatabaseUnavailable):
                await self.task
        await self.close()

    async def close(self) -> None:
        """Close the connections of a dead worker, as soon as none has a COMMIT that is still on its way."""
        if self.is_dead and all(late.actor is not self for late in self._machine.late):
            await self.worker.close()


def _as_kind(kind: str, call: Callable[..., Awaitable[Any]]) -> Any:
    async def of_kind(*args: Any, **options: Any) -> Any:
        before = _kind.set(kind)
        try:
            return await call(*args, **options)
        finally:
            _kind.reset(before)

    return of_kind


@dataclass(eq=False)
class Server:
    """A Redis. `line` is what happened to its stream: numbers of the entries added; negative: it was deleted.

    Servers of one `family` have copies of the same stream.
    """

    key: str
    family: int
    line: tuple[int, ...] = ()


@dataclass(frozen=True)
class Copy:
    dump: bytes | None
    family: int
    line: tuple[int, ...]


@dataclass
class Look:
    """What a client sees of the stream and our group."""

    ids: dict[int, EntryId] = field(default_factory=dict)
    exists: bool = False
    last: EntryId = BEGINNING
    added: int = 0
    consumers: list[str] = field(default_factory=list)
    delivered: EntryId = BEGINNING
    # Of the other group: the last entry that it has read, and the first one that it has not acknowledged.
    other: EntryId | None = None
    other_pending: EntryId | None = None

    @property
    def mark(self) -> str | None:
        return self.consumers[0] if len(self.consumers) == 1 else None


class StreamMachine(RuleBasedStateMachine):
    loop: ClassVar[asyncio.AbstractEventLoop]
    redis_url: ClassVar[str]
    database_url: ClassVar[str]
    faults: frozenset[str] = frozenset()

    def run(self, coroutine: Any) -> Any:
        return self.loop.run_until_complete(coroutine)

    @initialize(faults=SOME_FAULTS, branches=st.integers(0, 4), keep=st.booleans(), carried=st.integers(0, 3))
    def begin(self, faults: frozenset[str], branches: int, keep: bool, carried: int) -> None:
        self.faults = faults
        # Two copies of a stream may both be written, and the name move between them. Entries are skipped then, which
        # is a fault that is not covered. But none is carried twice.
        self.branches = branches == 4
        self.keep = keep
        self.run(self._begin(carried))

    async def _begin(self, carried: int) -> None:
        self.world = World(self.redis_url, self.database_url)
        await self.world.__aenter__()
        self.sql, self.redis = self.world.sql, self.world.redis
        self.environment = self.world.environment | streams.SETTINGS
        if self.keep:
            self.environment["CHUNK_REQUESTS_STREAM_KEEP"] = "1ms"
        for table in TABLES:
            await self.sql.execute(f"DELETE FROM {table}")
        # Create the row before the workers start: an INSERT would wait for the INSERT of a stopped worker.
        insert = "INSERT INTO stream_positions (source, stream, pipeline) VALUES ('default', $1, 'chunk_requests')"
        await self.sql.execute(insert, self.world.stream)
        self.stored = await read_stored(self.sql, self.world.stream)
        self.clock_ms = BEGAN_MS
        # By the number in the document.
        self.kinds: list[str] = []
        self.ids: list[EntryId] = []
        self.keys: list[str] = []
        # Those that the name may come to.
        self.servers: list[Server] = []
        # Family → the longest line, or the one that was written last.
        self.newest: dict[int, tuple[int, ...]] = {}
        self.active = self._new_server(family=0)
        self.copies: list[Copy] = []
        self.database_states: list[dict[str, list[Any]]] = []
        self.happened: set[str] = set()
        self.diverged = False
        self.late: list[Late] = []
        self.present: set[int] = set()
        # Entries that were gone while they were not carried. They may return with an older copy.
        self.removed: set[int] = set()
        self.removed_before_the_first_commit: int | None = None
        self.actors = [Actor(self) for _ in range(WORKERS)]
        if carried:
            await self.carry_up_to(0, ["good"] * carried, IDLE, turn=0)

    def _new_server(self, family: int, line: tuple[int, ...] = ()) -> Server:
        server = Server(f"{self.world.stream}@{len(self.keys)}", family, line)
        self.keys.append(server.key)
        self.servers.append(server)
        self.newest.setdefault(family, line)
        return server

    def row_is_locked(self) -> bool:
        return any(actor.locks_the_row for actor in self.actors) or any(late.kind != "read" for late in self.late)

    def check_outcome(self, outcome: Any) -> None:
        if isinstance(outcome, OnHold):
            assert any(cause in outcome.cause and faults & self.happened for cause, faults in HOLDS.items()), outcome

    async def terminate(self, backend: int) -> None:
        await self.sql.execute("SELECT pg_terminate_backend($1)", backend)
        while await self.sql.fetchval("SELECT count(*) FROM pg_stat_activity WHERE pid = $1", backend):
            await asyncio.sleep(0.001)

    # One rule, because Hypothesis leaves out some of the rules in each example, and nothing happens without most of
    # these. What is left out here is faults.
    @rule(data=st.data())
    def something_happens(self, data: Any) -> None:
        event = data.draw(st.sampled_from(self._possible()), label="event")
        arguments = data.draw(st.fixed_dictionaries(EVENTS[event]), label="arguments")
        self.run(getattr(self, event)(**arguments))

    def _possible(self) -> list[str]:
        events = [*WORK, "add", *(["remove"] if self.present else []), *(["another_group_reads"] if self.keep else [])]
        events += ["late_commit_lands"] * 4 if self.late else []
        events += [event for fault in sorted(self.faults) for event in FAULTS[fault]]
        return [*events, "operator_sets_the_position"] if self.happened else events

    # What workers do

    async def step(self, actor: int, steps: int, turn: int, fails: str) -> None:
        """Run a few gates on. The last command may fail."""
        for left in reversed(range(steps)):
            await self.actors[actor].step(turn, "" if left else fails)

    async def fail_at(self, actor: int, kinds: list[str], gate: str, fails: str, turn: int) -> None:
        """Add entries, free the lease, and run a worker to the gate, where the command fails."""
        await self.carry_up_to(actor, kinds, gate, turn)
        await self.actors[actor].step(turn, fails)

    async def late_commit_lands(self, rolls_back: bool) -> None:
        late = self.late.pop(0)
        if rolls_back and late.backend is not None:
            await self.terminate(late.backend)
        with contextlib.suppress(DatabaseUnavailable):
            await late.transaction.__aexit__(None, None, None)
        await late.actor.close()

    async def carry_up_to(self, actor: int, kinds: list[str], gate: str, turn: int) -> None:
        """Add entries, free the lease, and run a worker to the gate."""
        await self.add(kinds, same_ms=False)
        await self.take_over(actor, gate, turn)

    async def take_over(self, actor: int, gate: str, turn: int) -> None:
        await self._copy_database()
        await self._expire()
        await self.actors[actor].run_up_to(gate, turn)

    async def run_until_idle(self, actor: int, renews: bool, turn: int) -> None:
        if renews:
            await self.meet(actor, "renews")
        await self.actors[actor].run_up_to(IDLE, turn)

    async def meet(self, actor: int, what: str) -> None:
        one = self.actors[actor]
        match what:
            case "is killed":
                await one.kill()
                self.actors[actor] = Actor(self)
            case "loses its transaction" if one.backend is not None:
                await self.terminate(one.backend)
                one.backend = None
            case "loses its lease":
                await self._expire()
            case "renews":
                await asyncio.create_task(one.renew())

    async def _expire(self) -> None:
        await self.sql.execute(
            "UPDATE stream_positions SET lease_until = NULL, lease_holder = NULL "
            "WHERE stream IN (SELECT stream FROM stream_positions FOR UPDATE SKIP LOCKED)"
        )

    # What producers and other readers do

    async def add(self, kinds: list[str], same_ms: bool) -> None:
        # A long backlog takes long to carry, and shows nothing more.
        if len(self.present - set(self.stored.carried)) > BACKLOG:
            return
        if {"rewind", "failover"} & self.faults:
            await self._copy_redis()
        self.clock_ms += not same_ms
        await self._add(kinds, [f"{self.clock_ms}-*"] * len(kinds))

    async def _add(self, kinds: list[str], ids: list[str]) -> None:
        for kind, entry_id in zip(kinds, ids, strict=True):
            number = len(self.kinds)
            raw = await self.redis.xadd(self.active.key, {"data": DOCUMENTS[kind](number)}, id=entry_id)
            self.kinds.append(kind)
            self.ids.append(EntryId.parse(raw))
            self._happens_to_the_stream(number)
        await self._arrive()

    def _happens_to_the_stream(self, what: int) -> None:
        self.active.line += (what,)
        self.newest[self.active.family] = self.active.line

    async def remove(self, index: int, trim: bool) -> None:
        """Delete one entry, or all but the last ones."""
        index %= len(self.present)
        if trim:
            await self._remove(self.redis.xtrim(self.active.key, maxlen=index, approximate=False))
        else:
            number = sorted(self.present)[-1 - index]
            await self._remove(self.redis.xdel(self.active.key, str(self.ids[number])))

    async def _remove(self, removal: Awaitable[Any]) -> None:
        before = self.present
        await removal
        await self._arrive()
        self.removed |= before - self.present - set(self.stored.carried)

    async def another_group_reads(self, count: int, acknowledge: bool) -> None:
        await self._read_with("other", "reader", count, acknowledge)

    async def _read_with(self, group: str, consumer: str, count: int, acknowledge: bool) -> None:
        key = self.active.key
        if not await self.redis.exists(key):
            return
        if not any(found["name"] == group.encode() for found in await self.redis.xinfo_groups(key)):
            await self.redis.xgroup_create(key, group, "0")
        if not count:
            await self.redis.xgroup_createconsumer(key, group, consumer)
            return
        for _, entries in await self.redis.xreadgroup(group, consumer, {key: ">"}, count=count):
            for entry_id, _ in entries if acknowledge else ():
                await self.redis.xack(key, group, entry_id)

    # Faults

    async def _copy_redis(self) -> Copy:
        copy = Copy(await self.redis.dump(self.active.key), self.active.family, self.active.line)
        self.copies.append(copy)
        return copy

    async def _copy_database(self) -> None:
        if "restore" in self.faults:
            async with self.sql.transaction(isolation="repeatable_read"):
                tables = {table: await self.sql.fetch(f"SELECT * FROM {table}") for table in TABLES}
            self.database_states.append(tables)

    def _choose(self, places: Sequence[Any], index: int, family: int | None = None) -> Any:
        """Of copies or servers, one that the name or the data may come to; with index 0 the last one. None: none."""
        places = [
            place
            for place in places
            if family in (None, place.family) and (self.branches or not self._is_another_branch(place))
        ]
        return places[-1 - index % len(places)] if places else None

    def _is_another_branch(self, place: Any) -> bool:
        """Neither a part nor a continuation of the stream that was written last."""
        newest = self.newest[place.family]
        return bool(place.line[: len(newest)] != newest[: len(place.line)])

    async def _come_to(self, place: Any, fault: str) -> None:
        self.happened.add(fault)
        self.diverged |= self._is_another_branch(place)
        # Neither a restart nor a failover takes less than a millisecond.
        self.clock_ms += 1
        await self._arrive()

    async def _arrive(self) -> None:
        self.present = set((await self._look()).ids)

    async def redis_goes_back(self, index: int, restart: bool) -> None:
        copy = self._choose(self.copies, index, self.active.family)
        if copy is None:
            return
        if restart:
            for actor in self.actors:
                actor.is_cut = True
        await self._go_to(copy)

    async def redis_goes_to_and_fro(self, actor: int, kinds: list[str], gate: str, then: str) -> None:
        """While a worker is frozen, another one carries more, goes back with Redis, and lets the lease go."""
        other = self.actors[(actor + 1) % WORKERS]
        await self.take_over(actor, IDLE, turn=0)
        before = await self._copy_redis()
        await self.add(kinds, same_ms=False)
        if gate != IDLE:
            await self.actors[actor].run_up_to(gate)
        await self._expire()
        await other.run_up_to(IDLE)
        after = await self._copy_redis()
        await self._go_to(before)
        await self._expire()
        await other.run_up_to(IDLE)
        if then == "the newer copy returns":
            await self._go_to(after)
        elif then == "its clock is late" and other.stands_at(IDLE) and before.dump is not None:
            last = (await self._look()).last
            await self._add(["good"], [f"{last.ms}-{last.seq + 1}"])
        await self._expire()

    async def _go_to(self, copy: Copy) -> None:
        await self._put(self.active.key, copy.dump)
        self.active.line = copy.line
        await self._come_to(copy, "rewind")

    async def a_replica_is_promoted(self, index: int, lags: bool) -> None:
        exact = await self._copy_redis()
        copy = self._choose(self.copies, index, self.active.family) if lags else exact
        self.active = self._new_server(copy.family, copy.line)
        await self._put(self.active.key, copy.dump)
        await self._come_to(copy, "failover")

    async def name_moves_to_a_new_redis(self) -> None:
        self.active = self._new_server(family=len(self.keys))
        await self._come_to(self.active, "elsewhere")

    async def name_moves_back(self, index: int) -> None:
        server = self._choose([server for server in self.servers if server is not self.active], index)
        if server is not None:
            fault = "failover" if server.family == self.active.family else "elsewhere"
            self.active = server
            await self._come_to(server, fault)

    async def _put(self, key: str, dump: bytes | None) -> None:
        if dump is None:
            await self.redis.delete(key)
        else:
            await self.redis.restore(key, 0, dump, replace=True)

    async def stream_is_deleted(self) -> None:
        self.happened.add("delete")
        await self._remove(self.redis.delete(self.active.key))
        self._happens_to_the_stream(-1 - len(self.active.line))

    async def group_is_destroyed(self) -> None:
        if await self.redis.exists(self.active.key):
            self.happened.add("destroy")
            await self.redis.xgroup_destroy(self.active.key, GROUP)

    async def stranger_in_our_group(self, what: str) -> None:
        self.happened.add("stranger")
        if what in ("reads", "joins"):
            await self._read_with(GROUP, "stranger", int(what == "reads"), acknowledge=True)
            return
        for name in (await self._look()).consumers:
            if (name == "stranger") is (what == "leaves"):
                await self.redis.xgroup_delconsumer(self.active.key, GROUP, name)

    async def database_is_restored(self, index: int) -> None:
        """Sessions with a transaction end. Workers live on, with what they remember."""
        if not self.database_states:
            return
        self.happened.add("restore")
        for actor in range(WORKERS):
            await self.meet(actor, "loses its transaction")
        while self.late:
            await self.late_commit_lands(rolls_back=True)
        async with self.sql.transaction():
            for table, rows in self.database_states[-1 - index % len(self.database_states)].items():
                await self.sql.execute(f"DELETE FROM {table}")
                if rows:
                    await self.sql.copy_records_to_table(
                        table, records=[tuple(row) for row in rows], columns=list(rows[0].keys())
                    )
        self.stored = await read_stored(self.sql, self.world.stream)
        self.removed |= set(range(len(self.kinds))) - self.present - set(self.stored.carried)

    async def operator_sets_the_position(self, crashes: bool) -> None:
        """End a hold where nothing is carried twice: after the last entry that is carried. Restart the workers."""
        look, row = await self._look(), self.stored.row
        above = [entry_id for entry_id in look.ids.values() if entry_id > row.last]
        is_behind = row.high is not None and above and min(above) <= row.high
        if not look.exists or self.row_is_locked() or (look.mark == row.incarnation and not is_behind):
            return
        carried = set(self.stored.carried)
        target = max((self.ids[number] for number in look.ids.keys() & carried), default=BEGINNING)
        for number in range(WORKERS):
            await self.meet(number, "is killed")
        await asyncio.create_task(self.actors[0].set_position(target, crashes=crashes))
        self.happened.add("half set" if crashes else "set")
        # Not covered: the name moves, or an older copy returns, after the decision.
        self.copies, self.servers = [], [self.active]
        self.removed |= {number for number, entry_id in look.ids.items() if entry_id <= target} - carried

    # What must be true after every step

    @invariant()
    def invariants(self) -> None:
        self.stored = self.run(read_stored(self.sql, self.world.stream))
        look = self.run(self._look())
        self._each_entry_is_carried_once(self.stored)
        self._nothing_is_above_the_position_and_carried(self.stored, look)
        self._nothing_present_was_skipped(self.stored, look)
        self._only_the_committed_position_is_mirrored(self.stored.row, look)
        self._only_what_nobody_needs_was_trimmed(self.stored, look)
        self._losses_are_counted(self.stored, look)
        self.present = set(look.ids)

    async def _look(self) -> Look:
        key = self.active.key
        if not await self.redis.exists(key):
            return Look()
        pipeline = self.redis.pipeline(transaction=True)
        pipeline.xrange(key)
        pipeline.xinfo_stream(key)
        pipeline.xinfo_groups(key)
        entries, stream, groups = await pipeline.execute()
        look = Look(
            ids={streams.number_of(fields[b"data"]): EntryId.parse(raw) for raw, fields in entries},
            exists=True,
            last=EntryId.parse(stream["last-generated-id"]),
            added=stream["entries-added"],
        )
        for group in groups:
            delivered = EntryId.parse(group["last-delivered-id"])
            if group["name"] == GROUP.encode():
                look.consumers = [found["name"].decode() for found in await self.redis.xinfo_consumers(key, GROUP)]
                look.delivered = delivered
            else:
                pending = (await self.redis.xpending(key, "other"))["min"]
                look.other, look.other_pending = delivered, None if pending is None else EntryId.parse(pending)
        return look

    def _each_entry_is_carried_once(self, stored: Stored) -> None:
        assert len(set(stored.carried)) == len(stored.carried), f"twice: {stored}"
        assert all(self.kinds[number] == "good" for number in stored.rows)
        assert all(self.kinds[number] != "good" for number in stored.letters)

    def _nothing_is_above_the_position_and_carried(self, stored: Stored, look: Look) -> None:
        if look.mark is not None and look.mark == stored.row.incarnation:
            reached = max(stored.row.last, stored.row.high or BEGINNING)
            carried = look.ids.keys() & set(stored.carried)
            assert all(look.ids[number] <= reached for number in carried), f"will be carried again: {stored}"

    def _nothing_present_was_skipped(self, stored: Stored, look: Look) -> None:
        if look.mark is None or look.mark != stored.row.incarnation or self.diverged:
            return
        skipped = {number for number, entry_id in look.ids.items() if entry_id <= stored.row.last}
        skipped -= self.removed | set(stored.carried)
        assert not skipped, f"{skipped} are in the stream, at or below the position, and not carried: {stored}"

    def _only_the_committed_position_is_mirrored(self, row: Row, look: Look) -> None:
        if look.mark == row.incarnation and not {"restore", "stranger"} & self.happened:
            assert look.delivered <= max(row.last, row.high or BEGINNING)

    def _only_what_nobody_needs_was_trimmed(self, stored: Stored, look: Look) -> None:
        trimmed = self.present - set(look.ids)
        assert not trimmed or self.keep
        for number in trimmed:
            # A restored database may lack what was carried, and trimmed.
            if "restore" not in self.happened and not self.diverged:
                assert number in stored.carried or number in self.removed, f"{number} was trimmed unread"
            assert look.other is None or self.ids[number] <= look.other
            assert look.other_pending is None or self.ids[number] < look.other_pending

    def _losses_are_counted(self, stored: Stored, look: Look) -> None:
        """Exact where neither side lost data. What was deleted before the first commit is not counted."""
        row, carried = stored.row, set(stored.carried)
        if self.happened or row.incarnation is None:
            return
        if self.removed_before_the_first_commit is None:
            self.removed_before_the_first_commit = len(self.removed)
        assert row.gaps == 0
        # What was deleted above the position may be counted before the position comes there.
        assert row.lost <= len(self.removed - carried)
        if row.last == look.last:
            missing = {number for number, entry_id in enumerate(self.ids) if entry_id <= row.last} - carried
            assert row.entries_read == look.added
            assert len(missing) - self.removed_before_the_first_commit <= row.lost <= len(missing)

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.run(self._teardown())

    async def _teardown(self) -> None:
        try:
            await self._after_the_faults()
        finally:
            for actor in self.actors:
                await actor.kill()
            await self.redis.delete(*self.keys)
            await self.world.__aexit__(None, None, None)

    async def _after_the_faults(self) -> None:
        """Frozen workers go on; then a new worker carries everything, or holds for a reason that is in the table."""
        while self.late:
            await self.late_commit_lands(rolls_back=False)
        for actor in self.actors:
            await actor.run_up_to(IDLE)
            if actor.stands_at(IDLE):
                await actor.run_up_to(IDLE)
        await self._expire()
        last = Actor(self)
        self.actors.append(last)
        await last.run_up_to(IDLE)
        stored, look = await read_stored(self.sql, self.world.stream), await self._look()
        self._each_entry_is_carried_once(stored)
        self._nothing_present_was_skipped(stored, look)
        if isinstance(last.outcome, OnHold):
            assert self._explains(last.outcome.cause, stored.row, stored.candidate, look), (last.outcome, stored, look)
            return
        assert isinstance(last.outcome, Idle), last.outcome
        if last.outcome.cause == "there is no stream yet":
            assert not look.exists
        elif last.outcome.cause:
            assert not look.ids
            assert look.last < stored.row.last
        elif not self.diverged:
            assert set(look.ids) <= set(stored.carried) | self.removed

    def _explains(self, cause: str, row: Row, candidate: str | None, look: Look) -> bool:
        is_ours = look.mark is not None and look.mark == row.incarnation
        above = [entry_id for entry_id in look.ids.values() if entry_id > row.last]
        if "several consumers" in cause:
            return len(look.consumers) > 1
        if "another program's consumer" in cause:
            return look.consumers == ["stranger"]
        if "another database" in cause:
            offered = (candidate or "").split()
            return not is_ours and look.mark is not None and (look.delivered > row.last or look.mark not in offered)
        if "this is not the stream that was carried" in cause:
            return not is_ours and any(entry_id <= row.last for entry_id in look.ids.values())
        return "may be carried already" in cause and row.high is not None and min(above) <= row.high


@pytest.mark.parametrize("number", SEEDS)
def test_streams_survive_any_order_of_faults(number: int) -> None:
    run_state_machine_as_test(
        seed(number)(StreamMachine),
        settings=settings(
            max_examples=EXAMPLES_PER_SEED,
            stateful_step_count=40,
            deadline=None,
            phases=[Phase.generate] + ([] if os.environ.get("PROPERTY_SHRINK") == "no" else [Phase.shrink]),
            suppress_health_check=list(HealthCheck),
            print_blob=True,
        ),
    )


@pytest.fixture(autouse=True, scope="session")
def servers(redis_url: str, postgres_url: str, template_database: str) -> Any:
    name = f"vw_prop_{uuid4().hex[:12]}"
    StreamMachine.redis_url = redis_url
    StreamMachine.database_url = database_url_for(postgres_url, name)
    StreamMachine.loop = asyncio.new_event_loop()
    run = StreamMachine.loop.run_until_complete
    nodes = run(_set_entries_a_node(redis_url, "1"))
    run(_execute(postgres_url, f"CREATE DATABASE {name} TEMPLATE {template_database}"))
    run(_execute(StreamMachine.database_url, streams.REFUSE))
    yield
    run(_execute(postgres_url, f"DROP DATABASE {name} WITH (FORCE)"))
    run(_set_entries_a_node(redis_url, nodes))
    StreamMachine.loop.close()


async def _set_entries_a_node(redis_url: str, entries: str) -> str:
    """Redis trims whole nodes only. Returns the setting before."""
    async with aioredis.from_url(redis_url, decode_responses=True) as redis:
        before: dict[str, str] = await redis.config_get("stream-node-max-entries")
        await redis.config_set("stream-node-max-entries", entries)
    return before["stream-node-max-entries"]


async def _execute(url: str, statement: str) -> None:
    connection = await asyncpg.connect(url)
    await connection.execute(statement)
    await connection.close()
