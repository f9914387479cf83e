"""Finds counters whose value is too long to be a count, without fetching it.

A huge value could take all memory of the worker, or longer than a command may.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from worker.redis.scripts import LuaScript

if TYPE_CHECKING:
    from collections.abc import Sequence

    from worker.redis.client import RedisClient

LIMIT_BYTES = 100
FIND = LuaScript.load(Path(__file__).with_name("long_values.lua"))


async def split_by_length(redis: RedisClient, keys: Sequence[bytes]) -> tuple[list[bytes], list[bytes]]:
    """The keys to read, in their order, and those with a long value. Raises RedisUnavailable.

    At most a thousand keys: Redis does nothing else meanwhile.
    """
    if not keys:
        return [], []
    long = [keys[position - 1] for position in await redis.run(FIND, keys, [b"%d" % LIMIT_BYTES])]
    unreadable = set(long)
    return [key for key in keys if key not in unreadable], long
