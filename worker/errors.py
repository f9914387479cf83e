"""The errors that callers can catch, in one tree.

ViewerWorkerError
├── InvalidSettings          settings have wrong values; the worker does not start (exit code 78)
├── Unavailable              a server cannot be used right now; a retry may succeed (exit code 69)
│   ├── RedisUnavailable
│   │   ├── NotAppended      (redis.appender) an entry is certainly not in its stream
│   │   └── AppendUnanswered (redis.appender) an entry may be in its stream or not
│   ├── DatabaseUnavailable
│   │   ├── NotConnected     no connection could be opened, for whatever reason
│   │   ├── CommitUnanswered (pipelines.model) a batch may be written or not
│   │   └── WriteTooSlow     a write takes longer than the statement timeout: a smaller one may not
│   ├── StreamFull           (redis.appender) too many entries wait to be carried
│   └── TooManyReaders       too many concurrent reads
├── DatabaseRefused          Postgres refuses a statement: data that does not fit, a missing table
│   └── NotEncodable         the database's encoding lacks a character of a text: no row can have it
├── SchemaNotCurrent         the tables are not those of this version, or the role lacks rights on them
├── TargetUnusable           the application's own table (VIEW_TARGET_*) is missing or does not fit
├── TableRefused             a table, or the right to it, does not fit: nothing is written until somebody changes it
├── UnknownFailure           (pipelines) an error of no known class: worth a few tries
├── RetriesExhausted         (pipelines) such an error stayed after all tries
├── PositionNotSet           (pipelines) the position of a stream cannot be set there
├── OnHold                   Redis and Postgres contradict each other; flushing waits until they agree or `adopt` is run
├── NothingToAdopt           there is no hold for `adopt` to end, or it changed since it was shown
├── NotDrained               a loop ended with work left, since its part of SHUTDOWN_TIMEOUT was over (exit code 1)
├── ViewNotRecorded          (producer) certainly not in Redis; safe to send again
│   └── InvalidView          the id or the count is invalid; also a ValueError
├── ViewIndeterminate        (producer) sent but not confirmed; sending it again may count it twice
├── InvalidMetric            (MetricStore) a record of a batch is invalid; also a ValueError
├── InvalidId                (ids) not a valid id
├── CannotListen             (rpc) the address of the gRPC server is in use, or not an address of this host
├── BadRequest               (web) the request is invalid
├── NotFound                 (web) there is nothing to answer
└── ServerFailed             (dev.servers) an embedded server did not start
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# The end of a fix for errors of which `viewer-worker check` finds the cause. `check` itself leaves it out.
ASK_CHECK = "Run viewer-worker check: it shows what is wrong."


class ViewerWorkerError(Exception):
    """Root of the tree. `remedy` says how an operator can fix it, or is empty."""

    remedy: str = ""

    def __init__(self, message: str = "", remedy: str | None = None) -> None:
        super().__init__(message)
        if remedy is not None:
            self.remedy = remedy


@dataclass(frozen=True, slots=True)
class SettingProblem:
    """One setting with a wrong value. `value` is safe to print: secrets are masked."""

    name: str
    value: str
    expected: str

    def __str__(self) -> str:
        return f"{self.name}={self.value!r}: expected {self.expected}"


def cause_of(error: Exception) -> str:
    """The first line of an error's text, with the type in front unless it is a ViewerWorkerError."""
    text = str(error).split("\n", 1)[0][:200]
    return text if isinstance(error, ViewerWorkerError) else f"{type(error).__name__}: {text}"


class InvalidSettings(ViewerWorkerError):
    """Settings have wrong values. `problems` lists all of them."""

    def __init__(self, problems: Sequence[SettingProblem]) -> None:
        super().__init__("\n".join(map(str, problems)))
        self.problems = tuple(problems)


class Unavailable(ViewerWorkerError):
    """A server cannot be used right now. This says nothing about the data; the same step can be retried later."""


