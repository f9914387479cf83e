"""Waits for the first of several events."""

from __future__ import annotations

import asyncio


async def wait_first(timeout: float, *events: asyncio.Event) -> None:
    """Return when any of the events is set, or after `timeout` seconds."""
    waiters = [asyncio.create_task(event.wait()) for event in events]
    try:
        await asyncio.wait(waiters, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for waiter in waiters:
            waiter.cancel()
