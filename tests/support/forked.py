"""`viewer-worker` in processes that are forked from one that has its modules loaded already.

Loading them takes most of the CPU time of a command. In all else these are processes like any other: with their own
session, environment and signals. Tests of the start itself run `python -m worker`.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import threading
from multiprocessing.connection import wait
from multiprocessing.reduction import DupFd
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, BinaryIO

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    [
        "worker.cli",
        "worker.settings.environment",
        "worker.app.serve",
        "worker.app.commands",
        "alembic.command",
        "uvloop",
    ]
)
# `start` also looks for other processes that ended, and only one thread may read an exit code.
_lock = threading.Lock()


class ForkedProcess:
    """`python -m worker …`, or a Python file instead of it, with the interface of `subprocess.Popen`."""

    def __init__(
        self, arguments: tuple[str, ...], environment: dict[str, str], log: BinaryIO, script: Path | None = None
    ) -> None:
        out, its_out = os.pipe()
        self.stdout: BinaryIO = os.fdopen(out, "rb")
        with os.fdopen(its_out, "wb") as output, _lock:
            self._process = _FORKS.Process(target=_Start(script, arguments, environment, output, log))
            self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        with _lock:
            return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Returns the exit code, negative after a signal. Raises subprocess.TimeoutExpired."""
        wait([self._process.sentinel], timeout)
        code = self.poll()
        if code is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired("viewer-worker", timeout)
        return code

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run_forked(*arguments: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, as `subprocess.run` does with captured output."""
    with TemporaryFile() as log:
        process = ForkedProcess(arguments, environment, log)
        with process.stdout:
            printed = process.stdout.read()
        code = process.wait(60)
        log.seek(0)
        return subprocess.CompletedProcess(arguments, code, printed.decode(), log.read().decode())


class _Start:
    """What the new process does. Pickled in `start`, which hands the files over."""

    def __init__(
        self,
        script: Path | None,
        arguments: tuple[str, ...],
        environment: dict[str, str],
        output: BinaryIO,
        log: BinaryIO,
    ) -> None:
        self._script = script
        self._arguments = arguments
        self._environment = environment
        self._files: Any = (output, log)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": [DupFd(file.fileno()) for file in self._files]}

    def __call__(self) -> None:
        os.setsid()
        nothing = os.open(os.devnull, os.O_RDONLY)
        for number, opened in enumerate((nothing, *(file.detach() for file in self._files))):
            os.dup2(opened, number)
            os.close(opened)
        os.environ.clear()
        os.environ.update(self._environment)
        sys.argv[1:] = self._arguments
        if self._script is None:
            runpy.run_module("worker", run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(str(self._script), run_name="__main__")
