"""A real browser, and a worker whose page it opens."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import Browser, Page, async_playwright

from tests.support.tools import install_node_packages, tool
from tests.support.world import CliWorker, World
from worker.dev.servers import ValkeyServer

# It runs as root in containers, and connects to nothing but the page.
OPTIONS = (
    "--no-sandbox",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-dev-shm-usage",
    "--disable-sync",
    "--no-first-run",
)


@pytest.fixture(scope="session")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The source of axe-core, which finds what keeps people from using a page."""
    folder = tmp_path_factory.mktemp("axe")
    install_node_packages(Path(__file__).parent, folder)
    return (folder / "node_modules" / "axe-core" / "axe.min.js").read_text()


@pytest.fixture
async def browser() -> AsyncIterator[Browser]:
    chromium = tool("chromium", "chromium")
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=chromium, args=OPTIONS)
        yield browser
        await browser.close()


@pytest.fixture
async def page(browser: Browser) -> AsyncIterator[Page]:
    """A page that fails the test when a script or the content security policy complains."""
    context = await browser.new_context(viewport={"width": 1100, "height": 900}, color_scheme="light")
    page = await context.new_page()
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: complaints.append(message.text) if is_complaint(message) else None)
    yield page
    await context.close()
    assert complaints == []


def is_complaint(message: Any) -> bool:
    """A connection that fails while the worker is away is no mistake of the page."""
    return message.type in ("error", "warning") and "net::ERR" not in message.text


@pytest.fixture
async def world(valkey: ValkeyServer, database_url: str) -> AsyncIterator[World]:
    """With a Redis that the test may stop, and a port that a restarted worker gets again."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    async with World(valkey.url, database_url, HEALTH_CHECK_PORT=str(port)) as made:
        yield made


@pytest.fixture
def start(world: World) -> Iterator[Callable[..., CliWorker]]:
    """Starts a worker of the world."""
    started: list[CliWorker] = []

    def start(**settings: str) -> CliWorker:
        started.append(CliWorker(world.environment | settings, "run"))
        return started[-1]

    yield start
    for worker in started:
        worker.close()
