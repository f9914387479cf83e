"""The database's address, from `DATABASE_URL` or the `DB_*` variables."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import quote, unquote, urlencode

from worker.contract.urls import MASK, split_query, split_url
from worker.db.parameters import SESSION, read_parameters

_SCHEME = re.compile(r"postgres(?:ql)?(?:\+\w+)?")
_BRACKETED = re.compile(r"\[(?P<host>[^\[\]]+)\](?::(?P<port>\d*))?")
_PLAIN = re.compile(r"(?P<host>[^:\[\]]*)(?::(?P<port>\d*))?")
DEFAULT_PORT = 5432

Host = tuple[str, int | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class DatabaseAddress:
    """Where the database is and how to log in.

    `hosts` are tried in order; one that begins with / is the folder of a socket, and a port of None is the default.
    Without hosts, user or name, the driver uses libpq's defaults. `driver` has parameters for the log-in and TLS, under
    libpq's names; `session` the settings that a session begins with. A `pooled` server does not take a search path as
    one of them. `ignored` are the names of parameters in the URL that have no effect.
    """

    hosts: tuple[Host, ...] = ()
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    name: str | None = None
    driver: Mapping[str, str] = field(default_factory=dict, repr=False)
    session: Mapping[str, str] = field(default_factory=dict)
    pooled: bool = False
    ignored: tuple[str, ...] = ()

    @property
    def place(self) -> str:
        """Hosts (or the sockets' folders) and ports, for messages."""
        return ", ".join(show_host(host) for host in self.hosts or (("localhost", None),))

    def redacted(self) -> str:
        """A URL without the password, safe to print."""
        place = f"{quote(self.user or '')}:{MASK}@{self.place}/{quote(self.name or '')}"
        return f"postgresql://{place}" + (f"?{urlencode(self.driver)}" if self.driver else "")


def show_host(host: Host) -> str:
    """As in a URL, with its port."""
    name, port = host
    return f"{f'[{name}]' if ':' in name and name[0] != '/' else name}:{port or DEFAULT_PORT}"


def parse_database_url(text: str) -> DatabaseAddress:
    """Parse a URL as libpq and the drivers of other languages take it; `db.parameters` lists what it may have.

    As in libpq, a parameter wins over the same part of the URL. Several hosts may be given, separated by commas. If
    they are several, and the URL does not say which of them to use, the first that accepts writes is used.
    Raises ValueError that says what is wrong without quoting the URL.
    """
    parts = split_url(text)
    if not _SCHEME.fullmatch(parts.scheme):
        raise ValueError(f"the scheme must be postgresql, not {parts.scheme}")
    place, _, name = parts.place.partition("/")
    parameters = read_parameters(split_query(parts.query))
    given = dict(parameters.honoured)
    hosts = _hosts(place, given.pop("host", None), given.pop("hostaddr", None), given.pop("port", None))
    if len(hosts) > 1:
        given.setdefault("target_session_attrs", "read-write")
    return DatabaseAddress(
        hosts=hosts,
        user=given.pop("user", parts.user),
        password=given.pop("password", parts.password),
        name=given.pop("dbname", unquote(name) or None),
        pooled=given.pop("pgbouncer", "false") == "true",
        session={setting: given.pop(setting) for setting in SESSION if setting in given},
        driver=given,
        ignored=parameters.ignored,
    )


def _hosts(place: str, names: str | None, addresses: str | None, ports: str | None) -> tuple[Host, ...]:
    """The hosts of the URL, or those of its parameters `host` or `hostaddr`; `port` may have one for each, or for all.

    A parameter `host` may have ports too, as some drivers write it.
    """
    found = [_host(text) for text in place.split(",")] if place else []
    if named := addresses or names:
        own_ports = [str(port) for _, port in found if port]
        ports = ports or ",".join(own_ports)
        found = [_bare_or_host(text) for text in named.split(",")]
    if len(found) > 1 and not all(name for name, _ in found):
        raise ValueError("one of the hosts is empty")
    if ports:
        numbers = [_port(text) for text in ports.split(",")]
        if len(numbers) == 1:
            numbers *= max(1, len(found))
        if len(numbers) != max(1, len(found)):
            raise ValueError("the parameter port must have one port, or one for each host")
        found = [(name, port or own) for (name, own), port in zip(found or [("", None)], numbers, strict=True)]
    return tuple((name or "localhost", port) for name, port in found if name or port)


def _bare_or_host(text: str) -> Host:
    """A folder or an IPv6 address has colons of its own."""
    return (text, None) if text.startswith("/") or (text.count(":") > 1 and text[0] != "[") else _host(text)


def _host(text: str) -> Host:
    match = _BRACKETED.fullmatch(text) or _PLAIN.fullmatch(text)
    if match is None:
        raise ValueError("expected host[:port]/database after the credentials")
    return unquote(match["host"]), _port(match["port"])


def _port(text: str | None) -> int | None:
    if not text:
        return None
    if not (text.isascii() and text.isdecimal() and len(text) <= 5 and 0 < int(text) < 65536):
        raise ValueError("the port must be a number from 1 to 65535")
    return int(text)
