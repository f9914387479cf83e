"""Waits for the first of several events, or for work that a stop ends."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Coroutine


async def wait_first(timeout: float, *events: asyncio.Event) -> None:
    """Return when any of the events is set, or after `timeout` seconds."""
    waiters = [asyncio.create_task(event.wait()) for event in events]
    try:
        await asyncio.wait(waiters, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for waiter in waiters:
            waiter.cancel()


async def run_until(stop: asyncio.Event, work: Coroutine[Any, Any, None], name: str) -> None:
    """Return when `work`, a task of that name, has ended or is cancelled by `stop`. Its errors are not raised."""
    working = asyncio.create_task(work, name=name)
    stopping = asyncio.create_task(stop.wait(), name=f"{name} stop")
    try:
        await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (working, stopping):
            task.cancel()
        await asyncio.wait({working, stopping})
