"""The connection to Redis: only the commands this worker needs, each tried once, errors translated."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import redis.asyncio as aioredis
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, NoPermissionError, NoScriptError, RedisError, ResponseError
from redis.maint_notifications import MaintNotificationsConfig

from worker.errors import RedisUnavailable

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from worker.redis.address import RedisAddress
    from worker.redis.scripts import LuaScript

# Below the time for which Postgres lets a transaction idle: a Redis that falls silent must not cost the row lock.
COMMAND_TIMEOUT_S = 4.0
CONNECT_TIMEOUT_S = 3.0


REPLID_LENGTH = 40


@dataclass(frozen=True, slots=True)
class History:
    """`replid` stays the same while a Redis runs and changes with every restart and every promotion of a replica.

    `started_empty` is true only when it provably started without data and never was a replica.
    """

    replid: str | None
    started_empty: bool


class RedisClient:
    """Raises RedisUnavailable from every method when Redis cannot do what is asked, for whatever reason.

    The library would repeat a command whose reply was late, and so apply it twice; here every command is sent once.
    """

    def __init__(self, address: RedisAddress) -> None:
        self._redis, self._sentinels = _connect(address)

    async def probe(self) -> str | None:
        """Ask for a sign of life. Returns `master_replid`, the name of the data set's history; None if it is hidden."""
        with redis_errors():
            try:
                replication: dict[str, Any] = await self._redis.info("replication")
            except NoPermissionError:
                await self._redis.ping()
                return None
        return _text(replication, "master_replid")

    async def history(self) -> History | None:
        """Where the data set comes from, as far as Redis tells; None if INFO is forbidden."""
        with redis_errors():
            try:
                facts: dict[str, Any] = await self._redis.info("replication")
                facts |= await self._redis.info("persistence")
            except NoPermissionError:
                return None
        return History(
            replid=_text(facts, "master_replid"),
            started_empty=(
                facts.get("role") == "master"
                and set(_text(facts, "master_replid2") or "?") == {"0"}
                and facts.get("rdb_last_load_keys_loaded") == 0
                # After an AOF was loaded, no keys count as loaded either; but then its base has a size.
                and (facts.get("aof_enabled") == 0 or facts.get("aof_base_size") == 0)
            ),
        )

    async def info(self) -> dict[str, Any]:
        """All of INFO, parsed."""
        with redis_errors():
            facts: dict[str, Any] = await self._redis.info()
        return facts

    async def ping(self, timeout: float) -> None:
        """Raises RedisUnavailable unless Redis answers within `timeout` seconds."""
        with redis_errors():
            async with asyncio.timeout(timeout):
                await self._redis.ping()

    async def read(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """The values of all keys at one instant, None where a key is missing or is not a string.

        MGET is a single read-only command: atomic like a script, and allowed when Redis is at maxmemory.
        """
        with redis_errors():
            values = await self._redis.mget(keys)
        return cast("list[bytes | None]", values)

    async def type_of(self, key: bytes) -> str:
        """`string`, `hash`, …; `none` for a key that does not exist."""
        with redis_errors():
            kind = await self._redis.type(key)
        return cast("bytes", kind).decode()

    async def types_of(self, keys: Sequence[bytes]) -> list[str]:
        """`type_of` for many keys in one round trip."""
        with redis_errors():
            pipeline = self._redis.pipeline(transaction=False)
            for key in keys:
                pipeline.type(key)
            kinds: list[bytes] = await pipeline.execute()
        return [kind.decode() for kind in kinds]

    async def scan(self, cursor: int, pattern: bytes, count: int) -> tuple[int, list[bytes]]:
        """One page of SCAN: the next cursor (0: done) and the keys found."""
        with redis_errors():
            page = await self._redis.scan(cursor, match=pattern, count=count)
        return cast("tuple[int, list[bytes]]", page)

    async def overwrite(self, key: bytes, value: bytes) -> None:
        """Set a key, whatever type it had."""
        with redis_errors():
            await self._redis.set(key, value)

    async def run(self, script: LuaScript, keys: Sequence[bytes], args: Sequence[bytes]) -> Any:
        """Run a script by its digest; it is sent whole when the server does not have it.

        Before Redis 7 a script may not begin with `#!lua flags=…`; such a server gets it without that line.
        """
        with redis_errors():
            for variant in (script.flagged, script.plain):
                try:
                    return await self._evaluate(variant.digest, variant.source, keys, args)
                except ResponseError as error:
                    if variant is script.plain or "compiling script" not in str(error):
                        raise
        raise AssertionError("unreachable")

    async def _evaluate(self, digest: str, source: str, keys: Sequence[bytes], args: Sequence[bytes]) -> Any:
        try:
            return await self._redis.evalsha(digest, len(keys), *keys, *args)
        except NoScriptError:
            return await self._redis.eval(source, len(keys), *keys, *args)

    async def close(self) -> None:
        await self._redis.aclose()
        for sentinel in self._sentinels:
            await sentinel.aclose()


def _text(facts: dict[str, Any], name: str) -> str | None:
    """A fact as text: replication ids that happen to be all digits come parsed as numbers."""
    value = facts.get(name)
    if isinstance(value, int):
        return str(value).zfill(REPLID_LENGTH)
    return None if value is None else str(value)


@contextmanager
def redis_errors() -> Iterator[None]:
    try:
        yield
    except (RedisError, OSError) as error:  # OSError includes TimeoutError
        raise RedisUnavailable(_describe(error), _remedy(error)) from error


def _remedy(error: BaseException) -> str | None:
    if isinstance(error, NoPermissionError) or "ACL failure in script" in str(error):
        return "Let the user of REDIS_URL run it; deploy/redis/users.acl has all that the worker needs."
    return "Check user and password in REDIS_URL." if isinstance(error, AuthenticationError) else None


def _describe(error: BaseException) -> str:
    text = str(error).split("\n", 1)[0].strip()
    return text[:200] or ("no answer in time" if isinstance(error, TimeoutError) else type(error).__name__)


def _connect(address: RedisAddress) -> tuple[aioredis.Redis, list[aioredis.Redis]]:
    """The client, and those it asks where the master is (they are not closed with it)."""
    common: dict[str, Any] = {
        "db": address.database,
        "username": address.user,
        "password": address.password,
        "socket_timeout": COMMAND_TIMEOUT_S,
        "socket_connect_timeout": CONNECT_TIMEOUT_S,
        "retry": Retry(NoBackoff(), 0),
        # Else each connection sends CLIENT SETINFO, which a user of few rights may not and an older server cannot.
        "driver_info": None,
        # With these notifications the pool hands out connections that hold unread data: another reply's, or an end.
        "maint_notifications_config": MaintNotificationsConfig(enabled=False),
    }
    if address.master is not None:
        sentinel = Sentinel(  # type: ignore[no-untyped-call]
            list(address.hosts),
            sentinel_kwargs={"socket_timeout": CONNECT_TIMEOUT_S, "retry": Retry(NoBackoff(), 0)},
            **common,
        )
        client: aioredis.Redis = sentinel.master_for(address.master)
        return client, sentinel.sentinels
    if address.unix_path is not None:
        return aioredis.Redis(unix_socket_path=address.unix_path, **common), []
    host, port = address.hosts[0]
    options: dict[str, Any] = dict(address.options)
    if "ssl_check_hostname" in options:
        options["ssl_check_hostname"] = options["ssl_check_hostname"].lower() in ("1", "true", "yes")
    return aioredis.Redis(host=host, port=port, ssl=address.tls, **options, **common), []
