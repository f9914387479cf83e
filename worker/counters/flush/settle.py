"""Settling: subtracts a committed flush from the counters in Redis."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from worker.observability.logs import get_logger
from worker.observability.printable import excerpt
from worker.redis.scripts import LuaScript

if TYPE_CHECKING:
    from collections.abc import Mapping

    from worker.contract.keys import Keys
    from worker.counters.flush.marker import Marker
    from worker.observability.metrics import Metrics
    from worker.redis.client import RedisClient

log = get_logger(__name__)

SETTLE = LuaScript.load(Path(__file__).with_name("settle.lua"))


class Settler:
    """Runs `settle.lua`, which has the rules."""

    def __init__(self, redis: RedisClient, keys: Keys, metrics: Metrics) -> None:
        self._redis = redis
        self._keys = keys
        self._metrics = metrics

    async def settle(self, before: Marker, settled: Marker, deltas: Mapping[str, int], *, replay: bool = False) -> bool:
        """Subtract `deltas` and move the marker from `before` to `settled`; idempotent.

        False when the marker names neither: another worker moved it, or this is another Redis. Then it is unknown
        whether this flush was settled.
        """
        counters = [self._keys.counter(vod_id) for vod_id in deltas]
        amounts = [b"%d" % taken for taken in deltas.values()]
        reply = await self._redis.run(
            SETTLE,
            [self._keys.marker, self._keys.missing_counter, *counters],
            [before.encode(), settled.encode(), *amounts],
        )
        if reply[0] == b"moved":
            log.warning("settle found another marker", flush_id=settled.flush_id)
            return False
        if reply[0] == b"settled":
            self._report(settled, counters, left_out=reply[1], clamped=reply[2])
            if replay:
                self._metrics.settle_replays.inc()
                log.warning("settled from the ledger", flush_id=settled.flush_id, keys=len(counters))
        return True

    def _report(self, settled: Marker, counters: list[bytes], *, left_out: list[int], clamped: list[int]) -> None:
        flush_id = settled.flush_id
        if left_out:
            log.warning(
                "settle left out counters that do not hold a count",
                flush_id=flush_id,
                keys=len(left_out),
                some=_some(counters, left_out),
            )
        if clamped:
            log.warning(
                "settle found counters below what was flushed",
                flush_id=flush_id,
                keys=len(clamped),
                some=_some(counters, clamped),
            )


def _some(counters: list[bytes], positions: list[int]) -> list[str]:
    return [excerpt(counters[position - 1]) for position in positions[:5]]
