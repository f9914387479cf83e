"""The rights in deploy/ are sufficient, each of them is needed, and a missing one is named.

The tests marked `on_open_and_guarded_servers` check that these rights are sufficient for everything else.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import redis.asyncio as aioredis

from tests.support import bars
from tests.support.grpc_calls import connect, log_metric
from tests.support.guarded import DEPLOY, GuardedServers
from tests.support.records import Records, make_document
from tests.support.tls import Certificates, TlsFront
from tests.support.world import CliWorker, InProcessWorker, World
from worker import SyncViewProducer, ViewProducer
from worker.db.counters.history import History
from worker.db.counters.ledger import Ledger
from worker.db.rights import RIGHTS, STREAM_RIGHTS, TICKET_RIGHTS, rights_on_records
from worker.db.schema import VERSION_TABLE
from worker.db.tables import metadata
from worker.dev.servers import free_port
from worker.errors import DatabaseUnavailable
from worker.pipelines.records import RECORD_TYPES

Start = Callable[..., CliWorker]
GRANTS = "SELECT table_name, privilege_type FROM information_schema.role_table_grants WHERE grantee = 'viewer_worker'"


@pytest.fixture
async def world(guarded: GuardedServers) -> AsyncIterator[World]:
    async with guarded.world() as made:
        yield made


async def use_every_right(worker: InProcessWorker, world: World) -> None:
    """Do everything that the worker does with its tables: lease, marker, flush, replay, history, retention.

    And change to another Redis and back.
    """
    assert await worker.counters.lease.take()
    for vod_id in ("a", "b"):
        await world.view(vod_id)
        await worker.counters.loop.cycle()
        worker.counters.loop.sweep_soon()
    before = await world.marker()
    await world.view("b")
    await worker.counters.loop.cycle()
    # Redis is restored to its state before the last flush.
    assert before is not None
    await world.redis.set(world.keys.marker, before.encode())
    await world.redis.set(world.prefix + "b", "1")
    await worker.counters.loop.cycle()
    marker = await world.marker()
    assert marker is not None
    await world.sql.execute("UPDATE view_count_sources SET replid = 'another Redis'")
    await world.redis.delete(world.keys.marker)
    await worker.counters.loop.cycle()
    await world.redis.set(world.keys.marker, marker.encode())
    await worker.counters.loop.cycle()
    async with worker.database.transaction() as tx:
        await History("default").roll_up(tx, at_most=100)  # if the loop could not
        await Ledger("default", "me").prune(tx, done_id=2, age=timedelta(0), at_most=100)
    await worker.counters.lease.release()


async def test_role_has_the_rights_that_the_worker_checks_and_no_others(world: World) -> None:
    granted = {(row["table_name"], row["privilege_type"]) for row in await world.sql.fetch(GRANTS)}
    needed = RIGHTS | STREAM_RIGHTS | TICKET_RIGHTS | rights_on_records(RECORD_TYPES.values())
    assert granted == {(table, right) for table in needed for right in needed[table]} | {(VERSION_TABLE, "SELECT")}
    assert {*needed} == {*metadata.tables, *RECORD_TYPES}


async def test_role_can_do_all_that_the_worker_does_with_its_tables(world: World) -> None:
    await use_every_right(world.worker(), world)
    assert await world.totals() == world.truth
    assert not await world.pending()


async def test_role_can_replay_and_purge_dead_letters_and_delete_old_rows(world: World) -> None:
    """Locking letters needs UPDATE, which the role does not have: old ones stayed for ever."""
    records = Records(world)
    for path in ("/a", "/b"):
        await records.add_bad(make_document(0, path=path, time="not a time"))
    async with records.carrier().running():
        await records.wait(lambda: has_letters(records, 2))
    await world.sql.execute("UPDATE dead_letters SET payload = $1 WHERE id = 1", make_document(0).encode())
    await world.sql.execute("UPDATE dead_letters SET received_at = now() - interval '31 days' WHERE id = 2")
    await world.sql.execute("INSERT INTO chunk_requests VALUES ('2020-01-01', '/old')")
    replay = records.start("dead-letters", "replay", "1")
    assert await replay.wait() == 0, replay.log
    carrier = records.carrier(CHUNK_REQUESTS_RETENTION="2y")
    async with carrier.running():
        await records.wait(lambda: has_letters(records, 0))
    assert [row["path"] for row in await world.sql.fetch("SELECT path FROM chunk_requests")] == ["/0"]
    records.close()


async def test_role_and_users_can_carry_bars_and_replace_them_and_take_metrics(
    guarded: GuardedServers, world: World, start: Start
) -> None:
    url = f"{guarded.application_redis_url}?ssl_ca_certs={guarded.authority}"
    port = free_port()
    settings = {"PIPELINES": "bars_1m,metrics", "BARS_DB_WRITE_INTERVAL": "10ms", "GRPC_PORT": str(port)}
    worker = start(world.environment | settings, "run")
    async with connect(port) as channel:
        await asyncio.wait_for(channel.channel_ready(), 20)
        await log_metric(channel)
        while not await world.sql.fetchval("SELECT count(*) FROM metrics"):
            await asyncio.sleep(0.05)
    async with aioredis.from_url(url) as application:
        for number in (2, 1):
            await application.xadd("bars_1m", {"data": json.dumps(bars.make_document("A", number))})
            async with asyncio.timeout(20):
                while await bars.stored_bars(world.sql) != [bars.make_bar("A", number)]:
                    await asyncio.sleep(0.05)
    worker.terminate()
    assert await worker.wait() == 0
    denied = await world.redis.acl_log()  # type: ignore[no-untyped-call]
    assert [entry for entry in denied if entry["username"] == "viewer-worker"] == []
    await world.redis.delete("bars_1m", "metrics")


async def test_role_and_users_can_store_view_events_of_the_channel_and_prune_tickets(
    guarded: GuardedServers, world: World, start: Start
) -> None:
    await world.sql.execute("INSERT INTO ingest_batches VALUES (gen_random_uuid(), 'old', now() - interval '2 days')")
    url = f"{guarded.application_redis_url}?ssl_ca_certs={guarded.authority}"
    events = {"PIPELINES": "view_events", "VIEW_EVENTS_FLUSH_INTERVAL": "10ms"}
    await world.sql.execute("REVOKE DELETE ON ingest_batches FROM viewer_worker")
    findings = await check(world, start, **events)
    assert findings["record tables"] == ("failure", "this role lacks DELETE on ingest_batches")
    assert findings["redis rights"][0] == "ok"
    await world.sql.execute("GRANT DELETE ON ingest_batches TO viewer_worker")
    worker = start(world.environment | events, "run")
    await worker.wait_for_log('"listening"')
    async with aioredis.from_url(url) as application:
        await application.publish("view_count_updates", '{"vodId":"a","count":2}')
    async with asyncio.timeout(20):
        while [row["count"] for row in await world.sql.fetch("SELECT count FROM view_events")] != [2]:
            await asyncio.sleep(0.05)
        while await world.sql.fetchval("SELECT count(*) FROM ingest_batches WHERE pipeline = 'old'"):
            await asyncio.sleep(0.05)
    worker.terminate()
    assert await worker.wait() == 0
    denied = await world.redis.acl_log()  # type: ignore[no-untyped-call]
    assert [entry for entry in denied if entry["username"] == "viewer-worker"] == []


async def has_letters(records: Records, count: int) -> bool:
    return len(await records.letters()) == count


@pytest.mark.parametrize(("table", "right"), [(table, right) for table in RIGHTS for right in RIGHTS[table]])
async def test_each_right_of_the_role_is_needed(world: World, table: str, right: str) -> None:
    await world.sql.execute(f"REVOKE {right} ON {table} FROM viewer_worker")
    with pytest.raises(DatabaseUnavailable, match=f"permission denied for table {table}"):
        await use_every_right(world.worker(), world)


async def test_each_command_of_the_acl_user_is_needed(guarded: GuardedServers, start: Start) -> None:
    line = re.search(r"^user viewer-worker .*$", (DEPLOY / "redis" / "users.acl").read_text(), re.MULTILINE)
    assert line is not None
    granted = set(re.findall(r"\+([a-z|]+)", line.group()))
    async with guarded.world(database=1) as world:
        await world.view("a")
        # Trimmed, where no other group needs it.
        await world.redis.xadd(world.stream, {"data": "not json"}, id="1-1")
        await world.redis.xgroup_create(world.stream, "another", "$")
        await world.redis.script_flush()
        await world.redis.config_resetstat()
        port = free_port()
        settings = {"PIPELINES": "view_counts,chunk_requests,metrics", "CHUNK_REQUESTS_STREAM_KEEP": "1s"}
        worker = start(world.environment | settings | {"GRPC_PORT": str(port)}, "run")
        await worker.wait_for_log("batch flushed")
        async with connect(port) as channel:
            await log_metric(channel)
        await worker.wait_for_log('"redis ok"')
        while not await world.sql.fetchval("SELECT count(*) FROM dead_letters"):
            await asyncio.sleep(0.05)
        setting = start(world.environment | settings, "streams", "--set", world.stream, "0", "--yes")
        assert await setting.wait() == 0, setting.log
        while await world.sql.fetchval("SELECT count(*) FROM dead_letters") < 2:
            await asyncio.sleep(0.05)
        # A command that blocks is counted when an entry ends it.
        while "cmdstat_xread" not in await world.redis.info("commandstats"):
            await world.redis.xadd(world.stream, {"data": "not json"})
            await asyncio.sleep(0.2)
        worker.terminate()
        assert await worker.wait() == 0
        used = {name.removeprefix("cmdstat_") for name in await world.redis.info("commandstats")}
        assert await world.redis.acl_log() == []  # type: ignore[no-untyped-call]
        await world.redis.delete("metrics")
    assert granted <= used


async def test_application_s_user_can_record_and_publish_views(
    guarded: GuardedServers, world: World, start: Start
) -> None:
    url = f"{guarded.application_redis_url}?ssl_ca_certs={guarded.authority}"
    async with ViewProducer(url, raise_errors=True, timeout=5) as producer:
        await producer.record_many({"a": 2, "b": 1})
    with SyncViewProducer(url, raise_errors=True, timeout=5) as blocking:
        await asyncio.to_thread(blocking.record, "a")
    publish = start({"REDIS_URL": url}, "publish", "a")
    assert await publish.wait() == 0, publish.log
    assert await world.pending() == Counter(a=4, b=1)
    assert await world.redis.acl_log() == []  # type: ignore[no-untyped-call]


async def test_missing_right_is_named_and_waited_for(world: World, start: Start) -> None:
    await world.sql.execute("REVOKE INSERT, UPDATE ON view_counts FROM viewer_worker")
    await world.view("a", 3)
    worker = start(world.environment, "run")
    failing = json.loads(await worker.wait_for_log('"schema failing"'))
    assert failing["cause"] == "this role lacks INSERT on view_counts, UPDATE on view_counts"
    assert "role.sql" in failing["remedy"]
    await world.sql.execute("GRANT INSERT, UPDATE ON view_counts TO viewer_worker")
    await worker.wait_for_log("batch flushed")
    worker.terminate()
    assert await worker.wait() == 0
    await world.assert_exact()


async def test_check_names_the_missing_rights(world: World, start: Start) -> None:
    await world.sql.execute("REVOKE DELETE ON view_count_flushes FROM viewer_worker")
    await world.redis.execute_command("ACL SETUSER viewer-worker -decrby -del")
    findings = await check(world, start)
    assert findings["schema"] == ("failure", "this role lacks DELETE on view_count_flushes")
    assert findings["redis rights"] == ("failure", "the user may not run DECRBY, DEL on the worker's keys and channels")

    await world.sql.execute(f"REVOKE ALL ON {VERSION_TABLE} FROM viewer_worker")
    await world.redis.execute_command("ACL SETUSER viewer-worker -eval -evalsha")
    findings = await check(world, start)
    assert findings["schema"] == ("failure", f"this role lacks SELECT on {VERSION_TABLE}")
    assert "'evalsha'" in findings["redis"][1]


async def test_missing_right_to_wait_for_entries_is_named_and_they_are_carried(world: World, start: Start) -> None:
    await world.redis.execute_command("ACL SETUSER viewer-worker -xread")
    await world.redis.execute_command("ACL SETUSER viewer-worker clearselectors")
    findings = await check(world, start, PIPELINES="metrics", GRPC_PORT="50051")
    denied = "the user may not run XADD, XREAD on the worker's keys and channels"
    assert findings["redis rights"] == ("failure", denied)
    streams = {"PIPELINES": "chunk_requests"}
    findings = await check(world, start, **streams)
    assert findings["redis rights"] == ("failure", "the user may not run XREAD on the worker's keys and channels")
    worker = start(world.environment | streams, "run")
    warning = json.loads(await worker.wait_for_log("new entries are found late"))
    assert (warning["level"], warning["stream"], warning["right"]) == ("warning", world.stream, "xread")
    assert "users.acl" in warning["remedy"]
    await world.redis.xadd(world.stream, {"data": "not json"})
    while not await world.sql.fetchval("SELECT count(*) FROM dead_letters"):
        await asyncio.sleep(0.05)
    worker.terminate()
    assert await worker.wait() == 0
    assert worker.log.count("new entries are found late") == 1


async def check(world: World, start: Start, **settings: str) -> dict[str, tuple[str, str]]:
    """Name of the finding → level, what was found."""
    checking = start(world.environment | settings, "check", "--json")
    assert await checking.wait() in (1, 69), checking.log
    assert checking.process.stdout is not None
    return {found["name"]: (found["level"], found["found"]) for found in json.load(checking.process.stdout)}


async def test_denied_redis_command_is_reported_with_a_fix_and_loses_nothing(world: World, start: Start) -> None:
    await world.redis.execute_command("ACL SETUSER viewer-worker -decrby")
    await world.view("a", 3)
    worker = start(world.environment, "run")
    failed = json.loads(await worker.wait_for_log('"view_counts failing"'))
    assert "decrby" in failed["cause"]
    assert "users.acl" in failed["remedy"]
    assert "Traceback" not in worker.log
    await world.redis.execute_command("ACL LOAD")
    await worker.wait_for_log('"view_counts ok"')
    worker.terminate()
    assert await worker.wait() == 0
    await world.assert_exact()


async def test_role_cannot_migrate_and_the_error_names_the_missing_right(
    guarded: GuardedServers, world: World, start: Start
) -> None:
    await world.sql.execute("DROP TABLE viewer_worker_schema")
    migrate = start(world.environment, "migrate")
    assert await migrate.wait() == 69
    assert "permission denied for schema public" in migrate.log
    assert "To migrate, a role needs CREATE on the schema" in migrate.log
    assert "Traceback" not in migrate.log


async def test_servers_with_a_certificate_of_another_authority_are_refused(world: World, start: Start) -> None:
    other_authority = Certificates()
    fronts = [TlsFront(other_authority, server_port, postgres=postgres) for server_port, postgres in world_ports(world)]
    environment = dict(world.environment)
    for name, front in zip(("REDIS_URL", "DATABASE_URL"), fronts, strict=True):
        environment[name] = re.sub(r"@127\.0\.0\.1:\d+", f"@127.0.0.1:{front.port}", environment[name])
    worker = start(environment, "run")
    for check in ("redis", "postgres"):
        failing = json.loads(await worker.wait_for_log(f'"{check} failing"'))
        assert "certificate verify failed" in failing["cause"].lower()
    worker.terminate()
    assert await worker.wait() == 0
    for front in fronts:
        front.close()


def world_ports(world: World) -> list[tuple[int, bool]]:
    """Where Redis and Postgres listen without TLS."""
    redis, postgres = urlsplit(world.redis_url).port, urlsplit(world.database_url).port
    assert redis is not None
    assert postgres is not None
    return [(redis, False), (postgres, True)]


async def test_certificate_of_another_host_is_refused(world: World, start: Start) -> None:
    environment = {name: value.replace("@127.0.0.1:", "@localhost:") for name, value in world.environment.items()}
    once = start(environment, "run", "--once")
    assert await once.wait() == 69
    assert "certificate is not valid for 'localhost'" in once.log


async def test_db_group_with_a_password_file_and_verified_tls(
    guarded: GuardedServers, world: World, start: Start, tmp_path: Path
) -> None:
    address = urlsplit(world.environment["DATABASE_URL"])
    password = tmp_path / "password"
    password.write_text(f"{address.password}\n")
    environment = {name: value for name, value in world.environment.items() if name != "DATABASE_URL"} | {
        "DB_HOST": "127.0.0.1",
        "DB_PORT": str(address.port),
        "DB_USER": "viewer_worker",
        "DB_PASSWORD_FILE": str(password),
        "DB_NAME": address.path.removeprefix("/"),
        "DB_SSL_MODE": "verify-full",
        "PGSSLROOTCERT": str(guarded.authority),
    }
    await world.view("a", 2)
    once = start(environment, "run", "--once")
    assert await once.wait() == 0, once.log
    await world.assert_exact()


async def test_certificate_is_verified_against_the_authorities_of_the_system(
    guarded: GuardedServers, world: World, start: Start
) -> None:
    url = world.environment["DATABASE_URL"].partition("?")[0]
    environment = world.environment | {"DATABASE_URL": f"{url}?sslrootcert=system"}
    refused = start(environment, "run", "--once")
    assert await refused.wait() == 69
    assert "certificate verify failed" in refused.log
    once = start(environment | {"SSL_CERT_FILE": str(guarded.authority)}, "run", "--once")
    assert await once.wait() == 0, once.log
