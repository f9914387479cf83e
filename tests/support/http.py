"""A web server with some routes, and requests to it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
from aiohttp import web
from yarl import URL

from tests.support.fakes import FakeClock
from tests.support.openapi import assert_documented
from worker.observability.metrics import Metrics
from worker.observability.status import Status
from worker.web.health import Health
from worker.web.server import WebServer


@asynccontextmanager
async def serving(routes: Iterable[web.RouteDef]) -> AsyncIterator[str]:
    """Serve the routes, beside those of every worker; the URL."""
    clock = FakeClock()
    health = Health(Status(clock.monotonic, ()), clock, "0", clock.now() - clock.now())
    server = WebServer(health, routes, Metrics().registry, "127.0.0.1", 0)
    await server.start()
    yield server.url
    await server.close()


async def get(url: str) -> tuple[int, Any]:
    """Status and JSON document, which are as the OpenAPI document says; the URL is sent as it is."""
    async with aiohttp.ClientSession() as session, session.get(URL(url, encoded=True)) as response:
        body = await response.json()
    assert_documented(URL(url, encoded=True).raw_path, response.status, body)
    return response.status, body
