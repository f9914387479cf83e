"""The parts of the counters that need no server."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID, uuid4

import pytest
from fakeredis import FakeAsyncRedis
from hypothesis import given
from hypothesis import strategies as st

from tests.support.fakes import FakeClock
from worker.contract.ids import MAX_ID_BYTES, InvalidId, check_id, fitting_id
from worker.contract.keys import MAX_COUNT, Keys, parse_count
from worker.counters.flush.batch_size import BatchSize
from worker.counters.flush.marker import Marker
from worker.counters.flush.recovery import Agreed, Behind, Hold, Missing, judge
from worker.counters.intake.pending import SWEEP_SHARE, Pending, Sweep
from worker.counters.intake.quarantine import REMEMBERED_KEYS, REPORTED_KEYS, REST_S, Quarantine, printable
from worker.db.counters.source_row import Source
from worker.redis.address import RedisAddress
from worker.redis.client import RedisClient

KEYS = Keys(b"vod:views:")


def test_marker_key_follows_from_the_prefix() -> None:
    assert KEYS.marker == b"viewer-worker:settled:vod:views:"
    assert not KEYS.marker.startswith(KEYS.prefix)


@given(st.text(min_size=1).filter(lambda text: "\x00" not in text and len(text.encode()) <= 256))
def test_every_valid_id_survives_the_way_into_a_key_and_back(vod_id: str) -> None:
    assert KEYS.vod_id(KEYS.counter(vod_id)) == vod_id


@pytest.mark.parametrize("raw", [b"", b"\x00", b"a\x00b", b"\xff", b"\xed\xa0\x80", b"x" * 257])
def test_ids_that_postgres_cannot_hold_are_refused(raw: bytes) -> None:
    with pytest.raises(InvalidId):
        KEYS.vod_id(KEYS.prefix + raw)


def test_text_that_fits_is_its_own_id() -> None:
    assert fitting_id("/watch/é") == "/watch/é"
    assert fitting_id("é" * 128) == "é" * 128


@pytest.mark.parametrize("text", ["x" * 257, "é" * 200, "x" + "é" * 200, "€" * 100])
def test_text_that_is_too_long_becomes_an_id_that_only_it_has(text: str) -> None:
    vod_id = fitting_id(text)
    assert check_id(vod_id) == vod_id
    assert MAX_ID_BYTES - 4 < len(vod_id.encode()) <= MAX_ID_BYTES
    beginning, _, digest = vod_id.rpartition("~")
    assert text.startswith(beginning)
    assert len(digest) == 32
    assert fitting_id(text + "!") != vod_id == fitting_id(text)


@given(st.integers(0, MAX_COUNT))
def test_counts_are_read_as_redis_writes_them(count: int) -> None:
    assert parse_count(str(count).encode()) == count


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"abc",
        b"12.5",
        b"+5",
        b" 12",
        b"12 ",
        b"12\n",
        b"-1",
        b"007",
        b"00",
        b"1e3",
        b"\xd9\xa1",
        b"9223372036854775808",
    ],
)
def test_values_that_are_no_count(value: bytes) -> None:
    assert parse_count(value) is None


@given(st.uuids(), st.integers(0, MAX_COUNT), st.uuids())
def test_marker_is_read_as_it_is_written(lineage: UUID, flush_id: int, nonce: UUID) -> None:
    marker = Marker(lineage, flush_id, nonce)
    assert Marker.parse(marker.encode()) == marker


@given(st.binary())
def test_anything_else_is_no_marker(raw: bytes) -> None:
    marker = Marker.parse(raw)
    assert marker is None or marker.encode() == raw


@pytest.mark.parametrize(
    "text",
    ["{u}:1", "{u}:-1:{u}", "{u}:01:{u}", "{u}:1:{u} ", "{u}:1:{u}:", "{u}:x:{u}", "x:1:{u}", "{U}:1:{u}", "{u}:²:{u}"],
)
def test_near_misses_are_no_marker(text: str) -> None:
    assert Marker.parse(text.format(u=uuid4(), U=str(uuid4()).upper().replace("0", "A")).encode()) is None


LINEAGE, NONCE, OTHER = UUID(int=1), UUID(int=2), UUID(int=3)


def source(last: int = 7, **changes: Any) -> Source:
    values: dict[str, Any] = {
        "lineage": LINEAGE,
        "last_flush_id": last,
        "last_nonce": NONCE,
        "settled_id": last - 1,
        "identity": "r",
        "refused": None,
        "announced_nonce": None,
        "lease_holder": "me",
        "lease_epoch": 1,
    }
    return Source(**values | changes)


@pytest.mark.parametrize(
    ("raw", "state", "verdict"),
    [
        (None, source(0, lineage=None, last_nonce=None), Missing),
        (None, source(0), Missing),
        (None, source(0, refused="someone else's marker"), Hold),
        (None, source(7), Missing),
        (None, source(7, refused="someone else's marker"), Hold),
        (b"garbage", source(), Hold),
        (b"", source(), Hold),
        (Marker(LINEAGE, 7, NONCE).encode(), source(), Agreed),
        (Marker(LINEAGE, 7, OTHER).encode(), source(), Hold),
        (Marker(LINEAGE, 6, OTHER).encode(), source(), Behind),
        (Marker(LINEAGE, 0, OTHER).encode(), source(), Behind),
        (Marker(LINEAGE, 8, NONCE).encode(), source(), Hold),
        (Marker(OTHER, 7, NONCE).encode(), source(), Hold),
        (Marker(OTHER, 0, NONCE).encode(), source(0, lineage=None, last_nonce=None), Hold),
    ],
)
def test_marker_table(raw: bytes | None, state: Source, verdict: type) -> None:
    assert isinstance(judge(raw, state), verdict)


def test_pending_gives_the_oldest_first_and_sorted() -> None:
    clock = FakeClock()
    pending = Pending(clock)
    pending.add(["z", "y"])
    clock.advance(5)
    pending.add(["a", "z"])
    assert pending.oldest(2) == ["y", "z"]
    assert pending.oldest(9) == ["a", "y", "z"]
    assert pending.oldest_seconds() == 5
    pending.remove(["y", "z", "never there"])
    assert pending.oldest_seconds() == 0
    assert len(pending) == 1


class SlowRedis:
    """SCAN over `pages` pages, a second each."""

    def __init__(self, clock: FakeClock, pages: int) -> None:
        self._clock = clock
        self._pages = pages

    async def scan(self, _: bytes) -> AsyncIterator[list[bytes]]:
        for number in range(self._pages):
            self._clock.advance(1)
            yield [b"vod:views:%d" % number]


async def test_sweep_scans_at_most_its_share_of_the_time() -> None:
    clock = FakeClock()
    sweep = Sweep(SlowRedis(clock, pages=3), KEYS, clock)  # type: ignore[arg-type]
    assert sweep.is_due
    began = clock.monotonic()
    async for _ in sweep.pages():
        clock.advance(10)  # time that flushing takes is not time spent scanning
    assert not sweep.is_due
    clock.advance(began + 3 / SWEEP_SHARE - clock.monotonic() - 0.1)
    assert not sweep.is_due
    clock.advance(0.2)
    assert sweep.is_due


async def test_sweep_is_due_after_a_request_and_stays_due_when_it_breaks_off() -> None:
    clock = FakeClock()
    sweep = Sweep(SlowRedis(clock, pages=3), KEYS, clock)  # type: ignore[arg-type]
    async for _ in sweep.pages():
        break
    assert sweep.is_due
    async for _ in sweep.pages():
        pass
    assert not sweep.is_due
    sweep.request()
    assert sweep.is_due


async def test_sweep_finds_every_counter_and_nothing_else() -> None:
    redis = RedisClient(RedisAddress(hosts=(("unused", 1),)))
    redis._redis = FakeAsyncRedis()
    expected = {b"vod:views:%d" % number for number in range(2500)}
    await redis._redis.mset(dict.fromkeys(expected, 1))
    await redis._redis.set("vod:views", 1)
    await redis._redis.set(KEYS.marker, 1)
    found: set[bytes] = set()
    async for page in Sweep(redis, KEYS, FakeClock()).pages():
        found.update(page)
    assert found == expected
    await redis.close()


def test_quarantine_lists_a_hundred_keys_and_forgets_those_that_were_mended() -> None:
    quarantine = Quarantine(FakeClock())
    for number in range(150):
        quarantine.report(b"key%d" % number, "bad")
    assert len(quarantine) == 150
    assert len(quarantine.listed()) == REPORTED_KEYS
    quarantine.next_sweep()
    quarantine.report(b"key7", "bad")
    quarantine.next_sweep()
    assert quarantine.listed() == {"key7": "bad"}


def test_quarantine_logs_a_key_once_an_hour(monkeypatch: pytest.MonkeyPatch) -> None:
    from worker.counters.intake import quarantine as module

    logged: list[str] = []
    monkeypatch.setattr(module.log, "warning", lambda event, **_: logged.append(event), raising=False)
    clock = FakeClock()
    quarantine = Quarantine(clock)
    for _ in range(3):
        quarantine.report(b"key", "bad")
        quarantine.next_sweep()
    assert len(logged) == 1
    clock.advance(3601)
    quarantine.report(b"key", "bad")
    assert len(logged) == 2


@given(st.binary(max_size=400))
def test_printable_is_short_and_harmless(key: bytes) -> None:
    shown = printable(key)
    assert len(shown) <= 64
    assert shown.isascii()
    assert shown.isprintable()


def test_batches_grow_under_backlog_shrink_when_slow_and_go_back() -> None:
    size = BatchSize(100, 1000)
    grown = []
    for _ in range(5):
        size.flushed(0.01, left=100_000)
        grown.append(size.keys)
    assert grown == [200, 400, 800, 1000, 1000]
    size.flushed(3.0, left=100_000)
    assert size.keys == 500
    size.flushed(1.0, left=100_000)
    assert size.keys == 500
    size.flushed(0.01, left=50)
    assert size.keys == 100
    size.flushed(9.0, left=100_000)
    assert size.keys == 100
    size.flushed(0.01, left=100_000)
    size.failed()
    assert size.keys == 100


def test_quarantine_is_bounded() -> None:
    quarantine = Quarantine(FakeClock())
    for number in range(REMEMBERED_KEYS + 500):
        quarantine.report(b"%d" % number, "bad")
    assert len(quarantine) == REMEMBERED_KEYS + 500
    quarantine.next_sweep()
    quarantine.next_sweep()
    assert len(quarantine) == 0


def test_keys_that_rest_are_bounded_and_the_newest_are_among_them() -> None:
    quarantine = Quarantine(clock := FakeClock())
    for number in range(REMEMBERED_KEYS + 1):
        quarantine.report(b"%d" % number, "bad", rest=True)
    assert quarantine.is_resting(b"%d" % REMEMBERED_KEYS)
    assert not quarantine.is_resting(b"0")
    clock.advance(REST_S)
    assert not quarantine.is_resting(b"%d" % REMEMBERED_KEYS)
