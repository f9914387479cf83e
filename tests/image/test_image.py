"""The image: its contents, and that the worker runs in it read-only and without privileges."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.image.conftest import ROOT, Image
from tests.support.world import CliWorker, World
from worker import __version__
from worker.dev.servers import free_port

pytestmark = pytest.mark.timeout(900)
VENV = Path("opt/viewer-worker")


@pytest.fixture
async def world(redis_url: str, empty_database_url: str) -> Any:
    async with World(redis_url, empty_database_url) as made:
        yield made


@pytest.fixture
def workers() -> Iterator[list[CliWorker]]:
    started: list[CliWorker] = []
    yield started
    for worker in started:
        worker.close()


async def test_worker_counts_and_stops_in_a_read_only_filesystem_without_any_privilege(
    image: Image, world: World, workers: list[CliWorker]
) -> None:
    environment = world.environment | {"HEALTH_CHECK_PORT": str(free_port())}
    migrated = await asyncio.to_thread(image.run, "viewer-worker", "migrate", **environment)
    assert migrated.returncode == 0, migrated.stderr
    worker = CliWorker({}, *image.config["Cmd"], program=image.program(**environment))
    workers.append(worker)
    await worker.wait_for_log('"marker created"')
    assert confinement(worker.process.pid) == {
        "Uid": "10001",
        "CapEff": "0" * 16,
        "CapBnd": "0" * 16,
        "NoNewPrivs": "1",
    }
    assert root_is_read_only(worker.process.pid)

    await world.view("vod_1", 3)
    await worker.wait_for_log("batch flushed")
    async with aiohttp.ClientSession() as session:
        url = f"http://127.0.0.1:{environment['HEALTH_CHECK_PORT']}"
        async with session.get(f"{url}/health") as response:
            assert (await response.json())["status"] == "healthy"
    check = image.config["Healthcheck"]["Test"]
    assert check[0] == "CMD"
    assert (await asyncio.to_thread(image.run, *check[1:], **environment)).returncode == 0

    await world.view("vod_1", 4)
    worker.terminate()
    assert await worker.wait(timeout=8) == 0
    await world.assert_exact()
    assert (await asyncio.to_thread(image.run, *check[1:], **environment)).returncode == 1


def confinement(pid: int) -> dict[str, str]:
    status = dict(re.findall(r"^(\w+):\t(\S+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE))
    return {name: status[name] for name in ("Uid", "CapEff", "CapBnd", "NoNewPrivs")}


def root_is_read_only(pid: int) -> bool:
    """The only other mounted file system is /proc."""
    lines = Path(f"/proc/{pid}/mounts").read_text().splitlines()
    mounts = {target: options for _, target, _, options, *_ in map(str.split, lines)}
    return set(mounts) == {"/", "/proc"} and "ro" in mounts["/"].split(",")


def test_image_config_declares_how_to_run_it(image: Image) -> None:
    config = image.config
    assert (config["Entrypoint"], config["Cmd"], config["StopSignal"]) == (["viewer-worker"], ["run"], "SIGTERM")
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", config["User"])
    assert list(config["ExposedPorts"]) == ["3003/tcp", "50051/tcp"]
    assert config["Labels"]["org.opencontainers.image.version"] == __version__
    assert config["Labels"]["org.opencontainers.image.licenses"] == "MIT"


def test_image_contains_the_locked_packages_and_the_worker(image: Image) -> None:
    listing = "import importlib.metadata as m, json; print(json.dumps({d.name: d.version for d in m.distributions()}))"
    found = json.loads(image.run("python", "-c", listing).stdout)
    lock = (ROOT / "requirements.lock").read_text()
    locked = dict(
        re.findall(r"^([\w.-]+)==(\S+) (?!; (?:sys_platform == 'win32'|python_full_version < '3.11))", lock, re.M)
    )
    assert {normal(name) for name in found} == {normal(name) for name in locked} | {"viewer-worker"}
    assert all(found[name] == locked[normal(name)] for name in found if name != "viewer-worker")
    assert "uvloop" in found


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_image_contains_nothing_that_is_only_for_building_or_testing(image: Image) -> None:
    assert image.run("sh", "-c", "command -v pip pip3 gcc cc make").stdout == ""
    site = next((image.root / VENV / "lib").glob("python3.*/site-packages"))
    assert sorted(path.name for path in site.glob("worker*")) == ["worker"]
    assert not (site / "tests").exists()
    assert (site / "worker" / "alembic").is_dir()


def test_every_module_that_the_worker_loads_has_its_bytecode(image: Image) -> None:
    missing = (
        "import os, sys, worker.app.serve, worker.cli;"
        "print([name for name, module in sys.modules.items()"
        " if getattr(module, '__cached__', None) and not os.path.exists(module.__cached__)])"
    )
    assert image.run("python", "-c", missing).stdout == "[]\n"
