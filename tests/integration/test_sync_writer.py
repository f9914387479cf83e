"""A SyncWriter: any thread sends, a thread of its own writes, and a child of a fork writes what it sent itself."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.proxy import Mode, Proxy
from tests.support.written import WrittenRecords, assert_identity, event, paths_of
from worker import SyncWriter, WriterStats
from worker.inprocess import thread as thread_module

THREADS = 8
EACH = 2000


class Threads:
    """Runs functions in threads, and raises what they raised."""

    def __init__(self) -> None:
        self._threads: list[threading.Thread] = []
        self._errors: list[BaseException] = []

    def start(self, step: Callable[..., Any], *arguments: Any) -> None:
        def run() -> None:
            try:
                step(*arguments)
            except BaseException as error:
                self._errors.append(error)

        self._threads.append(threading.Thread(target=run, daemon=True))
        self._threads[-1].start()

    def join(self) -> None:
        for thread in self._threads:
            thread.join(40)
            assert not thread.is_alive()
        assert self._errors == []


async def in_thread(step: Callable[[], Any]) -> Any:
    """Not on the event loop of the test, which must go on."""
    async with asyncio.timeout(50):
        return await asyncio.to_thread(step)


async def test_records_of_eight_threads_are_rows_once_each(written: WrittenRecords) -> None:
    def run() -> WriterStats:
        threads, done = Threads(), threading.Event()
        with written.sync_writer(batch_size=200, capacity=20_000) as writer:

            def send(first: int) -> None:
                for number in range(first, first + EACH):
                    assert writer.send(event(number))

            def flush() -> None:
                while not done.is_set():
                    assert writer.flush(30)
                    assert_identity(writer.stats)

            senders = Threads()
            threads.start(flush)
            for number in range(THREADS):
                senders.start(send, number * EACH)
            senders.join()
            done.set()
            threads.join()
        return writer.stats

    stats = await in_thread(run)
    assert stats == WriterStats(accepted=THREADS * EACH, written=THREADS * EACH)
    assert await written.paths() == paths_of(range(THREADS * EACH))


async def test_put_of_many_threads_waits_for_room(written: WrittenRecords) -> None:
    def run() -> WriterStats:
        with written.sync_writer(capacity=10) as writer:
            threads = Threads()

            def put(first: int) -> None:
                for number in range(first, first + 50):
                    assert writer.put(event(number), 30)

            for number in range(4):
                threads.start(put, number * 50)
            threads.join()
        return writer.stats

    assert await in_thread(run) == WriterStats(accepted=200, written=200)
    assert await written.paths() == paths_of(range(200))


async def test_put_is_refused_when_there_is_no_room_in_time(written: WrittenRecords) -> None:
    async with written.sql.transaction():
        await written.sql.execute("LOCK TABLE ingest_batches")
        writer = written.sync_writer(capacity=2)
        assert await in_thread(lambda: [writer.put(event(number), 0.01) for number in range(3)]) == [True, True, False]
        assert not await in_thread(lambda: writer.flush(0.01))
    assert await in_thread(writer.shutdown)
    assert writer.stats == WriterStats(accepted=2, refused=1, written=2)


async def test_a_shutdown_does_not_disturb_threads_that_use_the_writer(written: WrittenRecords) -> None:
    def run() -> WriterStats:
        writer = written.sync_writer(capacity=500)
        threads, ended = Threads(), threading.Event()
        sent = threading.Barrier(5)

        def use(step: Callable[[], bool]) -> None:
            assert writer.send(event("first"))
            sent.wait()
            while not ended.is_set():
                step()
            for _ in range(3):
                step()

        threads.start(use, lambda: writer.send(event("sent")))
        threads.start(use, lambda: writer.put(event("put"), 0.01))
        threads.start(use, lambda: writer.flush(0.01))
        threads.start(use, lambda: writer.stats is None)
        sent.wait()
        enders = Threads()
        for _ in range(3):
            enders.start(writer.shutdown)
        enders.join()
        ended.set()
        threads.join()
        assert not writer.send(event("late"))
        assert not writer.put(event("late"), 5)
        assert writer.flush(0)
        assert writer.shutdown()
        return writer.stats

    stats = await in_thread(run)
    assert stats.accepted == stats.written >= 4
    await written.assert_adds_up(stats)


async def test_a_shutdown_while_the_database_is_away_counts_what_is_left(written: WrittenRecords) -> None:
    async with Proxy(written.url) as proxy:
        proxy.mode = Mode.RESET
        writer = written.sync_writer(proxy.url)
        assert await in_thread(lambda: all(writer.send(event(number)) for number in range(15)))
        assert not await in_thread(lambda: writer.shutdown(0.05))
        assert not await in_thread(writer.shutdown)
        assert not await in_thread(lambda: writer.flush(5))
    assert (writer.stats.accepted, writer.stats.queued) == (15, 0)
    assert writer.stats.unwritten + writer.stats.unknown == 15


async def test_a_writer_that_is_not_used_starts_no_thread(written: WrittenRecords) -> None:
    before = threading.active_count()
    with written.sync_writer() as writer:
        assert threading.active_count() == before
    assert writer.stats == WriterStats()
    disabled = written.sync_writer(enabled=False)
    assert disabled.send(event(1))
    assert disabled.put(event(2), 0)
    assert disabled.flush(0)
    assert disabled.shutdown()
    assert threading.active_count() == before


def test_without_a_thread_everything_is_refused_until_there_can_be_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter exits, or the process has too many threads: `send` never raises."""
    writer = SyncWriter.chunk_requests("postgresql://nobody@127.0.0.1:1/none")

    def fail(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", fail)
        assert not writer.send(event(1))
        assert not writer.put(event(2), 5)
        assert writer.flush(5)
    assert writer.stats == WriterStats(refused=2)
    assert writer.send(event(3))
    assert not writer.shutdown(0)


def test_without_an_event_loop_nothing_is_accepted_and_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Any) -> None:
        raise OSError("too many open files")

    monkeypatch.setattr(thread_module, "run_async", fail)
    writer = SyncWriter.chunk_requests("postgresql://nobody@127.0.0.1:1/none")
    writer.flush(5)
    assert not writer.send(event(1))
    assert not writer.put(event(2), 5)
    assert writer.shutdown()
    assert writer.stats == WriterStats(refused=2)


