"""Redis's address, from `REDIS_URL` or the `REDIS_*` variables."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from worker.contract.urls import MASK, split_query, split_url

SCHEMES = ("redis", "rediss", "unix", "redis+sentinel", "rediss+sentinel")
BOOLEANS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}
# Those of the library, and those of Python, which other programs take.
CERT_REQS = {prefix + name: name for prefix in ("", "cert_") for name in ("none", "optional", "required")}
# What these say is not done unless the server's certificate is verified.
VERIFYING = ("ssl_ca_certs", "ssl_check_hostname")
TLS_OPTIONS = ("ssl_cert_reqs", "ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_check_hostname")
SENTINEL_OPTIONS = ("sentinel_username", "sentinel_password", "sentinel_tls")
DEFAULT_PORT, DEFAULT_SENTINEL_PORT = 6379, 26379

Host = tuple[str, int]


@dataclass(frozen=True, slots=True)
class SentinelLogin:
    """How the Sentinels themselves are asked. `tls`: None is as for Redis."""

    user: str | None = None
    password: str | None = field(default=None, repr=False)
    tls: bool | None = None


@dataclass(frozen=True, slots=True)
class RedisAddress:
    """One server (`hosts` has one entry), a socket (`unix_path`), or a Sentinel group (`master` is set).

    `options` are the library's options for TLS, with Redis and with the Sentinels.
    """

    hosts: tuple[Host, ...] = ()
    unix_path: str | None = None
    master: str | None = None
    database: int = 0
    tls: bool = False
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    options: dict[str, Any] = field(default_factory=dict)
    sentinel: SentinelLogin = SentinelLogin()

    def with_sentinel_login(self, user: str | None, password: str | None, tls: bool | None) -> RedisAddress:
        """What the URL does not say of the Sentinels is taken from here. Raises ValueError, as the URL would."""
        own = self.sentinel
        login = SentinelLogin(
            user if own.user is None else own.user,
            password if own.password is None else own.password,
            tls if own.tls is None else own.tls,
        )
        found = replace(self, sentinel=login)
        found.check_tls()
        return found

    @property
    def sentinel_tls(self) -> bool:
        return self.tls if self.sentinel.tls is None else self.sentinel.tls

    @property
    def place(self) -> str:
        """Host and port, the socket, or the Sentinels and the master's name, for messages."""
        if self.unix_path is not None:
            return self.unix_path
        hosts = ",".join(f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in self.hosts)
        return hosts if self.master is None else f"{hosts}/{self.master}"

    def check_tls(self) -> None:
        """Raise ValueError if an option for TLS would have no effect."""
        if self.options and not self.tls and not (self.master and self.sentinel_tls):
            raise ValueError(f"{min(self.options)} has no effect without TLS: use rediss:// or rediss+sentinel://")
        if self.options.get("ssl_cert_reqs") == "none":
            without_effect = [name for name in VERIFYING if self.options.get(name)]
            if without_effect:
                raise ValueError(f"{without_effect[0]} has no effect with ssl_cert_reqs=none")
        if "ssl_keyfile" in self.options and "ssl_certfile" not in self.options:
            raise ValueError("ssl_keyfile has no effect without ssl_certfile")

    def redacted(self) -> str:
        """The URL of one server without its password, safe to print."""
        name, port = self.hosts[0]
        host = f"[{name}]" if ":" in name else name
        database = f"/{self.database}" if self.database else ""
        return f"redis://{f':{MASK}@' if self.password else ''}{host}:{port}{database}"


def parse_redis_url(text: str) -> RedisAddress:
    """Parse `redis://`, `rediss://`, `unix://`, `redis[s]+sentinel://h:p,h:p/master[/db]`.

    Read from the query: `username`, `password`, `db`, TLS options (`ssl_ca_certs`, `ssl_certfile`, `ssl_keyfile`,
    `ssl_cert_reqs`, `ssl_check_hostname`), and `sentinel_username`, `sentinel_password`, `sentinel_tls`.
    Raises ValueError that says what is wrong without quoting the URL.
    """
    parts = split_url(text)
    given = {name: value for name, value in split_query(parts.query) if value}
    known = ("db", "username", "password", *TLS_OPTIONS, *SENTINEL_OPTIONS)
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ValueError(f"unknown option {unknown[0][:64]!r}; known are {', '.join(known)}")
    hosts, _, path = parts.place.partition("/")
    database, user = given.pop("db", None), given.pop("username", parts.user)
    password, sentinel = given.pop("password", parts.password), _sentinel(given)
    scheme, _, through = parts.scheme.partition("+")
    if parts.scheme not in SCHEMES:
        raise ValueError(f"the scheme must be one of {', '.join(SCHEMES)}, not {parts.scheme}")
    if through != "sentinel" and sentinel != SentinelLogin():
        raise ValueError("sentinel_username, sentinel_password and sentinel_tls need redis+sentinel://")
    common: dict[str, Any] = {"user": user, "password": password, "options": _tls_options(given)}
    if parts.scheme == "unix":
        if hosts or not path:
            raise ValueError("expected unix:///path/to/redis.sock")
        address = RedisAddress(unix_path=parts.place, database=_database(database), **common)
    elif through:
        master, _, number = path.partition("/")
        if not hosts or not master:
            raise ValueError(f"expected {parts.scheme}://host:port,host:port/master")
        address = RedisAddress(
            hosts=tuple(_host_port(host, DEFAULT_SENTINEL_PORT) for host in hosts.split(",")),
            master=master,
            database=_database(database or number),
            tls=scheme == "rediss",
            sentinel=sentinel,
            **common,
        )
    else:
        if "," in hosts:
            raise ValueError("several hosts need redis+sentinel://; a cluster is not supported")
        address = RedisAddress(
            hosts=(_host_port(hosts or "localhost", DEFAULT_PORT),),
            database=_database(database or path),
            tls=scheme == "rediss",
            **common,
        )
    address.check_tls()
    return address


def _sentinel(given: dict[str, str]) -> SentinelLogin:
    user, password, tls = (given.pop(name, None) for name in SENTINEL_OPTIONS)
    return SentinelLogin(user, password, None if tls is None else _boolean("sentinel_tls", tls))


def _tls_options(given: dict[str, str]) -> dict[str, Any]:
    """Those that are left, with the values that the library takes."""
    options: dict[str, Any] = dict(given)
    if (verify := given.get("ssl_cert_reqs")) is not None:
        if verify.lower() not in CERT_REQS:
            raise ValueError("ssl_cert_reqs must be none, optional or required")
        options["ssl_cert_reqs"] = CERT_REQS[verify.lower()]
    if (check := given.get("ssl_check_hostname")) is not None:
        options["ssl_check_hostname"] = _boolean("ssl_check_hostname", check)
    return options


def _boolean(name: str, text: str) -> bool:
    if text.lower() not in BOOLEANS:
        raise ValueError(f"{name} must be true or false")
    return BOOLEANS[text.lower()]


def _host_port(text: str, default_port: int) -> Host:
    host, colon, port = text.rpartition(":")
    if not colon or port.endswith("]"):  # no port, or an IPv6 address without one
        return text.strip("[]"), default_port
    if not (port.isascii() and port.isdecimal() and len(port) <= 5 and 0 < int(port) < 65536):
        raise ValueError("the port must be a number from 1 to 65535")
    return host.strip("[]"), int(port)


def _database(text: str | None) -> int:
    if not text:
        return 0
    if not (text.isascii() and text.isdecimal() and len(text) <= 9):
        raise ValueError("the database after the slash must be a number")
    return int(text)
