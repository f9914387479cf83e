"""docs/how-to/log-metrics.md: clients of the gRPC intake, made from the published file."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.howto.pages import Snippet, snippets
from tests.howto.programs import Programs
from tests.howto.waiting import until
from tests.support.world import CliWorker, World
from worker.dev.servers import free_port

PROTO = str(Path(__file__).parents[2] / "proto")
PAGE = snippets("log-metrics")
GENERATE, SHOW, QUERY = (PAGE.pop(title) for title in ("generate.sh", "metrics.sh", "metrics.sql"))
each = pytest.mark.parametrize("snippet", [pytest.param(snippet, id=snippet.title) for snippet in PAGE.values()])


class Server:
    """The address of a worker that takes metrics, in the variables that the programs read."""

    def __init__(self, world: World) -> None:
        self.port = free_port()
        self.given = {"PROTO": PROTO, "GRPC_TARGET": f"127.0.0.1:{self.port}", "METRIC": "cpu_usage"}
        settings = {"PIPELINES": "metrics", "METRICS_FLUSH_INTERVAL": "50ms", "GRPC_PORT": str(self.port)}
        self.worker = CliWorker(world.environment | settings, "run")

    async def ready(self) -> str:
        """Waits for it. The URL of its HTTP endpoints."""
        return str(json.loads(await self.worker.wait_for_log('"started"'))["url"])


@pytest.fixture
def server(world: World) -> Iterator[Server]:
    made = Server(world)
    yield made
    made.worker.close()


@pytest.fixture(autouse=True)
def generated(programs: Programs) -> None:
    assert programs.run(GENERATE, {"PROTO": PROTO}).returncode == 0


@each
async def test_a_metric_is_a_row_and_a_failure_is_reported(
    snippet: Snippet, run: Callable[..., str], programs: Programs, world: World, server: Server
) -> None:
    url = await server.ready()
    await asyncio.to_thread(run, snippet, **server.given | {"EVENT_ID": 'a "b" 💡'})
    await asyncio.to_thread(run, snippet, **server.given | {"METRIC": "ü 💡"})
    refused = await asyncio.to_thread(programs.run, snippet, server.given | {"METRIC": "", "EVENT_ID": "e"})
    assert refused.returncode != 0
    assert "metric_name" in refused.stderr
    nobody = {"GRPC_TARGET": f"127.0.0.1:{free_port()}", "EVENT_ID": "e"}
    assert (await asyncio.to_thread(programs.run, snippet, server.given | nobody)).returncode != 0
    await until(lambda: world.sql.fetchval("SELECT count(*) FROM metrics"), 2)
    rows = await world.sql.fetch("SELECT * FROM metrics ORDER BY time")
    assert [(row["metric_name"], row["value"], row["event_id"]) for row in rows] == [
        ("cpu_usage", 0.25, 'a "b" 💡'),
        ("ü 💡", 0.25, None),
    ]
    assert all(abs(row["time"].timestamp() - time.time()) < 600 for row in rows)
    assert run(QUERY).splitlines()[0] == "checkout|ü 💡|0.25"
    shown = json.loads(await asyncio.to_thread(run, SHOW, WORKER_URL=url))
    assert [bucket["count"] for bucket in shown["buckets"]] == [1]
