"""Each trap of streams: what once lost or doubled entries in a simpler design, on real servers."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Callable
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import asyncpg
import pytest
import redis.asyncio as aioredis

from tests.support.proxy import Proxy
from tests.support.streams import BEGAN_MS, GROUP, SETTINGS, Row, StreamWorker, good, poison, read_stored
from tests.support.world import World, database_url_for
from worker.contract.entry_id import BEGINNING, EntryId
from worker.dev.servers import ValkeyServer
from worker.errors import RedisUnavailable, Unavailable
from worker.pipelines.model import Batch, Idle, NotClaimed, OnHold, Written
from worker.pipelines.sources.stream.adjust import Adjustment


def at(number: int) -> EntryId:
    """The id that the entry of this number gets."""
    return EntryId(BEGAN_MS + number, 0)


class Place:
    """A Redis with the stream."""

    def __init__(self, url: str, stream: str) -> None:
        self.url = url
        self.stream = stream
        self.redis = aioredis.from_url(url)

    async def add(self, *numbers: int, as_id: str | None = None, document: Callable[[int], bytes] = good) -> None:
        for number in numbers:
            await self.redis.xadd(self.stream, {"data": document(number)}, id=as_id or str(at(number)))

    async def mark(self) -> str | None:
        names = [found["name"].decode() for found in await self.redis.xinfo_consumers(self.stream, GROUP)]
        return names[0] if names else None

    async def mirrored(self) -> EntryId:
        (group,) = [found for found in await self.redis.xinfo_groups(self.stream) if found["name"] == GROUP.encode()]
        return EntryId.parse(group["last-delivered-id"])

    async def dump(self) -> bytes:
        copy = await self.redis.dump(self.stream)
        assert copy is not None
        return bytes(copy)

    async def restore(self, copy: bytes) -> None:
        await self.redis.restore(self.stream, 0, copy, replace=True)


class Incident:
    """One stream and one database. Workers reach Redis by a name, which may move to another server."""

    def __init__(self, world: World, name: Proxy) -> None:
        self.world = world
        self.name = name
        self.here = Place(world.redis_url, world.stream)
        self.workers: list[StreamWorker] = []

    def worker(self, **settings: str) -> StreamWorker:
        worker = StreamWorker(self.world.environment | SETTINGS | {"REDIS_URL": self.name.url} | settings)
        self.workers.append(worker)
        return worker

    async def expire(self) -> None:
        """Free the lease, as after eight seconds without a renewal by its holder."""
        await self.world.sql.execute("UPDATE stream_positions SET lease_until = now() - interval '1 second'")

    async def successor(self, **settings: str) -> StreamWorker:
        """Another worker; it may take the lease."""
        await self.expire()
        return self.worker(**settings)

    async def row(self) -> Row:
        return (await read_stored(self.world.sql, self.world.stream)).row

    async def carried(self) -> list[int]:
        return (await read_stored(self.world.sql, self.world.stream)).carried


@pytest.fixture
async def incident(world: World) -> AsyncIterator[Incident]:
    async with Proxy(world.redis_url) as name:
        made = Incident(world, name)
        yield made
        for worker in made.workers:
            await worker.close()
        await made.here.redis.aclose()


@pytest.fixture
async def elsewhere(valkey: ValkeyServer, world: World) -> AsyncIterator[Place]:
    """Another Redis."""
    place = Place(valkey.url, world.stream)
    yield place
    await place.redis.aclose()


@pytest.fixture
async def second_database(incident: Incident, postgres_url: str, template_database: str) -> AsyncIterator[str]:
    name = f"vw_test_{uuid4().hex[:12]}"
    await incident.world.sql.execute(f"CREATE DATABASE {name} TEMPLATE {template_database}")
    yield database_url_for(postgres_url, name)
    await incident.world.sql.execute(f"DROP DATABASE {name} WITH (FORCE)")


def is_hold(outcome: Any, cause: str) -> bool:
    return isinstance(outcome, OnHold) and cause in outcome.cause


NOT_THE_STREAM = "this is not the stream that was carried"
OTHER_DATABASE = "another database"
CARRIED_ALREADY = "may be carried already"


# The mark


async def test_a_crash_between_the_mark_and_the_first_commit_is_no_hold(incident: Incident) -> None:
    """The group was made after the first commit; a crash in between was a hold for ever."""
    await incident.here.add(1, 2, 3)
    crashed = incident.worker()
    assert isinstance(await crashed.read(), Batch)
    mark = await incident.here.mark()
    assert mark is not None
    assert await (await incident.successor()).carry() == Idle()
    assert await incident.carried() == [1, 2, 3]
    assert await incident.row() == Row(at(3), 3, None, mark, lost=0, gaps=0)


async def test_two_workers_that_create_the_mark_at_the_same_time_do_not_hold(incident: Incident) -> None:
    """One was frozen after it had offered a mark, and created it after the other one had offered another."""
    await incident.here.add(1, 2)
    frozen, other = incident.worker(), incident.worker()
    offer_late, offer = frozen.source._offer_mark, other.source._offer_mark

    async def freeze_after_the_offer(row: Any) -> Any:
        offered = await offer_late(row)
        await incident.expire()
        reading = asyncio.create_task(other.read())
        await other_offered.wait()
        go_on.append(reading)
        return offered

    async def wait_after_the_offer(row: Any) -> Any:
        offered = await offer(row)
        other_offered.set()
        await created.wait()
        return offered

    other_offered, created, go_on = asyncio.Event(), asyncio.Event(), []
    frozen.source._offer_mark, other.source._offer_mark = freeze_after_the_offer, wait_after_the_offer
    await frozen.read()
    created.set()
    await go_on[0]
    assert await (await incident.successor()).carry() == Idle()
    assert await incident.carried() == [1, 2]


async def test_the_mark_is_not_created_where_the_name_moved_to_in_between(incident: Incident, elsewhere: Place) -> None:
    """It is decided by one look that a mark is to be created, and created by the next one."""
    await incident.here.add(2)
    worker = incident.worker()
    await worker.carry()
    await incident.here.redis.delete(incident.here.stream)
    await incident.here.add(4)
    await elsewhere.add(1, 5)
    offer = worker.source._offer_mark

    async def offer_and_move(row: Any) -> Any:
        offered = await offer(row)
        incident.name.move_to(elsewhere.url)
        await worker.connection.drop()
        return offered

    worker.source._offer_mark = offer_and_move
    assert is_hold(await worker.carry(), NOT_THE_STREAM)
    assert await elsewhere.redis.xinfo_groups(elsewhere.stream) == []


@pytest.mark.parametrize("there", ["no stream", "an empty stream", "other entries"])
async def test_no_group_is_created_where_the_name_moved_to(incident: Incident, elsewhere: Place, there: str) -> None:
    """The mirror created the group wherever it was sent, and the entries that were there were never carried."""
    await incident.here.add(1, 2)
    worker = incident.worker()
    await worker.carry()
    if there != "no stream":
        await elsewhere.add(0, 4)
    if there == "an empty stream":
        await elsewhere.redis.delete(elsewhere.stream)
        await elsewhere.add(0)
        await elsewhere.redis.xtrim(elsewhere.stream, maxlen=0)
    incident.name.move_to(elsewhere.url)
    await worker.connection.drop()
    outcome = await worker.carry()
    if there == "other entries":
        assert is_hold(outcome, NOT_THE_STREAM)
    else:
        assert outcome == Idle(outcome.cause, keep_lease=False)
        assert outcome.cause
    assert not await elsewhere.redis.exists(elsewhere.stream) or not await elsewhere.redis.xinfo_groups(
        elsewhere.stream
    )
    incident.name.move_to(incident.here.url)
    await worker.connection.drop()
    await incident.here.add(5)
    assert await worker.carry() == Idle()
    assert await incident.carried() == [1, 2, 5]


async def test_a_group_of_our_name_that_another_database_moved_is_a_hold(
    incident: Incident, second_database: str
) -> None:
    """Any group of our name was taken for ours: a second database skipped what the first one had read."""
    await incident.here.add(1, 2, 3)
    await incident.worker().carry()
    assert await incident.here.mirrored() == at(3)
    second = incident.worker(DATABASE_URL=second_database)
    assert is_hold(await second.carry(), OTHER_DATABASE)
    await second.lease.release()
    with_its_own = incident.worker(DATABASE_URL=second_database, CHUNK_REQUESTS_STREAM_GROUP="second")
    assert await with_its_own.carry() == Idle()
    sql = await asyncpg.connect(second_database)
    assert (await read_stored(sql, incident.world.stream)).carried == [1, 2, 3]
    await sql.close()
    await incident.here.add(4)
    assert await (await incident.successor()).carry() == Idle()
    assert await incident.carried() == [1, 2, 3, 4]


async def test_a_mark_that_another_database_has_just_created_is_not_taken_over(
    incident: Incident, second_database: str
) -> None:
    """Both looked before the first commit: the second took the mark for its own, and they trimmed for each other."""
    await incident.here.add(1, 2)
    first = incident.worker()
    batch = await first.read()
    second = incident.worker(DATABASE_URL=second_database)
    assert is_hold(await second.carry(), OTHER_DATABASE)
    assert await first.write(batch) == Written(2)
    assert is_hold(await second.carry(), OTHER_DATABASE)


async def test_two_sources_of_one_database_do_not_carry_one_stream(incident: Incident) -> None:
    await incident.here.add(1, 2)
    await incident.worker().carry()
    await incident.here.redis.xtrim(incident.here.stream, maxlen=0)
    await incident.here.add(3)
    await incident.here.redis.xgroup_setid(incident.here.stream, GROUP, "0")
    second = incident.worker(VIEW_SOURCE_NAME="second")
    assert is_hold(await second.carry(), f"default/{incident.world.stream} carries this stream already")


async def test_another_program_that_reads_with_our_group_is_a_hold_while_it_does(incident: Incident) -> None:
    await incident.here.add(1)
    worker = incident.worker()
    await worker.carry()
    await incident.here.add(2, 3)
    stream, redis = incident.here.stream, incident.here.redis
    await redis.xreadgroup(GROUP, "stranger", {stream: ">"}, count=1)
    assert is_hold(await worker.carry(), "several consumers")
    await redis.xgroup_delconsumer(stream, GROUP, "stranger")
    assert await worker.carry() == Idle()
    assert await incident.carried() == [1, 2, 3]


async def test_another_program_s_consumer_is_not_taken_for_the_mark(incident: Incident) -> None:
    """Its name is the same on every server: as the mark it made two streams one, and entries were skipped."""
    await incident.here.redis.xgroup_create(incident.here.stream, GROUP, "$", mkstream=True)
    await incident.here.redis.xgroup_createconsumer(incident.here.stream, GROUP, "application-1")
    worker = incident.worker()
    assert is_hold(await worker.carry(), "another program's consumer")
    await incident.here.add(1, 2)
    await incident.here.redis.xgroup_delconsumer(incident.here.stream, GROUP, "application-1")
    assert await worker.carry() == Idle()
    assert await incident.carried() == [1, 2]


async def test_a_destroyed_group_is_a_hold_that_names_the_position(incident: Incident) -> None:
    await incident.here.add(1, 2)
    worker = incident.worker()
    await worker.carry()
    await incident.here.add(3)
    await incident.here.redis.xgroup_destroy(incident.here.stream, GROUP)
    outcome = await worker.carry()
    assert is_hold(outcome, NOT_THE_STREAM)
    assert f"It looks like the same stream: --set {incident.here.stream} {at(2)}" in outcome.cause
    assert await incident.here.redis.xinfo_groups(incident.here.stream) == []


# Redis goes back, or is another one


async def test_the_old_master_moves_the_position_back_and_nothing_is_doubled(
    incident: Incident, elsewhere: Place
) -> None:
    """A late connection to the old master moved the position back; back on the new one everything was doubled."""
    await incident.here.add(1, 2, 3)
    late = incident.worker()
    await late.carry()
    await elsewhere.restore(await incident.here.dump())
    incident.name.move_to(elsewhere.url)
    await elsewhere.add(4, 5)
    await (await incident.successor()).carry()
    assert await incident.carried() == [1, 2, 3, 4, 5]
    await incident.expire()
    assert await late.carry() == Idle()
    row = await incident.row()
    assert (row.last, row.high, row.entries_read) == (at(3), at(5), 3)
    await elsewhere.add(6)
    successor = await incident.successor()
    assert is_hold(await successor.carry(), CARRIED_ALREADY)
    assert await incident.carried() == [1, 2, 3, 4, 5]
    await elsewhere.redis.xdel(elsewhere.stream, str(at(4)), str(at(5)))
    assert await successor.carry() == Idle()
    assert await incident.carried() == [1, 2, 3, 4, 5, 6]
    assert (await incident.row()).high is None


async def test_after_going_back_twice_the_highest_position_counts(incident: Incident) -> None:
    worker = incident.worker()
    copies = []
    for number in range(1, 5):
        await incident.here.add(number)
        assert await worker.carry() == Idle()
        copies.append(await incident.here.dump())
    for copy in (copies[2], copies[0]):
        await incident.here.restore(copy)
        assert await worker.carry() == Idle()
    row = await incident.row()
    assert (row.last, row.high) == (at(1), at(4))
    await incident.here.restore(copies[3])
    await incident.here.redis.xdel(incident.here.stream, str(at(2)), str(at(3)))
    assert is_hold(await worker.carry(), CARRIED_ALREADY)
    assert await incident.carried() == [1, 2, 3, 4]


async def test_new_entries_of_a_late_clock_are_a_hold_and_not_skipped(incident: Incident) -> None:
    """The position stayed where it was, above what came after Redis had gone back."""
    await incident.here.add(1)
    worker = incident.worker()
    await worker.carry()
    copy = await incident.here.dump()
    await incident.here.add(4)
    await worker.carry()
    await incident.here.restore(copy)
    await worker.carry()
    await incident.here.add(3)
    assert is_hold(await worker.carry(), CARRIED_ALREADY)
    await incident.here.add(5)
    assert is_hold(await worker.carry(), CARRIED_ALREADY)
    assert await incident.carried() == [1, 4]


async def test_an_older_copy_takes_new_entries_and_none_is_lost(incident: Incident) -> None:
    """Redis restarted from a snapshot: its last id is below the position, and new entries come."""
    await incident.here.add(1, 2)
    worker = incident.worker()
    await worker.carry()
    copy = await incident.here.dump()
    await incident.here.add(3, 4)
    await worker.carry()
    await incident.here.restore(copy)
    await incident.here.add(5)
    assert await worker.carry() == Idle()
    assert await incident.carried() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("writable", [False, True])
async def test_a_replica_decides_nothing(incident: Incident, elsewhere: Place, writable: bool) -> None:
    """What a lagging replica showed was taken for the stream."""
    await incident.here.add(1, 2)
    await incident.worker().carry()
    before = await incident.row()
    master = urlsplit(incident.here.url)
    await elsewhere.redis.config_set("replica-read-only", "no" if writable else "yes")
    await elsewhere.redis.replicaof(str(master.hostname), str(master.port))
    async with asyncio.timeout(20):
        while not await elsewhere.redis.exists(elsewhere.stream):
            await asyncio.sleep(0.05)
    on_the_replica = await incident.successor(REDIS_URL=elsewhere.url)
    place = re.escape(urlsplit(elsewhere.url).netloc)
    with pytest.raises(RedisUnavailable, match=rf"^{place}: (its role is slave|.*replica)"):
        await on_the_replica.carry()
    assert await incident.row() == before
    await elsewhere.redis.replicaof("NO", "ONE")


async def test_a_stale_batch_does_not_fit_where_redis_went_back_to_its_position(incident: Incident) -> None:
    """The claim compared the position only: after a rewind to exactly an old position, a stale batch fitted."""
    await incident.here.add(1)
    frozen = incident.worker()
    await frozen.carry()
    copy = await incident.here.dump()
    await incident.here.add(2)
    stale = await frozen.read()
    other = await incident.successor()
    await other.carry()
    assert await incident.carried() == [1, 2]
    await incident.here.restore(copy)
    await other.carry()
    row = await incident.row()
    assert (row.last, row.high) == (at(1), at(2))
    assert await frozen.write(stale) == NotClaimed()
    assert await incident.carried() == [1, 2]


@pytest.mark.parametrize("when", ["while idle", "within a look"])
async def test_a_lease_that_is_taken_again_does_not_revive_what_was_known_before(incident: Incident, when: str) -> None:
    """A worker lost the lease and took it again without noticing: its row was stale, and its token new."""
    await incident.here.add(1)
    stalled = incident.worker()
    await stalled.carry()
    before = await incident.here.dump()
    await incident.here.add(2)

    async def another_one_goes_to_and_fro() -> None:
        other = await incident.successor()
        await other.carry()
        after = await incident.here.dump()
        await incident.here.restore(before)
        await other.carry()
        await other.lease.release()
        await incident.here.restore(after)
        assert await stalled.lease.take()

    if when == "while idle":
        await another_one_goes_to_and_fro()
    else:
        stalled.in_the_next_look(1, another_one_goes_to_and_fro)
    read = await stalled.source.read()
    if isinstance(read, Batch):
        await stalled.write(read)
        read = await stalled.source.read()
    assert await incident.carried() == [1, 2]
    assert is_hold(read, CARRIED_ALREADY)


async def test_a_batch_does_not_fit_after_its_commit_that_landed_late(incident: Incident) -> None:
    """The worker gave up a COMMIT, read the position again before it took effect, and read the same entries."""
    await incident.here.add(1, 2)
    worker = incident.worker()
    batch = await worker.read()
    transaction, is_written, lands = worker.database.transaction, asyncio.Event(), asyncio.Event()

    @contextlib.asynccontextmanager
    async def late() -> AsyncIterator[Any]:
        async with transaction() as tx:
            yield tx
            is_written.set()
            await lands.wait()

    worker.database.transaction = late  # type: ignore[method-assign]
    given_up = asyncio.create_task(worker.pipeline.delivery.deliver(batch))
    await is_written.wait()
    worker.database.transaction = transaction  # type: ignore[method-assign]
    again = await worker.read()
    assert isinstance(again, Batch)
    second = asyncio.create_task(worker.write(again))
    await asyncio.sleep(0.1)
    lands.set()
    assert await given_up == Written(2)
    assert await second == NotClaimed()
    assert await worker.carry() == Idle()
    assert await incident.carried() == [1, 2]


async def test_a_worker_without_the_lease_reports_no_hold_for_what_another_one_carried(incident: Incident) -> None:
    """It judged by the row that it remembered: a mark that is not in it, moved beyond its position."""
    stalled = incident.worker()
    assert await stalled.carry() == Idle("there is no stream yet", keep_lease=False)
    await incident.here.add(1, 2)
    assert await (await incident.successor()).carry() == Idle()
    assert await stalled.source.read() == Idle()


async def test_entries_that_wait_on_the_first_redis_are_not_skipped_after_a_second_one(
    incident: Incident, elsewhere: Place
) -> None:
    """A → B → A: B's ids moved the position past entries of A."""
    await incident.here.add(1)
    worker = incident.worker()
    await worker.carry()
    await incident.here.add(2)
    await elsewhere.add(3)
    incident.name.move_to(elsewhere.url)
    await worker.connection.drop()
    assert await worker.carry() == Idle()
    assert await incident.carried() == [1, 3]
    assert (await incident.row()).gaps == 1
    incident.name.move_to(incident.here.url)
    await worker.connection.drop()
    assert is_hold(await worker.carry(), NOT_THE_STREAM)
    assert (await incident.row()).last == at(3)
    assert await elsewhere.mark() != await incident.here.mark()


