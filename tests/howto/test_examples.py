"""examples/: each application counts the views of its pages, and its pages do not depend on Redis."""

from __future__ import annotations

import asyncio
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import aiohttp
import pytest

from tests.howto.waiting import until
from tests.support.tools import NODE, install_node_packages
from tests.support.world import CliWorker, World, clean_environment
from worker.dev.servers import ValkeyServer, free_port

EXAMPLES = Path(__file__).parents[2] / "examples"


def python(_: Path) -> list[str]:
    return [sys.executable, str(EXAMPLES / "python" / "app.py")]


def node(folder: Path) -> list[str]:
    install_node_packages(EXAMPLES / "node", folder)
    shutil.copy(EXAMPLES / "node" / "app.mjs", folder)
    return [str(NODE), str(folder / "app.mjs")]


class Application:
    """An example that runs, and a browser."""

    def __init__(self, process: subprocess.Popen[bytes], url: str, browser: aiohttp.ClientSession) -> None:
        self.process = process
        self._url = url
        self._browser = browser

    async def open(self, vod_id: str) -> tuple[int, str]:
        async with self._browser.get(f"{self._url}/watch/{vod_id}") as response:
            return response.status, await response.text()

    async def answers(self) -> bool:
        """True when it listens. Records no view."""
        try:
            return (await self.open("unknown"))[0] == 404
        except aiohttp.ClientConnectionError:
            return False


@contextmanager
def started(command: list[str], environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(command, env=clean_environment() | environment, stdin=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("make", [python, node])
async def test_example_counts_the_views_of_its_pages_and_outlives_redis(
    make: Callable[[Path], list[str]], world: World, valkey: ValkeyServer, tmp_path: Path
) -> None:
    port, worker_port = free_port(), free_port()
    worker = CliWorker(world.environment | {"HEALTH_CHECK_PORT": str(worker_port)}, "run")
    given = {"REDIS_URL": valkey.url, "WORKER_URL": f"http://127.0.0.1:{worker_port}", "PORT": str(port)}
    try:
        with started(make(tmp_path), given) as process:
            async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10)) as browser:
                await used(Application(process, f"http://127.0.0.1:{port}", browser), world, valkey)
    finally:
        worker.close()


async def used(application: Application, world: World, valkey: ValkeyServer) -> None:
    async def counted_after_a_page(vod_id: str, before: int) -> bool:
        assert (await application.open(vod_id))[0] == 200
        return (await world.totals())[vod_id] > before

    await until(application.answers, True)
    # Views are dropped until the connection to Redis is open.
    await until(lambda: counted_after_a_page("vod_2", 0), True)

    for _ in range(20):
        assert (await application.open("vod_1"))[0] == 200
    await until(lambda: total(world, "vod_1"), 20)
    await until(lambda: shows_a_number(application, "vod_2"), True)

    await until(world.pending, {})
    valkey.kill()
    for _ in range(3):
        status, page = await application.open("vod_1")
        assert (status, "<h1>My first video</h1>" in page) == (200, True)
    await world.restart_redis(valkey)
    await until(lambda: counted_after_a_page("vod_1", 20), True)

    application.process.send_signal(signal.SIGTERM)
    assert await asyncio.to_thread(application.process.wait, 20) == 0


async def shows_a_number(application: Application, vod_id: str) -> bool:
    return re.search(r"<p>\d+ views</p>", (await application.open(vod_id))[1]) is not None


async def total(world: World, vod_id: str) -> int:
    return (await world.totals())[vod_id]
