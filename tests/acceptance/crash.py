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
            raise SystemExit(f"no such point: {point}")


if __name__ == "__main__":
    crash_at(sys.argv.pop(1))
    from worker.cli import main

    main()
