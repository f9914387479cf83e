"""Classifies the errors of the database and its driver. This is the only module that translates them."""

from __future__ import annotations

import re
import ssl
from contextlib import contextmanager
from enum import Enum
from typing import TYPE_CHECKING

import asyncpg
from sqlalchemy.exc import DBAPIError, InterfaceError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from worker.errors import (
    ASK_CHECK,
    DatabaseRefused,
    DatabaseUnavailable,
    NotConnected,
    NotEncodable,
    ViewerWorkerError,
    WriteTooSlow,
)

if TYPE_CHECKING:
    from collections.abc import Container, Iterator

# Classes: 08 connection, 53 resources (disk, memory, connections), 57P0x shutdown and start-up. Single states: 25006
# read-only (failover), 25P03 and 25P04 timeouts of the transaction (idle, as a whole), 26000 statement missing behind a
# pooler, 40001 serialization, 40P01 deadlock, 55P03 lock timeout, 57014 statement timeout.
TRANSIENT_PREFIXES = ("08", "53", "57P0")
TRANSIENT_STATES = frozenset({"25006", "25P03", "25P04", "26000", "40001", "40P01", "55P03", "57014"})
LOCK_NOT_AVAILABLE = "55P03"
READ_ONLY = "25006"
QUERY_CANCELED = "57014"
# Deadlock, serialization failure: Postgres chose this transaction as the victim; it may be tried again at once.
COLLISIONS = ("40P01", "40001")
# Errors of the transaction, the connection or the server. Only where a function raises them is a row the cause.
TRANSACTION_PREFIXES = ("08", "25", "40", "53", "57")
TRANSACTION_STATES = frozenset({"0A000", "26000"})
# Refused log-ins: an operator has to fix them, but can do so while the worker waits.
REFUSED_PREFIXES = ("28", "3D000")
INSUFFICIENT_PRIVILEGE = "42501"
# A character that the database's encoding lacks, or bytes that are not of that encoding.
NOT_ENCODABLE = ("22P05", "22021")
# The driver's own errors. It raises the second on a connection that the server has closed, until we close it too.
DRIVER_ERRORS = (asyncpg.InterfaceError, asyncpg.InternalClientError)
RIGHTS_REMEDY = (
    "Grant the right that the message names; deploy/postgres/role.sql has all that the worker's role needs. "
    f"{ASK_CHECK}"
)
MIGRATE_REMEDY = (
    "To migrate, a role needs CREATE on the schema: migrate as the owner of the database, or grant that right."
)
# What Postgres refuses to a role that migrates and is not the owner.
_OF_MIGRATION = re.compile("permission denied (?:for schema|to create)|must be owner")
POOL_REMEDY = "All connections of this process are in use: raise DB_MAX_CONNECTIONS."
LOGIN_REMEDY = "Check user, password, database and sslmode in DATABASE_URL, and pg_hba.conf."
TLS_REMEDY = "Check sslmode and sslrootcert in DATABASE_URL, and whether the server speaks TLS."
_COLLISION_REMEDY = "Another session changed the same rows at the same time: the next try may succeed."
_SLOW_REMEDY = "The program was too slow between two statements: give it more CPU, or allow longer transactions."
# How to fix what Postgres reports, by SQLSTATEs and their beginnings.
REMEDIES = {
    "": "Postgres can be reached, and refuses: the message says why, and its log may have more.",
    "08": DatabaseUnavailable.remedy,
    READ_ONLY: "Let DATABASE_URL lead to the primary, and reset default_transaction_read_only if it is on.",
    "25P03": _SLOW_REMEDY,
    "25P04": _SLOW_REMEDY,
    "26000": "DATABASE_URL leads to a pooler: the next try does not use prepared statements.",
    "28": LOGIN_REMEDY,
    "3D000": LOGIN_REMEDY,
    "40001": _COLLISION_REMEDY,
    "40P01": _COLLISION_REMEDY,
    INSUFFICIENT_PRIVILEGE: RIGHTS_REMEDY,
    "53100": "The disk of Postgres is full: make room.",
    "53200": "Postgres lacks memory: look at its settings and at the other sessions.",
    "53300": "Postgres has no connection left: raise max_connections, lower DB_MAX_CONNECTIONS, or use a pooler.",
    LOCK_NOT_AVAILABLE: "Another session holds the lock: find it in pg_locks and pg_stat_activity, and end it.",
    QUERY_CANCELED: WriteTooSlow.remedy,
    "57P01": "Postgres is shutting down, or somebody ended this session: the next try connects again.",
    "57P02": "Postgres crashed and recovers: wait; its log says why.",
    "57P03": "Postgres is starting up, or recovers: wait.",
}


