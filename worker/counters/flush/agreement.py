"""Whether this worker may take a source over with another Redis than the one that was flushed last."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from worker.counters.flush.verdict import Hold

if TYPE_CHECKING:
    from uuid import UUID

    from worker.db.counters.source_row import SourceState

RECENT_MINUTES = 5
ANOTHER_REDIS = Hold(
    "this Redis is not the one that was flushed in the last five minutes",
    "Check REDIS_URL. If it is right, wait: without another flush of the other Redis, this hold ends by itself after "
    "five minutes. `viewer-worker adopt` ends it at once.",
)


@dataclass(slots=True)
class Agreement:
    """`lineage`: the one with which this worker last found its Redis in agreement, or which it started."""

    lineage: UUID | None = None

    def forbids_another_redis(self, row: SourceState) -> bool:
        """True if another worker may have the right Redis, and this one a wrong URL.

        Their Redis agreed with Postgres a short time ago, and this worker has had no part in that lineage. If it had,
        it may go on: the same Redis lost its data, or the URL now leads to another one.
        """
        minutes = row.agreed_minutes_ago
        # Below zero: the clock was set back.
        recently = minutes is not None and 0 <= minutes < RECENT_MINUTES
        return recently and self.lineage != row.lineage
