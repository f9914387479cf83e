"""`viewer-worker check`: checks everything that the worker relies on, and says how to fix what is wrong."""

from __future__ import annotations

from contextlib import aclosing
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from worker.contract.durations import format_age
from worker.contract.keys import MARKER_PATTERN, OWN_KEYS
from worker.db.counters.history import History
from worker.db.counters.ledger import Flush, Ledger
from worker.db.counters.source_row import SourceRow
from worker.db.positions import StreamPosition
from worker.db.rights import STREAM_RIGHTS, TICKET_RIGHTS, missing_rights, missing_tables, rights_on_records
from worker.db.schema import GRANT, read_schema, read_versions
from worker.errors import ASK_CHECK, DatabaseRefused, SchemaNotCurrent, TargetUnusable, Unavailable
from worker.observability.printable import excerpt
from worker.observability.status import SCHEMA
from worker.redis.client import AOF_PREAMBLE
from worker.redis.scripts import LuaScript

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence

    from worker.contract.keys import Keys
    from worker.counters.adopt import Adoption
    from worker.counters.flush.reading import CounterReader
    from worker.counters.intake.backlog import Backlog
    from worker.counters.stores import Stores
    from worker.db.lease import LeasedRow
    from worker.db.session import Database, Transaction
    from worker.db.target.table import TargetTable
    from worker.errors import ViewerWorkerError
    from worker.pipelines.model import RecordType
    from worker.pipelines.sources.stream.adjust import Adjustment
    from worker.redis.client import RedisClient

RIGHTS = LuaScript.load(Path(__file__).with_name("rights.lua"))
OLDEST_REDIS = (6, 2)
# A worker that has nothing else to do adds a flush to the history at once.
HISTORY_LIMIT_S = 60.0
OLDEST_POSTGRES = 150_000
READ_ONLY = "replica-read-only"
# Part of maxmemory in use from which on Redis may soon refuse writes.
FULL = 0.9
# Counters that are read together, and quarantined ones that are shown.
READ_AT_ONCE = 1000
EXAMPLES = 5
NO_WORKER = (
    "If one should be running, look at its log and its /health: on hold, or without one of the servers, it does not "
    "hold the lease. To start one: viewer-worker run."
)
# Name of the check that writes.
WRITING = "postgres writing"


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


def failure(name: str, error: ViewerWorkerError) -> Finding:
    """Of a check that raised an error. The fix need not name the command that prints it."""
    return Finding(name, Level.FAILURE, str(error), error.remedy.removesuffix(ASK_CHECK).rstrip())


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
    except SchemaNotCurrent as error:
        findings.append(failure(SCHEMA, error))
    else:
        findings += [Finding(SCHEMA, Level.OK, f"revision {schema.current}"), await _try(database, _write_a_flush)]
    return findings if target is None else [*findings, await _target(database, target)]


class _Undone(Exception):
    """Rolls a transaction back."""


async def _try(database: Database, write: Callable[[Transaction], Awaitable[object]]) -> Finding:
    """Write, and roll it back: a right, a row or a catalog does not show that a database is read-only, or a lock."""
    try:
        async with database.transaction() as tx:
            await write(tx)
            raise _Undone
    except _Undone:
        return Finding(WRITING, Level.OK, "tried, and rolled back")
    except (Unavailable, DatabaseRefused) as error:
        return failure(WRITING, error)


async def _write_a_flush(tx: Transaction) -> None:
    """The lease and a flush of a source, and a view of an id, that do not exist otherwise."""
    name = f"viewer-worker check {uuid4()}"
    row = SourceRow(name)
    await row.ensure(tx)
    await row.take_lease(tx, name)
    await Ledger(name, name).record(tx, Flush(1, uuid4(), uuid4(), {name: 1}))


async def _take_a_stream(tx: Transaction) -> None:
    name = f"viewer-worker check {uuid4()}"
    position = StreamPosition(name, name, name)
    await position.ensure(tx)
    await position.take_lease(tx, name)


async def _target(database: Database, target: TargetTable) -> Finding:
    try:
        async with database.transaction() as tx:
            await target.check(tx)
    except TargetUnusable as error:
        return failure("target table", error)
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
    tried = await _try(database, _take_a_stream)
    if tried.level is Level.FAILURE:
        return [tried]
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
            carried = f"carried to {state.row.last}; waiting entries: {state.backlog}"
            findings.append(await _leased(name, adjustment.database, adjustment.position, carried))
    return findings


