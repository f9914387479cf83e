"""Session events from a Redis stream: the newest by its arrival is in the table, whatever its producer's clock says."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator

import pytest

from tests.support.sessions import SessionStream
from tests.support.world import World

YEAR_MS = 365 * 86_400_000
# What producers whose clocks are wrong, or that have none, write in `ts`.
CLOCKS = [0, -1, 1, 4 * 10**12, "1970-01-01T00:00:00Z", "2099-01-01T00:00:00Z", "yesterday", 1.5, None, [], {"a": 1}]
REFUSED = "ALTER TABLE session_events ADD CONSTRAINT refused CHECK (last_event_id NOT LIKE 'refused%')"
ALLOWED = "ALTER TABLE session_events DROP CONSTRAINT refused"


@pytest.fixture
async def sessions(world: World) -> AsyncIterator[SessionStream]:
    made = SessionStream(world)
    yield made
    made.close()
    await world.redis.delete(made.name)


async def test_the_newest_entry_is_stored_whatever_the_clocks_of_the_producers_say(sessions: SessionStream) -> None:
    rng = random.Random(4)
    for number in range(600):
        await sessions.add(f"s{rng.randrange(30)}", f"e{number}", ts=rng.choice(CLOCKS))
    sessions.start(SESSION_BATCH_SIZE="7")
    await sessions.carried()
    assert await sessions.stored() == sessions.newest
    assert await sessions.letters() == []


async def test_the_newest_entries_are_stored_through_kills_of_two_replicas(sessions: SessionStream) -> None:
    """One of them is killed every half second, while a producer adds events."""
    rng = random.Random(12)
    replicas = [sessions.start(SESSION_BATCH_SIZE="20") for _ in range(2)]
    done = asyncio.Event()

    async def produce() -> None:
        while not done.is_set():
            for _ in range(20):
                await sessions.add(f"s{rng.randrange(50)}", f"e{sessions.count}", ts=rng.choice(CLOCKS))
            await asyncio.sleep(0.01)

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(produce())
        for _ in range(8):
            await asyncio.sleep(0.5)
            victim = rng.randrange(2)
            replicas[victim].kill()
            replicas[victim] = sessions.start(SESSION_BATCH_SIZE="20")
        done.set()
    await sessions.carried()
    assert await sessions.stored() == sessions.newest
    assert sessions.count > 1000
    assert await sessions.letters() == []


@pytest.mark.parametrize("batch_size", ["1", "50"])
async def test_ids_of_entries_are_compared_as_numbers(sessions: SessionStream, batch_size: str) -> None:
    """As text, 1700-10 is less than 1700-9."""
    for entry_id in ("1700-9", "1700-10"):
        await sessions.add("s", f"of {entry_id}", entry_id)
    await sessions.add("other", "of 1701-0", "1701-0")
    sessions.start(SESSION_BATCH_SIZE=batch_size)
    await sessions.carried()
    assert await sessions.stored() == {"s": "of 1700-10", "other": "of 1701-0"}


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]], ids=["without --overwrite", "with --overwrite"])
async def test_replay_of_an_old_event_never_replaces_a_newer_one(sessions: SessionStream, overwrite: list[str]) -> None:
    await sessions.world.sql.execute(REFUSED)
    await sessions.add("newer comes", "refused 1")
    await sessions.add("nothing comes", "refused 2")
    worker = sessions.start()
    await sessions.carried()
    await sessions.add("newer comes", "newest")
    await sessions.carried()
    assert len(await sessions.letters()) == 2
    worker.kill()
    await sessions.world.sql.execute(ALLOWED)
    replay = sessions.start("dead-letters", "replay", *overwrite)
    assert await replay.wait() == 0, replay.log
    assert await sessions.stored() == {"newer comes": "newest", "nothing comes": "refused 2"}
    assert await sessions.letters() == []


async def test_an_event_that_was_replayed_is_replaced_by_the_next_one(sessions: SessionStream) -> None:
    """It has the position of its entry, not that of the replay."""
    await sessions.world.sql.execute(REFUSED)
    await sessions.add("s", "refused")
    sessions.start()
    await sessions.carried()
    await sessions.world.sql.execute(ALLOWED)
    replay = sessions.start("dead-letters", "replay")
    assert await replay.wait() == 0, replay.log
    assert await sessions.stored() == {"s": "refused"}
    await sessions.add("s", "next")
    await sessions.carried()
    assert await sessions.stored() == {"s": "next"}


BAD = [
    {"session_id": "", "event_id": "e"},
    {"session_id": "s", "event_id": ""},
    {"session_id": "x" * 257, "event_id": "e"},
    {"session_id": "s", "event_id": "ü" * 129},
    {"session_id": "s", "event_id": "a\x00b"},
    {"session_id": "a\x00b", "event_id": "e"},
    {"session_id": 5, "event_id": "e"},
    {"session_id": "s", "event_id": 5},
    {"session_id": "s", "event_id": None},
    {"session_id": "s"},
    {"event_id": "e"},
    {},
]


async def test_bad_documents_are_letters_and_replace_nothing(sessions: SessionStream) -> None:
    await sessions.add("s", "good")
    await sessions.add("x" * 256, "ü" * 128)
    payloads = [json.dumps(document).encode() for document in BAD]
    payloads += [b"", b"{", b'"s"', b'{"session_id":"\xff","event_id":"e"}', b'{"session_id":"\\ud800","event_id":"e"}']
    for payload in payloads:
        await sessions.add_document(payload)
    sessions.start()
    await sessions.carried()
    assert await sessions.stored() == sessions.newest
    letters = await sessions.letters()
    assert [letter["payload"] for letter in letters] == payloads
    classes = [letter["error_class"] for letter in letters]
    assert classes == ["invalid_field"] * len(BAD) + ["not_json", "not_json", "invalid_field", "not_utf8", "not_json"]


async def test_an_id_beyond_the_calendar_is_a_letter(sessions: SessionStream) -> None:
    await sessions.add("s", "good")
    far = await sessions.add_document(b'{"session_id":"s","event_id":"far"}', f"{10**18}-0")
    sessions.start()
    await sessions.carried()
    assert await sessions.stored() == {"s": "good"}
    (letter,) = await sessions.letters()
    assert (letter["origin"], letter["error_class"]) == (f"{sessions.name}/{far}", "time_out_of_range")


async def test_an_id_a_year_ahead_is_replaced_by_an_event_with_a_true_one(sessions: SessionStream) -> None:
    """As where the clock of Redis jumped. Of one stream the ids only grow: the true one comes from an application."""
    now = int(await sessions.world.sql.fetchval("SELECT extract(epoch FROM now()) * 1000"))
    await sessions.add("s", "jumped", f"{now + YEAR_MS}-0")
    sessions.start()
    await sessions.carried()
    assert await sessions.stored() == {"s": "jumped"}
    from worker import SessionStore

    async with SessionStore(sessions.world.database_url) as store:
        assert store.offer("s", "true")
    assert await sessions.stored() == {"s": "true"}


async def test_of_many_events_of_a_session_in_a_batch_a_refused_one_costs_no_other(sessions: SessionStream) -> None:
    """Where it is the newest, the one before it stays; where a newer one replaces it, it is never tried."""
    await sessions.world.sql.execute(REFUSED)
    for number in range(10):
        for session in ("last is refused", "one between is refused", "none is refused"):
            await sessions.add(session, f"e{number}")
        if number == 4:
            await sessions.add("one between is refused", "refused between")
    await sessions.add("last is refused", "refused at last")
    sessions.start(SESSION_FLUSH_INTERVAL="100ms")
    await sessions.carried()
    assert await sessions.stored() == dict.fromkeys(
        ("last is refused", "one between is refused", "none is refused"), "e9"
    )
    letters = [json.loads(letter["payload"])["event_id"] for letter in await sessions.letters()]
    assert "refused at last" in letters
    assert set(letters) <= {"refused at last", "refused between"}