class ErrorClass(Enum):
    """What to do about an error of a statement that writes records."""

    WAIT = "heals by waiting"
    ROW = "a record does not fit: find it, the others fit"
    HOLD = "the table, or the right to it, does not fit: somebody has to change it"
    UNKNOWN = "try a few times"


# SQLSTATEs by their longest prefix.
_CLASSES = {
    "": ErrorClass.UNKNOWN,
    "08": ErrorClass.WAIT,
    "25006": ErrorClass.WAIT,
    "25P03": ErrorClass.WAIT,
    "25P04": ErrorClass.WAIT,
    "26000": ErrorClass.WAIT,
    "28": ErrorClass.WAIT,
    "3D": ErrorClass.WAIT,
    "40001": ErrorClass.WAIT,
    "40P01": ErrorClass.WAIT,
    "53": ErrorClass.WAIT,
    "55006": ErrorClass.WAIT,
    "55P03": ErrorClass.WAIT,
    "57014": ErrorClass.WAIT,
    "57P0": ErrorClass.WAIT,
    "22": ErrorClass.ROW,
    "23": ErrorClass.ROW,
    "44": ErrorClass.ROW,
    "54": ErrorClass.ROW,
    "P0": ErrorClass.ROW,
    "0A": ErrorClass.HOLD,
    "21": ErrorClass.HOLD,
    "3F": ErrorClass.HOLD,
    "42": ErrorClass.HOLD,
    "53400": ErrorClass.HOLD,
    "XX": ErrorClass.HOLD,
}
NOT_NULL_VIOLATION = "23502"
# What the driver says of a value that it cannot send; the value itself follows.
_CLIENT_SIDE = re.compile(r"invalid input for query argument \$\d+")


def classify(error: BaseException, columns: Container[str]) -> ErrorClass:
    """The class of an error of a statement that fills `columns`. The driver's state decides before the SQLSTATE."""
    if isinstance(error, NotConnected) or _is_disconnected(error):
        return ErrorClass.WAIT
    state = sqlstate(error)
    if state is None:
        return ErrorClass.WAIT if is_transient(error) or isinstance(error, DatabaseUnavailable) else ErrorClass.UNKNOWN
    if state == NOT_NULL_VIOLATION and _field_of(error, "column_name") not in columns:
        return ErrorClass.HOLD
    return next(_CLASSES[state[:length]] for length in range(len(state), -1, -1) if state[:length] in _CLASSES)


def _is_disconnected(error: BaseException) -> bool:
    """True when the driver closed the connection at this error, whatever the server said last."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, DBAPIError):
            return seen.connection_invalidated
        seen = seen.__cause__
    return False


def _field_of(error: BaseException, name: str) -> str | None:
    """A field of the message with which Postgres reported the error, by asyncpg's name for it."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, asyncpg.PostgresError):
            value: str | None = getattr(seen, name, None)
            return value
        seen = getattr(seen, "orig", None) or seen.__cause__
    return None


def sqlstate(error: BaseException) -> str | None:
    """The five-character SQLSTATE of an error or of its cause, or None."""
    seen: BaseException | None = error
    while seen is not None:
        state = getattr(seen, "sqlstate", None)
        if isinstance(state, str):
            return state
        seen = getattr(seen, "orig", None) or seen.__cause__
    return None