@pytest.mark.parametrize("change", ["another connection", "another mark"])
async def test_reading_ahead_stops_at_a_change_of_server(incident: Incident, elsewhere: Place, change: str) -> None:
    """What was read ahead came from another server than the batch before: entries of the first one were lost."""
    await incident.here.add(1, 2, 3, 4)
    worker = incident.worker()
    batch = await worker.read()
    assert batch.full
    if change == "another connection":
        await elsewhere.restore(await incident.here.dump())
        await elsewhere.redis.xdel(elsewhere.stream, str(at(3)))
        incident.name.move_to(elsewhere.url)
        await worker.connection.drop()
    else:
        await incident.here.redis.xgroup_destroy(incident.here.stream, GROUP)
        await incident.here.redis.xgroup_create(incident.here.stream, GROUP, "0")
        await incident.here.redis.xgroup_createconsumer(incident.here.stream, GROUP, "another")
    assert await worker.source.read_ahead(batch) is None


async def test_reading_ahead_mirrors_and_trims_by_the_committed_position_only(
    incident: Incident, elsewhere: Place
) -> None:
    """The batch that is being written may never be committed."""
    await elsewhere.redis.config_set("stream-node-max-entries", 1)
    worker = incident.worker(REDIS_URL=elsewhere.url, CHUNK_REQUESTS_STREAM_KEEP="1ms")
    await elsewhere.add(1, 2, 3, 4, 5, 6)
    first = await worker.read()
    await worker.write(first)
    second = await worker.source.read()
    assert await worker.source.read_ahead(second) is not None
    assert await elsewhere.mirrored() == at(2)
    assert [number async for number in _numbers(elsewhere)] == [2, 3, 4, 5, 6]
    assert await (await incident.successor(REDIS_URL=elsewhere.url)).carry() == Idle()
    assert await incident.carried() == [1, 2, 3, 4, 5, 6]


