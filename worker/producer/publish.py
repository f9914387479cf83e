"""Records the views of an access log in batches, so that an interrupted run can resume where it stopped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import islice

from worker.contract.ids import fitting_id
from worker.producer.access_log import MalformedLine, Request
from worker.producer.client import SyncViewProducer

BATCH_LINES = 500
SHOWN_MALFORMED = 5


@dataclass(slots=True)
class Tally:
    """The progress: every line before `next_line` is done, and every line up to `last_tried` was tried.

    `ids` grows with the number of different ids; nothing else grows with the log.
    """

    next_line: int
    last_tried: int = 0
    lines: int = 0
    views: int = 0
    ids: set[str] = field(default_factory=set)
    malformed: int = 0
    examples: list[MalformedLine] = field(default_factory=list)

    def add(self, batch: list[Request | MalformedLine], views: Counter[str]) -> None:
        self.next_line += len(batch)
        self.lines += len(batch)
        self.views += views.total()
        self.ids.update(views)
        malformed = [line for line in batch if isinstance(line, MalformedLine)]
        self.malformed += len(malformed)
        self.examples += malformed[: SHOWN_MALFORMED - len(self.examples)]


def publish_log(
    lines: Iterable[Request | MalformedLine],
    producer: SyncViewProducer,
    tally: Tally,
    deferred: AbstractContextManager[None],
) -> None:
    """Record a view for every request, with the current time. Each batch is recorded inside `deferred`.

    `producer` must be one with `raise_errors`. Raises ViewNotRecorded or ViewIndeterminate for the lines from
    `next_line` to `last_tried`.
    """
    for batch in _batches(iter(lines)):
        with deferred:
            tally.last_tried = tally.next_line + len(batch) - 1
            views = Counter(fitting_id(line.path) for line in batch if isinstance(line, Request))
            producer.record_many(views)
            tally.add(batch, views)


def _batches(lines: Iterator[Request | MalformedLine]) -> Iterator[list[Request | MalformedLine]]:
    while batch := list(islice(lines, BATCH_LINES)):
        yield batch
