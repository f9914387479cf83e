"""Publishes new totals after the commit, for live pages."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from worker.errors import RedisUnavailable
from worker.observability.logs import get_logger
from worker.redis.scripts import LuaScript

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from worker.db.counters.ledger import Change
    from worker.redis.client import RedisClient

log = get_logger(__name__)

PUBLISH = LuaScript.load(Path(__file__).with_name("publish.lua"))
# While a script runs, Redis serves no other client: this many take about a millisecond.
MESSAGES_AT_ONCE = 500


class NewTotal(msgspec.Struct, rename="camel"):
    """A message on the channel: `view_count` is the total in Postgres, `delta` what this flush added to it."""

    vod_id: str
    view_count: int
    delta: int
    flush_id: int


class TotalsChannel:
    """Best effort: a message that cannot be sent is not sent again. Where nobody listens, most are not sent."""

    def __init__(self, redis: RedisClient, channel: str) -> None:
        self._redis = redis
        self._channel = channel.encode()

    async def publish(self, flush_id: int, changes: Iterable[Change]) -> None:
        messages = self._messages(flush_id, changes)
        try:
            while some := list(islice(messages, MESSAGES_AT_ONCE)):
                if await self._redis.run(PUBLISH, (), (self._channel, *some)) != len(some):
                    return
        except RedisUnavailable as error:
            log.warning("new totals not published", flush_id=flush_id, cause=str(error))

    def _messages(self, flush_id: int, changes: Iterable[Change]) -> Iterator[bytes]:
        encode = msgspec.json.Encoder().encode
        return (encode(NewTotal(change.vod_id, change.total, change.views, flush_id)) for change in changes)
