"""The image, built by buildah without a daemon, and its root filesystem, in which the tests run the worker."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest

from worker import __version__

ROOT = Path(__file__).parents[2]
BASE = "docker.io/library/python:3.13-slim-bookworm"
TAG = "localhost/viewer-worker:test"
# As a careful platform runs it: nothing can be written, and the user is not root and cannot become root.
CONFINED = """
set -e
mount --bind "$0" "$0"
mount -o remount,bind,ro "$0"
mount -t proc proc "$0/proc"
exec chroot "$0" setpriv --reuid "$1" --regid "$2" --clear-groups --no-new-privs --bounding-set=-all --inh-caps=-all \
    env -i "${@:3}"
"""


@dataclass(frozen=True)
class Image:
    """`config` is the configuration of the image; `root` is its file system, mounted."""

    config: dict[str, Any]
    root: Path

    def program(self, *command: str, **environment: str) -> list[str]:
        """The command line that runs `command` (by default the entrypoint) confined, on this machine's network."""
        user, group = self.config["User"].split(":")
        variables = [*self.config["Env"], *(f"{name}={value}" for name, value in environment.items())]
        confined = [
            "unshare",
            "--mount",
            "--propagation",
            "private",
            "bash",
            "-c",
            CONFINED,
            str(self.root),
            user,
            group,
        ]
        return [*confined, *variables, *(command or self.config["Entrypoint"])]

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.program(*command, **environment), capture_output=True, text=True, check=False)


@pytest.fixture(scope="session")
def image() -> Iterator[Image]:
    if shutil.which("buildah") is None or os.getuid() != 0:
        skip_or_fail("needs buildah, and root to run what it builds")
    if (
        not buildah("images", "--quiet", BASE, check=False)
        and subprocess.run(["buildah", "pull", "--quiet", BASE]).returncode
    ):
        skip_or_fail(f"the base image {BASE} is not stored here and cannot be pulled")
    mirror = os.environ.get("PIP_INDEX_URL")
    arguments = ["--build-arg", f"PIP_INDEX_URL={mirror}"] if mirror else []
    # Without the cache of layers: it takes labels of builds with other arguments for these.
    how = ("--isolation", "chroot", "--network", "host", "--format", "docker", "--no-cache", "--quiet")
    buildah("bud", *how, *arguments, "--build-arg", f"VERSION={__version__}", "--tag", TAG, str(ROOT))
    container = buildah("from", "--pull-never", TAG)
    config = json.loads(buildah("inspect", "--type", "image", TAG))["Docker"]["config"]
    yield Image(config, Path(buildah("mount", container)))
    buildah("rm", container)


def skip_or_fail(reason: str) -> NoReturn:
    """Skip even in CI, as not every machine can build images. A CI that can build them sets IMAGE_BASE_REQUIRED."""
    if os.environ.get("IMAGE_BASE_REQUIRED"):
        pytest.fail(reason)
    pytest.skip(reason)


def buildah(*arguments: str, check: bool = True) -> str:
    done = subprocess.run(["buildah", *arguments], capture_output=True, text=True, check=False)
    assert not check or done.returncode == 0, done.stderr
    return done.stdout.strip()
