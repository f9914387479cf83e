"""The client library without a server: what it accepts, what replies prove, what it logs and loads."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from enum import Enum, IntEnum
from threading import Event
from types import SimpleNamespace

import pytest
import redis
import redis.asyncio
from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    ExecAbortError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    ResponseError,
)

import worker
from tests.support.fakes import FakeClock
from worker.contract.ids import check_id
from worker.errors import InvalidView, ViewIndeterminate, ViewNotRecorded
from worker.producer.client import Failures, Outcome, SyncViewProducer, ViewProducer
from worker.producer.transaction import BlockingTransactions, Permits, raise_unless_applied

QUEUED = b"QUEUED"
LOST = redis.ConnectionError("Connection closed by server.")
ABORTED = ExecAbortError("Transaction discarded because of previous errors.")


def server_error(error: type[redis.ConnectionError], code: str) -> redis.ConnectionError:
    """A server error that the Redis library reports as a connection error."""
    return error("text", status_code=code)


def demoted() -> redis.ConnectionError:
    try:
        raise ReadOnlyError("You can't write against a read only replica.")
    except ReadOnlyError:
        try:
            raise redis.ConnectionError("The previous master is now a slave")
        except redis.ConnectionError as error:
            return error


@pytest.mark.parametrize(
    "replies",
    [[b"OK", QUEUED, QUEUED, [4, 0]], [NoPermissionError("no MULTI"), 4, 0, NoPermissionError("no EXEC")]],
    ids=["together", "one by one"],
)
def test_replies_without_an_error_prove_that_everything_was_applied(replies: list[object]) -> None:
    raise_unless_applied(replies, 2)


@pytest.mark.parametrize(
    "replies",
    [
        [b"OK", OutOfMemoryError("OOM"), QUEUED, ABORTED],
        [b"OK", QUEUED, NoPermissionError("no channel"), ABORTED],
        [b"OK", QUEUED, QUEUED, ABORTED],
        [b"OK", server_error(BusyLoadingError, "LOADING")],
        [b"OK", demoted()],
        [server_error(AuthenticationError, "NOAUTH")],
        [NoPermissionError("a")] * 4,
    ],
    ids=["oom", "no channel", "aborted", "loading", "demoted", "no auth", "no rights"],
)
def test_refusal_in_the_queue_proves_that_nothing_was_applied(replies: list[object]) -> None:
    with pytest.raises(ViewNotRecorded):
        raise_unless_applied(replies, 2)


@pytest.mark.parametrize(
    "replies",
    [
        [LOST],
        [b"OK", LOST],
        [b"OK", QUEUED, QUEUED, LOST],
        [b"OK", QUEUED, QUEUED, [ResponseError("WRONGTYPE"), 0]],
        [b"OK", QUEUED, QUEUED, [1]],
        [b"OK", QUEUED, QUEUED, None],
        [NoPermissionError("no MULTI"), 1, NoPermissionError("no PUBLISH"), ResponseError("EXEC without MULTI")],
        [NoPermissionError("no MULTI"), NoPermissionError("no INCRBY"), LOST],
    ],
)
def test_replies_that_prove_nothing_are_indeterminate(replies: list[object]) -> None:
    with pytest.raises(ViewIndeterminate):
        raise_unless_applied(replies, 2)


@pytest.mark.parametrize(
    ("vod_id", "count"),
    [
        ("", 1),
        ("x" * 257, 1),
        ("é" * 129, 1),
        ("a\x00b", 1),
        ("\ud800", 1),
        (True, 1),
        (None, 1),
        (1.5, 1),
        (b"vod_1", 1),
        (10**300, 1),
        pytest.param(10**5000, 1, id="5000 digits"),
        ("vod_1", 0),
        ("vod_1", -1),
        ("vod_1", 10**9 + 1),
        ("vod_1", True),
        ("vod_1", 1.0),
        ("vod_1", "1"),
    ],
)
def test_invalid_view_never_reaches_redis(vod_id: object, count: object) -> None:
    with SyncViewProducer("unix:///nowhere/redis.sock", raise_errors=True) as producer:
        with pytest.raises(InvalidView) as caught:
            producer.record(vod_id, count)  # type: ignore[arg-type]
        assert isinstance(caught.value, ValueError)
    with SyncViewProducer("unix:///nowhere/redis.sock") as producer:
        assert producer.record(vod_id, count) is Outcome.NOT_RECORDED  # type: ignore[arg-type]


@pytest.mark.parametrize("views", [None, ["vod_1"], "vod_1", {"vod_1": 0}])
def test_views_that_are_not_a_mapping_are_not_recorded_and_raise_nothing(views: object) -> None:
    with SyncViewProducer("unix:///nowhere/redis.sock") as producer:
        assert producer.record_many(views) is Outcome.NOT_RECORDED  # type: ignore[arg-type]


async def test_closed_producer_opens_no_connection() -> None:
    blocking = SyncViewProducer("unix:///nowhere/redis.sock", raise_errors=True)
    blocking.close()
    with pytest.raises(ViewNotRecorded, match="closed"):
        blocking.record("vod_1")
    producer = ViewProducer("unix:///nowhere/redis.sock", raise_errors=True)
    await producer.aclose()
    with pytest.raises(ViewNotRecorded, match="closed"):
        await producer.record("vod_1")


class Word(str, Enum):  # noqa: UP042 - str() of such a member is not its value
    VOD = "vod_1"


class Number(IntEnum):
    SEVEN = 7


@pytest.mark.parametrize(
    ("value", "expected"), [("vod_1", "vod_1"), (7, "7"), (Word.VOD, "vod_1"), (Number.SEVEN, "7")]
)
def test_id_is_a_text_or_the_decimal_digits_of_a_number(value: str | int, expected: str) -> None:
    assert check_id(value) == expected


class StuckPool:
    """Blocks until `freed` is set, then fails to connect."""

    def __init__(self) -> None:
        self.asked, self.freed = Event(), Event()

    def get_connection(self) -> None:
        self.asked.set()
        self.freed.wait(30)
        raise redis.ConnectionError("gone")


def test_view_is_not_recorded_if_no_connection_becomes_free_in_time() -> None:
    pool = StuckPool()
    transactions = BlockingTransactions(SimpleNamespace(connection_pool=pool), timeout=0.01, max_connections=1)  # type: ignore[arg-type]
    with ThreadPoolExecutor(1) as other:
        stuck = other.submit(transactions.execute, [("PING",)])
        assert pool.asked.wait(30)
        with pytest.raises(ViewNotRecorded, match="no connection became free"):
            transactions.execute([("PING",)])
        pool.freed.set()
        assert isinstance(stuck.exception(30), ViewNotRecorded)
    with pytest.raises(ViewNotRecorded, match="gone"):
        transactions.execute([("PING",)])


def test_invalid_url_is_reported_without_quoting_it() -> None:
    with pytest.raises(ValueError, match="scheme") as caught:
        SyncViewProducer("nosql://me:hunter2@db")
    assert "hunter2" not in str(caught.value)


def test_client_of_the_other_kind_is_refused() -> None:
    with pytest.raises(TypeError, match=r"redis\.asyncio\.Redis"):
        ViewProducer(redis.Redis())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"redis\.Redis"):
        SyncViewProducer(redis.asyncio.Redis())  # type: ignore[arg-type]


def test_each_kind_of_failure_is_logged_once_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    clock = FakeClock()
    failures = Failures(raise_errors=False, clock=clock)

    def logged_of(error: ViewNotRecorded | ViewIndeterminate) -> list[int]:
        caplog.clear()
        failures.outcome(error)
        return [record.levelno for record in caplog.records]

    assert logged_of(ViewNotRecorded("refused")) == [logging.WARNING]
    assert logged_of(ViewNotRecorded("refused")) == []
    assert logged_of(ViewIndeterminate("silent")) == [logging.WARNING]
    clock.advance(59)
    assert logged_of(ViewNotRecorded("refused")) == []
    clock.advance(1)
    assert logged_of(ViewNotRecorded("refused")) == [logging.WARNING]


def test_import_loads_the_redis_library_and_few_modules_of_the_worker() -> None:
    probe = (
        # Modules that the Redis library itself loads are not checked.
        "import sys, redis.asyncio, redis.asyncio.sentinel; before = set(sys.modules); from worker import ViewProducer;"
        "names = {name.partition('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names);"
        "print(sorted(names), sorted(name for name in sys.modules if name.startswith('worker.')))"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    own = ["contract", "contract.ids", "contract.keys", "contract.message", "contract.urls", "errors", "observability"]
    own += ["observability.throttle", "producer", "producer.client", "producer.transaction", "redis", "redis.address"]
    own += ["redis.connection", "redis.errors", "redis.pool", "redis.sentinel", "runtime", "runtime.clock"]
    assert done.stdout.strip() == f"['worker'] {[f'worker.{name}' for name in own]}"


def test_package_exports_only_what_applications_use() -> None:
    assert {name: getattr(worker, name).__module__ for name in worker.__all__} == {
        "Bar": "worker.pipelines.records.bars_1m",
        "BarStore": "worker.inprocess.bar_store",
        "ChunkEvent": "worker.pipelines.records.chunk_requests",
        "CommitUnanswered": "worker.pipelines.model",
        "EventTracker": "worker.inprocess.session_store",
        "Metric": "worker.pipelines.records.metrics",
        "MetricStore": "worker.inprocess.metric_store",
        "Outcome": "worker.producer.client",
        "SessionManager": "worker.inprocess.session_store",
        "SessionStore": "worker.inprocess.session_store",
        "SyncBarStore": "worker.inprocess.bar_store",
        "SyncMetricStore": "worker.inprocess.metric_store",
        "SyncViewProducer": "worker.producer.client",
        "SyncWriter": "worker.inprocess.sync_writer",
        "ViewProducer": "worker.producer.client",
        "Writer": "worker.inprocess.writer",
        "WriterStats": "worker.inprocess.stats",
    }
    with pytest.raises(AttributeError, match="Producer"):
        _ = worker.Producer


class TaskLimit(Exception):
    """Raised by an application's signal handler at any point of its code."""


class LimitedPool:
    def get_connection(self) -> None:
        raise TaskLimit


def test_exception_of_the_application_passes_through_and_loses_no_connection() -> None:
    transactions = BlockingTransactions(SimpleNamespace(connection_pool=LimitedPool()), 0.01, 1)  # type: ignore[arg-type]
    for _ in range(3):
        with pytest.raises(TaskLimit):
            transactions.execute([("PING",)])


def test_permit_of_an_interrupted_call_is_free_again() -> None:
    permits = Permits(1)
    permit = permits.take(0.01)
    assert permit is not None
    assert permits.take(0.01) is None
    del permit
    again = permits.take(0.01)
    assert again is not None
    again.give_back()
    again.give_back()
    del again
    assert permits.take(0.01) is not None


def test_permits_are_garbage_collected_with_their_producer() -> None:
    permits = Permits(3)
    gone = weakref.ref(permits._free)
    del permits
    assert gone() is None


def test_forked_process_has_all_permits() -> None:
    permits = Permits(1)
    permit = permits.take(0.01)
    child = os.fork()
    if child == 0:
        os._exit(0 if permits.take(0.01) is not None else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert permit is not None
