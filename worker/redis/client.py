"""The Redis client: only the commands that the worker needs. Each is sent once, and errors are translated."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from redis.exceptions import NoPermissionError, NoScriptError, ResponseError

from worker.errors import RedisUnavailable
from worker.redis.connection import connect
from worker.redis.errors import MASTER
from worker.redis.pool import Pool
from worker.redis.stream import StreamConnection
from worker.redis.subscriber import subscription

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence
    from contextlib import AbstractAsyncContextManager

    from worker.redis.address import RedisAddress
    from worker.redis.scripts import LuaScript
    from worker.redis.subscriber import Subscription

# Shorter than the time that Postgres lets a transaction idle, so that a silent Redis does not cost us the row lock.
COMMAND_TIMEOUT_S = 4.0
CONNECT_TIMEOUT_S = 3.0
# Keys that one SCAN reads: about a millisecond of Redis's time.
SCAN_COUNT = 1000
REPLID_LENGTH = 40
AOF_PREAMBLE = "aof-use-rdb-preamble"


@dataclass(frozen=True, slots=True)
class History:
    """`replid` stays the same while a Redis runs and changes with every restart and every promotion of a replica.

    None if Redis hides it, or is a replica: that reports the id of its master, and a writable one has other data.
    `started_empty` is true only if all that Redis reports means that it started without data and never was a replica.
    If part of that evidence is its AOF (`by_its_aof`), it counts only if Redis `writes_a_base`.
    """

    replid: str | None
    started_empty: bool
    by_its_aof: bool = False


class RedisClient:
    """Every method raises RedisUnavailable when Redis cannot do what is asked, for any reason.

    The library would repeat a command whose reply was late, and so apply it twice. Here every command is sent once.
    """

    def __init__(self, address: RedisAddress) -> None:
        self._knows_flags = True
        self._redis, self._sentinels = connect(address, COMMAND_TIMEOUT_S, CONNECT_TIMEOUT_S)
        self._pool = Pool(self._redis.connection_pool, address.place)
        self._run_id: str | None = None

    async def probe(self) -> str | None:
        """Check that Redis answers. Returns the id of the data set's history, or None: see History."""
        async with self._pool.errors():
            try:
                replication: dict[str, Any] = await self._redis.info("replication")
            except NoPermissionError:
                await self._redis.ping()
                return None
        return _replid(replication)

    async def history(self) -> History | None:
        """Where the data set comes from, as far as Redis reports it; None if INFO is forbidden."""
        async with self._pool.errors():
            try:
                facts: dict[str, Any] = await self._redis.info("replication")
                facts |= await self._redis.info("persistence")
            except NoPermissionError:
                return None
        return History(
            replid=_replid(facts),
            started_empty=(
                facts.get("role") == "master"
                and set(_text(facts, "master_replid2") or "?") == {"0"}
                and facts.get("rdb_last_load_keys_loaded") == 0
                # After loading an AOF, Redis reports no loaded keys either. But then the AOF's base has a size.
                and (facts.get("aof_enabled") == 0 or facts.get("aof_base_size") == 0)
            ),
            by_its_aof=facts.get("aof_enabled") != 0,
        )

    async def setting(self, name: str) -> str | None:
        """A setting of the server, such as `yes`. None if Redis does not report it."""
        async with self._pool.errors():
            try:
                found: dict[Any, Any] = await self._redis.config_get(name)
            except ResponseError:
                return None
        value = next(iter(found.values()), None)
        return value.decode() if isinstance(value, bytes) else value

    async def writes_a_base(self) -> bool:
        """Whether its AOF begins with a snapshot, which is the default. False if Redis does not report it."""
        return await self.setting(AOF_PREAMBLE) == "yes"

    async def info(self) -> dict[str, Any]:
        """All of INFO, parsed."""
        async with self._pool.errors():
            facts: dict[str, Any] = await self._redis.info()
        return facts

    async def check(self, timeout: float) -> None:
        """Raises RedisUnavailable unless Redis answers within `timeout` seconds, and is a master as far as it reports.

        If the name has led to another server since the last check, open connections to the former one are given up.
        """
        async with self._pool.errors():
            async with asyncio.timeout(timeout):
                pipeline = self._redis.pipeline(transaction=False)
                pipeline.ping()
                pipeline.info("server")
                pipeline.info("replication")
                pong, *replies = await pipeline.execute(raise_on_error=False)
            if isinstance(pong, Exception):
                raise pong
            facts: dict[str, Any] = {}
            for reply in replies:
                facts |= reply if isinstance(reply, dict) else {}  # INFO may be forbidden
        role, run_id = facts.get("role", "master"), _text(facts, "run_id")
        if role != "master" or self._run_id not in (None, run_id):
            await self._pool.give_up(self._pool.generation)
        if role != "master":
            raise RedisUnavailable(f"{self._pool.place}: its role is {role}", MASTER)
        self._run_id = run_id

    async def read(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """The values of all keys at one instant; None for a key that is missing or not a string.

        MGET is a single read-only command: atomic like a script, and allowed when Redis is at maxmemory.
        """
        async with self._pool.errors():
            values = await self._redis.mget(keys)
        return cast("list[bytes | None]", values)

    async def type_of(self, key: bytes) -> str:
        """`string`, `hash`, …; `none` for a key that does not exist."""
        async with self._pool.errors():
            kind = await self._redis.type(key)
        return cast("bytes", kind).decode()

    async def types_of(self, keys: Sequence[bytes]) -> list[str]:
        """`type_of` for many keys in one round trip."""
        async with self._pool.errors():
            pipeline = self._redis.pipeline(transaction=False)
            for key in keys:
                pipeline.type(key)
            kinds: list[bytes] = await pipeline.execute()
        return [kind.decode() for kind in kinds]

    async def scan(self, pattern: bytes) -> AsyncGenerator[list[bytes]]:
        """Yield the keys that match, page by page. A page may be empty; a key may occur twice."""
        cursor = 0
        while True:
            async with self._pool.errors():
                cursor, page = await self._redis.scan(cursor, match=pattern, count=SCAN_COUNT)
            yield cast("list[bytes]", page)
            if cursor == 0:
                return

    async def overwrite(self, key: bytes, value: bytes) -> None:
        """Set a key. A value of any other type is replaced."""
        async with self._pool.errors():
            await self._redis.set(key, value)

    async def run(self, script: LuaScript, keys: Sequence[bytes], args: Sequence[bytes]) -> Any:
        """Run a script by its digest. If the server does not have it, send its source.

        Before Redis 7 a script may not begin with `#!lua flags=…`; such a server gets it without that line.
        """
        async with self._pool.errors():
            if self._knows_flags:
                try:
                    return await self._evaluate(script.flagged.digest, script.flagged.source, keys, args)
                except ResponseError as error:
                    if "compiling script" not in str(error):
                        raise
                    self._knows_flags = False
            return await self._evaluate(script.plain.digest, script.plain.source, keys, args)

    async def _evaluate(self, digest: str, source: str, keys: Sequence[bytes], args: Sequence[bytes]) -> Any:
        try:
            return await self._redis.evalsha(digest, len(keys), *keys, *args)
        except NoScriptError:
            return await self._redis.eval(source, len(keys), *keys, *args)

    def subscription(self, channel: str) -> AbstractAsyncContextManager[Subscription]:
        """Subscribe on a separate connection, which is closed when the block ends."""
        return subscription(self._pool, channel)

    def stream_connection(self) -> StreamConnection:
        """A connection of its own, for the reader of a stream. Drop it at the end."""
        return StreamConnection(self._pool)

    async def close(self) -> None:
        await self._redis.aclose()
        for sentinel in self._sentinels:
            await sentinel.aclose()


def _replid(facts: dict[str, Any]) -> str | None:
    return _text(facts, "master_replid") if facts.get("role") == "master" else None


def _text(facts: dict[str, Any], name: str) -> str | None:
    """A fact as text. The library parses a replication id that has only digits as a number."""
    value = facts.get(name)
    if isinstance(value, int):
        return str(value).zfill(REPLID_LENGTH)
    return None if value is None else str(value)
