"""A web application with a page for each video. It counts the views of a page, and shows the number."""

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator

import aiohttp
from aiohttp import web

from worker import ViewProducer

REDIS_URL = os.environ.get("REDIS_URL", "redis://localhost:6379")
WORKER_URL = os.environ.get("WORKER_URL", "http://localhost:3003")
VIDEOS = {"vod_1": "My first video", "vod_2": "My second video"}
PERIOD_S = 1.0

log = logging.getLogger("app")


class Views:
    """Records views, and keeps the last known number of each video. No page waits for Redis or fails with it."""

    def __init__(self, producer: ViewProducer, http: aiohttp.ClientSession) -> None:
        self._producer = producer
        self._http = http
        self._recording: set[asyncio.Task[object]] = set()
        self._numbers: dict[str, int] = {}
        self._asked_at: dict[str, float] = {}

    def record(self, vod_id: str) -> None:
        """In the background. The producer gives up after half a second, logs failures, and raises nothing."""
        task = asyncio.create_task(self._producer.record(vod_id))
        self._recording.add(task)  # asyncio itself keeps no reference
        task.add_done_callback(self._recording.discard)

    async def number(self, vod_id: str) -> int | None:
        """The number to show, at most a second old while the worker answers; None before its first answer."""
        now = time.monotonic()
        if now - self._asked_at.get(vod_id, -PERIOD_S) >= PERIOD_S:
            self._asked_at[vod_id] = now  # also for requests that arrive while this one asks
            try:
                async with self._http.get(f"{WORKER_URL}/v1/views/{vod_id}", raise_for_status=True) as response:
                    self._numbers[vod_id] = (await response.json())["views"]
            except (aiohttp.ClientError, TimeoutError) as error:
                log.warning("the number of views is not up to date: %s", error)
        return self._numbers.get(vod_id)

    async def finish(self) -> None:
        await asyncio.gather(*self._recording)


VIEWS = web.AppKey("views", Views)


async def connect(app: web.Application) -> AsyncIterator[None]:
    timeout = aiohttp.ClientTimeout(total=0.5)
    async with ViewProducer(REDIS_URL) as producer, aiohttp.ClientSession(timeout=timeout) as http:
        app[VIEWS] = Views(producer, http)
        yield
        await app[VIEWS].finish()


async def watch(request: web.Request) -> web.Response:
    vod_id = request.match_info["vod_id"]
    if vod_id not in VIDEOS:  # otherwise any visitor could add ids to the database
        raise web.HTTPNotFound
    request.app[VIEWS].record(vod_id)
    number = await request.app[VIEWS].number(vod_id)
    shown = "" if number is None else f"<p>{number} views</p>"
    return web.Response(text=f"<!doctype html><h1>{VIDEOS[vod_id]}</h1>{shown}\n", content_type="text/html")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    app = web.Application()
    app.cleanup_ctx.append(connect)
    app.router.add_get("/watch/{vod_id}", watch, allow_head=False)
    web.run_app(app, host="127.0.0.1", port=int(os.environ.get("PORT", "8000")))
