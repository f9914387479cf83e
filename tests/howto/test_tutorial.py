"""docs/tutorial.md, from start to end."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from tests.howto.pages import Snippet, joined, snippets
from tests.howto.programs import Programs
from tests.howto.waiting import until
from tests.support.world import World
from worker.dev.servers import free_port

PAGE = snippets("../tutorial")
# Signals of the test must reach the worker, not the shell that started it. The test reads the worker's log.
START = replace(
    PAGE["start.sh"], code=PAGE["start.sh"].code.replace("viewer-worker run", "exec viewer-worker run 2>&1")
)
START_AGAIN = replace(START, title="start-again.sh", code=START.code.splitlines()[-1])


def here(snippet: Snippet, port: int) -> Snippet:
    """The snippet with the test's port."""
    return replace(snippet, code=snippet.code.replace("localhost:3003", f"127.0.0.1:{port}"))


async def test_tutorial_prints_what_it_shows(world: World, programs: Programs, run: Callable[..., str]) -> None:
    port = free_port()
    given = {"BATCH_INTERVAL_MS": "300", "HEALTH_CHECK_PORT": str(port), "HEALTH_CHECK_HOST": "127.0.0.1"}
    environment = world.environment | given

    async def shows(title: str) -> str:
        return await asyncio.to_thread(run, here(PAGE[title], port), **given)

    assert {line.split("=")[0] for line in PAGE["settings.sh"].code.splitlines() if line.startswith("export")} == {
        "export DATABASE_URL",
        "export REDIS_URL",
        "export BATCH_INTERVAL_MS",
    }
    with programs.started(START, environment) as worker:
        await until(lambda: subscribers(world), 1)
        assert await shows("view.sh") == "1"
        number, expected = json.loads(await shows("number.sh")), json.loads(PAGE["number.json"].code)
        assert number | {"pending": 1} == expected
        await until(world.pending, {})
        assert await shows("stored.sh") == PAGE["stored.txt"].code.strip()
        await shows("announce.sh")
        await until(world.totals, {"vod_456": 2, "vod_7": 5})
        assert await top(shows) == {("2", "2", "vod_456"), ("5", "5", "vod_7")}
        await killed(worker, PAGE["kill.sh"], run)
    with programs.started(START_AGAIN, environment) as worker:
        await until(world.pending, {})
        assert await shows("after.sh") == PAGE["after.txt"].code.strip()
        await stopped(worker)
    await shows("table.sql")
    target = joined(PAGE["target.sh"], START_AGAIN)
    with programs.started(target, environment) as worker:
        await until(lambda: subscribers(world), 1)
        await shows("view.sh")
        await until(world.pending, {})
        assert await shows("together.sh") == PAGE["together.txt"].code.strip()
        await stopped(worker)
    await shows("clean.sh")
    assert not await world.totals()


async def subscribers(world: World) -> int:
    ((_, listening),) = await world.redis.pubsub_numsub("view_count_updates")
    return int(listening)


async def top(shows: Callable[..., object]) -> set[tuple[str, ...]]:
    shown = await shows("top.sh")  # type: ignore[misc]
    return {tuple(line.split()) for line in str(shown).splitlines()[3:]}


async def killed(worker: subprocess.Popen[str], block: Snippet, run: Callable[..., str]) -> None:
    """Run the block with the process id that the worker logged, as a reader does."""
    assert worker.stdout is not None
    logged = ""
    while '"started"' not in logged:
        logged = await asyncio.to_thread(worker.stdout.readline)
        assert logged, "the worker has ended without the line `started`"
    pid = json.loads(logged)["pid"]
    assert block.code.count(" 4711\n") == 1
    await asyncio.to_thread(run, replace(block, code=block.code.replace(" 4711\n", f" {pid}\n")))
    assert await asyncio.to_thread(worker.wait, 20) == -signal.SIGKILL


async def stopped(worker: subprocess.Popen[str]) -> None:
    worker.send_signal(signal.SIGINT)
    assert await asyncio.to_thread(worker.wait, 20) == 0


async def test_servers_run_until_they_are_stopped(programs: Programs, tmp_path: Path) -> None:
    typed = PAGE["servers.sh"].code.strip()
    servers = replace(PAGE["servers.sh"], code=f"exec {typed} --data {tmp_path / 'dev'}\n")
    with programs.started(servers, {}) as program:
        assert program.stdout is not None
        lines = [await asyncio.to_thread(program.stdout.readline) for _ in range(2)]
        urls = dict(line.strip().removeprefix("export ").split("=", 1) for line in lines)
        async with World(urls["REDIS_URL"], urls["DATABASE_URL"]) as world:
            await world.view("a")
            assert await world.sql.fetchval("SELECT 1") == 1
        await stopped(program)
