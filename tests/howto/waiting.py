"""Waiting for what another process does."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable


async def until(ask: Callable[[], Awaitable[object]], expected: object, timeout: float = 60.0) -> None:
    """Wait until the answer is as expected. Raises TimeoutError after `timeout` seconds."""
    async with asyncio.timeout(timeout):
        while await ask() != expected:
            await asyncio.sleep(0.02)
