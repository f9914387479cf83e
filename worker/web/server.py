"""The HTTP server of the worker. It only reads: nothing on this port changes anything."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiohttp.typedefs import Handler

    from worker.web.answer import Answer
    from worker.web.api import Api
    from worker.web.health import Health

MAX_REQUEST_BYTES = 1024


class WebServer:
    """Serves `/health`, `/ping`, `/livez`, `/readyz`, `/metrics` and `/v1/…` on `host`:`port` (0 takes a free port)."""

    def __init__(self, health: Health, api: Api, registry: CollectorRegistry, host: str, port: int) -> None:
        self._registry = registry
        self._host = host
        self._port = port
        app = web.Application(client_max_size=MAX_REQUEST_BYTES)
        app.add_routes(
            [
                web.get("/health", _answers(health.health)),
                web.get("/ping", _answers(health.health)),
                web.get("/livez", _answers(health.live)),
                web.get("/readyz", _answers(health.ready)),
                web.get("/metrics", self._metrics),
                *api.routes(),
            ]
        )
        self._runner = web.AppRunner(
            app, access_log=None, handle_signals=False, keepalive_timeout=15.0, shutdown_timeout=1.0
        )

    @property
    def url(self) -> str:
        host, port = self._runner.addresses[0][:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    async def start(self) -> None:
        """Raises OSError when the address is taken or not ours."""
        await self._runner.setup()
        await web.TCPSite(self._runner, self._host, self._port, reuse_address=True).start()

    async def close(self) -> None:
        await self._runner.cleanup()

    async def _metrics(self, request: web.Request) -> web.Response:
        encode, content_type = choose_encoder(request.headers.get("Accept", ""))
        return web.Response(body=encode(self._registry), headers={"Content-Type": content_type})


def _answers(answer: Callable[[], Answer]) -> Handler:
    async def handle(_: web.Request) -> web.StreamResponse:
        return answer().response()

    return handle
