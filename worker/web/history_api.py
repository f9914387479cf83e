"""Serves the history of one id: `/v1/views/<id>/history`."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol

from aiohttp import web

from worker.contract.ids import decode_id
from worker.contract.times import format_time
from worker.web.endpoint import BadRequest, answering, read_parameters, read_path
from worker.web.time_range import parse_range

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from worker.db.counters.reads import Bucket
    from worker.runtime.clock import Clock

TAIL = b"/history"
MAX_BUCKETS = 1500
# Width of a bucket, and the range where the request has none.
BUCKETS = {"hour": (timedelta(hours=1), timedelta(days=1)), "day": (timedelta(days=1), timedelta(days=30))}


class Histories(Protocol):
    """Reads the history. Raises Unavailable, DatabaseRefused."""

    async def history(
        self, vod_id: str, bucket: str, first: datetime, last: datetime
    ) -> tuple[datetime, Sequence[Bucket]]: ...


class HistoryApi:
    def __init__(self, histories: Histories, clock: Clock) -> None:
        self._histories = histories
        self._clock = clock

    def routes(self) -> list[web.RouteDef]:
        """Before those of `/v1/views/<id>`, which match any path below it."""
        return [web.get("/v1/views/{vod_id:(?s:.+)}/history", answering(self._history))]

    async def _history(self, request: web.Request) -> dict[str, Any]:
        vod_id = decode_id(read_path(request).removesuffix(TAIL))
        parameters = read_parameters(request, ("bucket", "from", "to"))
        bucket = parameters.get("bucket", "hour")
        if bucket not in BUCKETS:
            raise BadRequest("bucket: expected hour or day")
        width, default = BUCKETS[bucket]
        first, last = parse_range(parameters, default, self._clock.now())
        if last - first > MAX_BUCKETS * width:
            raise BadRequest(f"from: expected at most {MAX_BUCKETS} buckets up to `to`")
        as_of, found = await self._histories.history(vod_id, bucket, first, last)
        return history_document(vod_id, bucket, as_of, found)


def history_document(vod_id: str, bucket: str, as_of: datetime, found: Sequence[Bucket]) -> dict[str, Any]:
    """The answer, also of `viewer-worker history --json`."""
    buckets = [{"time": format_time(each.start), "views": each.views} for each in found]
    return {"vodId": vod_id, "bucket": bucket, "asOf": format_time(as_of), "buckets": buckets}
