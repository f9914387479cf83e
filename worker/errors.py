"""The errors that a caller may meet, in one tree.

ViewerWorkerError
├── InvalidSettings          settings have wrong values; the start is refused (exit code 78)
├── Unavailable              a server cannot be used right now; waiting may heal it (exit code 69)
│   ├── RedisUnavailable
│   ├── DatabaseUnavailable
│   └── TooManyReaders       too many ask for numbers at the same time
├── DatabaseRefused          Postgres refuses a statement: data that does not fit, a table that is not there
├── SchemaNotCurrent         the database's tables are not those of this version, or its role may not use them
├── TargetUnusable           the application's own table (VIEW_TARGET_*) is missing or does not fit
├── OnHold                   Redis and Postgres contradict each other: first `adopt` has to end that
├── NothingToAdopt           there is no hold that `adopt` could end, or not the one that was looked at
├── ViewNotRecorded          (producer) surely not in Redis; it may be sent again
│   └── InvalidView          its id or count is none; also a ValueError
├── ViewIndeterminate        (producer) sent, and in Redis or not; sending it again may count it twice
├── InvalidId                (ids) this cannot be an id
├── BadRequest               (web) a question that cannot be answered
└── ServerFailed             (dev.servers) an embedded server did not start
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class ViewerWorkerError(Exception):
    """Root of the tree. `remedy` is one sentence that tells an operator what to do, or empty."""

    remedy: str = ""

    def __init__(self, message: str = "", remedy: str | None = None) -> None:
        super().__init__(message)
        if remedy is not None:
            self.remedy = remedy


@dataclass(frozen=True, slots=True)
class SettingProblem:
    """`value` is as it may be printed: secrets are masked in it."""

    name: str
    value: str
    expected: str

    def __str__(self) -> str:
        return f"{self.name}={self.value!r}: expected {self.expected}"


def cause_of(error: Exception) -> str:
    """What an error says, in a line; with its kind where it is not one of ours."""
    text = str(error).split("\n", 1)[0][:200]
    return text if isinstance(error, ViewerWorkerError) else f"{type(error).__name__}: {text}"


class InvalidSettings(ViewerWorkerError):
    """Settings with wrong values, all of them named."""

    def __init__(self, problems: Sequence[SettingProblem]) -> None:
        super().__init__("\n".join(map(str, problems)))
        self.problems = tuple(problems)


class Unavailable(ViewerWorkerError):
    """A server cannot be used right now. Nothing was decided; the same step may be tried again later."""


class RedisUnavailable(Unavailable):
    remedy = "Check that Redis runs and that REDIS_URL reaches it."


class DatabaseUnavailable(Unavailable):
    remedy = "Check that Postgres runs and that DATABASE_URL (or DB_HOST, DB_PORT, …) reaches it."


class DatabaseRefused(ViewerWorkerError):
    """Waiting does not heal it. The cause is the driver's error; `db.errors` tells the kinds apart."""

    remedy = "`viewer-worker check` says what is wrong."

    def __init__(self, cause: str) -> None:
        super().__init__(f"Postgres refuses it: {cause}")


class TooManyReaders(Unavailable):
    """Reading must not keep the worker from its work."""

    def __init__(self) -> None:
        super().__init__("too many readers at the same time")


class SchemaNotCurrent(ViewerWorkerError):
    """The tables are missing, older or newer than this version of the worker needs, or not granted to its role."""


class TargetUnusable(ViewerWorkerError):
    """The table that VIEW_TARGET_TABLE names cannot be kept up to date."""


class OnHold(ViewerWorkerError):
    """Redis and Postgres contradict each other; nothing is changed until that is decided."""

    def __init__(self, cause: str, remedy: str) -> None:
        super().__init__(f"on hold: {cause}", remedy)


class NothingToAdopt(ViewerWorkerError):
    """There is no hold, or not the one that was looked at."""


class ViewNotRecorded(ViewerWorkerError):
    """Nothing of it was applied: Redis was not reached, or refused all of it."""


class InvalidView(ViewNotRecorded, ValueError):
    """The id or the count cannot be recorded, now or later; the text says why."""


class ViewIndeterminate(ViewerWorkerError):
    """It was sent and Redis did not confirm all of it: it may have counted or not. It must not be repeated blindly."""
