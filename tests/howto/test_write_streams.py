"""docs/how-to/write-streams.md: every program adds one entry, and sends it again only where that is safe."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import Callable, Iterator

import pytest

from tests.howto.pages import Snippet, snippets
from tests.howto.programs import Programs
from tests.howto.waiting import until
from tests.support.proxy import Proxy
from tests.support.world import CliWorker, World
from worker.contract.entry_id import EntryId
from worker.dev.servers import free_port
from worker.pipelines.model import Window
from worker.pipelines.records.chunk_requests import CHUNK_REQUESTS, ChunkEvent, parse

PATH = "/vod_456/00001.ts"
HOSTILE_PATH = "/\"ü\" 'x' \\ \\n $(a) `b` %s <c>&\n\t{💡}"
# How every answer to XADD ends, and no other answer to these programs.
ANSWER = b"-0\r\n"
ATTEMPTS = 3
ACCEPTED = Window(CHUNK_REQUESTS.defaults.accept_past, CHUNK_REQUESTS.defaults.accept_future)

PAGE = snippets("write-streams")
ONE_ENTRY = PAGE.pop("one-entry.sh")
DEAD_LETTERS = PAGE.pop("dead-letters.sql")
PROGRAMS = [pytest.param(snippet, id=snippet.title) for snippet in PAGE.values()]
each = pytest.mark.parametrize("snippet", PROGRAMS)


async def documents(world: World, stream: str = "chunk_requests") -> list[bytes]:
    """The documents in the stream. Every entry has one field, `data`."""
    entries = await world.redis.xrange(stream)
    assert all(list(fields) == [b"data"] for _, fields in entries)
    return [fields[b"data"] for _, fields in entries]


async def records(world: World, stream: str = "chunk_requests") -> list[ChunkEvent]:
    """The entries as the worker reads them. Raises InvalidRecord for one that it would refuse."""
    return [
        parse(fields[b"data"], EntryId.parse(entry_id), ACCEPTED)
        for entry_id, fields in await world.redis.xrange(stream)
    ]


async def run_through(
    proxy: Proxy, programs: Programs, snippet: Snippet, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a program that reaches Redis through the proxy. It may fail."""
    given = {"REDIS_URL": proxy.url, "REQUEST_PATH": PATH, **environment}
    return await asyncio.to_thread(programs.run, snippet, given)


async def heal(proxy: Proxy) -> None:
    """Lose no more answers from the second connection on, the first one that is made after a lost answer."""
    while proxy.connections < 2:
        await asyncio.sleep(0)
    proxy.reset_at(b"no answer contains this")


def test_page_has_a_program_for_each_client() -> None:
    assert [snippet.language for snippet in PAGE.values()] == ["python", "python", "js", "js", "go", "php", "sh"]


async def test_entry_at_the_top_of_the_page_is_a_record(run: Callable[..., str], world: World) -> None:
    run(ONE_ENTRY)
    assert [record.path for record in await records(world)] == [PATH]
    assert len(await documents(world)) == 1


@each
async def test_one_request_is_one_entry_that_the_worker_accepts(
    snippet: Snippet, run: Callable[..., str], world: World
) -> None:
    run(snippet, REQUEST_PATH=PATH)
    assert len(await documents(world)) == 1
    ((entry_id, _),) = await world.redis.xrange("chunk_requests")
    (record,) = await records(world)
    assert (record.path, record.event_id) == (PATH, None)
    # The clock of the program, in its time zone: an hour off is a mistake.
    assert abs(record.time.timestamp() - EntryId.parse(entry_id).ms / 1000) < 600


@each
async def test_any_path_and_event_id_arrive_unchanged(snippet: Snippet, run: Callable[..., str], world: World) -> None:
    run(snippet, REQUEST_PATH=HOSTILE_PATH, EVENT_ID='a "b"\\💡')
    (record,) = await records(world)
    assert (record.path, record.event_id) == (HOSTILE_PATH, 'a "b"\\💡')


@each
async def test_stream_can_have_another_name(snippet: Snippet, run: Callable[..., str], world: World) -> None:
    run(snippet, REQUEST_PATH=PATH, STREAM="requests")
    assert [record.path for record in await records(world, "requests")] == [PATH]
    assert await documents(world) == []


@each
async def test_entry_whose_answer_is_lost_is_reported_and_not_sent_again(
    snippet: Snippet, programs: Programs, world: World
) -> None:
    async with Proxy(world.redis_url) as proxy:
        proxy.reset_at(ANSWER)
        ended = await run_through(proxy, programs, snippet)
    assert ended.returncode != 0
    assert len(await documents(world)) == 1


