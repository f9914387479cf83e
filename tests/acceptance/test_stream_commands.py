"""Streams as users run them: kills at every point, a real access log, the commands."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from datetime import UTC, datetime
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from tests.support.records import Records, make_document
from tests.support.tools import missing
from worker.pipelines.records import RECORD_TYPES
from worker.producer.access_log import MalformedLine, Request, read_access_log

CRASH = Path(__file__).with_name("crash.py")
ROOT = Path(__file__).parents[2]
POINTS = [
    "before the claim",
    "after the claim",
    "before the COMMIT of a batch",
    "after the COMMIT of a batch",
    "before the mirror",
    "after the mirror",
]


@pytest.mark.parametrize("point", POINTS)
async def test_worker_killed_while_it_carries_writes_each_entry_once(records: Records, point: str) -> None:
    for _ in range(3):
        await records.add(20)
        await records.add_bad("{")
        crashed = records.start(point, "run", script=CRASH, CHUNKLOG_BATCH_SIZE="7", PIPELINES="chunk_requests")
        assert await crashed.wait() == -signal.SIGKILL, crashed.log
        await records.world.sql.execute("UPDATE stream_positions SET lease_until = now()")
    records.start()
    await records.carried(letters=3)
    await asyncio.sleep(0.3)
    await records.assert_exact(letters=3)


@pytest.fixture
def access_log() -> Path:
    log = Path(os.environ.get("ACCESS_LOG") or ROOT.parent / "shared" / "data" / "access.log")
    if not log.exists():
        missing(f"no access log at {log}; ACCESS_LOG names one")
    return log


async def test_a_real_access_log_equals_a_straight_parse_field_by_field(records: Records, access_log: Path) -> None:
    with access_log.open("rb") as stream:
        lines = stream.read().splitlines()
    with access_log.open("rb") as stream:
        parsed = list(read_access_log(stream))
    pipeline = records.world.redis.pipeline(transaction=False)
    expected: list[tuple[Any, ...]] = []
    for raw, line in zip(lines, parsed, strict=True):
        if isinstance(line, MalformedLine):
            pipeline.xadd(records.world.stream, {"data": raw})
        else:
            pipeline.xadd(records.world.stream, {"data": json.dumps(fields_of(line))})
            expected.append((line.time, line.path, ip_address(str(line.ip)), line.referer, line.user_agent))
    await pipeline.execute()
    records.start(PIPELINES="chunk_requests")

    async def all_carried() -> bool:
        return await records.rows() + len(await records.letters()) >= len(lines)

    await records.wait(all_carried, timeout=60)
    rows = await records.world.sql.fetch("SELECT time, path, ip, referer, user_agent FROM chunk_requests")
    assert len(rows) == 9999
    assert sorted(map(repr, map(tuple, rows))) == sorted(map(repr, map(as_stored, expected)))
    (letter,) = await records.letters()
    assert letter["payload"] == lines[8898]


def fields_of(line: Request) -> dict[str, Any]:
    return {
        "time": line.time.isoformat(),
        "path": line.path,
        "ip": line.ip or "-",
        "referer": line.referer,
        "user_agent": line.user_agent,
    }


def as_stored(row: tuple[Any, ...]) -> tuple[Any, ...]:
    time: datetime = row[0]
    return (time.astimezone(UTC), *row[1:])


async def test_streams_command_shows_and_sets_positions(records: Records) -> None:
    await records.add(5)
    worker = records.start()
    await records.carried()
    shown = await run(records, "streams", "--json")
    (state,) = [each for each in json.loads(shown) if each["pipeline"] == "chunk_requests"]
    assert (state["stream"], state["waiting"], state["lost"], state["problem"]) == (records.world.stream, 0, 0, "")
    refused = records.start("streams", "--set", records.world.stream, "0")
    assert await refused.wait() == 1
    assert b"5 entries between" in refused.process.stdout.read()  # type: ignore[union-attr]
    await records.assert_exact()

    worker.terminate()
    assert await worker.wait() == 0
    await records.add(3)
    await run(records, "streams", "--set", records.world.stream, "$", "--yes")
    del records.paths[5:]
    await records.add(2)
    records.start()
    await records.carried()
    # Carried again from the beginning: without event ids, each entry is a second row.
    await run(records, "streams", "--set", records.world.stream, "0", "--yes")
    records.paths = [f"/{number}" for number in range(10)] + records.paths
    await records.carried()


async def test_set_continues_where_another_group_is_before_the_first_start(records: Records) -> None:
    redis, stream = records.world.redis, records.world.stream
    await records.add(4)
    await redis.xgroup_create(stream, "old reader", "0")
    await redis.xreadgroup("old reader", "me", {stream: ">"}, count=3)
    await run(records, "streams", "--set", stream, "group:old reader", "--yes")
    records.paths = ["/3"]
    records.start()
    await records.carried()
    for given, target, cause in (
        (stream, "group:nobody", "the stream has no group nobody"),
        (stream, "first", "expected the id of an entry"),
        ("nothing", "0", "no pipeline reads the stream nothing"),
    ):
        failed = records.start("streams", "--set", given, target, "--yes")
        assert await failed.wait() == 1
        assert f"viewer-worker: --set: {cause}" in failed.log


async def test_dead_letters_are_listed_replayed_and_purged(records: Records) -> None:
    await records.world.sql.execute("ALTER TABLE chunk_requests ADD CHECK (path <> '/1')")
    await records.add(3)
    records.paths.remove("/1")
    await records.add_bad("{")
    worker = records.start()
    await records.carried(letters=2)
    listed = await run(records, "dead-letters", "list")
    assert "chunk_requests not_json" in listed
    assert "chunk_requests refused" in listed
    listing = json.loads(await run(records, "dead-letters", "list", "--json"))
    invalid, refused = sorted(listing, key=lambda letter: letter["error_class"])
    assert refused["payload"] == make_document(1)
    assert "23514" in await run(records, "dead-letters", "show", str(refused["id"]))

    still = records.start("dead-letters", "replay")
    assert await still.wait() == 1
    await records.assert_exact(letters=2)
    await records.world.sql.execute("ALTER TABLE chunk_requests DROP CONSTRAINT chunk_requests_path_check")
    replays = [records.start("dead-letters", "replay", "--class", "refused") for _ in range(2)]
    for replay in replays:
        await replay.wait()
    records.paths.append("/1")
    await records.assert_exact(letters=1)

    assert "1 letter would be deleted" in await run(records, "dead-letters", "purge", "--pipeline", "chunk_requests")
    await records.assert_exact(letters=1)
    assert "0 letters would" in await run(records, "dead-letters", "purge", "--older-than", "1h")
    assert "1 letter deleted" in await run(records, "dead-letters", "purge", str(invalid["id"]), "--yes")
    await records.assert_exact()
    worker.terminate()
    assert await worker.wait() == 0


async def test_letter_of_an_impossible_id_is_not_there(records: Records) -> None:
    for letter_id in ("7", str(2**63), str(10**30)):
        failed = records.start("dead-letters", "show", letter_id)
        assert await failed.wait() == 1
        assert failed.log == f"viewer-worker: there is no letter {letter_id}\n"
    assert "0 letters would" in await run(records, "dead-letters", "purge", str(2**63))


async def test_letters_of_a_pipeline_of_another_version_are_listed_and_purged_but_not_replayed(
    records: Records,
) -> None:
    await records.world.sql.execute(
        "INSERT INTO dead_letters (pipeline, origin, error_class, error, payload) VALUES ('old', 's/1-0', 'x', 'x', '')"
    )
    only = ("--pipeline", "old")
    assert "1  old x" in await run(records, "dead-letters", "list", *only)
    refused = records.start("dead-letters", "replay", *only)
    assert await refused.wait() == 2
    assert "chunk_requests" in refused.log
    assert "1 letter deleted" in await run(records, "dead-letters", "purge", *only, "--yes")
    for command in ("list", "purge"):
        done = records.start("dead-letters", command, *only)
        assert await done.wait() == 0
        assert done.log == f"this version has no pipeline old; it has {', '.join(RECORD_TYPES)}\n"


async def test_replay_that_the_table_ends_prints_what_was_done_and_the_cause(records: Records) -> None:
    document = make_document(0, path="/refused")
    await records.world.sql.execute("ALTER TABLE chunk_requests ADD CHECK (path <> '/refused')")
    await records.world.sql.execute(
        "INSERT INTO dead_letters (pipeline, origin, error_class, error, payload)"
        " SELECT 'chunk_requests', 's/1795773600000-' || n, 'refused', 'x', $1 FROM generate_series(1, 1500) n",
        document.encode(),
    )
    ended = records.start("dead-letters", "replay")
    assert await ended.wait() == 1
    assert ended.process.stdout is not None
    assert ended.process.stdout.read().decode() == "0 rows written, 1,000 refused again, 0 not valid\n"
    assert "the table refuses every record" in ended.log
    assert "replay again" in ended.log
    assert "Traceback" not in ended.log
    await records.assert_exact(letters=1500)


async def run(records: Records, *arguments: str) -> str:
    done = records.start(*arguments)
    assert await done.wait() == 0, done.log
    assert done.process.stdout is not None
    return done.process.stdout.read().decode()
