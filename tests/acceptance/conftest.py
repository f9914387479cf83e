from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.guarded import GuardedServers
from tests.support.world import CliWorker, World


@pytest.fixture
def start() -> Iterator[Callable[..., CliWorker]]:
    """Starts `viewer-worker …`, and kills it if the test left it running. Takes the arguments of CliWorker."""
    started: list[CliWorker] = []

    def start(*arguments: Any, **keywords: Any) -> CliWorker:
        worker = CliWorker(*arguments, **keywords)
        started.append(worker)
        return worker

    yield start
    for worker in started:
        worker.close()


@pytest.fixture(scope="session")
def guarded(servers_folder: Path) -> Iterator[GuardedServers]:
    """Servers with TLS on which the worker has only the rights in deploy/."""
    servers = GuardedServers(servers_folder / "guarded")
    yield servers
    servers.close()


@pytest.fixture
async def world(
    request: pytest.FixtureRequest, redis_url: str, database_url: str, guarded: GuardedServers
) -> AsyncIterator[World]:
    """The usual world, or one on guarded servers if the test is parametrized so."""
    if getattr(request, "param", "open") == "open":
        async with World(redis_url, database_url) as made:
            yield made
        return
    async with guarded.world() as made:
        yield made
        assert await made.redis.acl_log() == []  # type: ignore[no-untyped-call]
