"""An application with a Writer that is killed (SIGKILL) at a named point of its third batch. Run by the tests."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

from crash import die  # type: ignore[import-not-found]

from worker import ChunkEvent, Writer
from worker.db.tickets import Ticket
from worker.pipelines import sink
from worker.pipelines.sources.buffered import BufferedSource

BATCH = 10


def kill_at(point: str) -> None:
    owner: Any
    owner, name, after = {
        "before the claim": (Ticket, "take", False),
        "after the claim": (Ticket, "take", True),
        "before the COMMIT": (sink, "write_letters", True),
        "after the COMMIT": (BufferedSource, "done", False),
    }[point]
    step = getattr(owner, name)
    calls = 0

    def call(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            return then_die(step(*arguments)) if after else die()
        return step(*arguments)

    setattr(owner, name, call)


async def then_die(step: Any) -> None:
    await step
    die()


async def main() -> None:
    async with Writer.chunk_requests(batch_size=BATCH, writers=1) as writer:
        for number in range(4 * BATCH):
            assert writer.send(ChunkEvent(path=f"/{number}", ip="none" if number % BATCH == 5 else None))


if __name__ == "__main__":
    kill_at(sys.argv[1])
    asyncio.run(main())
