"""What becomes of each parameter of a DATABASE_URL: honoured, mapped to others, ignored, or refused.

None is passed on to the server unless it is listed in SESSION: Postgres ends a connection that asks for a setting it
does not know, and a pooler one that asks for a setting it does not track.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches

from worker.db.quoting import quote_identifier

SSL_MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
TLS_VERSIONS = ("TLSv1", "TLSv1.1", "TLSv1.2", "TLSv1.3")
# With this value of sslrootcert the certificate is verified against the authorities that the system trusts.
SYSTEM_ROOTS = "system"
TRUE, FALSE = ("true", "1", "t", "on", "yes"), ("false", "0", "f", "off", "no")

# Honoured: parts of the address, the log-in and TLS, under libpq's names.
HONOURED = frozenset(
    {
        *("host", "hostaddr", "port", "user", "password", "dbname", "passfile", "krbsrvname"),
        *("sslmode", "sslrootcert", "sslcert", "sslkey", "sslpassword", "sslcrl", "sslnegotiation"),
        *("ssl_min_protocol_version", "ssl_max_protocol_version", "target_session_attrs"),
        *("application_name", "options", "search_path", "pgbouncer", "sslaccept"),
    }
)
# Settings of the server that a session begins with.
SESSION = ("application_name", "options", "search_path")
# Honoured parameters that have few values.
VALUES: dict[str, tuple[str, ...]] = {
    "sslmode": SSL_MODES,
    "sslnegotiation": ("postgres", "direct"),
    "ssl_min_protocol_version": TLS_VERSIONS,
    "ssl_max_protocol_version": TLS_VERSIONS,
    "target_session_attrs": ("any", "read-write", "primary"),
}

# Ignored: they concern other programs' pools, caches and time limits (the worker has settings of its own), or what the
# driver always does or never does.
IGNORED = frozenset(
    {
        # libpq
        *("channel_binding", "client_encoding", "connect_timeout", "fallback_application_name", "gssdelegation"),
        *("gssencmode", "gsslib", "keepalives", "keepalives_count", "keepalives_idle", "keepalives_interval"),
        *("load_balance_hosts", "max_protocol_version", "min_protocol_version", "replication", "sslcertmode"),
        *("sslcompression", "sslkeylogfile", "sslsni", "tcp_user_timeout"),
        # Prisma
        *("connection_limit", "max_connection_lifetime", "max_idle_connection_lifetime", "pool_timeout"),
        *("single_use_connections", "socket_timeout", "statement_cache_size"),
        # node-postgres, postgres.js, and what the platforms that deploy with them add
        *("connectionTimeoutMillis", "encoding", "idleTimeoutMillis", "idle_in_transaction_session_timeout"),
        *("idle_timeout", "keepAlive", "lock_timeout", "max", "max_lifetime", "min", "prepare", "query_timeout"),
        *("statement_timeout", "supa", "uselibpqcompat", "workaround"),
        # asyncpg and SQLAlchemy
        *("command_timeout", "max_cacheable_statement_size", "max_cached_statement_lifetime", "max_overflow"),
        *("pool_pre_ping", "pool_recycle", "prepared_statement_cache_size", "timeout"),
        # Django, Rails, Ecto
        *("advisory_locks", "checkout_timeout", "conn_health_checks", "conn_max_age", "pool", "pool_size"),
        *("prepared_statements", "reaping_frequency", "statement_limit"),
        # pgx, lib/pq, sqlx
        *("binary_parameters", "default_query_exec_mode", "description_cache_capacity", "pool_health_check_period"),
        *("pool_max_conn_idle_time", "pool_max_conn_lifetime", "pool_max_conn_lifetime_jitter", "pool_max_conns"),
        *("pool_min_conns", "pool_min_idle_conns", "statement-cache-capacity", "statement_cache_capacity"),
        # pgjdbc
        *("assumeMinServerVersion", "autosave", "binaryTransfer", "cancelSignalTimeout", "connectTimeout"),
        *("defaultRowFetchSize", "loadBalanceHosts", "loginTimeout", "preferQueryMode", "prepareThreshold"),
        *("preparedStatementCacheQueries", "preparedStatementCacheSizeMiB", "reWriteBatchedInserts"),
        *("socketTimeout", "stringtype", "tcpKeepAlive"),
    }
)
# Ignored parameters that ask for a protection with these values. It would not be given, so they are refused. Not
# channel_binding=require, which is in every URL of a provider: sslmode=verify-full protects from the same attack.
_UNPROTECTED = {"gssencmode": ("require",), "sslcertmode": ("require",)}
# Ignored parameters with values that change what the connection is.
_REPLICATION = ("", *FALSE)
REFUSED = {
    "gssEncMode": "the driver has no GSSAPI encryption",
    "oauth_client_id": "the driver has no OAuth",
    "oauth_client_secret": "the driver has no OAuth",
    "oauth_issuer": "the driver has no OAuth",
    "oauth_scope": "the driver has no OAuth",
    "require_auth": "the driver cannot limit how the server asks for the password",
    "requirepeer": "the driver cannot check who runs the server",
    "scram_client_key": "give the password instead",
    "scram_server_key": "give the password instead",
    "service": "give the parameters of the service themselves",
    "servicefile": "give the parameters of the service themselves",
    "sslcrldir": "give one file as sslcrl",
    "sslfactory": "use sslmode and sslrootcert",
    "sslidentity": "a PKCS #12 file; give its parts in PEM as sslcert and sslkey",
}

Mapped = Mapping[str, str]


def _is_true(value: str) -> bool:
    if value.lower() not in (*TRUE, *FALSE):
        raise ValueError("true or false")
    return value.lower() in TRUE


def _ssl(value: str) -> Mapped:
    """Either one of the modes, or whether to encrypt."""
    if value in (*SSL_MODES, "no-verify"):
        return {"sslmode": value}
    return {"sslmode": "require" if _is_true(value) else "disable"}


def _target(value: str) -> Mapped:
    names = {"any": "any", "primary": "primary", "master": "primary"}
    if value not in names:
        raise ValueError("any or primary: the worker writes")
    return {"target_session_attrs": names[value]}


# Mapped to honoured ones.
MAPPED: dict[str, Callable[[str], Mapped]] = {
    "ApplicationName": lambda value: {"application_name": value},
    "application-name": lambda value: {"application_name": value},
    "channelBinding": lambda value: {"channel_binding": value},
    "currentSchema": lambda value: {"search_path": value},
    "database": lambda value: {"dbname": value},
    "direct_tls": lambda value: {"sslnegotiation": "direct" if _is_true(value) else "postgres"},
    "pgbouncer": lambda value: {"pgbouncer": str(_is_true(value)).lower()},
    "requiressl": lambda value: {"sslmode": "require" if _is_true(value) else "prefer"},
    "schema": lambda value: {"search_path": quote_identifier(value)},
    "schema_search_path": lambda value: {"search_path": value},
    "ssl": _ssl,
    "ssl_require": lambda value: {"sslmode": "require" if _is_true(value) else "prefer"},
    "targetServerType": _target,
}


@dataclass(frozen=True, slots=True)
class Parameters:
    """`honoured` have libpq's names and valid values. `ignored` are the names of those that have no effect."""

    honoured: Mapping[str, str]
    ignored: tuple[str, ...]


