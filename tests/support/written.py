"""What Writers wrote to a database, compared with what they count."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any

from tests.support.world import clean_environment
from worker import ChunkEvent, SyncWriter, Writer, WriterStats

# Small batches, so that a test has many.
ARGUMENTS: dict[str, Any] = {"batch_size": 10, "batch_timeout": 0.02, "retry_delay": 0.01, "max_retries": 1}
ROOT = Path(__file__).parents[2]


def event(number: int | str, **fields: Any) -> ChunkEvent:
    return ChunkEvent(**({"path": f"/{number}", "ip": "203.0.113.7"} | fields))


def paths_of(numbers: Iterable[int | str]) -> list[str]:
    return sorted(f"/{number}" for number in numbers)


def assert_identity(stats: WriterStats) -> None:
    """Every accepted record is counted once."""
    became = stats.written + stats.repeated + stats.dead + stats.dropped + stats.unwritten + stats.unknown
    assert stats.accepted == became + stats.queued


class WrittenRecords:
    """`sql` is a connection of the test's own."""

    def __init__(self, url: str, sql: Any) -> None:
        self.url = url
        self.sql = sql

    def writer(self, url: str | None = None, **arguments: Any) -> Writer[ChunkEvent]:
        return Writer.chunk_requests(url or self.url, **ARGUMENTS | arguments)

    def sync_writer(self, url: str | None = None, **arguments: Any) -> SyncWriter[ChunkEvent]:
        return SyncWriter.chunk_requests(url or self.url, **ARGUMENTS | arguments)

    async def paths(self) -> list[str]:
        return sorted(row["path"] for row in await self.sql.fetch("SELECT path FROM chunk_requests"))

    async def letters(self) -> list[Any]:
        return list(await self.sql.fetch("SELECT * FROM dead_letters ORDER BY id"))

    async def tickets(self) -> int:
        return int(await self.sql.fetchval("SELECT count(*) FROM ingest_batches"))

    async def assert_adds_up(self, *stats: WriterStats) -> None:
        """The counters of all Writers of this database add up to the rows and letters, exactly."""
        for each in stats:
            assert_identity(each)
        assert len(await self.paths()) == sum(each.written for each in stats)
        assert len(await self.letters()) == sum(each.dead for each in stats)

    async def wait_until(self, condition: Callable[[], Awaitable[Any]]) -> None:
        async with asyncio.timeout(20):
            while not await condition():
                await asyncio.sleep(0.01)

    async def terminate_connections(self) -> None:
        """As a restart of the database does, but for the test's own."""
        await self.sql.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )

    async def run(self, program: str, *arguments: str, status: int = 0, **environment: str) -> tuple[str, str]:
        """Run a program of its own that may use `URL` and `event`; warnings are errors. Its stdout and stderr."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-W",
            "error",
            "-c",
            PROLOGUE + program,
            *arguments,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=ROOT,
            env=clean_environment() | {"DATABASE_URL": self.url} | environment,
            start_new_session=True,
        )
        try:
            async with asyncio.timeout(25):
                out, err = await process.communicate()
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)  # with the children that it forked
            await process.wait()
            raise
        assert process.returncode == status, err.decode()
        return out.decode(), err.decode()


PROLOGUE = """
import asyncio, json, os, signal, sys, threading, time
from worker import ChunkEvent, SyncWriter, Writer
ARGUMENTS = {"batch_size": 10, "batch_timeout": 0.02}
def event(number): return ChunkEvent(path=f"/{number}")
"""
