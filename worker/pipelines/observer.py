"""What a pipeline reports of its work. `metrics.py` implements it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from worker.db.positions import Move, Position
    from worker.pipelines.model import Written
    from worker.pipelines.sources.stream.evidence import Evidence


class StreamObserver(Protocol):
    def looked(self, row: Position, evidence: Evidence) -> None:
        """A look was taken at the stream."""

    def moved(self, move: Move, entries: int, backlog: int) -> None:
        """A move over `entries` was committed; `backlog` entries are left."""


class WriteObserver(Protocol):
    """Numbers are records. Durations are seconds."""

    def writing(self, records: int, *, again: bool) -> None:
        """A write begins; `again` after one that failed."""

    def written(self, written: Written, seconds: float, latency: float | None) -> None:
        """`latency`: from the arrival of the oldest record to the commit."""

    def failed(self, records: int) -> None: ...

    def exhausted(self, records: int) -> None:
        """All tries failed."""

    def not_claimed(self) -> None: ...
