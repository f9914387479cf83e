"""docs/records.md, from start to end, on the servers that it starts."""

from __future__ import annotations

import asyncio
import re
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.howto.pages import Snippet, snippets
from tests.howto.programs import Programs
from tests.howto.waiting import until
from worker.dev.servers import free_port

PAGE = snippets("../records")
# Signals of the test must reach the worker, not the shell that started it.
START = replace(PAGE["start.sh"], code=PAGE["start.sh"].code.replace("viewer-worker run", "exec viewer-worker run"))


@pytest.fixture
def servers(programs: Programs, tmp_path: Path) -> Iterator[dict[str, str]]:
    """The servers of the page, and the variables that the lines they print set."""
    command = PAGE["servers.sh"].code.strip()
    block = replace(PAGE["servers.sh"], code=f"exec {command} --data {tmp_path / 'dev'}\n")
    with programs.started(block, {}) as program:
        assert program.stdout is not None
        lines = [program.stdout.readline().strip() for _ in range(2)]
        yield dict(line.removeprefix("export ").split("=", 1) for line in lines)
        stop(program)


def stop(program: subprocess.Popen[str]) -> None:
    program.send_signal(signal.SIGINT)
    assert program.wait(20) == 0


async def test_page_prints_what_it_shows(programs: Programs, servers: dict[str, str]) -> None:
    port = free_port()
    environment = servers | {"HEALTH_CHECK_PORT": str(port), "HEALTH_CHECK_HOST": "127.0.0.1"}
    assert set(servers) == {"REDIS_URL", "DATABASE_URL"}

    async def shows(name: str) -> str:
        block: Snippet = PAGE[f"{name}.sh"]
        here = replace(block, code=block.code.replace("localhost:3003", f"127.0.0.1:{port}"))
        ended = await asyncio.to_thread(programs.run, here, environment)
        assert ended.returncode == 0, ended.stderr + ended.stdout
        return ended.stdout.strip()

    def shown(name: str) -> str:
        return PAGE[f"{name}.txt"].code.strip()

    async def row_count() -> int:
        return len((await shows("paths")).splitlines())

    async def is_ready() -> bool:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            return False
        writer.close()
        return True

    with programs.started(START, environment) as worker:
        await until(is_ready, True)
        assert re.fullmatch(r"\d+-\d+", await shows("add"))
        await until(row_count, 1)
        assert await shows("rows") == shown("rows")
        await shows("bad")
        await until(row_count, 2)
        assert await shows("letters") == shown("letters")
        assert await shows("metric") == shown("metric")
        await shows("corrected")
        await until(row_count, 3)
        assert await shows("paths") == shown("paths")
        stop(worker)
    await shows("add")
    with programs.started(START, environment) as worker:
        await until(row_count, 4)
        stop(worker)
