"""Serves the page at `/`, and its updates as server-sent events at `/events`."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING

from aiohttp import web

from worker.runtime.waiting import wait_first
from worker.web.answer import Answer
from worker.web.page.files import file_routes

if TYPE_CHECKING:
    from worker.runtime.clock import Clock
    from worker.web.page.lookups import Lookups
    from worker.web.page.samples import Samples
    from worker.web.page.state import State

PERIOD_S = 1.0
# A client that does not read is given up after this.
WRITE_LIMIT_S = 10.0
# Below the server's limit of connections: pages must not keep probes away.
MAX_WATCHERS = 120
# Milliseconds after which a browser connects again.
RETRY_MS = 2000
HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-store",
    # For proxies that would collect events before they pass them on.
    "X-Accel-Buffering": "no",
}


class Page:
    """Each page gets an event `samples` when it connects and for each new sample, and an event `state` every second.

    They are the same for all pages, so each is computed once.
    """

    def __init__(self, state: State, samples: Samples, lookups: Lookups, clock: Clock) -> None:
        self._state = state
        self._samples = samples
        self._lookups = lookups
        self._clock = clock
        self._closing = asyncio.Event()
        self._watchers = 0
        self._made_at = float("-inf")
        self._made = b""

    def routes(self) -> list[web.RouteDef]:
        return [*file_routes(), web.get("/events", self._events, allow_head=False)]

    async def close(self) -> None:
        """End all event streams: the server waits for them when it closes."""
        self._closing.set()

    async def _events(self, request: web.Request) -> web.StreamResponse:
        if request.headers.get("Sec-Fetch-Site") == "cross-site":
            # Another web site could use up the places, though it cannot read the answers.
            return Answer(403, {"error": "only this worker's page may connect"}).response()
        if self._watchers >= MAX_WATCHERS:
            return Answer(503, {"error": f"{MAX_WATCHERS} pages are open"}).response()
        response = web.StreamResponse(headers=HEADERS)
        self._watchers += 1
        try:
            await response.prepare(request)
            await self._send(response)
        except (ConnectionError, TimeoutError):
            pass  # the page was closed, or does not read
        finally:
            self._watchers -= 1
        return response

    async def _send(self, response: web.StreamResponse) -> None:
        await response.write(f"retry: {RETRY_MS}\n\n".encode())
        seen = 0
        while not self._closing.is_set():
            self._lookups.want()
            event = self._make_state()
            if seen < self._samples.number:
                event = _event("samples", self._samples.document(seen)) + event
                seen = self._samples.number
            async with asyncio.timeout(WRITE_LIMIT_S):
                await response.write(event)
            await wait_first(PERIOD_S, self._closing)

    def _make_state(self) -> bytes:
        now = self._clock.monotonic()
        if now - self._made_at >= PERIOD_S / 2:
            self._made, self._made_at = _event("state", self._state.document()), now
        return self._made


def _event(name: str, document: dict[str, object]) -> bytes:
    # Escapes instead of other characters: no id can end a line.
    return f"event: {name}\ndata: {json.dumps(document)}\n\n".encode()