@each
async def test_entry_with_an_event_id_is_sent_again_unchanged(
    snippet: Snippet, programs: Programs, world: World
) -> None:
    async with Proxy(world.redis_url) as proxy:
        proxy.reset_at(ANSWER)
        healing = asyncio.create_task(heal(proxy))
        ended = await run_through(proxy, programs, snippet, EVENT_ID="e1")
        await asyncio.wait_for(healing, 1)
    assert ended.returncode == 0, ended.stderr
    first, second = await documents(world)
    assert first == second
    assert json.loads(first)["event_id"] == "e1"


@each
async def test_repeating_ends_with_a_failure(snippet: Snippet, programs: Programs, world: World) -> None:
    async with Proxy(world.redis_url) as proxy:
        proxy.reset_at(ANSWER)
        ended = await run_through(proxy, programs, snippet, EVENT_ID="e1")
    assert ended.returncode != 0
    sent = await documents(world)
    assert len(sent) == ATTEMPTS
    assert len(set(sent)) == 1


@each
async def test_redis_that_does_not_answer_is_given_up(snippet: Snippet, programs: Programs, world: World) -> None:
    await world.redis.execute_command("CLIENT PAUSE", 600_000, "WRITE")
    try:
        given = {"REDIS_URL": world.redis_url, "REQUEST_PATH": PATH}
        ended = await asyncio.to_thread(programs.run, snippet, given)
    finally:
        await world.redis.execute_command("CLIENT UNPAUSE")
    assert ended.returncode != 0
    assert len(await documents(world)) <= 1


@each
async def test_redis_that_is_away_is_given_up(snippet: Snippet, programs: Programs) -> None:
    given = {"REDIS_URL": f"redis://127.0.0.1:{free_port()}", "REQUEST_PATH": PATH, "EVENT_ID": "e1"}
    ended = await asyncio.to_thread(programs.run, snippet, given)
    assert ended.returncode != 0


@each
async def test_redis_that_refuses_is_reported(snippet: Snippet, programs: Programs, world: World) -> None:
    await world.redis.set("text", "not a stream")
    given = {"REDIS_URL": world.redis_url, "REQUEST_PATH": PATH, "STREAM": "text"}
    ended = await asyncio.to_thread(programs.run, snippet, given)
    assert ended.returncode != 0


@pytest.fixture
def start() -> Iterator[Callable[..., CliWorker]]:
    """Starts the command with these settings and arguments."""
    started: list[CliWorker] = []

    def start(environment: dict[str, str], *arguments: str) -> CliWorker:
        started.append(CliWorker(environment | {"PIPELINES": "chunk_requests"}, *arguments))
        return started[-1]

    yield start
    for worker in started:
        worker.close()


async def carried(world: World, entries: int) -> list[str]:
    """Wait until so many entries are carried, and return the paths in the table."""
    await until(lambda: world.sql.fetchval("SELECT entries_read FROM stream_positions"), entries)
    return [row["path"] for row in await world.sql.fetch("SELECT path FROM chunk_requests")]


async def test_repeated_entry_is_one_row(
    run: Callable[..., str], world: World, start: Callable[..., CliWorker]
) -> None:
    run(PAGE["redis-py.py"], REQUEST_PATH=PATH, EVENT_ID="e1")
    (document,) = await documents(world)
    await world.redis.xadd("chunk_requests", {"data": document})
    start(world.environment, "run")
    assert await carried(world, 2) == [PATH]


async def test_bad_document_is_a_dead_letter_that_other_settings_accept(
    run: Callable[..., str], world: World, start: Callable[..., CliWorker]
) -> None:
    old = json.dumps({"time": "1999-12-31T23:59:59Z", "path": PATH})
    entry_id = await world.redis.xadd("chunk_requests", {"data": old})
    start(world.environment, "run")
    assert await carried(world, 1) == []
    (letter,) = run(DEAD_LETTERS).splitlines()
    assert letter.split("|")[1:3] == [f"chunk_requests/{entry_id.decode()}", "time_out_of_range"]
    replay = start(world.environment | {"CHUNK_REQUESTS_ACCEPT_PAST": "36500d"}, "dead-letters", "replay")
    assert await replay.wait() == 0, replay.log
    assert await carried(world, 1) == [PATH]
    assert run(DEAD_LETTERS) == ""
