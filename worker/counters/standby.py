"""What a worker without the lease can see: whether the one that has it flushes the same Redis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from worker.counters.flush.agreement import ANOTHER_REDIS
from worker.counters.flush.marker import Marker
from worker.counters.flush.verdict import Agreed, Behind, Returned, compare

if TYPE_CHECKING:
    from worker.counters.flush.agreement import Agreement
    from worker.counters.flush.verdict import Hold
    from worker.counters.stores import Stores


@dataclass(frozen=True, slots=True)
class Standby:
    """Looks at both sides without a lock, and changes nothing."""

    stores: Stores
    agreement: Agreement

    async def look(self) -> Hold | None:
        """ANOTHER_REDIS if another worker flushes another Redis than this worker has. Raises Unavailable."""
        data_set_id = await self.stores.probe_data_set()
        # The marker first: a flush in between then leaves it behind the source row, not ahead of it.
        (marker,) = await self.stores.redis.read([self.stores.keys.marker])
        async with self.stores.database.transaction() as tx:
            row = await self.stores.source_row.read(tx)
            if row is None or not self.agreement.forbids_another_redis(row) or row.data_set_id == data_set_id:
                return None
            verdict = await compare(tx, self.stores.source_row, marker, row)
        match verdict:
            case Agreed() | Returned(successor=Marker()):
                return None
            case Behind(behind, _) if behind.lineage == row.lineage:
                return None
        return ANOTHER_REDIS
