"""What a pipeline reports of its work. The metrics are one implementation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from worker.db.positions import Move, Position
    from worker.pipelines.sources.stream.evidence import Evidence


class StreamObserver(Protocol):
    def looked(self, row: Position, evidence: Evidence) -> None:
        """A look was taken at the stream."""

    def moved(self, move: Move, row: Position, evidence: Evidence | None) -> None:
        """A move was committed; `row` is what it left."""


class WriteObserver(Protocol):
    """Records are counted, not batches. Durations are seconds."""

    def written(self, rows: int, letters: int, seconds: float, latency: float | None) -> None:
        """`latency`: from the arrival of the oldest record to the commit."""

    def failed(self, records: int, error_class: str) -> None:
        """A write failed and is tried again."""
