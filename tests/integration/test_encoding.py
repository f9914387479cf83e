"""Ids in a database whose encoding lacks some of their characters."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest

from tests.support.world import World
from worker.counters.flush.outcome import Flushed
from worker.db.address import parse_database_url
from worker.db.counters.reads import Shown
from worker.db.encoding import CODECS, can_encode
from worker.db.read_limit import ReadLimit
from worker.db.record_reads import RecordReader
from worker.db.session import Database


async def test_ids_that_the_database_cannot_store_are_quarantined_without_a_statement(
    redis_url: str, latin1_database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with World(redis_url, latin1_database_url) as world:
        unstorable = [f"vod_{number} 😀" for number in range(300)]
        pipeline = world.redis.pipeline(transaction=False)
        for vod_id in unstorable:
            pipeline.incr(world.prefix + vod_id)
        await pipeline.execute()
        await world.view_many(["plain", "ünïcödé"])
        worker = world.worker(BATCH_SIZE="10")
        commit, sent = worker.counters.flusher.committer.commit, []

        async def record(committer: Any, ids: list[str]) -> Any:
            sent.extend(ids)
            return await commit(ids)

        monkeypatch.setattr(type(worker.counters.flusher.committer), "commit", record)
        async with worker.listening():
            await world.announce("only announced 😀")
            await worker.wait_until(lambda: len(worker.counters.backlog.announced))
            assert await worker.sweep_and_flush() == Flushed(flush_id=1, keys=2, views=2)
        assert set(sent) == {"plain", "ünïcödé"}
        assert await world.totals() == world.truth
        assert worker.metric("view_count_quarantined_keys") == 301
        reasons = set(worker.counters.backlog.quarantine.listed().values())
        assert reasons == {"the database's encoding LATIN1 lacks a character of the id"}

        await world.view("plain")
        shown = await world.worker().counters.display.views(["vod_7 😀", "plain", "nobody 😀"])
        assert shown == [Shown("vod_7 😀", 1, 1, 0), Shown("plain", 2, 1, 1), Shown("nobody 😀", 0, 0, 0)]


async def test_id_that_only_postgres_knows_to_be_impossible_does_not_fail_the_others(
    redis_url: str, euc_jp_database_url: str
) -> None:
    async with World(redis_url, euc_jp_database_url) as world:
        await world.view_many(["plain", "再生"])
        worker = world.worker()
        await worker.cycle()
        await world.view("😀", 3)
        display = worker.counters.display
        others = [f"vod_{number}" for number in range(97)]
        shown = await display.views(["😀", "再生", "🎬", *others, "plain"])
        assert shown[:3] == [Shown("😀", 3, 3, 0), Shown("再生", 1, 0, 1), Shown("🎬", 0, 0, 0)]
        assert shown[-1] == Shown("plain", 1, 0, 1)
        assert await display.views(["😀"]) == [Shown("😀", 3, 3, 0)]
        await world.redis.set(world.keys.marker, "garbage")
        assert await display.views(["😀"]) == [Shown("😀", 3, 3, 0, is_exact=False)]
        _, buckets = await display.history("😀", "hour", datetime(2025, 1, 1, tzinfo=UTC), datetime.now(UTC))
        assert list(buckets) == []


async def test_records_of_a_name_that_the_database_cannot_encode_are_none(latin1_database_url: str) -> None:
    database = Database(parse_database_url(latin1_database_url))
    reader, times = RecordReader(database, ReadLimit()), (datetime(2025, 1, 1, tzinfo=UTC), datetime.now(UTC))
    assert await reader.bars("😀", *times, 10) == []
    assert await reader.latest_bars("😀", 10) == []
    assert await reader.last_event("😀") is None
    assert await reader.metric_values("web", "😀", *times, 10) == []
    assert await reader.metric_buckets("😀", "cpu", *times, timedelta(hours=1), 1e290) == []
    await database.close()


async def test_codecs_have_the_same_characters_as_the_encodings_of_postgres(postgres_url: str) -> None:
    sql = await asyncpg.connect(postgres_url)
    await sql.execute(
        """
        CREATE FUNCTION pg_temp.decoded(raw bytea, encoding text) RETURNS text LANGUAGE plpgsql AS
            $$BEGIN RETURN convert_from(raw, encoding); EXCEPTION WHEN OTHERS THEN RETURN NULL; END$$
        """
    )
    for encoding, codec in CODECS.items():
        characters = [bytes([byte]) for byte in range(128, 256)]
        if codec == "gb2312":
            characters = [bytes([first, second]) for first in range(161, 255) for second in range(161, 255)]
        decoded = (
            "SELECT pg_temp.decoded(raw, $2) AS text FROM unnest($1::bytea[]) WITH ORDINALITY raw(raw, n) ORDER BY n"
        )
        theirs = [row["text"] for row in await sql.fetch(decoded, characters, encoding)]
        assert theirs == [raw.decode(codec, "ignore") or None for raw in characters], encoding
        assert all(can_encode(text, encoding) for text in theirs if text), encoding
        assert not can_encode("😀", encoding)
    await sql.close()


def test_unknown_encodings_are_left_to_postgres() -> None:
    for encoding in (None, "UTF8", "SQL_ASCII", "EUC_JP"):
        assert can_encode("😀", encoding)
