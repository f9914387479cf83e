"""Opens a connection to one of the hosts of an address."""

from __future__ import annotations

import asyncio
import ssl
from typing import TYPE_CHECKING, Any

import asyncpg

from worker.db.address import show_host
from worker.db.tls import attempts

if TYPE_CHECKING:
    from worker.db.address import DatabaseAddress, Host

# What says nothing about the other hosts: this one is away or a standby, or it starts or stops.
_TRY_NEXT_HOST = (OSError, asyncpg.CannotConnectNowError)

_DRIVER = ("passfile", "krbsrvname", "target_session_attrs")


async def connect(address: DatabaseAddress, timeout: float, **options: Any) -> asyncpg.Connection[Any]:
    """Connect to the first host that takes the connection and fits `target_session_attrs`.

    Each host gets an equal part of `timeout` (seconds), so that a silent one does not use up the time of the others.
    A host that refuses the log-in ends the search. `options` are those of asyncpg. Raises its errors, and OSError.
    """
    if len(address.hosts) < 2:
        return await _connect(address, address.hosts[0] if address.hosts else None, timeout, options)
    failures: list[str] = []
    for host in address.hosts:
        try:
            return await _connect(address, host, timeout / len(address.hosts), options)
        except _TRY_NEXT_HOST as error:
            cause = "no answer in time" if isinstance(error, TimeoutError) else str(error)
            failures.append(f"{show_host(host)}: {cause}")
    raise ConnectionError("; ".join(failures))


async def _connect(
    address: DatabaseAddress, host: Host | None, timeout: float, options: dict[str, Any]
) -> asyncpg.Connection[Any]:
    """With TLS or without, in the order that `sslmode` asks for."""
    through_socket = host is not None and host[0].startswith("/")
    *first, last = [None] if through_socket else attempts(address.driver)
    async with asyncio.timeout(timeout):
        for context in first:
            try:
                return await _open(address, host, context, options)
            except asyncpg.InvalidPasswordError:
                raise
            except (ssl.SSLError, ConnectionError, asyncpg.InvalidAuthorizationSpecificationError):
                pass  # the server has no TLS, or takes this user in the other way only
        return await _open(address, host, last, options)


async def _open(
    address: DatabaseAddress, host: Host | None, context: ssl.SSLContext | None, options: dict[str, Any]
) -> asyncpg.Connection[Any]:
    name, port = host or (None, None)
    options = {
        "host": name,
        "port": port,
        "user": address.user,
        "password": address.password,
        "database": address.name,
        "ssl": context or False,
        "direct_tls": context is not None and address.driver.get("sslnegotiation") == "direct",
        "timeout": None,
        **{option: address.driver[option] for option in _DRIVER if option in address.driver},
        **options,
    }
    try:
        connection: asyncpg.Connection[Any] = await asyncpg.connect(**options)
    except asyncpg.TargetServerAttributeNotMatched:
        raise ConnectionError("it does not accept writes") from None
    return connection
