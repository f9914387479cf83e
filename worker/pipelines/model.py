"""What flows through a pipeline: records in batches. Knows neither Redis nor SQL."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Literal, NamedTuple, Protocol, TypeAlias, TypeVar

from worker.errors import DatabaseUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from datetime import datetime

    from worker.contract.entry_id import EntryId

R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)


class InvalidRecord(Exception):
    """A document that is not a valid record.

    `error_class` is a label of a few words, such as `not_json`; the text says what is wrong, without values.
    """

    def __init__(self, error_class: str, text: str) -> None:
        super().__init__(text)
        self.error_class = error_class


class Column(NamedTuple):
    """A column of a pipeline's table. `type` is its name in Postgres."""

    name: str
    type: str


@dataclass(frozen=True, slots=True)
class Rule:
    """What becomes of a record whose `key` (columns of a unique index) the table has already.

    `keep`: the row stays. `replace`: the record replaces it. `replace_older`: it does where its `position` (columns) is
    greater. `optional`: a record without a value in this column has no key.
    """

    key: tuple[str, ...]
    action: Literal["keep", "replace", "replace_older"]
    optional: str | None = None
    position: tuple[str, ...] = ()


def append(time: str = "time", event_id: str = "event_id") -> Rule:
    """Each record is a row; one with an `event_id` only once for its time and id."""
    return Rule((time, event_id), "keep", optional=event_id)


@dataclass(frozen=True, slots=True)
class Defaults:
    """The names that a pipeline's settings have, and their defaults. Durations in seconds.

    `capacity` (records), `writers` and `enabled` are those of an application's Writer; without a name there is one that
    is enabled. With `counts_first_try`, `max_retries` is a number of tries.
    """

    batch_size: tuple[str, int]
    interval: tuple[str, float]
    max_retries: tuple[str, int]
    retry_delay: tuple[str, float]
    capacity: tuple[str, int]
    writers: tuple[str, int] | None = None
    enabled: str | None = None
    counts_first_try: bool = False
    accept_past: float = 20 * 365 * 86_400.0
    accept_future: float = 300.0


class Window(NamedTuple):
    """How far a record's time may lie before and after the arrival of its entry, in seconds."""

    past: float
    future: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordType(Generic[R]):
    """A pipeline's record: how it is read from a document, and how it becomes a row.

    `time` is the column that says how old a row is. `parse` takes a document, the id of its entry, and the accepted
    window around it; it raises InvalidRecord. `row` returns the values of the columns, in their order. `stamp` takes a
    record of an application and a clock, and fills in the time of acceptance where the record needs one. Of an
    application's records with equal `coalesce_by`, only the newest has to be written; None: this one must.
    """

    name: str
    columns: tuple[Column, ...]
    time: str
    rule: Rule
    parse: Callable[[bytes, EntryId, Window], R]
    row: Callable[[R], tuple[Any, ...]]
    defaults: Defaults
    stamp: Callable[[Any, Callable[[], datetime]], Any] | None = None
    coalesce_by: Callable[[Any], str | None] | None = None


class Item(NamedTuple, Generic[R]):
    """A valid record. `key` is its place in the batch's origin, and `payload` its document: for a dead letter."""

    key: object
    payload: bytes
    record: R


@dataclass(frozen=True, slots=True)
class Letter:
    """A dead letter: a record that cannot become a row. `origin` is where it came from, such as `stream/1-0`."""

    origin: str
    error_class: str
    error: str
    payload: bytes
    sqlstate: str | None = None


class Claim(Protocol):
    """Proves, in the transaction that writes the batch, that the batch was not written before."""

    async def take(self, tx: Any) -> bool:
        """Execute the claim. False: the batch was written already, or is no longer this worker's to write."""


@dataclass(frozen=True, slots=True)
class Batch(Generic[R]):
    """Records in their order, and letters for those that are not valid. `full`: more is waiting behind it.

    `origin` is where they came from, such as the name of a stream; a record's own origin is `origin/key`. `oldest` is
    the arrival of its first record, in seconds since the epoch; None without records.
    """

    claim: Claim
    origin: str = ""
    items: Sequence[Item[R]] = ()
    letters: Sequence[Letter] = ()
    full: bool = False
    oldest: float | None = None

    def __len__(self) -> int:
        return len(self.items) + len(self.letters)


@dataclass(frozen=True, slots=True)
class Written:
    """The batch is in the database: `rows` records as rows, `letters` as dead letters.

    `repeated` records were there already, with their event_id. `dropped` could not even become letters.
    """

    rows: int = 0
    letters: int = 0
    repeated: int = 0
    dropped: int = 0


@dataclass(frozen=True, slots=True)
class NotClaimed:
    """Nothing was written: another attempt wrote the batch, or another worker took over. Drop it, and read again."""


WriteOutcome: TypeAlias = Written | NotClaimed


class CommitUnanswered(DatabaseUnavailable):
    """The commit of a batch had no answer: it may be written or not. `written`: what it is then."""

    def __init__(self, cause: str, written: Written) -> None:
        super().__init__(cause)
        self.written = written


class Sink(Protocol[R]):
    """Writes a batch in one transaction: claim, rows, letters."""

    async def write(
        self, batch: Batch[R], *, isolate: bool = False, before_commit: Callable[[], None] = lambda: None
    ) -> WriteOutcome:
        """Raises Unavailable (retry later), TableRefused (a hold), UnknownFailure (retry a few times).

        After CommitUnanswered it is unknown whether the batch was written: taking its claim again shows it. After other
        errors it was not. With `isolate`, a record that fails for an unknown reason becomes a letter, too, and a letter
        that fails is dropped. `before_commit` is called when the batch may be written from now on, until an answer.
        """


@dataclass(frozen=True, slots=True)
class Idle:
    """Nothing to carry now. `cause` is why the source only waits, empty if it is caught up.

    `keep_lease` is False where another replica may see more than this one, on another server for example.
    """

    cause: str = ""
    keep_lease: bool = True


@dataclass(frozen=True, slots=True)
class OnHold:
    """It is not certain what may be carried: stop, report why. Nothing is lost."""

    cause: str
    remedy: str


ReadOutcome: TypeAlias = "Batch[R] | Idle | OnHold"


class Source(Protocol[R]):
    """Where batches come from. Reads what follows the last batch that was `done`."""

    async def read(self) -> ReadOutcome[R]:
        """The next batch. Raises Unavailable. Starts again from the last written batch after any error."""

    async def read_ahead(self, batch: Batch[R]) -> Batch[R] | None:
        """The batch that follows `batch`, which is being written. None where that is not certain; it never raises."""

    def done(self, batch: Batch[R], outcome: WriteOutcome) -> None:
        """`batch` was written, or not claimed."""

    def reset(self, *, smaller: bool = False) -> None:
        """The last batch may or may not be written: forget what was read, and find out by the next `read`.

        With `smaller`, the next batches are smaller: a write may have failed because of its size.
        """

    async def wait(self, seconds: float) -> None:
        """Until there may be more to read; at most so long."""

    async def close(self) -> None: ...
