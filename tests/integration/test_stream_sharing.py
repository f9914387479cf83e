"""One stream, two that want to carry it: only one does, and the other says why not."""

from __future__ import annotations

import asyncio

import asyncpg
import pytest

from tests.support.records import CHECK, SETTINGS, Records
from worker.app.commands import open_adjustments
from worker.observability.status import State
from worker.settings.environment import load_settings


@pytest.mark.parametrize("order", ["the stream first", "the workers first"])
async def test_two_sources_of_one_database_carry_a_stream_once(records: Records, order: str) -> None:
    one, other = records.carrier(), records.carrier(VIEW_SOURCE_NAME="other")
    if order == "the stream first":
        await records.add(50)
    async with one.running(), other.running():
        await asyncio.sleep(0.3)
        await records.add(50)
        await records.carried()
        await records.wait(lambda: _one_holds(one, other))
        await records.add(20)
        await records.carried()


async def test_two_databases_carry_a_stream_once(records: Records, postgres_url: str, template_database: str) -> None:
    name = f"vw_other_{records.world.stream[-9:-1]}"
    admin = await asyncpg.connect(postgres_url)
    await admin.execute(f"CREATE DATABASE {name} TEMPLATE {template_database}")
    url = records.world.database_url.rsplit("/", 1)[0] + f"/{name}"
    one, other = records.carrier(), records.carrier(DATABASE_URL=url)
    async with one.running(), other.running():
        await asyncio.sleep(0.3)
        await records.add(50)
        await records.wait(lambda: _one_holds(one, other))
        there = await asyncpg.connect(url)

        async def carried_once() -> bool:
            counts = {await records.rows(), await there.fetchval("SELECT count(*) FROM chunk_requests")}
            return counts == {0, 50}

        await records.wait(carried_once)
        await asyncio.sleep(0.5)
        assert await carried_once()
        await there.close()
    await admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
    await admin.close()


async def test_streams_command_names_the_other_source_that_carries_a_stream(records: Records) -> None:
    await records.add(5)
    async with records.carrier().running():
        await records.carried()
    settings = load_settings(environ=records.world.environment | SETTINGS | {"VIEW_SOURCE_NAME": "other"})
    async with open_adjustments(settings) as adjustments:
        state = await adjustments[records.world.stream].look()
    assert state.problem == f"on hold: default/{records.world.stream} carries this stream already"
    assert state.remedy == "Let only one source carry a stream."


async def _one_holds(*carriers: object) -> bool:
    states = [carrier.status.checks[CHECK].state for carrier in carriers]  # type: ignore[attr-defined]
    return sorted(states) == sorted([State.HOLD, State.OK])


async def test_a_lease_that_cannot_be_taken_shows_why(records: Records) -> None:
    await records.world.sql.execute("ALTER TABLE stream_positions RENAME TO gone")
    carrier = records.carrier()
    async with carrier.running():
        assert "stream_positions" in await carrier.reaches(State.FAILING)
        await records.add(3)
        await records.world.sql.execute("ALTER TABLE gone RENAME TO stream_positions")
        await records.carried()
