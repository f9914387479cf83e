"""A small ASGI server: `python asgi_server.py FILE` serves the `app` of a file on PORT, with lifespan events."""

from __future__ import annotations

import asyncio
import os
import runpy
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from aiohttp import web

Message = dict[str, Any]
App = Callable[[Message, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]]


def lifespan_of(app: App) -> Callable[[web.Application], AsyncIterator[None]]:
    async def lifespan(_: web.Application) -> AsyncIterator[None]:
        to_app, from_app = asyncio.Queue[Message](), asyncio.Queue[Message]()
        task = asyncio.create_task(app({"type": "lifespan"}, to_app.get, from_app.put))  # type: ignore[arg-type]
        to_app.put_nowait({"type": "lifespan.startup"})
        assert await from_app.get() == {"type": "lifespan.startup.complete"}
        yield
        to_app.put_nowait({"type": "lifespan.shutdown"})
        assert await from_app.get() == {"type": "lifespan.shutdown.complete"}
        await task

    return lifespan


def handler_of(app: App) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    async def handle(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()

        async def receive() -> Message:
            return {"type": "http.request", "body": await request.read(), "more_body": False}

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                response.set_status(message["status"])
                response.headers.extend({name.decode(): value.decode() for name, value in message["headers"]})
                await response.prepare(request)
            else:
                await response.write(message["body"])
                if not message.get("more_body"):
                    await response.write_eof()

        headers = [(name.lower(), value) for name, value in request.raw_headers]
        client = (request.remote, 0)
        await app(
            {"type": "http", "method": request.method, "path": request.path, "headers": headers, "client": client},
            receive,
            send,
        )
        return response

    return handle


def main() -> None:
    app = runpy.run_path(sys.argv[1])["app"]
    server = web.Application()
    server.cleanup_ctx.append(lifespan_of(app))
    server.router.add_get("/{path:.*}", handler_of(app))
    web.run_app(server, host="127.0.0.1", port=int(os.environ["PORT"]))


if __name__ == "__main__":
    main()
