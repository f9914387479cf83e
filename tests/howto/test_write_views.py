"""docs/how-to/write-views.md: every program counts a view and announces it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable

import pytest
from redis.asyncio.client import Monitor, PubSub

from tests.howto.pages import Snippet, snippets
from tests.howto.programs import Programs
from tests.support.proxy import Proxy
from tests.support.world import World

END = "the end of the test"
HOSTILE_ID = '"ü" \\ <b>\n{💡}'

PRODUCER = snippets("write-views")["view-producer.py"]
BY_HAND = snippets("write-views")["redis-cli.sh"]
ALL = list(snippets("write-views").values())


def each(*, without: tuple[Snippet, ...] = ()) -> pytest.MarkDecorator:
    kept = [snippet for snippet in ALL if snippet not in without]
    return pytest.mark.parametrize("snippet", [pytest.param(snippet, id=snippet.title) for snippet in kept])


@pytest.fixture
async def channel(world: World) -> AsyncIterator[PubSub]:
    async with world.redis.pubsub() as subscription:
        await subscription.subscribe("view_count_updates")
        yield subscription


async def received(channel: PubSub, world: World) -> list[object]:
    """The messages published so far, decoded."""
    await world.redis.publish("view_count_updates", json.dumps(END))
    messages: list[object] = []
    async for message in channel.listen():
        if message["type"] == "message":
            messages.append(json.loads(message["data"]))
        if messages[-1:] == [END]:
            break
    return messages[:-1]


@each()
async def test_one_view_is_one_count_and_one_message(
    snippet: Snippet, run: Callable[..., str], world: World, channel: PubSub
) -> None:
    run(snippet, VOD_ID="vod_123")
    assert await world.pending() == {"vod_123": 1}
    assert await received(channel, world) == [{"vodId": "vod_123", "count": 1}]


@each(without=(BY_HAND,))
async def test_any_id_reaches_counter_and_message_unchanged(
    snippet: Snippet, run: Callable[..., str], world: World, channel: PubSub
) -> None:
    run(snippet, VOD_ID=HOSTILE_ID)
    assert await world.pending() == {HOSTILE_ID: 1}
    assert await received(channel, world) == [{"vodId": HOSTILE_ID, "count": 1}]


@each()
async def test_the_counter_comes_before_the_message(snippet: Snippet, run: Callable[..., str], world: World) -> None:
    async with world.redis.monitor() as monitor:
        run(snippet, VOD_ID="vod_123")
        await world.redis.echo(END)
        assert await counting(monitor) == ["INCR", "PUBLISH"]


async def counting(monitor: Monitor) -> list[str]:
    """The INCR and PUBLISH commands that the server received until the end of the test."""
    seen: list[str] = []
    while END not in (command := (await monitor.next_command())["command"]):
        name = command.partition(" ")[0].upper().removesuffix("BY")
        if name in ("INCR", "PUBLISH"):
            seen.append(name)
    return seen


@each(without=(PRODUCER,))
async def test_a_view_whose_answer_is_lost_is_reported_and_not_sent_again(
    snippet: Snippet, programs: Programs, world: World
) -> None:
    async with Proxy(world.redis_url) as proxy:
        proxy.lose_answer_to(b"vod:views:")
        environment = world.environment | {"REDIS_URL": proxy.url, "VOD_ID": "v"}
        ended = await asyncio.to_thread(programs.run, snippet, environment)
    assert ended.returncode != 0
    assert await world.pending() == {"v": 1}