async def _numbers(place: Place) -> AsyncIterator[int]:
    for raw, _ in await place.redis.xrange(place.stream):
        yield EntryId.parse(raw).ms - BEGAN_MS


# A look


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("new_id", ["above the position", "the position"])
async def test_a_stream_deleted_and_created_again_within_a_look(incident: Incident, step: int, new_id: str) -> None:
    """Evidence and entries were of two streams, whose ids are of one millisecond: entries were lost."""
    ids = [f"{BEGAN_MS}-{number}" for number in range(3)]
    for number, entry_id in enumerate(ids):
        await incident.here.add(number, as_id=entry_id)
        if number == 0:
            worker = incident.worker()
            await worker.carry()

    async def create_again() -> None:
        await incident.here.redis.delete(incident.here.stream)
        await incident.here.add(7, as_id=ids[1] if new_id == "above the position" else ids[0])

    worker.in_the_next_look(step, create_again)
    outcome = await worker.carry()
    if new_id == "above the position":
        assert outcome == Idle()
        assert await incident.carried() == [0, 7]
        assert (await incident.row()).gaps == 1
    else:
        assert is_hold(outcome, NOT_THE_STREAM)
        assert await incident.carried() == [0]


@pytest.mark.parametrize("step", [1, 2])
async def test_an_entry_added_within_a_look_waits_for_the_next_one(incident: Incident, step: int) -> None:
    """By the second answer, nothing was above the position, but the last id was: the entry was skipped as lost."""
    await incident.here.add(1)
    worker = incident.worker()
    await worker.carry()
    worker.in_the_next_look(step, lambda: incident.here.add(2))
    assert await worker.read() == Idle()
    assert (await incident.row()).last == at(1)
    assert await worker.carry() == Idle()
    assert await incident.carried() == [1, 2]
    assert (await incident.row()).lost == 0


