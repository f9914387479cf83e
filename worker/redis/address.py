"""Redis's address, from `REDIS_URL`."""

from __future__ import annotations

from dataclasses import dataclass, field
from urllib.parse import parse_qsl

from worker.contract.urls import split_url

TLS_OPTIONS = ("ssl_cert_reqs", "ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_check_hostname")


@dataclass(frozen=True, slots=True)
class RedisAddress:
    """One server (`hosts` has one entry), a socket (`unix_path`), or a Sentinel group (`master` is set)."""

    hosts: tuple[tuple[str, int], ...] = ()
    unix_path: str | None = None
    master: str | None = None
    database: int = 0
    tls: bool = False
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    options: dict[str, str] = field(default_factory=dict)


def parse_redis_url(text: str) -> RedisAddress:
    """Parse `redis://`, `rediss://`, `unix://` or `redis+sentinel://h:p,h:p/master[/db]`.

    TLS options are read from the query (`ssl_ca_certs`, `ssl_certfile`, `ssl_keyfile`, `ssl_cert_reqs`).
    Raises ValueError that says what is wrong without quoting the URL.
    """
    parts = split_url(text)
    location, _, query = parts.rest.partition("?")
    options = dict(parse_qsl(query))
    database = options.pop("db", None)
    unknown = sorted(set(options) - set(TLS_OPTIONS))
    if unknown:
        raise ValueError(f"unknown option {unknown[0]}; known are db, {', '.join(TLS_OPTIONS)}")
    hosts, _, path = location.partition("/")
    common = {"user": parts.user, "password": parts.password, "options": options}
    match parts.scheme:
        case "redis" | "rediss":
            return RedisAddress(
                hosts=(_host_port(hosts or "localhost", 6379),),
                database=_database(database or path),
                tls=parts.scheme == "rediss",
                **common,  # type: ignore[arg-type]
            )
        case "unix":
            if not location.startswith("/"):
                raise ValueError("expected unix:///path/to/redis.sock")
            return RedisAddress(unix_path=location, database=_database(database), **common)  # type: ignore[arg-type]
        case "redis+sentinel":
            master, _, number = path.partition("/")
            if not hosts or not master:
                raise ValueError("expected redis+sentinel://host:port,host:port/master")
            return RedisAddress(
                hosts=tuple(_host_port(host, 26379) for host in hosts.split(",")),
                master=master,
                database=_database(database or number),
                **common,  # type: ignore[arg-type]
            )
    raise ValueError(f"the scheme must be redis, rediss, unix or redis+sentinel, not {parts.scheme}")


def _host_port(text: str, default_port: int) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon or port.endswith("]"):  # no port, or an IPv6 address without one
        return text.strip("[]"), default_port
    if not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError("the port must be a number from 1 to 65535")
    return host.strip("[]"), int(port)


def _database(text: str | None) -> int:
    if not text:
        return 0
    if not text.isdecimal():
        raise ValueError("the database after the slash must be a number")
    return int(text)