async def test_what_is_left_when_the_interpreter_exits_is_written(written: WrittenRecords) -> None:
    program = "writer = SyncWriter.chunk_requests()\nfor number in range(700): assert writer.send(event(number))"
    assert await written.run(program) == ("", "")
    assert await written.paths() == paths_of(range(700))


async def test_what_is_sent_by_an_exit_handler_is_written_or_refused(written: WrittenRecords) -> None:
    program = """
import atexit
writer = SyncWriter.chunk_requests()
atexit.register(lambda: print(writer.send(event("last")), writer.flush(10)))
"""
    out, err = await written.run(program)
    assert err == "" or "no thread" in err
    assert await written.paths() == (["/last"] if out == "True True\n" else [])


# `report` prints what is accepted, written, and left.
FORK = """
def report(writer):
    stats = writer.stats
    line = json.dumps([stats.accepted, stats.written, stats.queued + stats.unwritten + stats.unknown])
    os.write(1, f"{line}\\n".encode())  # whole, unlike that of `print`

def send(writer, *numbers):
    for number in numbers:
        assert writer.send(event(number))

writer = SyncWriter.chunk_requests(batch_size=10, batch_timeout=float(sys.argv[1]))
"""
# name → what happens before the fork; the records that are written for it.
BEFORE = {
    "started": ("send(writer, 'before'); assert writer.flush(10)", ["before"]),
    "records wait": ("send(writer, *range(25))", range(25)),
    "in the middle of it": (
        "threading.Thread(target=lambda: [writer.send(event(number)) for number in range(3000)]).start()",
        range(3000),
    ),
}


@pytest.mark.parametrize("before", BEFORE)
async def test_parent_and_child_of_a_fork_each_write_what_they_sent_once(written: WrittenRecords, before: str) -> None:
    steps, numbers = BEFORE[before]
    program = f"""{FORK}
{steps}
children = []
for child in range(2):
    if not (pid := os.fork()):
        send(writer, *(f"child {{child}} {{number}}" for number in range(15)))
        assert writer.shutdown(20)
        report(writer)
        sys.exit()
    children.append(pid)
send(writer, *(f"parent {{number}}" for number in range(15)))
for pid in children:
    assert os.waitpid(pid, 0)[1] == 0
assert writer.flush(20)
for thread in threading.enumerate():
    if thread is not threading.current_thread() and not thread.daemon: thread.join()
assert writer.shutdown(20)
report(writer)
"""
    out, err = await written.run(program, "0.05" if before == "started" else "30")
    assert err == ""
    *children, parent = [json.loads(line) for line in out.splitlines()]
    assert children == [[15, 15, 0]] * 2
    assert parent == [15 + len(numbers), 15 + len(numbers), 0]
    own = [f"{who} {number}" for who in ("parent", "child 0", "child 1") for number in range(15)]
    assert await written.paths() == paths_of([*numbers, *own])


