"""Which ids to flush next: those whose counter the sweep found, and those that messages announced."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from worker.contract.ids import InvalidId
from worker.contract.keys import NOT_A_COUNT
from worker.counters.long_values import split_by_length

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

    from worker.contract.keys import Keys
    from worker.counters.intake.announced import Announced
    from worker.counters.intake.pending import Pending, Sweep
    from worker.counters.intake.quarantine import Quarantine
    from worker.db.session import Database
    from worker.redis.client import RedisClient

# A sweep that finds more lets them be flushed before it goes on.
PENDING_LIMIT = 50_000
PAGE = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Backlog:
    """Collects pending ids from both sources; ids in quarantine that rest are left out."""

    pending: Pending
    sweep: Sweep
    announced: Announced
    quarantine: Quarantine
    keys: Keys
    redis: RedisClient
    database: Database

    async def add_announced(self) -> None:
        """Add the ids that messages announced. Raises RedisUnavailable."""
        await self._add(map(self.keys.counter, self.announced.hand_over()))

    async def sweep_pages(self) -> AsyncIterator[None]:
        """Sweep if it is due; adds what it finds, and yields after each page. Raises RedisUnavailable."""
        if not self.sweep.is_due:
            return
        async for page in self.sweep.pages():
            await self._add(page)
            yield
        self.quarantine.next_sweep()

    def count(self) -> int:
        """Ids with views to write, as far as they are known. Those that were announced may be pending, too."""
        return max(len(self.pending), len(self.announced))

    def oldest_seconds(self) -> float:
        """For how long the oldest of them waits; 0 when there are none."""
        return max(self.pending.oldest_seconds(), self.announced.oldest_seconds())

    def is_overdue(self, interval: float) -> bool:
        """Whether flushing should not wait for the end of the sweep; `interval` is seconds between two cycles."""
        return len(self.pending) >= PENDING_LIMIT or self.pending.oldest_seconds() >= interval

    def restart(self) -> None:
        """Forget what was found, and sweep: another worker held the lease in between."""
        self.pending.clear()
        self.sweep.request()

    async def _add(self, keys: Iterable[bytes]) -> None:
        rest = iter(keys)
        while page := list(itertools.islice(rest, PAGE)):
            countable, long = await split_by_length(self.redis, self.quarantine.without_resting(page))
            for key in long:
                self.quarantine.report(key, NOT_A_COUNT)
            self._add_countable(countable)

    def _add_countable(self, keys: Iterable[bytes]) -> None:
        ids = []
        for key in keys:
            try:
                ids.append(self._storable(self.keys.vod_id(key)))
            except InvalidId as error:
                self.quarantine.report(key, str(error))
        self.pending.add(ids)

    def _storable(self, vod_id: str) -> str:
        # Here, because in a flush each such id would cost a dozen transactions.
        if not self.database.can_store(vod_id):
            raise InvalidId(f"the database's encoding {self.database.encoding} lacks a character of the id")
        return vod_id
