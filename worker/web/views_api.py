"""Serves view counts: `/v1/views` and `/v1/top`. Requests are bounded and read-only."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Protocol

from aiohttp import web

from worker.contract.durations import parse_duration
from worker.contract.ids import decode_id
from worker.contract.times import format_time
from worker.web.endpoint import BadRequest, answering, read_list, read_parameters, read_path, refuse_unknown

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import timedelta

    from worker.db.counters.reads import Shown, Top

MAX_IDS = 100
MAX_LIMIT = 100
# Added while flushing is on hold.
NOT_EXACT = {"exact": False}
_LIMIT = re.compile("[0-9]{1,3}")


class Numbers(Protocol):
    """Reads the numbers. Raises Unavailable, DatabaseRefused."""

    async def views(self, ids: Sequence[str]) -> Sequence[Shown]: ...
    async def top(self, window: timedelta, limit: int) -> Top: ...


class ViewsApi:
    def __init__(self, numbers: Numbers) -> None:
        self._numbers = numbers

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/v1/views", answering(self._several)),
            web.get("/v1/views/{vod_id:(?s:.+)}", answering(self._one)),
            web.get("/v1/top", answering(self._top)),
        ]

    async def _one(self, request: web.Request) -> dict[str, Any]:
        read_parameters(request)
        (shown,) = await self._numbers.views([decode_id(read_path(request))])
        return _views(shown)

    async def _several(self, request: web.Request) -> dict[str, Any]:
        ids = [decode_id(raw) for raw in read_list(request, "ids")]
        refuse_unknown(request, ("ids",))
        if not 1 <= len(ids) <= MAX_IDS:
            raise BadRequest(f"ids: expected 1 to {MAX_IDS} ids, separated by commas")
        return {"views": [_views(shown) for shown in await self._numbers.views(list(dict.fromkeys(ids)))]}

    async def _top(self, request: web.Request) -> dict[str, Any]:
        try:
            parameters = read_parameters(request, ("window", "limit"))
            window = parse_duration(parameters.get("window", "24h"))
        except ValueError as error:
            raise BadRequest(f"window: expected {error}") from None
        limit = parameters.get("limit", "10")
        if _LIMIT.fullmatch(limit) is None or not 1 <= int(limit) <= MAX_LIMIT:
            raise BadRequest(f"limit: expected a number from 1 to {MAX_LIMIT}")
        return top_document(await self._numbers.top(window, int(limit)))


def top_document(top: Top) -> dict[str, Any]:
    """The answer, also of `viewer-worker top --json`."""
    entries = [{"vodId": entry.vod_id, "views": entry.views, "total": entry.total} for entry in top.entries]
    body = {"since": format_time(top.since), "asOf": format_time(top.as_of), "top": entries}
    return body if top.is_exact else body | NOT_EXACT


def _views(shown: Shown) -> dict[str, Any]:
    body = {"vodId": shown.vod_id, "views": shown.views, "pending": shown.pending}
    return body if shown.is_exact else body | NOT_EXACT
