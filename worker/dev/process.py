"""Runs the worker in a separate process."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

from worker.dev.servers import die_with_parent, free_port
from worker.settings.environment import without_settings
from worker.settings.model import PIPELINES

INTERVAL_MS = 1000


class WorkerProcess:
    """The worker in its own process, as in production: controlled only by its environment and by signals."""

    def __init__(self, folder: Path, redis_url: str, database_url: str) -> None:
        self.log = folder / "worker.log"
        self.env_file = folder / "worker.env"
        self.kills = 0
        self._port = 3003 if _is_free(3003) else free_port()
        self._grpc_port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self.env_file.write_text(
            f"REDIS_URL={redis_url}\nDATABASE_URL={database_url}\nBATCH_INTERVAL_MS={INTERVAL_MS}\n"
            f"PIPELINES={','.join(PIPELINES)}\nHEALTH_CHECK_HOST=127.0.0.1\nHEALTH_CHECK_PORT={self._port}\n"
            f"GRPC_HOST=127.0.0.1\nGRPC_PORT={self._grpc_port}\n"
        )
        self.log.unlink(missing_ok=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def grpc_target(self) -> str:
        return f"127.0.0.1:{self._grpc_port}"

    @property
    def pid(self) -> int:
        return self._running().pid

    @property
    def exit_code(self) -> int | None:
        return self._running().poll()

    def start(self) -> None:
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "worker", "run", "--env-file", str(self.env_file)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=without_settings(os.environ),
                start_new_session=True,
                preexec_fn=die_with_parent(signal.SIGTERM),
            )

    def kill(self) -> None:
        """Send SIGKILL if the process still runs."""
        process = self._running()
        if process.poll() is None:
            self.kills += 1
            process.kill()
            process.wait()

    def stop(self) -> int:
        """Send SIGTERM, as a platform does, and return the exit code."""
        process = self._running()
        process.terminate()
        return process.wait()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise RuntimeError("not started")
        return self._process


def _is_free(port: int) -> bool:
    with socket.socket() as probe, contextlib.suppress(OSError):
        probe.bind(("127.0.0.1", port))
        return True
    return False