def read_parameters(given: Iterable[tuple[str, str]]) -> Parameters:
    """Sort the parameters; of several values the last one wins, and an empty one counts as absent.

    Raises ValueError that names the parameter: one that is unknown, is refused, or has a wrong value.
    """
    honoured: dict[str, str] = {}
    ignored: list[str] = []
    for name, value in given:
        for own_name, own_value in _map(name, value).items():
            if own_name in HONOURED:
                honoured[own_name] = own_value
            else:
                _check_ignored(own_name, own_value)
                ignored.append(name)
    honoured = {name: value for name, value in honoured.items() if value}
    _use_tls_names(honoured, ignored)
    for name, values in VALUES.items():
        if honoured.get(name, values[0]) not in values:
            raise ValueError(f"{name} must be one of {', '.join(values)}")
    _check_tls(honoured)
    return Parameters(honoured, tuple(dict.fromkeys(ignored)))


def _map(name: str, value: str) -> Mapped:
    if name in MAPPED:
        try:
            return MAPPED[name](value) if value else {}
        except ValueError as error:
            raise ValueError(f"{name} must be {error}") from None
    if name in HONOURED or name in IGNORED:
        return {name: value}
    if name in REFUSED:
        raise ValueError(f"the parameter {name} is not supported: {REFUSED[name]}")
    known = sorted(HONOURED | IGNORED | set(MAPPED))
    alike = get_close_matches(name, known, n=1)
    hint = f"; did you mean {alike[0]}?" if alike else ""
    raise ValueError(f"unknown parameter {name[:64]!r}{hint}")


def _check_ignored(name: str, value: str) -> None:
    if value in _UNPROTECTED.get(name, ()):
        raise ValueError(f"{name}={value} is not supported")
    if name == "replication" and value.lower() not in _REPLICATION:
        raise ValueError("replication must be false: the worker runs statements")


def _use_tls_names(honoured: dict[str, str], ignored: list[str]) -> None:
    """Turn what other drivers say of the server's certificate into libpq's sslmode and sslrootcert."""
    if honoured.get("sslmode") == "no-verify":  # node-postgres
        honoured["sslmode"] = "require"
        if honoured.pop("sslrootcert", None):
            ignored.append("sslrootcert")
    if accept := honoured.pop("sslaccept", None):  # Prisma, whose sslcert is the authority's certificate
        authority = honoured.pop("sslcert", SYSTEM_ROOTS)
        if accept == "strict":
            honoured |= {"sslmode": "verify-full", "sslrootcert": authority}
        elif accept == "accept_invalid_certs":
            ignored.append("sslaccept")
        else:
            raise ValueError("sslaccept must be strict or accept_invalid_certs")
    if honoured.get("sslrootcert") == SYSTEM_ROOTS:
        honoured.setdefault("sslmode", "verify-full")


def _check_tls(honoured: Mapped) -> None:
    mode = honoured.get("sslmode")
    if honoured.get("sslrootcert") == SYSTEM_ROOTS and mode != "verify-full":
        raise ValueError("sslrootcert=system needs sslmode=verify-full")
    if honoured.get("sslnegotiation") == "direct" and mode not in ("require", "verify-ca", "verify-full"):
        raise ValueError("sslnegotiation=direct needs sslmode=require, verify-ca or verify-full")
    if "hostaddr" in honoured and mode == "verify-full":
        raise ValueError("hostaddr does not go with sslmode=verify-full: the certificate has the name of the host")
