"""The database's address, from `DATABASE_URL` or the `DB_*` variables."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, quote, unquote, urlencode

from worker.contract.urls import MASK, split_url
from worker.db.quoting import quote_identifier

SCHEMES = ("postgres", "postgresql", "postgresql+asyncpg")
PRISMA_OPTIONS = ("connection_limit", "connect_timeout", "pool_timeout", "socket_timeout", "pgbouncer", "sslaccept")
SSL_MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")


_PLACE = re.compile(
    r"(?:\[(?P<ipv6>[0-9A-Fa-f:.]+)\]|(?P<host>[^\[\]/:?]*))(?::(?P<port>\d*))?"
    r"(?:/(?P<name>[^?]*))?(?:\?(?P<query>.*))?"
)


@dataclass(frozen=True, slots=True)
class DatabaseAddress:
    """`options` are libpq's options (sslmode, host=/socket, …) as a query string. None means libpq's default."""

    host: str | None
    port: int | None
    user: str | None
    password: str | None = field(repr=False)
    name: str | None
    options: str

    @property
    def place(self) -> str:
        """Host (or the socket's folder) and port, for messages."""
        host = self.host or dict(parse_qsl(self.options)).get("host", "localhost")
        return f"{host}:{self.port or 5432}"

    def redacted(self) -> str:
        """A URL without the password, safe to print."""
        place = f"{quote(self.user or '')}:{MASK}@{self.host}:{self.port}/{quote(self.name or '')}"
        return f"postgresql://{place}" + (f"?{self.options}" if self.options else "")


def parse_database_url(text: str) -> DatabaseAddress:
    """Parse a `postgres[ql]://` URL, including one with Prisma's options.

    Raises ValueError that says what is wrong without quoting the URL.
    """
    parts = split_url(text)
    if parts.scheme not in SCHEMES:
        raise ValueError(f"the scheme must be postgresql, not {parts.scheme}")
    place = _PLACE.fullmatch(parts.rest)
    if place is None:
        raise ValueError("expected host[:port]/database after the credentials")
    port = int(place["port"]) if place["port"] else None
    if port is not None and not 0 < port < 65536:
        raise ValueError("the port must be a number from 1 to 65535")
    options = _translate_prisma_options(parse_qsl(place["query"] or "", keep_blank_values=True))
    for name, value in options:
        if name == "sslmode" and value not in SSL_MODES:
            raise ValueError(f"sslmode must be one of {', '.join(SSL_MODES)}")
    host = place["ipv6"] or place["host"] or None
    return DatabaseAddress(
        host, port, parts.user, parts.password, unquote(place["name"] or "") or None, urlencode(options)
    )


def _translate_prisma_options(options: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Turn Prisma's `schema` into the search path and drop its pool options, which Postgres does not know."""
    kept = [(name, value) for name, value in options if name not in PRISMA_OPTIONS]
    return [("search_path", quote_identifier(value)) if name == "schema" else (name, value) for name, value in kept]