async def _leased(name: str, database: Database, row: LeasedRow[Any], found: str) -> Finding:
    """`found`, and which worker holds the lease of the row; a warning if none does."""
    async with database.transaction() as tx:
        lease = await row.read_lease(tx, "")
    if lease is None or lease.is_free:
        return Finding(name, Level.WARNING, f"no worker holds the lease; {found}", NO_WORKER)
    return Finding(name, Level.OK, f"{lease.holder} runs and holds the lease; {found}")


async def check_redis(redis: RedisClient, keys: Keys, used: RedisNames) -> list[Finding]:
    """Check Redis. Raises RedisUnavailable."""
    facts = await redis.info()
    rights, settings = await _rights(redis, keys, used), {}
    if rights.may_read_settings:
        settings = {name: await redis.setting(name) for name in (READ_ONLY, AOF_PREAMBLE)}
    found = [_redis_version(facts), _role(facts), *rights.findings, _eviction(facts), _persistence(facts)]
    return [*found, *_replicas(facts, settings), *_aof_base(facts, settings), *await _prefixes(redis, keys)]


def shared_channel(channel: str) -> Finding:
    """Warn that the worker may receive messages about keys of other workers."""
    found = f"{channel} is the default channel, but the key prefix or the Redis database is not the default"
    remedy = "What producers of other keys publish there counts here, too. Give each worker its own VIEW_CHANNEL."
    return Finding("view channel", Level.WARNING, found, remedy)


@dataclass(frozen=True, slots=True)
class _Rights:
    """`may_read_settings`: asking nevertheless would add an entry to Redis's ACL LOG."""

    findings: list[Finding]
    may_read_settings: bool


async def _rights(redis: RedisClient, keys: Keys, used: RedisNames) -> _Rights:
    asked = (keys.marker, keys.probe, keys.counter("check"), *(stream.encode() for stream in used.streams))
    names_only = (used.totals_channel, used.message_channel, *used.appended)
    reply = await redis.run(RIGHTS, asked, [name.encode() for name in names_only])
    if reply is None:
        return _Rights([], may_read_settings=True)
    denied, may_read_settings = reply
    return _Rights([_denied(denied)], may_read_settings=bool(may_read_settings))


def _denied(denied: list[bytes]) -> Finding:
    if not denied:
        return Finding("redis rights", Level.OK, "the user may run all commands that the worker needs")
    names = ", ".join(sorted({name.decode() for name in denied}))
    cause = f"the user may not run {names} on the worker's keys and channels"
    remedy = "Grant the rights of the user in deploy/redis/users.acl."
    return Finding("redis rights", Level.FAILURE, cause, remedy)


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
    used = facts.get("used_memory", 0) / limit if limit else 0.0
    if policy == "noeviction" and used >= FULL:
        remedy = "At maxmemory Redis refuses INCR, and views are lost. Raise maxmemory, or delete other data."
        return Finding("redis eviction", Level.WARNING, f"{policy}, and {used:.0%} of maxmemory is used", remedy)
    return Finding("redis eviction", Level.OK, policy)


def _persistence(facts: dict[str, Any]) -> Finding:
    if facts.get("aof_enabled"):
        return Finding("redis persistence", Level.OK, "AOF is on")
    remedy = "Views that are not flushed yet are lost when Redis crashes. Set appendonly yes."
    saved = "AOF is off" + (
        ", snapshots are taken" if facts.get("rdb_last_save_time") and facts.get("rdb_saves") else ""
    )
    return Finding("redis persistence", Level.WARNING, saved, remedy)


def _replicas(facts: dict[str, Any], settings: Mapping[str, str | None]) -> list[Finding]:
    """A master does not report what its replicas allow. But its own setting is that of the replica it may become."""
    if facts.get("slave_read_only") != 0 and settings.get(READ_ONLY) != "no":
        return []
    remedy = "Views that are recorded on a replica are lost. Set it to yes on each server that may become a replica."
    return [Finding("redis replicas", Level.WARNING, f"{READ_ONLY} is no", remedy)]


