"""`viewer-worker`, but it is killed (SIGKILL) when it reaches a named point. Run as a program by the tests."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any


def die(*_: Any, **__: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def crash_at(point: str) -> None:
    from worker.counters.flush.settle import Settler
    from worker.db.counters.ledger import Ledger

    match point:
        case "before COMMIT":
            record = Ledger.record

            async def record_then_die(self: Ledger, *args: Any) -> None:
                await record(self, *args)
                die()

            Ledger.record = record_then_die  # type: ignore[method-assign]
        case "between COMMIT and settle":
            Settler.settle = die  # type: ignore[method-assign]
        case "after settle":
            settle = Settler.settle

            async def settle_then_die(self: Settler, *args: Any, **kwargs: Any) -> Any:
                await settle(self, *args, **kwargs)
                die()

            Settler.settle = settle_then_die  # type: ignore[method-assign]
        case _:
            crash_in_a_stream_at(point)


def crash_in_a_stream_at(point: str) -> None:
    from worker.db.positions import StreamPosition
    from worker.pipelines import sink
    from worker.pipelines.sources.stream.source import StreamSource

    move, write_letters, read = StreamPosition.move, sink.write_letters, StreamSource.read

    async def move_then_die(self: StreamPosition, *args: Any) -> None:
        await move(self, *args)
        die()

    async def write_then_die(*args: Any) -> None:
        await write_letters(*args)
        die()

    written = False

    def note(self: StreamSource[Any], *_: Any) -> None:
        nonlocal written
        self.reset()
        written = True

    async def read_then_die(self: StreamSource[Any]) -> Any:
        """The look that follows a commit has mirrored the position."""
        found = await read(self)
        return die() if written else found

    async def die_or_read(self: StreamSource[Any]) -> Any:
        return die() if written else await read(self)

    points: dict[str, list[tuple[Any, str, Any]]] = {
        "before the claim": [(StreamPosition, "move", die)],
        "after the claim": [(StreamPosition, "move", move_then_die)],
        "before the COMMIT of a batch": [(sink, "write_letters", write_then_die)],
        "after the COMMIT of a batch": [(StreamSource, "done", die)],
        "before the mirror": [(StreamSource, "done", note), (StreamSource, "read", die_or_read)],
        "after the mirror": [(StreamSource, "done", note), (StreamSource, "read", read_then_die)],
    }
    if point not in points:
        raise SystemExit(f"no such point: {point}")
    for owner, name, replacement in points[point]:
        setattr(owner, name, replacement)


if __name__ == "__main__":
    crash_at(sys.argv.pop(1))
    from worker.cli import main

    main()
