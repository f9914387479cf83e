"""The fix that comes with an error speaks of that error."""

from __future__ import annotations

import re
import ssl
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import asyncpg
import hiredis
import pytest
from redis._parsers.base import BaseParser
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import InvalidResponse
from sqlalchemy.exc import TimeoutError as PoolTimeout

from tests.support.fakes import FakeClock
from tests.unit.test_error_classes import raised, refused
from worker.app.checkup import Level, failure
from worker.db.errors import MIGRATE_REMEDY, REMEDIES, RIGHTS_REMEDY, TLS_REMEDY, database_errors
from worker.db.target.names import TargetNames
from worker.db.target.table import TargetTable
from worker.db.upsert import RecordTable
from worker.errors import (
    DatabaseRefused,
    DatabaseUnavailable,
    RedisUnavailable,
    TableRefused,
    ViewerWorkerError,
    ViewNotRecorded,
    WriteTooSlow,
)
from worker.pipelines.records.chunk_requests import CHUNK_REQUESTS
from worker.pipelines.sink import PostgresSink
from worker.producer.transaction import raise_unless_applied
from worker.redis.address import parse_redis_url
from worker.redis.errors import LOGIN, MASTER, NOT_REDIS, REFUSALS, REFUSED, RIGHT, TLS, redis_errors, remedy_for

# What Redis and Valkey send → a word of its fix.
REPLIES = {
    "OOM command not allowed when used memory > 'maxmemory'.": "maxmemory",
    "OOM command not allowed when used memory > 'maxmemory'. script: 1ac6, on @user_script:1.": "maxmemory",
    "ERR Error running script (call to f_1ac6): @user_script:1: -OOM command not allowed when used": "maxmemory",
    "EXECABORT Transaction discarded because of: OOM command not allowed when used memory": "maxmemory",
    "MISCONF Redis is configured to save RDB snapshots, but it's currently unable to persist": "disk",
    "READONLY You can't write against a read only replica.": "master",
    "MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.": "master",
    "LOADING Redis is loading the dataset in memory": "Wait",
    "BUSY Redis is busy running a script. You can only call SCRIPT KILL or SHUTDOWN NOSAVE.": "SCRIPT KILL",
    "NOREPLICAS Not enough good replicas to write.": "replicas",
    "NOAUTH Authentication required.": "password",
    "WRONGPASS invalid username-password pair or user is disabled.": "password",
    "NOPERM User viewer has no permissions to run the 'incrby' command": "users.acl",
    "ERR ACL failure in script: User viewer has no permissions": "users.acl",
    "WRONGTYPE Operation against a key holding the wrong kind of value": "another type",
    "MOVED 3999 127.0.0.1:6381": "Cluster",
    "ERR max number of clients reached": "maxclients",
    "ERR unknown command 'x', with args beginning with: 'NOT OOM '": "6.2",
    "ERR DB index is out of range": "REDIS_URL",
    "ERR something new": "the message says why",
    "EXECABORT Transaction discarded because of previous errors.": "the message says why",
}


@pytest.mark.parametrize(("reply", "word"), REPLIES.items())
def test_redis_that_refused_need_not_be_started(reply: str, word: str) -> None:
    for error in (BaseParser.parse_error(reply), hiredis.ReplyError(reply)):
        remedy = remedy_for(error)
        assert remedy is not None
        assert word in remedy
        assert "that Redis runs" not in remedy


def test_every_fix_for_a_reply_of_redis_is_tried() -> None:
    found = {remedy_for(BaseParser.parse_error(reply)) for reply in REPLIES}
    assert found == {*REFUSALS.values(), REFUSED}
    assert {RIGHT, LOGIN, MASTER} < found


@pytest.mark.parametrize(
    ("error", "text", "remedy"),
    [
        (
            RedisConnectionError("Error 111 connecting to cache:6379. Connect call failed ('10.0.0.1', 6379)."),
            "cache:6379: Connection refused",
            RedisUnavailable.remedy,
        ),
        (
            RedisConnectionError("Error -2 connecting to cache:6379. Name or service not known."),
            "cache:6379: Name or service not known",
            RedisUnavailable.remedy,
        ),
        (
            RedisConnectionError("Error Multiple exceptions: [Errno 111] … connecting to cache:6379."),
            "cache:6379: Multiple exceptions: [Errno 111] …",
            RedisUnavailable.remedy,
        ),
        (
            RedisConnectionError("Error connecting to cache:6379."),
            "cache:6379: cannot connect",
            RedisUnavailable.remedy,
        ),
        (TimeoutError(), "cache:6379: no answer in time", RedisUnavailable.remedy),
        (ssl.SSLError(1, "certificate verify failed"), "cache:6379: certificate verify failed", TLS),
        (InvalidResponse('Protocol error, got "H"'), 'cache:6379: Protocol error, got "H"', NOT_REDIS),
        (
            BaseParser.parse_error("OOM command not allowed"),
            "cache:6379: command not allowed",
            REFUSALS["OOM"],
        ),
    ],
)
def test_error_of_redis_names_the_host_once(error: Exception, text: str, remedy: str) -> None:
    with pytest.raises(RedisUnavailable) as caught, redis_errors("cache:6379"):
        raise error
    assert (str(caught.value), caught.value.remedy) == (text, remedy)


