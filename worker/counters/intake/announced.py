"""The views that messages announced and that are not in Postgres yet, summed in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from uuid import UUID

    from worker.observability.metrics import Metrics

# Ids kept at most, about 30 MB. Views of further ids are dropped, and measured.
ID_LIMIT = 200_000


class Announced:
    """Sums of the holder of the lease, of one epoch: whoever takes the lease over begins with none.

    What a flush sends is kept until it is known whether the commit took place. That is found out from the source row
    *under its lock*: an earlier transaction of this worker, which held that lock, can no longer come in late.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._epoch: int | None = None
        self._sums: dict[str, int] = {}
        self._sent: tuple[UUID, Mapping[str, int]] | None = None

    def __len__(self) -> int:
        return len(self._sums)

    def ids(self) -> list[str]:
        """Ids with views to write, those that wait longest first."""
        return list(self._sums)

    def begin(self, epoch: int) -> None:
        """Listening begins, or goes on, in this epoch of the lease. The sums of another are nobody's: dropped."""
        if epoch != self._epoch:
            self.drop()
            self._epoch = epoch

    def drop(self) -> None:
        """What was not written by now will not be; each view of it is lost unless it was also INCRed."""
        if self._sent is not None:
            self.confirm(None)
        self._metrics.announced_dropped.inc(sum(self._sums.values()))
        self._sums = {}

    def add(self, views: Mapping[str, int]) -> None:
        sums = self._sums
        for vod_id, count in views.items():
            if vod_id in sums:
                sums[vod_id] += count
            elif len(sums) < ID_LIMIT:
                sums[vod_id] = count
            else:
                self._metrics.announced_dropped.inc(count)

    def copy(self, ids: Iterable[str], epoch: int) -> dict[str, int]:
        """The sums of these ids; none if they are of another epoch than the one that the source row names."""
        if epoch != self._epoch:
            return {}
        return {vod_id: self._sums[vod_id] for vod_id in ids if vod_id in self._sums}

    def sending(self, nonce: UUID, sums: Mapping[str, int]) -> None:
        """These are about to be committed, by the flush with this nonce."""
        self._sent = nonce, sums

    def confirm(self, written: UUID | None) -> None:
        """The source row says that the flush with the nonce `written` was the last to write sums: ours, or not."""
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