async def test_an_entry_added_within_a_look_is_no_loss(incident: Incident) -> None:
    """The batch ended at the first look's last id, and the entries were counted by the second one."""
    await incident.here.add(1)
    worker = incident.worker()
    await worker.carry()
    await incident.here.add(2)
    worker.in_the_next_look(2, lambda: incident.here.add(3))
    await worker.write(await worker.read())
    row = await incident.row()
    assert (row.last, row.entries_read, row.lost, row.gaps) == (at(2), 2, 0, 0)


@pytest.mark.parametrize("replica_has", [[], [1]])
async def test_entries_that_a_lagging_replica_does_not_have_are_not_skipped(
    incident: Incident, elsewhere: Place, replica_has: list[int]
) -> None:
    """A proxy asked a replica for XRANGE: its empty answer was taken for "nothing there"."""
    await incident.here.add(1, 2, 3)
    await elsewhere.add(*replica_has)
    worker, replica = (
        incident.worker(),
        StreamWorker(incident.world.environment | SETTINGS | {"REDIS_URL": elsewhere.url}),
    )
    send = worker.connection.send

    async def through_the_proxy(commands: Any, timeout: float) -> Any:
        replies = await send(commands, timeout)
        if len(commands) == 3:
            (replies[1],) = await replica.connection.send([commands[1]], timeout)
        return replies

    worker.connection.send = through_the_proxy
    assert is_hold(await worker.carry(), "does not keep commands together")
    assert (await incident.row()).last == BEGINNING
    await replica.close()
    worker.connection.send = send
    assert await worker.carry() == Idle()
    assert await incident.carried() == [1, 2, 3]