@pytest.mark.parametrize(
    ("url", "place"),
    [
        ("redis://:hunter2@cache", "cache:6379"),
        ("rediss://me:hunter2@[::1]:7000/3", "[::1]:7000"),
        ("unix:///run/redis.sock?db=1", "/run/redis.sock"),
        ("redis+sentinel://me:hunter2@a,b:7000/main/2", "a:26379,b:7000/main"),
    ],
)
def test_place_of_redis_has_no_secret(url: str, place: str) -> None:
    assert parse_redis_url(url).place == place


def test_producer_that_redis_refuses_names_the_fix() -> None:
    oom = BaseParser.parse_error("OOM command not allowed when used memory > 'maxmemory'.")
    abort = BaseParser.parse_error("EXECABORT Transaction discarded because of previous errors.")
    with pytest.raises(ViewNotRecorded) as caught:
        raise_unless_applied([b"OK", oom, b"QUEUED", abort], 2)
    assert caught.value.remedy == REFUSALS["OOM"]


@pytest.mark.parametrize(
    ("state", "word"),
    [
        ("25006", "primary"),
        ("25P03", "CPU"),
        ("28P01", "password"),
        ("28000", "pg_hba.conf"),
        ("3D000", "database"),
        ("40001", "next try"),
        ("40P01", "next try"),
        ("42501", "role.sql"),
        ("53100", "disk"),
        ("53200", "memory"),
        ("53300", "max_connections"),
        ("55P03", "pg_locks"),
        ("57014", "slows"),
        ("57P01", "shutting down"),
        ("57P02", "crashed"),
        ("57P03", "starting"),
        ("57P05", "the message says why"),
        ("26000", "pooler"),
    ],
)
def test_postgres_that_refused_need_not_be_started(state: str, word: str) -> None:
    with pytest.raises(DatabaseUnavailable) as caught, database_errors():
        raise raised(refused(state))
    assert word in caught.value.remedy
    assert "that Postgres runs" not in caught.value.remedy


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("permission denied for schema public", MIGRATE_REMEDY),
        ('permission denied to create extension "timescaledb"', MIGRATE_REMEDY),
        ("must be owner of table view_counts", MIGRATE_REMEDY),
        ("permission denied for table view_counts", RIGHTS_REMEDY),
    ],
)
def test_missing_right_is_granted_and_only_a_migration_needs_the_owner(text: str, remedy: str) -> None:
    with pytest.raises(DatabaseUnavailable) as caught, database_errors():
        raise raised(asyncpg.PostgresError.new({"C": "42501", "M": text}))
    assert caught.value.remedy == remedy


def test_full_connection_pool_names_its_limit() -> None:
    with pytest.raises(DatabaseUnavailable) as caught, database_errors():
        raise PoolTimeout("QueuePool limit of size 1 overflow 0 reached, connection timed out, timeout 5.00")
    assert "DB_MAX_CONNECTIONS" in caught.value.remedy


async def test_table_that_another_session_uses_need_not_be_started() -> None:
    """Errors that a write translates again keep the fix of their SQLSTATE."""
    in_use = DatabaseRefused("in use")
    in_use.__cause__ = raised(refused("55006"))
    database: Any = SimpleNamespace(transaction=lambda: Raising(in_use))
    batch: Any = None
    with pytest.raises(DatabaseUnavailable) as written:
        await PostgresSink(database, CHUNK_REQUESTS, RecordTable(CHUNK_REQUESTS)).write(batch)
    assert written.value.remedy == REMEDIES[""]
    target = TargetTable(TargetNames(None, "Vod", "id", "viewCount"), FakeClock())
    with pytest.raises(DatabaseUnavailable) as added:
        target._raise_if_concerns_all(raised(refused("40P01")), 1)
    assert added.value.remedy == REMEDIES["40P01"]


class Raising:
    """A transaction that cannot be begun."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    async def __aenter__(self) -> None:
        raise self._error

    async def __aexit__(self, *_: object) -> None: ...


def test_postgres_that_cannot_be_reached_may_not_run() -> None:
    for error in (OSError(111, "Connection refused"), TimeoutError(), asyncpg.InterfaceError("closed")):
        with pytest.raises(DatabaseUnavailable) as caught, database_errors():
            raise error
        assert caught.value.remedy == DatabaseUnavailable.remedy
    with pytest.raises(DatabaseUnavailable) as caught, database_errors():
        raise ssl.SSLError(1, "certificate verify failed")
    assert caught.value.remedy == TLS_REMEDY


@pytest.mark.parametrize(
    "error",
    [
        DatabaseRefused("no column"),
        TableRefused("no table"),
        DatabaseUnavailable("denied", REMEDIES["42501"]),
        WriteTooSlow("slow"),
    ],
)
def test_check_does_not_advise_to_run_check(error: ViewerWorkerError) -> None:
    finding = failure("tables", error)
    assert (finding.level, finding.found) == (Level.FAILURE, str(error))
    assert finding.remedy
    assert "viewer-worker check" not in finding.remedy


def test_check_leaves_out_the_only_sentence_that_advises_to_run_it() -> None:
    """A fix of another module with other words for it would come through."""
    worker = Path(__file__).parents[2] / "worker"
    advice = re.compile(r"""["'. ][Rr]un:? `?viewer-worker check""")
    found = [path.name for path in worker.rglob("*.py") for _ in advice.findall(path.read_text())]
    assert found == ["errors.py"]
