"""Creates Redis clients, for asyncio and for threads."""

from __future__ import annotations

from typing import Any

import hiredis
import redis
import redis.asyncio as aioredis
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.maint_notifications import MaintNotificationsConfig
from redis.retry import Retry

from worker.redis.address import RedisAddress
from worker.redis.sentinel import AsyncSentinels, Sentinels

# The library's default, 100, is less than a worker with fifty streams needs.
UNLIMITED = 2**31


def connect(
    address: RedisAddress, timeout: float | None, connect_timeout: float
) -> tuple[aioredis.Redis, list[aioredis.Redis]]:
    """The client, and the Sentinel clients that find its master (close them separately). Nothing is sent twice.

    `timeout` (seconds) limits each wait for Redis. With None the caller has to limit it. The number of connections is
    not limited: it follows from the streams, or from the producer's own limit.
    """
    retry = AsyncRetry(NoBackoff(), 0)
    options = _options(address, timeout, connect_timeout, retry)
    if address.master is None:
        return _pack_fast(aioredis.Redis(**_place(address), **options)), []
    asked = _sentinel_options(address, connect_timeout, retry)
    sentinels = AsyncSentinels(list(address.hosts), sentinel_kwargs=asked, **options)  # type: ignore[no-untyped-call]
    return _pack_fast(sentinels.master_for(address.master)), sentinels.sentinels


class _PacksInC:
    """Part of a connection: the library uses the C code of hiredis to pack commands in its blocking connections only.

    Its Python code takes several times as long for a command with thousands of arguments.
    """

    def pack_command(self, name: str | bytes, *args: Any) -> list[bytes]:
        words = name.split() if isinstance(name, bytes) else name.encode().split()  # such as SCRIPT LOAD
        return [hiredis.pack_command((*words, *args))]


def _pack_fast(client: aioredis.Redis) -> aioredis.Redis:
    pool: Any = client.connection_pool
    kind = pool.connection_class
    pool.connection_class = type(kind.__name__, (_PacksInC, kind), {})
    return client


def connect_blocking(
    address: RedisAddress, timeout: float, connect_timeout: float
) -> tuple[redis.Redis, list[redis.Redis]]:
    """`connect`, but for threads."""
    retry = Retry(NoBackoff(), 0)
    options = _options(address, timeout, connect_timeout, retry)
    if address.master is None:
        return redis.Redis(**_place(address), **options), []
    asked = _sentinel_options(address, connect_timeout, retry)
    sentinels = Sentinels(list(address.hosts), sentinel_kwargs=asked, **options)  # type: ignore[no-untyped-call]
    client: redis.Redis = sentinels.master_for(address.master)  # type: ignore[no-untyped-call]
    return client, sentinels.sentinels


def _options(
    address: RedisAddress, timeout: float | None, connect_timeout: float, retry: Retry | AsyncRetry
) -> dict[str, Any]:
    return {
        "db": address.database,
        "username": address.user,
        "password": address.password,
        "socket_timeout": timeout,
        "max_connections": UNLIMITED,
        **_tls(address, address.tls),
        **_common(connect_timeout, retry),
    }


def _sentinel_options(address: RedisAddress, timeout: float, retry: Retry | AsyncRetry) -> dict[str, Any]:
    return {
        "username": address.sentinel.user,
        "password": address.sentinel.password,
        "socket_timeout": timeout,
        **_tls(address, address.sentinel_tls),
        **_common(timeout, retry),
    }


def _common(connect_timeout: float, retry: Retry | AsyncRetry) -> dict[str, Any]:
    return {
        "socket_connect_timeout": connect_timeout,
        "retry": retry,
        # Otherwise each connection sends CLIENT SETINFO, which needs a right and which older servers do not know.
        "driver_info": None,
        # With these notifications the pool hands out connections with unread data (another reply) or already closed.
        "maint_notifications_config": MaintNotificationsConfig(enabled=False),
    }


def _tls(address: RedisAddress, encrypt: bool) -> dict[str, Any]:
    return {"ssl": True, **address.options} if encrypt else {}


def _place(address: RedisAddress) -> dict[str, Any]:
    if address.unix_path is not None:
        return {"unix_socket_path": address.unix_path}
    host, port = address.hosts[0]
    return {"host": host, "port": port}
