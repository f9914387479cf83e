"""`viewer-worker dev --servers-only`: runs a Redis and a Postgres until Ctrl-C."""

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
    """Create the folder and lock it. Raises ViewerWorkerError when another process has locked it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ViewerWorkerError(f"another `viewer-worker dev` is running in {folder}") from None
        yield


async def run_servers(folder: Path, print_line: Callable[[str], None]) -> None:
    """Start both servers in `folder`, print how to use them, and wait for Ctrl-C. Raises ViewerWorkerError."""
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
            print_line(f"export {name}={server.url}")
        print_line("# Run these two lines in each terminal. Ctrl-C here stops the servers; their data is kept.")
        await stop.wait()
