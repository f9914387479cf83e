"""`viewer-worker dev --servers-only`: a Redis and a Postgres to play with, until Ctrl-C."""

from __future__ import annotations

import asyncio
import fcntl
import signal
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from worker.dev.servers import PostgresServer, Server, ValkeyServer
from worker.errors import ViewerWorkerError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make the folder, and keep it for this process. Raises ViewerWorkerError when another one has it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ViewerWorkerError(f"another `viewer-worker dev` is at work in {folder}") from None
        yield


async def run_servers(folder: Path, say: Callable[[str], None]) -> None:
    """Start both in `folder`, and say how to use them. Raises ViewerWorkerError."""
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    with ExitStack() as stack:
        stack.enter_context(locked(folder))
        servers: tuple[Server, ...] = (ValkeyServer(folder / "redis"), PostgresServer(folder / "postgres"))
        for server in servers:
            server.start()
            stack.callback(server.stop)
        for name, server in zip(("REDIS_URL", "DATABASE_URL"), servers, strict=True):
            say(f"export {name}={server.url}")
        say("# Type these two lines in each terminal. The servers end with Ctrl-C here; their data stay.")
        await stop.wait()