def is_transient(error: BaseException) -> bool:
    """True when the same statement may succeed later on the same data."""
    state = sqlstate(error)
    if state is not None:
        return state.startswith(TRANSIENT_PREFIXES) or state in TRANSIENT_STATES
    if isinstance(error, DBAPIError):
        return error.connection_invalidated or isinstance(error, InterfaceError) or is_transient_cause(error.orig)
    return isinstance(error, PoolTimeout) or is_transient_cause(error)


def is_transient_cause(error: BaseException | None) -> bool:
    """True when the error or a cause of it means that the connection is unusable. OSError includes every timeout."""
    while error is not None:
        if isinstance(error, (OSError, asyncpg.PostgresConnectionError, *DRIVER_ERRORS)):
            return True
        error = error.__cause__
    return False


def is_login_refused(error: BaseException) -> bool:
    return (sqlstate(error) or "").startswith(REFUSED_PREFIXES)


def is_refused_by_row(error: BaseException) -> bool:
    """True when a row refuses its change or a trigger on it raises any error. Other rows may accept theirs.

    False for a wait for a lock, and when the connection is lost.
    """
    state = sqlstate(error)
    if state is None or state == LOCK_NOT_AVAILABLE or _is_disconnected(error):
        return False
    concerns_all = state.startswith(TRANSACTION_PREFIXES) or state in TRANSACTION_STATES
    # A full disk or a shutdown would otherwise be blamed on rows, and their views skipped.
    return not concerns_all or _is_raised_in_a_function(error)


def _is_raised_in_a_function(error: BaseException) -> bool:
    """True when Postgres names the functions that were running, as those of triggers."""
    return bool(_field_of(error, "context"))


@contextmanager
def database_errors() -> Iterator[None]:
    """Raise DatabaseUnavailable where a retry may succeed, DatabaseRefused for Postgres's other errors.

    SQLAlchemy's other errors are mistakes in this program: they stay as they are.
    """
    try:
        yield
    except (SQLAlchemyError, asyncpg.PostgresError, *DRIVER_ERRORS, OSError) as error:
        if is_login_refused(error) or sqlstate(error) == INSUFFICIENT_PRIVILEGE or is_transient(error):
            raise DatabaseUnavailable(describe(error), remedy_for(error)) from error
        if sqlstate(error) in NOT_ENCODABLE:
            raise NotEncodable(describe(error)) from error
        if isinstance(error, DBAPIError | asyncpg.PostgresError):
            raise DatabaseRefused(describe(error)) from error
        raise


def remedy_for(error: BaseException) -> str | None:
    """How an operator can fix it; None: the usual, which is for a server that cannot be reached."""
    if isinstance(error, PoolTimeout):
        return POOL_REMEDY
    if (state := sqlstate(error)) is not None:
        if state == INSUFFICIENT_PRIVILEGE and _OF_MIGRATION.search(describe(error)):
            return MIGRATE_REMEDY
        return next(REMEDIES[state[:length]] for length in range(len(state), -1, -1) if state[:length] in REMEDIES)
    return TLS_REMEDY if _is_of_tls(error) else None


def _is_of_tls(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, ssl.SSLError):
            return True
        error = getattr(error, "orig", None) or error.__cause__ or error.__context__
    return False


def describe(error: BaseException) -> str:
    """The error in one line, without statement, parameters and address: those may contain data or secrets."""
    if isinstance(error, ViewerWorkerError):
        return str(error)  # it is translated already, and has its SQLSTATE
    origin: BaseException = error
    while isinstance(error, DBAPIError) and (deeper := getattr(origin, "orig", None) or origin.__cause__) is not None:
        if isinstance(origin, asyncpg.PostgresError):
            break
        origin = deeper
    if isinstance(origin, TimeoutError):
        return "no answer in time"
    text = str(origin).split("\n", 1)[0].strip() or type(origin).__name__
    if match := _CLIENT_SIDE.match(text):
        text = match.group()
    state = sqlstate(error)
    return f"{text[:200]} (SQLSTATE {state})" if state else text[:200]
