"""`viewer-worker check`: checks everything that the worker relies on, and says how to fix what is wrong."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from worker.db.rights import STREAM_RIGHTS, TICKET_RIGHTS, missing_rights, missing_tables, rights_on_records
from worker.db.schema import GRANT, read_schema, read_versions
from worker.errors import SchemaNotCurrent, TargetUnusable
from worker.redis.scripts import LuaScript

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from worker.contract.keys import Keys
    from worker.counters.adopt import Adoption
    from worker.db.session import Database
    from worker.db.target.table import TargetTable
    from worker.pipelines.model import RecordType
    from worker.pipelines.sources.stream.adjust import Adjustment
    from worker.redis.client import RedisClient

RIGHTS = LuaScript.load(Path(__file__).with_name("rights.lua"))
OLDEST_REDIS = (6, 2)
OLDEST_POSTGRES = 150_000


class Level(StrEnum):
    OK = "ok"
    WARNING = "warning"
    FAILURE = "failure"


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check: what was found, and how to fix it (empty when nothing is wrong)."""

    name: str
    level: Level
    found: str
    remedy: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class RedisNames:
    """What the worker uses in Redis, beside its keys. `message_channel`: empty if it does not listen."""

    totals_channel: str
    message_channel: str
    streams: Sequence[str]
    appended: Sequence[str]


async def check_postgres(database: Database, target: TargetTable | None) -> list[Finding]:
    """Check Postgres and `target`, the application's own table (None: not used). Raises DatabaseUnavailable."""
    async with database.transaction() as tx:
        number, version, timescale = await read_versions(tx)
        schema = await read_schema(tx)
    findings = [Finding("postgres version", Level.OK, version)]
    if number < OLDEST_POSTGRES:
        findings = [Finding("postgres version", Level.FAILURE, version, "Use PostgreSQL 15 or newer.")]
    kind = f"{timescale}: tables by time are hypertables" if timescale else "not installed: tables by time are plain"
    findings.append(Finding("timescaledb", Level.OK, kind))
    try:
        schema.require_current()
        findings.append(Finding("schema", Level.OK, f"revision {schema.current}"))
    except SchemaNotCurrent as error:
        findings.append(Finding("schema", Level.FAILURE, str(error), error.remedy))
    return findings if target is None else [*findings, await _target(database, target)]


async def _target(database: Database, target: TargetTable) -> Finding:
    try:
        async with database.transaction() as tx:
            await target.check(tx)
    except TargetUnusable as error:
        return Finding("target table", Level.FAILURE, str(error), error.remedy)
    return Finding("target table", Level.OK, f"{target.names}.{target.names.column} fits")


async def check_record_tables(
    database: Database, records: Sequence[RecordType[Any]], *, takes_tickets: bool
) -> list[Finding]:
    """Check the rights on the tables of the pipelines that are carried. Raises DatabaseUnavailable."""
    if not records:
        return []
    needed = STREAM_RIGHTS | rights_on_records(records) | (TICKET_RIGHTS if takes_tickets else {})
    async with database.transaction() as tx:
        gone = await missing_tables(tx, list(needed))
        lacking = await missing_rights(tx, needed)
    if gone:
        return [Finding("record tables", Level.FAILURE, f"there is no table {', '.join(gone)}", "Create it again.")]
    if lacking:
        return [Finding("record tables", Level.FAILURE, f"this role lacks {', '.join(lacking)}", GRANT)]
    return [Finding("record tables", Level.OK, "the role may read and write them")]


async def check_streams(adjustments: Iterable[Adjustment]) -> list[Finding]:
    """Check whether each stream can be carried. Raises Unavailable."""
    findings = []
    for adjustment in adjustments:
        state, name = await adjustment.look(), f"stream {adjustment.position.stream}"
        if state.remedy:
            findings.append(Finding(name, Level.FAILURE, state.problem, state.remedy))
        elif state.problem:
            findings.append(Finding(name, Level.OK, state.problem))
        else:
            findings.append(Finding(name, Level.OK, f"carried to {state.row.last}; waiting entries: {state.backlog}"))
    return findings


