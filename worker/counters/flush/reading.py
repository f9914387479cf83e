"""Reads the marker and the counters of some ids at one instant."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from worker.contract.keys import NOT_A_COUNT, parse_count

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from worker.contract.keys import Keys
    from worker.counters.intake.quarantine import Quarantine
    from worker.redis.client import RedisClient


@dataclass(slots=True)
class Reading:
    """`counted`: id → views to flush, above zero. `unusable`: ids with a value that is not a count.

    `absent`: ids without a string value. They were settled or reset since they were found, or have another type.
    """

    marker: bytes | None
    counted: dict[str, int] = field(default_factory=dict)
    unusable: list[str] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)


class CounterReader:
    """Reads counters, and quarantines those that do not hold a count."""

    def __init__(self, redis: RedisClient, keys: Keys, quarantine: Quarantine) -> None:
        self._redis = redis
        self._keys = keys
        self._quarantine = quarantine

    async def read(self, ids: Sequence[str]) -> Reading:
        """Marker and counters at one instant. Raises RedisUnavailable."""
        marker, *values = await self._redis.read([self._keys.marker, *map(self._keys.counter, ids)])
        reading = Reading(marker)
        for vod_id, value in zip(ids, values, strict=True):
            count = None if value is None else parse_count(value)
            if value is None:
                reading.absent.append(vod_id)
            elif count is None:
                reading.unusable.append(vod_id)
            elif count > 0:
                reading.counted[vod_id] = count
        return reading

    async def report(self, reading: Reading, announced: Collection[str]) -> None:
        """Quarantine what cannot be counted. Announced ids need not have a counter. Raises RedisUnavailable."""
        for vod_id in reading.unusable:
            self._quarantine.report(self._keys.counter(vod_id), NOT_A_COUNT)
        absent = [self._keys.counter(vod_id) for vod_id in reading.absent if vod_id not in announced]
        for key, kind in zip(absent, await self._redis.types_of(absent) if absent else (), strict=True):
            if kind not in ("none", "string"):
                self._quarantine.report(key, f"the key holds a {kind}, not a number")