async def test_only_the_first_run_of_a_look_writes(incident: Incident, elsewhere: Place) -> None:
    """The second one trimmed and created, too: looks disagreed with themselves."""
    await elsewhere.redis.config_set("stream-node-max-entries", 1)
    settings = {"REDIS_URL": elsewhere.url, "CHUNK_REQUESTS_STREAM_KEEP": "1ms"}
    await elsewhere.add(1, 2)
    worker = incident.worker(**settings)
    looker, row = worker.source._looker, await worker.source._read_row()
    await looker.peek(row)
    assert await elsewhere.redis.xinfo_groups(elsewhere.stream) == []
    await worker.write(await worker.read())
    await looker.peek(await worker.source._read_row())
    assert await elsewhere.redis.xlen(elsewhere.stream) == 2
    assert await elsewhere.mirrored() == BEGINNING
    await worker.read()
    assert await elsewhere.redis.xlen(elsewhere.stream) == 1
    assert await elsewhere.mirrored() == at(2)


async def test_at_maxmemory_entries_are_carried(incident: Incident, elsewhere: Place) -> None:
    """Redis refuses MULTI and scripts at maxmemory. Carrying is what ends it."""
    await elsewhere.redis.config_set("stream-node-max-entries", 1)
    await elsewhere.add(1, 2, 3)
    await elsewhere.redis.config_set("maxmemory", 1)
    with pytest.raises(aioredis.ResponseError, match="maxmemory"):
        await elsewhere.add(4)
    assert await incident.worker(REDIS_URL=elsewhere.url, CHUNK_REQUESTS_STREAM_KEEP="1ms").carry() == Idle()
    assert await incident.carried() == [1, 2, 3]
    assert await elsewhere.redis.xlen(elsewhere.stream) == 1


