"""Sums of the views that messages announced and that are not in Postgres yet; in memory."""

from __future__ import annotations

import asyncio
from sys import getsizeof
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from uuid import UUID

    from worker.observability.metrics import Metrics
    from worker.runtime.clock import Clock

# Views of further ids are dropped, and measured.
MAX_BYTES = 64 * 2**20
# What an id takes besides its text, which is in memory twice: as an id with a sum, and as a pending id.
OVERHEAD_BYTES = 300


class Announced:
    """Sums of one epoch of the lease: a worker that takes the lease over starts with none.

    What a flush writes is kept until it is known whether its commit took place. The source row says so, read *under
    its lock*: an earlier transaction of this worker, which held that lock, can no longer commit late.

    `ended` is set when no more messages come: the listener has stopped, or there is none.
    """

    def __init__(self, metrics: Metrics, clock: Clock) -> None:
        self._metrics = metrics
        self._clock = clock
        self._epoch: int | None = None
        self._sums: dict[str, int] = {}
        self._bytes = 0
        self._sent: tuple[UUID, Mapping[str, int]] | None = None
        # When the first message after the last handing over came.
        self._first_at: float | None = None
        self.ended = asyncio.Event()

    def __len__(self) -> int:
        return len(self._sums)

    def hand_over(self) -> list[str]:
        """Ids with views to write, the longest waiting first. From now on the backlog knows how long they wait."""
        self._first_at = None
        return list(self._sums)

    def oldest_seconds(self) -> float:
        """Age of the oldest views that were not handed over; 0 when there are none."""
        return 0.0 if self._first_at is None else self._clock.monotonic() - self._first_at

    def begin(self, epoch: int) -> None:
        """Listen in this epoch of the lease. The sums of another epoch are dropped."""
        if epoch != self._epoch:
            self.drop()
            self._epoch = epoch

    def drop(self) -> None:
        """Drop all sums: a view in them is lost unless it was also INCRed."""
        if self._sent is not None:
            self.resolve_sent(None)
        self._metrics.announced_dropped.inc(sum(self._sums.values()))
        self._sums = {}
        self._bytes = 0
        self._first_at = None

    def add(self, views: Mapping[str, int]) -> None:
        if self._first_at is None and views:
            self._first_at = self._clock.monotonic()
        sums = self._sums
        for vod_id, count in views.items():
            if vod_id in sums:
                sums[vod_id] += count
            elif self._bytes + (size := _size(vod_id)) <= MAX_BYTES:
                sums[vod_id] = count
                self._bytes += size
            else:
                self._metrics.announced_dropped.inc(count)

    def copy(self, ids: Iterable[str], epoch: int) -> dict[str, int]:
        """The sums of these ids; empty unless `epoch`, from the source row, is the epoch of the sums."""
        if epoch != self._epoch:
            return {}
        return {vod_id: self._sums[vod_id] for vod_id in ids if vod_id in self._sums}

    def mark_sent(self, nonce: UUID, sums: Mapping[str, int]) -> None:
        """The flush with this nonce is about to commit these sums."""
        self._sent = nonce, sums

    def resolve_sent(self, written: UUID | None) -> None:
        """Remove the sent sums if `written`, the nonce of the last flush that wrote sums, is theirs; else keep them."""
        if self._sent is None:
            return
        (nonce, sums), self._sent = self._sent, None
        if nonce != written:
            return
        for vod_id, count in sums.items():
            left = self._sums[vod_id] - count
            if left:
                self._sums[vod_id] = left
            else:
                del self._sums[vod_id]
                self._bytes -= _size(vod_id)


def _size(vod_id: str) -> int:
    return 2 * getsizeof(vod_id) + OVERHEAD_BYTES
