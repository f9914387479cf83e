from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.world import CliWorker


@pytest.fixture
def start() -> Iterator[Callable[..., CliWorker]]:
    """Starts `viewer-worker …` as a subprocess, and ends what the test left running."""
    started: list[CliWorker] = []

    def start(environment: dict[str, str], *arguments: str, program: list[str] | None = None) -> CliWorker:
        worker = CliWorker(environment, *arguments, program=program)
        started.append(worker)
        return worker

    yield start
    for worker in started:
        worker.close()