# Trimming


@pytest.mark.parametrize("acknowledges", [False, True])
async def test_trimming_keeps_what_another_group_needs(
    incident: Incident, elsewhere: Place, acknowledges: bool
) -> None:
    await elsewhere.redis.config_set("stream-node-max-entries", 1)
    await elsewhere.add(1, 2, 3, 4, 5)
    await elsewhere.redis.xgroup_create(elsewhere.stream, "another", "0")
    worker = incident.worker(REDIS_URL=elsewhere.url, CHUNK_REQUESTS_STREAM_KEEP="1ms")
    assert await worker.carry() == Idle()
    assert await elsewhere.redis.xlen(elsewhere.stream) == 5
    await elsewhere.redis.xreadgroup("another", "reader", {elsewhere.stream: ">"}, count=3)
    if acknowledges:
        await elsewhere.redis.xack(elsewhere.stream, "another", str(at(1)))
    await worker.carry()
    # It has not acknowledged the first one, or the second.
    assert [number async for number in _numbers(elsewhere)] == ([2, 3, 4, 5] if acknowledges else [1, 2, 3, 4, 5])
    await elsewhere.redis.xgroup_destroy(elsewhere.stream, "another")
    await worker.carry()
    assert [number async for number in _numbers(elsewhere)] == [5]
    assert await incident.carried() == [1, 2, 3, 4, 5]


