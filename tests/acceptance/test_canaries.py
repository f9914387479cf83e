"""Secrets are never shown: no output of the worker contains one, whatever fails."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import pytest

from tests.support.forked import run_forked
from tests.support.guarded import GuardedServers
from tests.support.world import CliWorker, World, clean_environment
from worker.dev.servers import free_port

Start = Callable[..., CliWorker]

ACCEPTED = [
    {"DATABASE_URL": "postgresql://me:CANARY@db/app?password=CANARY&sslpassword=CANARY"},
    {"DATABASE_URL": "postgresql://me:p@ss/CANARY:%#CANARY@db/app"},
    {"DB_PASSWORD": "any://CANARY", "DB_HOST": "db"},
    {"REDIS_URL": "rediss://me:CANARY@redis:6380/2?ssl_ca_certs=/etc/ca.pem"},
    {"REDIS_URL": "redis+sentinel://:CANARY@one:26379,two:26379/master"},
    {"REDIS_URL": "redis://CANARY@redis"},
    {"REDIS_URL": "redis://redis?password=CANARY"},
]
REFUSED = [
    {"DATABASE_URL": "CANARY"},
    {"DATABASE_URL": "me:CANARY@db/app"},
    {"DATABASE_URL": "me:CANARY://db/app"},
    {"DATABASE_URL": "mysql://me:CANARY@db/app"},
    {"DATABASE_URL": "postgresql://me:CANARY@db:CANARY/app"},
    {"DATABASE_URL": "postgresql://me:CANARY@db/app?sslmode=CANARY"},
    {"REDIS_URL": "redis://:CANARY@redis/CANARY"},
    {"DB_HOST": "postgresql://me:CANARY@db/app"},
    {"DB_HOST": "me:CANARY@db"},
    {"DB_HOST": "POSTGRES://me:CANARY@db"},
    {"DB_PORT": "postgresql://me:CANARY@db/app"},
    {"HEALTH_CHECK_HOST": " redis://:CANARY@redis"},
    {"LOG_LEVEL": "PostgreSQL://me:CANARY@db/app"},
    {"HEALTH_CHECK_PORT": "redis://:CANARY@redis"},
    {"DB_PASSWORD": "CANARY", "DB_PASSWORD_FILE": "/nowhere"},
]


async def run_command(*arguments: str, **environment: str) -> tuple[int, str]:
    """The exit code, and everything that the command printed."""
    done = await asyncio.to_thread(run_forked, *arguments, environment=clean_environment() | environment)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("settings", ACCEPTED)
async def test_config_masks_every_secret(settings: dict[str, str]) -> None:
    code, printed = await run_command("config", **settings)
    assert code == 0, printed
    assert "***" in printed
    assert "CANARY" not in printed


@pytest.mark.parametrize("settings", REFUSED)
async def test_setting_that_is_refused_is_named_without_its_secret(settings: dict[str, str]) -> None:
    code, printed = await run_command("config", **settings)
    assert code == 78, printed
    assert next(iter(settings)) in printed
    assert "CANARY" not in printed


async def test_secret_in_an_invalid_file_is_not_shown(tmp_path: Path) -> None:
    for content in (b"\xffCANARY", b"postgres:CANARY"):
        (tmp_path / "url").write_bytes(content)
        code, printed = await run_command("config", DATABASE_URL_FILE=str(tmp_path / "url"))
        assert code == 78
        assert "CANARY" not in printed


@pytest.fixture
async def world(guarded: GuardedServers) -> AsyncIterator[World]:
    """A world on servers that require passwords."""
    async with guarded.world() as made:
        yield made


def secrets_of(environment: dict[str, str]) -> list[str]:
    secrets = [urlsplit(environment[name]).password for name in ("DATABASE_URL", "REDIS_URL")]
    assert all(secrets)
    return [str(secret) for secret in secrets]


async def test_commands_print_no_secret_whether_they_succeed_or_fail(world: World) -> None:
    valid = world.environment
    secrets = secrets_of(valid)
    nowhere = f"127.0.0.1:{free_port()}"
    refused = {"DATABASE_URL": f"postgresql://me:CANARY@{nowhere}/app", "REDIS_URL": f"redis://:CANARY@{nowhere}"}
    wrong_passwords = {name: re.sub(r":[0-9a-f]{48}@", ":CANARY@", valid[name]) for name in refused}
    wrong_hosts = {name: valid[name].replace("@127.0.0.1:", "@localhost:") for name in refused}
    check, once = ("check", "--json"), ("run", "--once")
    for changes, commands in (
        ({}, (("migrate",), once, check, ("adopt",))),
        (wrong_passwords, (once, check)),
        ({"REDIS_URL": wrong_passwords["REDIS_URL"]}, (once,)),
        (wrong_hosts, (once, check)),
        (refused, (once, check)),
    ):
        for arguments in commands:
            code, printed = await run_command(*arguments, **(valid | changes), LOG_LEVEL="debug")
            assert (code == 0) is (not changes), printed
            assert "Traceback" not in printed
            assert [secret for secret in ("CANARY", *secrets) if secret in printed] == [], (arguments, code)


async def test_running_worker_shows_no_secret_in_any_failure(world: World, start: Start) -> None:
    canaries = ["CANARY", *secrets_of(world.environment)]
    worker = start(world.environment | {"LOG_LEVEL": "debug"}, "run")
    await worker.wait_for_log('"marker created"')
    url = json.loads(await worker.wait_for_log('"started"'))["url"]
    shown = await all_responses(url)

    await world.sql.execute("DROP TABLE view_counts")
    await world.view("a")
    await worker.wait_for_log("Traceback")
    shown += await all_responses(url)
    await world.redis.execute_command("ACL SETUSER viewer-worker resetpass >CANARY")
    await world.redis.execute_command("CLIENT KILL TYPE normal SKIPME yes")
    await worker.wait_for_log('"redis failing"')
    shown += await all_responses(url)

    assert '"redis"' in shown
    assert [canary for canary in canaries if canary in shown + worker.log] == []


async def all_responses(url: str) -> str:
    shown = ""
    async with aiohttp.ClientSession() as session:
        for path in ("/health", "/ping", "/livez", "/readyz", "/metrics", "/", "/nothing?password=1"):
            async with session.get(url + path) as response:
                shown += f"{response.headers}\n{await response.text()}\n"
    return shown