class RedisUnavailable(Unavailable):
    remedy = "Check that Redis runs and that REDIS_URL reaches it."


class NotAppended(RedisUnavailable):
    """An entry is certainly not in its stream. It can be sent again."""


class AppendUnanswered(RedisUnavailable):
    """An entry was sent, and it is not known whether it is in its stream."""


class StreamFull(Unavailable):
    """So many entries wait to be carried that no more are taken. Nothing was stored."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"{limit} entries or more wait to be carried")


class DatabaseUnavailable(Unavailable):
    remedy = "Check that Postgres runs and that DATABASE_URL (or DB_HOST, DB_PORT, …) reaches it."


class NotConnected(DatabaseUnavailable):
    """No connection could be opened. No statement and no data is the cause, so waiting may help."""


class WriteTooSlow(DatabaseUnavailable):
    """A write was cancelled by the statement timeout. Nothing was written."""

    remedy = "Look for what slows Postgres down: locks, triggers, its disk."


class DatabaseRefused(ViewerWorkerError):
    """Postgres refuses a statement, and a retry would not help. `db.errors` can classify the error in `__cause__`."""

    remedy = f"The log of Postgres has the statement. {ASK_CHECK}"

    def __init__(self, cause: str) -> None:
        super().__init__(f"Postgres refused the statement: {cause}")


class NotEncodable(DatabaseRefused):
    """The database's encoding lacks a character of a text that was sent, so no row has this text."""


class TooManyReaders(Unavailable):
    """The limit on concurrent reads, which keeps connections free for flushing, is reached."""

    def __init__(self) -> None:
        super().__init__("too many reads at the same time")


class SchemaNotCurrent(ViewerWorkerError):
    """The tables are missing, older or newer than this version needs, or the worker's role lacks rights on them."""


class TargetUnusable(ViewerWorkerError):
    """The worker cannot update the table that VIEW_TARGET_TABLE names."""


class OnHold(ViewerWorkerError):
    """Redis and Postgres contradict each other. Nothing is changed until that is resolved."""

    def __init__(self, cause: str, remedy: str) -> None:
        super().__init__(f"on hold: {cause}", remedy)


class NothingToAdopt(ViewerWorkerError):
    """There is no hold, or it changed since it was shown."""


class NotDrained(ViewerWorkerError):
    """A loop ended after the stop with work left. The text says what is lost, if anything."""


class ViewNotRecorded(ViewerWorkerError):
    """Nothing was recorded: Redis could not be reached, or refused all of it. Safe to send again."""


class InvalidView(ViewNotRecorded, ValueError):
    """The id or the count is invalid, so sending it again fails too. The text says why."""


class ViewIndeterminate(ViewerWorkerError):
    """The views were sent, but Redis did not confirm all of them. Sending them again may count them twice."""


class CannotListen(ViewerWorkerError):
    """The gRPC server cannot use its address."""

    remedy = "Set GRPC_HOST to an address of this host, and GRPC_PORT to a free port; 0 turns gRPC off."


class InvalidMetric(ViewerWorkerError, ValueError):
    """A record of a batch is invalid, so nothing was written. The text names its index, from 0, and its field."""

    def __init__(self, index: int, cause: str) -> None:
        super().__init__(f"metric {index} of the batch: {cause}")
        self.index = index


class TableRefused(ViewerWorkerError):
    """Nothing can be written: the table is missing, was altered, or must not be written by this role."""

    remedy = f"Look at the table and its rights. Writing resumes by itself. {ASK_CHECK}"


class UnknownFailure(ViewerWorkerError):
    """A write failed for a reason that is not known to heal by waiting."""


class RetriesExhausted(ViewerWorkerError):
    """All tries of a write failed for a reason that is not known to heal by waiting."""

    remedy = "The log has the error. The worker keeps trying; if the error persists, check the database."


class PositionNotSet(ViewerWorkerError):
    """There is no such stream, group or id."""