def _aof_base(facts: dict[str, Any], settings: Mapping[str, str | None]) -> list[Finding]:
    if not facts.get("aof_enabled") or settings.get(AOF_PREAMBLE) != "no":
        return []
    remedy = (
        "If Redis loses its data, it cannot prove that it started empty, and flushing is on hold. Set it to yes, then "
        "run BGREWRITEAOF: with yes and the old AOF, a copy of Redis may be counted twice."
    )
    return [Finding("redis AOF base", Level.WARNING, f"{AOF_PREAMBLE} is no", remedy)]


async def _prefixes(redis: RedisClient, keys: Keys) -> list[Finding]:
    """Sources on this Redis and database whose keys overlap with ours, as far as they have a marker."""
    nested: set[bytes] = set()
    async with aclosing(redis.scan(MARKER_PATTERN)) as pages:
        async for page in pages:
            nested |= {other for marker in page if (other := keys.nested_prefix(marker)) is not None}
    if not nested:
        return []
    names = ", ".join(excerpt(other) for other in sorted(nested))
    found = f"{excerpt(keys.prefix)} and the prefix of another source overlap: {names}"
    remedy = (
        "Either source counts the views of the longer prefix, and at times both do. Use prefixes of which none begins "
        f"with another. If a prefix is no longer used, delete its marker ({OWN_KEYS}settled:…)."
    )
    return [Finding("redis prefixes", Level.WARNING, found, remedy)]


async def check_counters(backlog: Backlog, reader: CounterReader) -> list[Finding]:
    """Sweep: what is pending, and counters that cannot be counted. `reader` reports to the backlog's quarantine.

    Raises Unavailable.
    """
    counted: dict[str, int] = {}
    async for _ in backlog.sweep_pages():
        while ids := backlog.pending.oldest(READ_AT_ONCE):
            reading = await reader.read(ids)
            await reader.report(reading, ())
            counted |= reading.counted
            backlog.pending.remove(ids)
    pending = f"pending views: {sum(counted.values())}, pending ids: {len(counted)}"
    bad, total = backlog.quarantine.listed(), len(backlog.quarantine)
    if not total:
        return [Finding("counters", Level.OK, f"all can be counted; {pending}")]
    examples = "; ".join(f"{key}: {reason}" for key, reason in list(bad.items())[:EXAMPLES])
    left = f"{total} left as {'it is' if total == 1 else 'they are'}: {examples}{'; …' if total > EXAMPLES else ''}"
    found = f"{pending}; {left}"
    remedy = (
        "Such a key is not counted, and blocks no other. Delete it, or set it to a whole number from 0 to 2^63-1, as "
        "INCR does. An id is 1 to 256 bytes of UTF-8 without NUL, in characters that the database can store. What "
        "Postgres refuses is known to the worker alone: its /health lists it under quarantined_keys."
    )
    return [Finding("counters", Level.WARNING, found, remedy)]


async def check_worker(stores: Stores) -> list[Finding]:
    """Check whether a worker flushes. Raises DatabaseUnavailable."""
    async with stores.database.transaction() as tx:
        age = await stores.ledger.last_flush_age(tx)
    last = "nothing was flushed yet" if age is None else f"last flush {format_age(age)} ago"
    return [await _leased("worker", stores.database, stores.source_row, last)]


async def check_history(database: Database, source: str) -> list[Finding]:
    """Check that the hourly history follows the flushes. Raises DatabaseUnavailable."""
    async with database.transaction() as tx:
        flushes, age = await History(source).behind(tx)
    if age <= HISTORY_LIMIT_S:
        return [Finding("history", Level.OK, "up to date")]
    found = f"flushes that are missing: {flushes}, the first is {format_age(age)} old"
    remedy = "Totals are right; `top` is behind. It waits while views are pending, or the worker's log has the cause."
    return [Finding("history", Level.WARNING, found, remedy)]


async def check_agreement(adoption: Adoption) -> list[Finding]:
    """Check that the marker in Redis agrees with the ledger in Postgres. Raises Unavailable."""
    situation = await adoption.look(reads_pending=False)
    if situation.hold is not None:
        return [Finding("marker", Level.FAILURE, situation.hold.cause, situation.hold.remedy)]
    if situation.marker is None:
        return [Finding("marker", Level.OK, "none yet, the first flush creates it")]
    return [Finding("marker", Level.OK, f"Redis and Postgres agree; flushes: {situation.row.last_flush_id}")]