async def check_redis(redis: RedisClient, keys: Keys, used: RedisNames) -> list[Finding]:
    """Check Redis. Raises RedisUnavailable."""
    facts = await redis.info()
    rights = await _rights(redis, keys, used)
    return [_redis_version(facts), _role(facts), *rights, _eviction(facts), _persistence(facts)]


def shared_channel(channel: str) -> Finding:
    """Warn that the worker may receive messages about keys of other workers."""
    found = f"{channel} is the default channel, but the key prefix or the Redis database is not the default"
    remedy = "What producers of other keys publish there counts here, too. Give each worker its own VIEW_CHANNEL."
    return Finding("view channel", Level.WARNING, found, remedy)


async def _rights(redis: RedisClient, keys: Keys, used: RedisNames) -> list[Finding]:
    asked = (keys.marker, keys.probe, keys.counter("check"), *(stream.encode() for stream in used.streams))
    names_only = (used.totals_channel, used.message_channel, *used.appended)
    denied: list[bytes] | None = await redis.run(RIGHTS, asked, [name.encode() for name in names_only])
    if denied is None:
        return []
    if not denied:
        return [Finding("redis rights", Level.OK, "the user may run all commands that the worker needs")]
    names = ", ".join(sorted({name.decode() for name in denied}))
    cause = f"the user may not run {names} on the worker's keys and channels"
    remedy = "Grant the rights of the user in deploy/redis/users.acl."
    return [Finding("redis rights", Level.FAILURE, cause, remedy)]


def _redis_version(facts: dict[str, Any]) -> Finding:
    version = str(facts.get("redis_version", "0"))
    shown = f"{facts.get('server_name', 'redis')} {facts.get('valkey_version', version)}"
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdecimal())
    if numbers < OLDEST_REDIS:
        return Finding("redis version", Level.FAILURE, shown, "Use Redis 6.2 or newer, or Valkey.")
    return Finding("redis version", Level.OK, shown)


def _role(facts: dict[str, Any]) -> Finding:
    role = str(facts.get("role"))
    if role == "master":
        return Finding("redis role", Level.OK, role)
    return Finding("redis role", Level.FAILURE, role, "Point REDIS_URL at the master, or use redis+sentinel://.")


def _eviction(facts: dict[str, Any]) -> Finding:
    policy, limit = str(facts.get("maxmemory_policy", "unknown")), facts.get("maxmemory", 0)
    if policy.startswith("allkeys"):
        remedy = "Views can be evicted before they are flushed. Set maxmemory-policy to noeviction or volatile-*."
        return Finding("redis eviction", Level.FAILURE if limit else Level.WARNING, policy, remedy)
    return Finding("redis eviction", Level.OK, policy)


def _persistence(facts: dict[str, Any]) -> Finding:
    if facts.get("aof_enabled"):
        return Finding("redis persistence", Level.OK, "AOF is on")
    remedy = "Views that are not flushed yet are lost when Redis crashes. Set appendonly yes."
    saved = "AOF is off" + (
        ", snapshots are taken" if facts.get("rdb_last_save_time") and facts.get("rdb_saves") else ""
    )
    return Finding("redis persistence", Level.WARNING, saved, remedy)


async def check_agreement(adoption: Adoption) -> list[Finding]:
    """Check that the marker in Redis agrees with the ledger in Postgres. Raises Unavailable."""
    situation = await adoption.look()
    pending = f"pending views: {situation.pending_views}, pending ids: {len(situation.pending)}"
    if situation.hold is not None:
        return [Finding("marker", Level.FAILURE, situation.hold.cause, situation.hold.remedy)]
    if situation.marker is None:
        return [Finding("marker", Level.OK, f"none yet, the first flush creates it; {pending}")]
    flushes = situation.row.last_flush_id
    return [Finding("marker", Level.OK, f"Redis and Postgres agree; flushes: {flushes}, {pending}")]
