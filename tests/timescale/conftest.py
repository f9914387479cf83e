"""A real TimescaleDB without Docker: the extension compiled to WebAssembly, run by Node.js from a wheel."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.tools import NODE, install_node_packages
from worker.dev.servers import free_port

FOLDER = Path(__file__).parent


@pytest.fixture(scope="session")
def timescale_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the server and its packages, installed from the lock file."""
    folder = tmp_path_factory.mktemp("timescale")
    install_node_packages(FOLDER, folder)
    shutil.copy(FOLDER / "server.mjs", folder)
    return folder


@pytest.fixture
def timescale_url(timescale_program: Path) -> Iterator[str]:
    """A fresh TimescaleDB. One connection at a time: a second hangs until the first is closed."""
    port = free_port()
    server = subprocess.Popen(
        [NODE, "server.mjs", str(port)], cwd=timescale_program, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert server.stdout is not None
    first_line = server.stdout.readline()
    assert first_line == b"ready\n", first_line + server.stdout.read()
    yield f"postgresql://postgres@127.0.0.1:{port}/postgres?sslmode=disable"
    server.kill()
    server.wait()
    server.stdout.close()