async def test_a_child_that_ends_without_a_shutdown_writes_what_is_left(written: WrittenRecords) -> None:
    """It has the settings of its parent, even if the environment changed."""
    program = f"""{FORK}
send(writer, 'parent')
os.environ["CHUNKLOG_WORKERS"] = "none"
if not os.fork(): send(writer, 'child')
else: os.wait()
"""
    assert await written.run(program, "30") == ("", "")
    assert await written.paths() == ["/child", "/parent"]


async def test_a_writer_that_was_shut_down_before_a_fork_is_so_in_the_child(written: WrittenRecords) -> None:
    program = f"""{FORK}
send(writer, 'before')
writer.shutdown()
if not os.fork():
    print(writer.send(event("lost")), writer.put(event("lost"), 5), writer.shutdown(), writer.stats.refused, flush=True)
else:
    os.wait()
"""
    out, err = await written.run(program, "30")
    assert out == "False False True 2\n"
    assert "shut down" in err
    assert await written.paths() == ["/before"]


# An asynchronous Writer, forked by its own event loop.
ASYNC_FORK = """
async def use(writer):
    writer.send(event("child"))
    return await writer.put(event("child"), 5), await writer.flush(5), await writer.shutdown(5), writer.stats.refused

async def main():
    async with Writer.chunk_requests(batch_size=10) as writer:
        for number in range(25): assert writer.send(event(number))
        if not (pid := os.fork()):
            raise SystemExit(child(writer))
        os.waitpid(pid, 0)

def child(writer):
    found = []
    thread = threading.Thread(target=lambda: found.append(asyncio.run(use(writer))))
    thread.start()
    thread.join()
    print(found, flush=True)
    os._exit(0)

asyncio.run(main())
"""


async def test_a_writer_that_runs_is_closed_in_the_child_of_a_fork(written: WrittenRecords) -> None:
    out, err = await written.run(ASYNC_FORK)
    assert out == "[(False, True, True, 2)]\n"
    assert "shut down" in err
    assert await written.paths() == paths_of(range(25))


async def test_a_writer_that_was_not_started_may_be_started_in_each_child(written: WrittenRecords) -> None:
    """As a server does that imports the application, forks, and starts an event loop in each worker."""
    program = """
writer = Writer.chunk_requests()
assert writer.send(event("before"))
async def main(name):
    async with writer:
        assert writer.send(event(name))
    assert writer.stats.accepted == writer.stats.written == (2 if name == "parent" else 1)
if not os.fork():
    asyncio.run(main("child"))
else:
    assert os.wait()[1] == 0
    asyncio.run(main("parent"))
"""
    assert await written.run(program) == ("", "")
    assert await written.paths() == ["/before", "/child", "/parent"]


async def test_a_process_of_multiprocessing_writes_what_it_sent(written: WrittenRecords) -> None:
    program = f"""{FORK}
import multiprocessing
def work(name):
    send(writer, name)
    assert writer.shutdown(20)
if __name__ == "__main__":
    send(writer, "parent")
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work, args=(f"child {{number}}",)) for number in range(2)]
    for process in processes: process.start()
    for process in processes: process.join(); assert process.exitcode == 0
"""
    assert await written.run(program, "30") == ("", "")
    assert await written.paths() == ["/child 0", "/child 1", "/parent"]


def test_threads_that_gevent_replaces_are_refused_when_a_writer_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread was a part of gevent's loop, and blocked it for ever at the first `send`."""
    monkeypatch.setitem(
        sys.modules, "gevent.monkey", SimpleNamespace(is_module_patched=lambda name: name == "threading")
    )
    with pytest.raises(RuntimeError, match="gevent"):
        SyncWriter.chunk_requests("postgresql://nobody@127.0.0.1:1/none")
