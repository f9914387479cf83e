"""Redis and Postgres, as the counters of one source use them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from worker.contract.keys import Keys
    from worker.db.counters.ledger import Ledger
    from worker.db.counters.source_row import SourceRow
    from worker.db.session import Database
    from worker.redis.client import RedisClient


@dataclass(frozen=True, slots=True, kw_only=True)
class Stores:
    """Both servers, and the names of what belongs to this source in each."""

    database: Database
    ledger: Ledger
    source_row: SourceRow
    redis: RedisClient
    keys: Keys

    async def probe_data_set(self) -> str | None:
        """The id of the data set that Redis has now; None if Redis hides it. Raises RedisUnavailable."""
        return self.keys.data_set_id(await self.redis.probe())
