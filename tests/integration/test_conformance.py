"""Every source and every sink behaves as pipelines/model.py says, whatever is behind it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from tests.support.conformance import SINKS, SOURCES, SinkCase, SourceCase, document, invalid
from tests.support.streams import number_of
from tests.support.world import World
from worker.errors import TableRefused, UnknownFailure
from worker.pipelines.model import Batch, Idle, Letter, NotClaimed, Written


@pytest.fixture(params=SOURCES)
async def case(request: pytest.FixtureRequest, world: World) -> AsyncIterator[SourceCase]:
    async with SOURCES[request.param](world) as made:
        yield made


async def test_a_source_without_documents_is_idle(case: SourceCase) -> None:
    assert isinstance(await case.source.read(), Idle)


async def test_each_document_is_in_one_batch_in_its_order(case: SourceCase) -> None:
    await case.add(*(document(number) for number in range(1, 6)))
    first = await case.source.read()
    assert isinstance(first, Batch)
    assert [number_of(item.payload) for item in first.items] == [1, 2]
    assert first.full
    case.source.done(first, await case.sink.write(first))
    assert await case.carry() == 2
    assert await case.store.rows() == [1, 2, 3, 4, 5]


async def test_a_document_that_is_not_valid_is_a_letter_with_its_bytes(case: SourceCase) -> None:
    await case.add(document(1), invalid(2), document(3))
    await case.carry()
    assert (await case.store.rows(), await case.store.letters()) == ([1, 3], [2])


async def test_a_batch_that_is_not_done_is_read_again_and_written_once(case: SourceCase) -> None:
    await case.add(document(1), document(2), document(3))
    lost = await case.source.read()
    assert isinstance(lost, Batch)
    assert isinstance(await case.sink.write(lost), Written)
    case.source.reset()
    again = await case.source.read()
    if isinstance(again, Batch):
        # The source that does not ask the database reads the same again; its claim shows that it is written.
        case.source.done(again, await case.sink.write(again))
    await case.carry()
    assert await case.store.rows() == [1, 2, 3]


async def test_a_batch_is_not_claimed_twice(case: SourceCase) -> None:
    await case.add(document(1))
    batch = await case.source.read()
    assert isinstance(batch, Batch)
    outcomes = [await case.sink.write(batch) for _ in range(2)]
    assert outcomes == [Written(1), NotClaimed()]
    case.source.done(batch, outcomes[1])
    assert isinstance(await case.source.read(), Idle)
    assert await case.store.rows() == [1]


async def test_what_is_read_ahead_follows_the_batch(case: SourceCase) -> None:
    await case.add(*(document(number) for number in range(1, 5)))
    batch = await case.source.read()
    assert isinstance(batch, Batch)
    ahead = await case.source.read_ahead(batch)
    case.source.done(batch, await case.sink.write(batch))
    if ahead is not None:
        assert [number_of(item.payload) for item in ahead.items] == [3, 4]
        case.source.done(ahead, await case.sink.write(ahead))
    await case.carry()
    assert await case.store.rows() == [1, 2, 3, 4]


async def test_waiting_ends_when_a_document_comes(case: SourceCase) -> None:
    assert isinstance(await case.source.read(), Idle)
    waiting = asyncio.create_task(case.source.wait(60))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    await case.add(document(1))
    async with asyncio.timeout(10):
        await waiting
    assert await case.carry() == 1


@pytest.fixture(params=SINKS)
async def sinks(request: pytest.FixtureRequest, world: World) -> AsyncIterator[SinkCase]:
    async with SINKS[request.param](world) as made:
        yield made


async def test_a_batch_is_rows_and_letters(sinks: SinkCase) -> None:
    batch = sinks.batch(document(1), document(2), letters=(Letter("o/2", "not_json", "no", invalid(3)),))
    assert await sinks.sink.write(batch) == Written(rows=2, letters=1)
    assert (await sinks.store.rows(), await sinks.store.letters()) == ([1, 2], [3])


async def test_a_batch_without_records_is_written(sinks: SinkCase) -> None:
    assert await sinks.sink.write(sinks.batch()) == Written()


async def test_a_claim_is_taken_once(sinks: SinkCase) -> None:
    claim = sinks.new_claim()
    assert await sinks.sink.write(sinks.batch(document(1), claim=claim)) == Written(1)
    assert await sinks.sink.write(sinks.batch(document(1), claim=claim)) == NotClaimed()
    assert await sinks.store.rows() == [1]


async def test_a_record_that_does_not_fit_is_a_letter_and_the_others_rows(sinks: SinkCase) -> None:
    batch = sinks.batch(document(1), document(2, "refused"), document(3))
    assert await sinks.sink.write(batch) == Written(rows=2, letters=1)
    assert (await sinks.store.rows(), await sinks.store.letters()) == ([1, 3], [2])


async def test_a_table_that_does_not_fit_refuses_the_batch_as_a_whole(sinks: SinkCase) -> None:
    claim = sinks.new_claim()
    await sinks.break_table()
    with pytest.raises(TableRefused):
        await sinks.sink.write(sinks.batch(document(1), claim=claim))
    await sinks.repair_table()
    assert (await sinks.store.rows(), await sinks.store.letters()) == ([], [])
    assert await sinks.sink.write(sinks.batch(document(1), claim=claim)) == Written(1)


async def test_an_unknown_failure_writes_nothing_and_isolating_finds_its_record(sinks: SinkCase) -> None:
    claim = sinks.new_claim()
    batch = sinks.batch(document(1), document(2, "strange"), document(3), claim=claim)
    with pytest.raises(UnknownFailure, match="strange"):
        await sinks.sink.write(batch)
    assert await sinks.store.rows() == []
    assert await sinks.sink.write(batch, isolate=True) == Written(rows=2, letters=1)
    assert (await sinks.store.rows(), await sinks.store.letters()) == ([1, 3], [2])
