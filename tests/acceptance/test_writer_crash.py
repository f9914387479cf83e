"""An application that is killed: a ticket and its rows are there together, or not at all."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.world import CliWorker
from tests.support.written import WrittenRecords, paths_of

PROGRAM = [sys.executable, str(Path(__file__).with_name("crash_writer.py"))]
BATCH = 10
# Where the application dies while it writes its third batch; batches that are written then.
POINTS = {"before the claim": 2, "after the claim": 2, "before the COMMIT": 2, "after the COMMIT": 3}


@pytest.mark.parametrize("point", POINTS)
async def test_application_killed_while_it_writes_leaves_whole_batches(
    written: WrittenRecords, start: Callable[..., CliWorker], point: str
) -> None:
    killed = start({"DATABASE_URL": written.url}, point, program=PROGRAM)
    assert await killed.wait() == -signal.SIGKILL, killed.log
    batches = POINTS[point]
    assert await written.tickets() == batches
    assert await written.paths() == paths_of(number for number in range(batches * BATCH) if number % BATCH != 5)
    letters = await written.letters()
    tickets = {str(row["id"]) for row in await written.sql.fetch("SELECT id FROM ingest_batches")}
    assert sorted(letter["origin"] for letter in letters) == sorted(f"{ticket}/5" for ticket in tickets)