async def test_nothing_is_trimmed_by_the_position_on_another_server(incident: Incident, elsewhere: Place) -> None:
    """It deleted there what should have been on hold."""
    await elsewhere.redis.config_set("stream-node-max-entries", 1)
    await incident.here.add(4, 5)
    worker = incident.worker(CHUNK_REQUESTS_STREAM_KEEP="1ms")
    await worker.carry()
    await elsewhere.add(1, 2, 3, 6)
    incident.name.move_to(elsewhere.url)
    await worker.connection.drop()
    assert is_hold(await worker.carry(), NOT_THE_STREAM)
    assert [number async for number in _numbers(elsewhere)] == [1, 2, 3, 6]


# The position


@pytest.mark.parametrize("lands", [False, True])
async def test_a_worker_that_restarts_after_a_commit_without_an_answer_goes_on_exactly(
    incident: Incident, lands: bool
) -> None:
    await incident.here.add(1, 2)
    await incident.here.add(3, document=poison)
    async with Proxy(incident.world.database_url) as postgres:
        worker = incident.worker(DATABASE_URL=postgres.url)
        batch = await worker.read()
        postgres.lose_answer_to(b"COMMIT" if lands else b"INSERT INTO chunk_requests")
        with pytest.raises(Unavailable):
            await worker.write(batch)
        if lands:
            async with asyncio.timeout(10):
                while await incident.carried() != [1, 2]:
                    await asyncio.sleep(0.02)
    assert await (await incident.successor()).carry() == Idle()
    assert await incident.carried() == [1, 2, 3]
    assert (await incident.row()).entries_read == 3


async def test_a_restored_database_carries_again_what_the_stream_still_has(incident: Incident) -> None:
    await incident.here.add(1, 2)
    worker = incident.worker()
    await worker.carry()
    row = await incident.world.sql.fetchrow("SELECT * FROM stream_positions")
    await incident.here.add(3, 4)
    await worker.carry()
    await incident.here.redis.xdel(incident.here.stream, str(at(3)))
    async with incident.world.sql.transaction():
        await incident.world.sql.execute("DELETE FROM stream_positions")
        await incident.world.sql.copy_records_to_table("stream_positions", records=[tuple(row.values())])
        await incident.world.sql.execute("DELETE FROM chunk_requests WHERE path IN ('/#3', '/#4')")
    assert await (await incident.successor()).carry() == Idle()
    assert await incident.carried() == [1, 2, 4]
    assert (await incident.row()).lost == 1


# Losses


async def test_the_first_start_counts_no_history_as_lost(incident: Incident) -> None:
    await incident.here.add(1, 2, 3, 4, 5)
    await incident.here.redis.xtrim(incident.here.stream, maxlen=2, approximate=False)
    await incident.worker().carry()
    assert await incident.carried() == [4, 5]
    row = await incident.row()
    assert (row.lost, row.gaps, row.entries_read) == (0, 0, 5)


