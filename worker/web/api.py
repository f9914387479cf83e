"""Serves view counts: `/v1/views` and `/v1/top`. Requests are bounded and read-only."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import parse_qsl, unquote

from aiohttp import web

from worker.contract.durations import parse_duration
from worker.contract.ids import InvalidId, decode_id
from worker.errors import DatabaseRefused, Unavailable, ViewerWorkerError
from worker.web.answer import Answer

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from datetime import timedelta

    from aiohttp.typedefs import Handler

    from worker.db.counters.reads import Shown, Top

MAX_IDS = 100
MAX_LIMIT = 100
_LIMIT = re.compile("[0-9]{1,3}")
# Keep bytes of a URL that are not UTF-8, so that the id is refused. Replacing them would give the count of another id.
UNCHANGED = "surrogateescape"


class BadRequest(ViewerWorkerError):
    """The request is invalid; the message says what is expected."""


class Numbers(Protocol):
    """Reads the numbers. Raises Unavailable, DatabaseRefused."""

    async def views(self, ids: Sequence[str]) -> Sequence[Shown]: ...
    async def top(self, window: timedelta, limit: int) -> Top: ...


class Api:
    def __init__(self, numbers: Numbers) -> None:
        self._numbers = numbers

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/v1/views", _answering(self._several)),
            web.get("/v1/views/{vod_id:.+}", _answering(self._one)),
            web.get("/v1/top", _answering(self._top)),
        ]

    async def _one(self, request: web.Request) -> dict[str, Any]:
        _, _, _, quoted = request.rel_url.raw_path.split("/", 3)
        (shown,) = await self._numbers.views([_id(unquote(quoted, errors=UNCHANGED))])
        return _views(shown)

    async def _several(self, request: web.Request) -> dict[str, Any]:
        query = parse_qsl(request.rel_url.raw_query_string, errors=UNCHANGED)
        ids = [_id(text) for name, value in query if name == "ids" for text in value.split(",") if text]
        if not 1 <= len(ids) <= MAX_IDS:
            raise BadRequest(f"ids: expected 1 to {MAX_IDS} ids, separated by commas")
        return {"views": [_views(shown) for shown in await self._numbers.views(list(dict.fromkeys(ids)))]}

    async def _top(self, request: web.Request) -> dict[str, Any]:
        try:
            window = parse_duration(request.query.get("window", "24h"))
        except ValueError as error:
            raise BadRequest(f"window: expected {error}") from None
        limit = request.query.get("limit", "10")
        if _LIMIT.fullmatch(limit) is None or not 1 <= int(limit) <= MAX_LIMIT:
            raise BadRequest(f"limit: expected a number from 1 to {MAX_LIMIT}")
        top = await self._numbers.top(window, int(limit))
        entries = [{"vodId": entry.vod_id, "views": entry.views, "total": entry.total} for entry in top.entries]
        return {"since": top.since.isoformat().replace("+00:00", "Z"), "top": entries}


def _views(shown: Shown) -> dict[str, Any]:
    return {"vodId": shown.vod_id, "views": shown.views, "pending": shown.pending}


def _id(text: str) -> str:
    return decode_id(text.encode(errors=UNCHANGED))


def _answering(answer: Callable[[web.Request], Awaitable[dict[str, Any]]]) -> Handler:
    """Answer 400 to an invalid request and 503 while a server cannot be asked; the body has the reason."""

    async def handle(request: web.Request) -> web.StreamResponse:
        try:
            return Answer(200, await answer(request)).response()
        except (BadRequest, InvalidId) as error:
            return Answer(400, {"error": str(error)}).response()
        except (Unavailable, DatabaseRefused) as error:
            return Answer(503, {"error": str(error), "remedy": error.remedy}).response()

    return handle
