"""Where the database is, from `DATABASE_URL` or the `DB_*` variables."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import parse_qsl, urlencode

from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

from worker.urls import split_url

SCHEMES = ("postgres", "postgresql", "postgresql+asyncpg")
PRISMA_OPTIONS = ("connection_limit", "connect_timeout", "pool_timeout", "socket_timeout", "pgbouncer", "sslaccept")
SSL_MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")


@dataclass(frozen=True, slots=True)
class DatabaseAddress:
    """`url` names driver, user, host and database; `options` are libpq's (sslmode, …), as a query string."""

    url: URL
    options: str


def parse_database_url(text: str) -> DatabaseAddress:
    """Read a `postgres[ql]://` URL, that of a Prisma application too.

    Raises ValueError saying what is wrong, never quoting the URL.
    """
    parts = split_url(text)
    if parts.scheme not in SCHEMES:
        raise ValueError(f"the scheme must be postgresql, not {parts.scheme}")
    try:
        bare = make_url(f"postgresql+asyncpg://{parts.rest}")
    except (ArgumentError, ValueError):
        raise ValueError("expected host[:port]/database after the credentials") from None
    options = _without_prisma_s(parse_qsl(bare.render_as_string().partition("?")[2], keep_blank_values=True))
    for name, value in options:
        if name == "sslmode" and value not in SSL_MODES:
            raise ValueError(f"sslmode must be one of {', '.join(SSL_MODES)}")
    url = URL.create(bare.drivername, parts.user, parts.password, bare.host, bare.port, bare.database)
    return DatabaseAddress(url, urlencode(options))


def _without_prisma_s(options: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Its `schema` is the search path; what else it adds is for its own pool, and no setting that Postgres knows."""
    kept = [(name, value) for name, value in options if name not in PRISMA_OPTIONS]
    return [("search_path", _quote(value)) if name == "schema" else (name, value) for name, value in kept]


def _quote(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def database_address(host: str, port: int, user: str, password: str, name: str, ssl_mode: str) -> DatabaseAddress:
    url = URL.create("postgresql+asyncpg", user, password or None, host, port, name)
    return DatabaseAddress(url, urlencode({"sslmode": ssl_mode}))
