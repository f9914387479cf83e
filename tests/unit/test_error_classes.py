"""What to do about an error of a statement that writes records: the table, row by row."""

from __future__ import annotations

import asyncpg
import pytest
from sqlalchemy.dialects.postgresql.asyncpg import AsyncAdapt_asyncpg_dbapi as driver
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from worker.db.errors import ErrorClass, classify, database_errors, describe, is_refused_by_row
from worker.errors import DatabaseRefused, DatabaseUnavailable

WAIT, ROW, HOLD, UNKNOWN = ErrorClass.WAIT, ErrorClass.ROW, ErrorClass.HOLD, ErrorClass.UNKNOWN
COLUMNS = frozenset({"time", "path"})

TABLE = {
    WAIT: [
        *("08000", "08003", "08006", "08P01"),
        *("25006", "25P03", "25P04", "26000"),
        *("28000", "28P01", "3D000"),
        *("40001", "40P01"),
        *("53000", "53100", "53200", "53300"),
        *("55006", "55P03"),
        *("57014", "57P01", "57P02", "57P03", "57P04", "57P05"),
    ],
    ROW: [
        *("22000", "22001", "22003", "22007", "22008", "22021", "22P02", "22P05"),
        *("23000", "23001", "23503", "23505", "23514", "23P01"),
        *("44000", "54000", "54001", "54011"),
        *("P0000", "P0001", "P0002", "P0004"),
    ],
    HOLD: [
        *("0A000", "21000", "3F000"),
        *("42501", "42601", "42703", "42704", "42804", "42846", "42883", "42P01", "42P10"),
        "53400",
        *("XX000", "XX001", "XX002"),
    ],
    UNKNOWN: ["01000", "25000", "25P02", "2F000", "38000", "40002", "40003", "55000", "58030", "F0000", "99999"],
}
ROWS = [(state, expected) for expected, states in TABLE.items() for state in states]


def raised(cause: Exception, *, disconnected: bool = False) -> DBAPIError:
    """`cause` as SQLAlchemy raises it."""
    kind = driver.InterfaceError if isinstance(cause, asyncpg.InterfaceError) else driver.Error
    translated = kind(str(cause), cause)
    translated.__cause__ = cause
    error = DBAPIError("INSERT", {}, translated, connection_invalidated=disconnected)
    error.__cause__ = translated
    return error


def refused(state: str, column: str | None = None, context: str | None = None) -> Exception:
    """An error that Postgres sent."""
    fields = {"C": state, "M": "text", "c": column, "W": context}
    return asyncpg.PostgresError.new({name: value for name, value in fields.items() if value})


def translated(error: Exception) -> Exception:
    """The error as it leaves a transaction."""
    with pytest.raises((DatabaseUnavailable, DatabaseRefused)) as caught, database_errors():
        raise error
    return caught.value


@pytest.mark.parametrize(("state", "expected"), ROWS)
def test_sqlstate_decides_before_and_after_translation(state: str, expected: ErrorClass) -> None:
    error = raised(refused(state))
    assert classify(refused(state), COLUMNS) is expected
    assert classify(error, COLUMNS) is expected
    assert classify(translated(error), COLUMNS) is expected


@pytest.mark.parametrize(("column", "expected"), [("path", ROW), ("tenant", HOLD), (None, HOLD)])
def test_missing_value_is_the_row_s_fault_only_in_a_column_that_is_filled(
    column: str | None, expected: ErrorClass
) -> None:
    error = raised(refused("23502", column))
    assert classify(error, COLUMNS) is expected
    assert classify(translated(error), COLUMNS) is expected


def test_value_that_the_driver_cannot_send_is_the_row_s_fault() -> None:
    # asyncpg raises it without a SQLSTATE from the server; its class has 22000.
    error = raised(asyncpg.DataError("invalid input for query argument $1: [2 ** 70] (value out of int64 range)"))
    assert classify(error, COLUMNS) is ROW
    assert classify(translated(error), COLUMNS) is ROW


@pytest.mark.parametrize(
    "cause",
    [
        asyncpg.InterfaceError("connection is closed"),
        asyncpg.InternalClientError("got result for unknown protocol state"),
        asyncpg.ConnectionDoesNotExistError("connection was closed in the middle of operation"),
        ConnectionResetError(),
        TimeoutError(),
        OSError("unreachable"),
    ],
    ids=lambda cause: type(cause).__name__,
)
def test_lost_connection_heals_by_waiting(cause: Exception) -> None:
    for error in (cause, raised(cause), translated(cause), translated(raised(cause))):
        assert classify(error, COLUMNS) is WAIT


@pytest.mark.parametrize("state", ["22003", "42P01", "53400", "XX000", "99999"])
def test_lost_connection_decides_before_the_sqlstate(state: str) -> None:
    error = raised(refused(state), disconnected=True)
    assert classify(error, COLUMNS) is WAIT
    assert classify(translated(error), COLUMNS) is WAIT


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (PoolTimeout("no free connection"), WAIT),
        (DatabaseUnavailable("too many connections"), WAIT),
        (DatabaseRefused("text"), UNKNOWN),
        (raised(Exception("text")), UNKNOWN),
        (ArgumentError("text"), UNKNOWN),
        (ValueError("text"), UNKNOWN),
    ],
    ids=lambda value: type(value).__name__,
)
def test_error_without_a_sqlstate(error: Exception, expected: ErrorClass) -> None:
    assert classify(error, COLUMNS) is expected


@pytest.mark.parametrize("state", ["23514", "40001", "42501", "28000"])
def test_translated_error_is_described_with_its_sqlstate_once(state: str) -> None:
    error = raised(refused(state))
    assert describe(error) == f"text (SQLSTATE {state})"
    assert describe(translated(error)).count(state) == 1


def test_mistake_in_the_use_of_the_library_is_not_an_error_of_the_database() -> None:
    with pytest.raises(ArgumentError), database_errors():
        raise ArgumentError("text")


IN_A_TRIGGER = "PL/pgSQL function refuse() line 1 at RAISE"


@pytest.mark.parametrize("state", ["0A000", "08006", "25006", "26000", "40001", "53100", "53200", "57014", "57P01"])
def test_error_that_concerns_all_rows_is_a_row_s_fault_only_if_a_trigger_raised_it(state: str) -> None:
    assert is_refused_by_row(raised(refused(state, context=IN_A_TRIGGER)))
    assert not is_refused_by_row(raised(refused(state)))
    assert not is_refused_by_row(raised(refused(state, context=IN_A_TRIGGER), disconnected=True))


@pytest.mark.parametrize(("state", "expected"), [("22003", True), ("23514", True), ("42501", True), ("55P03", False)])
def test_other_error_is_a_row_s_fault_unless_it_waited_for_a_lock(state: str, expected: bool) -> None:
    assert is_refused_by_row(raised(refused(state))) is expected
    assert is_refused_by_row(raised(refused(state, context=IN_A_TRIGGER))) is expected