@pytest.mark.parametrize("deleted", [[2], [3], [2, 3], [1, 2, 3]])
async def test_entries_deleted_unread_are_counted(incident: Incident, deleted: list[int]) -> None:
    """Deleted in the tail, they were never seen; with the stream trimmed empty, they were never counted."""
    await incident.here.add(1)
    worker = incident.worker()
    await worker.carry()
    await incident.here.add(2, 3)
    await incident.here.redis.xdel(incident.here.stream, *(str(at(number)) for number in deleted))
    assert await worker.carry() == Idle()
    row = await incident.row()
    assert (row.last, row.lost, row.gaps) == (at(3), len({2, 3}.intersection(deleted)), 0)


# The operator's decision


def adjustment_of(worker: StreamWorker) -> Adjustment:
    """What `streams --set` uses."""
    return Adjustment(
        database=worker.database,
        position=worker.source._position,
        looker=worker.source._looker,
        pipeline="chunk_requests",
    )


async def hold_new_entries_of_a_late_clock(incident: Incident) -> StreamWorker:
    """Entries 1, 2 and 5 are carried, Redis went back to 2, and 3 and 4 are new."""
    await incident.here.add(1, 2)
    worker = incident.worker()
    await worker.carry()
    copy = await incident.here.dump()
    await incident.here.add(5)
    await worker.carry()
    await incident.here.restore(copy)
    await worker.carry()
    await incident.here.add(3, 4)
    assert is_hold(await worker.carry(), CARRIED_ALREADY)
    return worker


async def test_a_position_that_is_set_ends_the_hold(incident: Incident) -> None:
    """`high` and the number of entries read stayed: its own hold never ended, and losses were wrong."""
    worker = await hold_new_entries_of_a_late_clock(incident)
    adjustment = adjustment_of(worker)
    change = await adjustment.preview(str(at(2)))
    assert (change.before, change.entries) == (at(2), 0)
    await adjustment.set(change)
    assert await (await incident.successor()).carry() == Idle()
    assert await incident.carried() == [1, 2, 3, 4, 5]
    row = await incident.row()
    assert (row.high, row.lost, row.gaps, row.entries_read) == (None, 0, 1, 4)


async def test_a_crash_while_a_position_is_set_leaves_a_hold(incident: Incident) -> None:
    """The group was written first: after a crash the hold was lifted, at the old position."""
    worker = await hold_new_entries_of_a_late_clock(incident)
    adjustment = adjustment_of(worker)
    worker.connection.send = _refuse(worker.connection.send, "EVAL")
    with pytest.raises(RedisUnavailable):
        await adjustment.set(await adjustment.preview(str(at(2))))
    assert is_hold(await (await incident.successor()).carry(), NOT_THE_STREAM)
    assert await incident.carried() == [1, 2, 5]


async def test_a_batch_that_was_read_before_a_position_was_set_does_not_fit(incident: Incident) -> None:
    await incident.here.add(1, 2)
    worker = incident.worker()
    await worker.carry()
    await incident.here.add(3)
    batch = await worker.read()
    adjustment = adjustment_of(incident.worker())
    await adjustment.set(await adjustment.preview(str(at(2))))
    assert await worker.write(batch) == NotClaimed()
    assert await worker.carry() == Idle()
    assert await incident.carried() == [1, 2, 3]


async def test_a_name_that_moves_back_after_a_position_was_set_is_a_hold(incident: Incident, elsewhere: Place) -> None:
    """The position was set to 0 for one Redis, and the other one was carried again from its beginning."""
    await elsewhere.add(1, 2)
    await incident.here.add(3, as_id=str(at(1)))
    incident.name.move_to(elsewhere.url)
    worker = incident.worker()
    await worker.write(await worker.read())
    incident.name.move_to(incident.here.url)
    await worker.connection.drop()
    assert is_hold(await worker.carry(), NOT_THE_STREAM)
    adjustment = adjustment_of(worker)
    await adjustment.set(await adjustment.preview("0"))
    incident.name.move_to(elsewhere.url)
    await worker.connection.drop()
    assert is_hold(await worker.carry(), OTHER_DATABASE)
    incident.name.move_to(incident.here.url)
    await worker.connection.drop()
    assert await worker.carry() == Idle()
    assert await incident.carried() == [1, 2, 3]


def _refuse(send: Any, name: str) -> Any:
    async def refuse(commands: Any, timeout: float) -> Any:
        if commands[0][0] == name:
            raise RedisUnavailable("injected")
        return await send(commands, timeout)

    return refuse
