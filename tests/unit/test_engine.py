"""Backoff, waiting, and the supervisor."""

from __future__ import annotations

import asyncio
import os
import random
import signal

import pytest

from worker.errors import NotDrained
from worker.runtime.backoff import Backoff
from worker.runtime.supervisor import Supervisor
from worker.runtime.waiting import wait_first


def test_backoff_grows_is_capped_and_jittered() -> None:
    backoff = Backoff(first=1, cap=10, rng=random.Random(1))
    delays = [backoff.next() for _ in range(50)]
    for delay, step in zip(delays, [1, 2, 4, 8, *[10] * 46], strict=True):
        assert step / 2 <= delay <= step
    assert len(set(delays[10:])) > 30
    backoff.reset()
    assert backoff.next() <= 1


async def test_wait_first_returns_at_the_first_event() -> None:
    one, two = asyncio.Event(), asyncio.Event()
    asyncio.get_running_loop().call_soon(two.set)
    await asyncio.wait_for(wait_first(60, one, two), 5)
    assert two.is_set()
    await wait_first(0.001, one)
    assert not one.is_set()


class UntilStop:
    async def run(self, stop: asyncio.Event) -> None:
        await stop.wait()


class Fails:
    async def run(self, stop: asyncio.Event) -> None:
        raise ValueError("broken")


class ReturnsEarly:
    async def run(self, stop: asyncio.Event) -> None:
        return


class NeverStops:
    cancelled = False

    async def run(self, stop: asyncio.Event) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled = True
            raise


async def test_stop_ends_all_loops_cleanly() -> None:
    stopped: list[bool] = []
    supervisor = Supervisor(5, on_stop=lambda: stopped.append(True))
    asyncio.get_running_loop().call_soon(supervisor.stop)
    assert await supervisor.run({"a": UntilStop(), "b": UntilStop()})
    assert stopped == [True]


@pytest.mark.parametrize("bad", [Fails(), ReturnsEarly()])
async def test_loop_that_ends_by_itself_stops_the_worker_with_a_failure(bad: Fails | ReturnsEarly) -> None:
    assert not await asyncio.wait_for(Supervisor(5).run({"good": UntilStop(), "bad": bad}), 5)


class LeavesWork:
    async def run(self, stop: asyncio.Event) -> None:
        await stop.wait()
        raise NotDrained("work is left")


async def test_stop_that_leaves_work_is_not_clean() -> None:
    supervisor = Supervisor(5)
    supervisor.stop()
    assert not await supervisor.run({"a": LeavesWork(), "b": UntilStop()})


async def test_loop_that_misses_the_deadline_is_cancelled() -> None:
    supervisor, loop = Supervisor(0.01), NeverStops()
    supervisor.stop()
    assert not await supervisor.run({"never": loop, "good": UntilStop()})
    assert loop.cancelled


async def test_first_signal_stops_the_loops_cleanly() -> None:
    asyncio.get_running_loop().call_later(0.01, os.kill, os.getpid(), signal.SIGTERM)
    assert await Supervisor(5).run({"a": UntilStop()})


class SwallowsTheFirstCancellation:
    async def run(self, stop: asyncio.Event) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            await asyncio.Event().wait()


async def test_supervisor_ends_even_if_a_loop_swallows_its_cancellation() -> None:
    supervisor = Supervisor(0.01)
    supervisor.stop()
    assert not await asyncio.wait_for(supervisor.run({"deaf": SwallowsTheFirstCancellation()}), 5)
