"""The worker's HTTP server. All endpoints are read-only."""

from __future__ import annotations

import asyncio
import logging
import socket
from importlib.resources import files
from typing import TYPE_CHECKING

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from worker.web.answer import Answer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from aiohttp.typedefs import Handler

    from worker.web.health import Health

SERVER_NAME = "viewer-worker"
# Of both families.
ANY_ADDRESS = "::"
ANY_ADDRESSES = (ANY_ADDRESS, "0.0.0.0")  # noqa: S104
BACKLOG = 128
MAX_REQUEST_BYTES = 1024
# Above this number the oldest connection is closed, so that idle clients cannot lock out a probe.
MAX_CONNECTIONS = 200


class WebServer:
    """Serves `/health`, `/ping`, `/livez`, `/readyz`, `/metrics`, `/openapi.json` and `routes` on `host`:`port`.

    Port 0 is a free port.
    """

    def __init__(
        self, health: Health, routes: Iterable[web.RouteDef], registry: CollectorRegistry, host: str, port: int
    ) -> None:
        self._registry = registry
        self._openapi = files("worker.web").joinpath("openapi.json").read_bytes()
        self._host = host
        self._port = port
        app = web.Application(client_max_size=MAX_REQUEST_BYTES, middlewares=[_refusals_as_json])
        app.on_response_prepare.append(_without_versions)
        app.add_routes(
            [
                web.get("/health", _answers(health.health)),
                web.get("/ping", _answers(health.health)),
                web.get("/livez", _answers(health.live)),
                web.get("/readyz", _answers(health.ready)),
                web.get("/metrics", self._metrics),
                web.get("/openapi.json", self._document),
                *routes,
            ]
        )
        self._runner = web.AppRunner(app, handle_signals=False, shutdown_timeout=1.0)
        self._listener: asyncio.Server | None = None
        logging.getLogger("aiohttp.server").addFilter(_is_our_mistake)

    @property
    def url(self) -> str:
        assert self._listener is not None  # set by start()  # noqa: S101
        host, port = self._listener.sockets[0].getsockname()[:2]
        # To listen on any address is not an address to open.
        shown = "localhost" if host in ANY_ADDRESSES else f"[{host}]" if ":" in host else host
        return f"http://{shown}:{port}"

    async def start(self) -> None:
        """Listen. Raises OSError when the address is in use or not an address of this host."""
        await self._runner.setup()
        create_server = asyncio.get_running_loop().create_server
        if self._host == ANY_ADDRESS:
            # The event loop would listen for IPv6 alone.
            both = socket.create_server((self._host, self._port), family=socket.AF_INET6, dualstack_ipv6=True)
            self._listener = await create_server(self._accept, sock=both, backlog=BACKLOG)
        else:
            self._listener = await create_server(
                self._accept, self._host, self._port, reuse_address=True, backlog=BACKLOG
            )

    async def close(self) -> None:
        if self._listener is not None:
            self._listener.close()
        await self._runner.cleanup()

    def _accept(self) -> asyncio.Protocol:
        server = self._runner.server
        assert server is not None  # set before we listen  # noqa: S101
        connections = server.connections
        for oldest in connections[: max(0, len(connections) - MAX_CONNECTIONS + 1)]:
            oldest.force_close()
        return _Connection(
            server,
            loop=asyncio.get_running_loop(),
            access_log=None,  # type: ignore[arg-type]  # the library accepts it
            keepalive_timeout=15.0,
        )

    async def _metrics(self, request: web.Request) -> web.Response:
        encode, content_type = choose_encoder(request.headers.get("Accept", ""))
        return web.Response(body=encode(self._registry), headers={"Content-Type": content_type})

    async def _document(self, _: web.Request) -> web.Response:
        return web.Response(body=self._openapi, content_type="application/json")


class _Connection(web.RequestHandler):
    """Answers what no endpoint does: malformed requests, and mistakes in this program."""

    __slots__ = ()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        super().handle_error(request, status, exc, message)  # logs it
        error = "a mistake in this program: the log has it" if status == 500 else "the request is malformed"
        response = Answer(status, {"error": error}).response()
        response.headers["Server"] = SERVER_NAME
        response.force_close()
        return response


@web.middleware
async def _refusals_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except web.HTTPException as refusal:
        texts = {404: "there is no such endpoint", 405: f"{request.method} is not allowed here"}
        answer = Answer(refusal.status, {"error": texts.get(refusal.status, refusal.reason)}).response()
        if "Allow" in refusal.headers:
            answer.headers["Allow"] = refusal.headers["Allow"]
        return answer


async def _without_versions(_: web.Request, response: web.StreamResponse) -> None:
    response.headers["Server"] = SERVER_NAME


def _answers(answer: Callable[[], Answer]) -> Handler:
    async def handle(_: web.Request) -> web.StreamResponse:
        return answer().response()

    return handle


def _is_our_mistake(record: logging.LogRecord) -> bool:
    """Drop malformed requests: they would flood the log."""
    return not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError))
