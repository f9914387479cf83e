"""Records from a Redis stream to their table, each exactly once."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime, timedelta

from tests.support.records import Records, make_document
from worker.observability.status import SERVERS, State


async def test_entries_become_rows_and_survive_a_kill(records: Records) -> None:
    await records.add(10)
    worker = records.start()
    await records.carried()
    await records.add(3000)
    await asyncio.sleep(0.05)
    worker.kill()
    await records.add(10)
    records.start()
    await records.carried()


async def test_a_row_has_every_field_of_its_document(records: Records) -> None:
    await records.world.redis.xadd(
        records.world.stream,
        {
            "data": json.dumps(
                {
                    "time": "2026-11-27T12:00:00.123456789+02:00",
                    "path": "/a?b=ü",
                    "ip": "[2001:db8::1]:443",
                    "referer": "https://example.org/",
                    "user_agent": "agent",
                    "sid": "s",
                    "uid": "u",
                    "event_id": "e",
                    "further": [1],
                }
            )
        },
    )
    records.paths = ["/a?b=ü"]
    async with records.carrier().running():
        await records.carried()
    row = dict(await records.world.sql.fetchrow("SELECT *, host(ip) AS host FROM chunk_requests"))
    assert row.pop("time") == datetime(2026, 11, 27, 10, 0, 0, 123456, tzinfo=UTC)
    assert row.pop("host") == "2001:db8::1"
    del row["ip"]
    assert row == {
        "path": "/a?b=ü",
        "referer": "https://example.org/",
        "user_agent": "agent",
        "sid": "s",
        "uid": "u",
        "event_id": "e",
    }


async def test_a_repeated_event_is_one_row(records: Records) -> None:
    await records.add(1, event_id="e")
    for _ in range(3):
        await records.world.redis.xadd(records.world.stream, {"data": make_document(0, event_id="e")})
    await records.add(1, event_id="f")
    async with records.carrier().running():
        await records.carried()


async def test_bad_documents_become_letters_with_their_bytes_and_stop_no_neighbour(records: Records) -> None:
    bad = [
        b"{",
        b"\xff\xfe",
        b"[]",
        b'{"path":"/x"}',
        b'{"time":0,"path":"/x"}',
        b'{"time":"2026-11-27T10:00:00Z","path":1}',
    ]
    for document in bad:
        await records.add(9)
        await records.add_bad(document)
    async with records.carrier().running():
        await records.carried(letters=len(bad))
    letters = await records.letters()
    assert [letter["payload"] for letter in letters] == bad
    classes = ["not_json", "not_utf8", "invalid_field", "invalid_field", "time_out_of_range", "invalid_field"]
    assert [letter["error_class"] for letter in letters] == classes
    assert all(letter["origin"].startswith(f"{records.world.stream}/") for letter in letters)


async def test_entries_of_another_field_or_of_several(records: Records) -> None:
    await records.world.redis.xadd(records.world.stream, {"bar": make_document(0)})
    await records.world.redis.xadd(records.world.stream, {"x": "1", "y": "2"})
    await records.world.redis.xadd(records.world.stream, {"other": "1", "data": make_document(1)})
    records.paths = ["/0", "/1"]
    async with records.carrier().running():
        await records.carried(letters=1)
    (letter,) = await records.letters()
    assert (letter["error_class"], letter["payload"]) == ("missing_field", b"x: 1\ny: 2")


async def test_an_entry_over_a_mebibyte_is_a_letter_with_its_first_64_kib(records: Records) -> None:
    await records.add_bad(b"x" * (1024 * 1024 + 1))
    await records.add(1)
    async with records.carrier().running():
        await records.carried(letters=1)
    (letter,) = await records.letters()
    assert (letter["error_class"], letter["payload"]) == ("too_large", b"x" * 65536)


async def test_the_group_mirrors_the_position_and_shows_no_lag(records: Records) -> None:
    await records.add(20)
    carrier = records.carrier()
    async with carrier.running():
        await records.carried()
        stream = records.world.stream
        async with asyncio.timeout(15):
            while (group := (await records.world.redis.xinfo_groups(stream))[0])["lag"] != 0:
                await records.add(1)
                await asyncio.sleep(0.1)
        assert group["entries-read"] == (await records.world.redis.xinfo_stream(stream))["entries-added"]
        assert carrier.metric("stream_backlog_entries", stream=stream) == 0


async def test_carried_entries_are_trimmed_but_not_what_another_group_needs(records: Records) -> None:
    redis, stream = records.world.redis, records.world.stream
    await redis.xadd(stream, {"data": make_document(0)}, id="1-1")
    records.paths.append("/0")
    records.added = 1
    await records.add(300)
    await redis.xgroup_create(stream, "another", "0")
    carrier = records.carrier(CHUNK_REQUESTS_STREAM_KEEP="1ms", CHUNK_REQUESTS_ACCEPT_FUTURE="100y")
    async with carrier.running():
        await records.carried()
        await records.add(1)
        await records.carried()
        assert await redis.xlen(stream) == 302
        await redis.xgroup_destroy(stream, "another")
        async with asyncio.timeout(20):
            while await redis.xlen(stream) > 150:
                await records.add(1)
                await asyncio.sleep(0.1)
        await records.carried()
    assert carrier.metric("stream_entries_lost_total", stream=stream) == 0


async def test_entries_trimmed_unread_are_counted_as_lost(records: Records) -> None:
    await records.add(5)
    async with records.carrier().running():
        await records.carried()
    await records.add(10)
    await records.world.redis.xtrim(records.world.stream, maxlen=4, approximate=False)
    del records.paths[5:11]
    async with records.carrier().running():
        await records.carried()
    assert await records.world.sql.fetchrow("SELECT lost, gaps FROM stream_positions") == (6, 0)


async def test_several_streams_of_one_pipeline(records: Records) -> None:
    second = f"second {records.world.prefix}"
    await records.add(5)
    for number in range(5, 10):
        await records.world.redis.xadd(second, {"data": make_document(number)})
        records.paths.append(f"/{number}")
    carrier = records.carrier(CHUNK_REQUESTS_STREAM=f"{records.world.stream},{second}")
    async with carrier.running():
        await records.carried()
    assert {stream.name for stream in carrier.pipelines.streams} == {
        f"chunk_requests:{records.world.stream}",
        f"chunk_requests:{second}",
    }
    await records.world.redis.delete(second)


async def test_a_replica_stands_by_and_takes_over_at_once_after_a_clean_stop(records: Records) -> None:
    first, second = records.carrier(), records.carrier()
    async with second.running():
        async with first.running():
            await records.add(10)
            await records.carried()
        await records.add(10)
        await records.carried(timeout=5)
        assert second.status.checks["chunk_requests"].state is State.OK


async def test_a_replica_on_a_wrong_empty_redis_does_not_keep_the_right_one_idle(records: Records) -> None:
    await records.add(3)
    async with records.carrier().running():
        await records.carried()
    wrong, right = records.carrier(CHUNK_REQUESTS_STREAM=records.world.stream), records.carrier()
    # Database 9 of the same server has no such stream.
    wrong = records.carrier(REDIS_URL=f"{records.world.redis_url}/9")
    async with wrong.running():
        await asyncio.sleep(0.5)
        async with right.running():
            await records.add(10)
            await records.carried(timeout=10)


async def test_retention_deletes_old_rows_and_letters(records: Records) -> None:
    await records.add(3)
    old = (datetime.now(UTC) - timedelta(days=9)).isoformat()
    for _ in range(4):
        await records.world.redis.xadd(records.world.stream, {"data": json.dumps({"time": old, "path": "/old"})})
    await records.add_bad("{")
    carrier = records.carrier(CHUNK_REQUESTS_RETENTION="7d", CHUNK_REQUESTS_ACCEPT_PAST="1y")
    async with carrier.running():
        await records.wait(lambda: _is(records, rows=7, letters=1))
    await records.world.sql.execute("UPDATE dead_letters SET received_at = now() - interval '31 days'")
    carrier = records.carrier(CHUNK_REQUESTS_RETENTION="7d")
    for server in SERVERS:
        carrier.status.ok(server)
    stop = asyncio.Event()
    loop = asyncio.create_task(carrier.pipelines.retention.run(stop))
    await records.wait(lambda: _is(records, rows=3, letters=0))
    stop.set()
    await loop
    await carrier.database.close()
    await carrier.redis.close()
    await records.assert_exact()


async def _is(records: Records, rows: int, letters: int) -> bool:
    return await records.rows() == rows and len(await records.letters()) == letters
