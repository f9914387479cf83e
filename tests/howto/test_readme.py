"""README.md, "Five minutes with your own Redis and Postgres": its commands run and print what it shows."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.howto.waiting import until
from tests.support.tools import tool
from tests.support.world import World, clean_environment, database_url_for
from worker.dev.servers import PostgresServer, free_port

ROOT = Path(__file__).parents[2]
CHAPTER = (ROOT / "README.md").read_text().split("## Five minutes", 1)[1].split("\n## ", 1)[0]
CREATE, START = re.findall(r"```sh\n(.*?)```", CHAPTER, re.DOTALL)
SUPERUSER = "psql -h localhost -U postgres"
# In a transcript, a command follows a prompt, and the lines after it are its output.
TYPED = re.findall(r"^\$ (.*)\n((?:(?!```|\$ ).*\n)*)", CHAPTER, re.MULTILINE)


def environment(world: World, port: int) -> dict[str, str]:
    servers = {"REDIS_URL": world.redis_url, "DATABASE_URL": world.database_url}
    return clean_environment() | servers | {"HEALTH_CHECK_PORT": str(port), "HEALTH_CHECK_HOST": "127.0.0.1"}


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def worker(world: World, port: int, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Runs the block that installs and starts the worker, without the installation and on the test's servers."""
    lines = [line for line in START.splitlines() if not re.match(r"make install|export (DATABASE|REDIS)_URL", line)]
    assert len(lines) == len(START.splitlines()) - 3
    typed = "\n".join(lines).replace(".venv/bin/viewer-worker", f"{sys.executable} -m worker")
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            ["bash", "-euc", typed.replace("BATCH_INTERVAL_MS=5000", "BATCH_INTERVAL_MS=500")],
            env=environment(world, port),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    yield process
    os.killpg(process.pid, 9)
    process.wait()


def test_database_that_the_readme_creates_belongs_to_its_user(application_server: PostgresServer) -> None:
    psql = tool("psql", "postgresql-client")

    def typed(commands: str) -> None:
        subprocess.run(["bash", "-euc", commands], check=True, timeout=30)

    as_superuser = f"{psql} {application_server.url}"
    assert CREATE.count(SUPERUSER) == 2
    typed(CREATE.replace(SUPERUSER, as_superuser))
    user_url = database_url_for(application_server.url, "streamix").replace("//postgres@", "//username:password@")
    typed(f"{psql} {user_url} -c 'CREATE TABLE made (id integer)'")
    typed(f"{as_superuser} -c 'DROP DATABASE streamix' -c 'DROP ROLE username'")


@pytest.mark.usefixtures("worker")
async def test_first_view_is_shown_as_in_the_readme(world: World, port: int) -> None:
    for name, package in (("redis-cli", "redis-tools"), ("psql", "postgresql-client"), ("curl", "curl")):
        tool(name, package)
    incr, select, curl = [typed for typed, _ in TYPED]
    answers = [answer for _, answer in TYPED]
    assert await output_of(incr, world, port) == "1\n"
    assert answers[0] == "(integer) 1\n"
    await until(world.pending, {})
    assert await output_of(select, world, port) == answers[1]
    answer = await output_of(curl.replace("localhost:3003", f"127.0.0.1:{port}"), world, port)
    assert json.loads(answer) == json.loads(answers[2])


async def output_of(command: str, world: World, port: int) -> str:
    done = await asyncio.to_thread(
        subprocess.run,
        ["bash", "-c", command],
        env=environment(world, port),
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    return re.sub(r" +$", "", str(done.stdout), flags=re.MULTILINE).replace("\n\n", "\n")
