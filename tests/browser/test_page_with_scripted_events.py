"""The page in Chromium, with events that a test makes: what no real worker shows soon, or at a known moment."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.async_api import Page, Route, expect

from worker.web.page import files
from worker.web.page.samples import VIEW_COLUMNS

expect.set_options(timeout=20_000)

PHONE = {"width": 360, "height": 740}
UNKNOWN = "\u2013"


class ScriptedWorker:
    """What a page is sent that has no worker: the page's own files, and these events."""

    def __init__(self, page: Page, *pipelines: dict[str, Any]) -> None:
        self._page = page
        working = {"status": "ok", "for_seconds": 1, "role": "working"}
        server = {"status": "ok", "for_seconds": 1}
        self.checks = {"redis": server, "postgres": server, "schema": server, "view_counts": working}
        self.checks |= {each["name"]: working for each in pipelines}
        self.now = datetime.now(UTC)
        self.views: dict[str, Any] = {
            "flushIntervalSeconds": 30,
            "lastAgreementMs": None,
            "pendingIds": 0,
            "oldestPendingSeconds": 0,
            "flushedViews": 0,
        }
        self.pipelines = pipelines
        self.lookups: dict[str, Any] = {}
        self.samples: Sequence[Sequence[float]] = ()
        self.asked: list[str] = []

    async def open(self) -> None:
        await self._page.route("**/*", self._answer)
        await self._page.goto("http://127.0.0.1/")

    async def _answer(self, route: Route) -> None:
        url = urlsplit(route.request.url)
        if url.path == "/events":
            await route.fulfill(body=self._events(), content_type="text/event-stream")
        elif url.path in files.FILES:
            name, kind = files.FILES[url.path]
            body = (Path(files.__file__).parent / "static" / name).read_bytes()
            await route.fulfill(body=body, content_type=kind, headers=files.HEADERS)
        else:
            self.asked.append(f"{url.path}?{url.query}")
            document = {"views": [{"views": 1, "pending": 0}], "buckets": [], "asOf": self.now.isoformat()}
            await route.fulfill(json=document)

    def _events(self) -> str:
        health = {"status": "healthy", "version": "1", "timestamp": self.now.isoformat(), "checks": self.checks}
        worker = {"host": "host", "pid": 1, "uptimeSeconds": 1, "source": "default", "redis": "a:1", "postgres": "b:2"}
        state = {"health": health, "worker": worker, "views": self.views}
        state |= {"pipelines": self.pipelines, "lookups": self.lookups}
        columns = ["time", *VIEW_COLUMNS, *(each["name"] for each in self.pipelines)]
        events = {"samples": {"columns": columns, "rows": self.samples}, "state": state}
        return "retry: 200\n\n" + "".join(f"event: {name}\ndata: {json.dumps(events[name])}\n\n" for name in events)


def make_stream(name: str, pipeline: str, **numbers: object) -> dict[str, Any]:
    known = {"queued": 0, "dropped": 0, "backlog": None, "oldestUnreadSeconds": None, "lost": 0, "gaps": 0}
    return {"name": name, "pipeline": pipeline, "stream": name} | known | numbers


@pytest.mark.parametrize("interval", [30, 600])
async def test_page_shows_a_steady_rate_between_flushes(page: Page, interval: int) -> None:
    worker = ScriptedWorker(page)
    worker.views["flushIntervalSeconds"] = interval
    rows = []
    for number in range(600):
        seconds = 5.005 * number  # samples take a while, too
        flushes = seconds // interval
        views = 100 * interval * flushes
        rows.append([1000 * seconds, 0, views, flushes, flushes, flushes, 0, 0])
    shown = page.locator("#plot-views figcaption")
    for worker.samples in (rows[:-step] for step in range(1, 8)):
        await worker.open()
        await expect(shown).to_contain_text("written 100 ")
    worker.samples = [[0, *[0] * 7], [5000, 0, 100_000, 1, 1, 1, 0, 0]]
    await worker.open()
    await expect(shown).to_contain_text(f"written {UNKNOWN}")  # these views waited for the start, nobody knows how long


async def test_page_shows_no_backlog_that_nobody_knows_and_counts_nothing_twice(page: Page) -> None:
    worker = ScriptedWorker(
        page,
        make_stream("bars_1m:a", "bars_1m", dropped=3, backlog=5, oldestUnreadSeconds=60),
        make_stream("bars_1m:b", "bars_1m", dropped=3, gaps=1),
    )
    worker.lookups = {"deadLetters": {"bars_1m": 2}}
    await worker.open()
    rows = page.locator("#pipeline-rows tr")
    cells = ["ok", UNKNOWN, "5", "1 min", "2", "0"]
    await expect(rows.nth(0).locator("td")).to_have_text(cells)
    await expect(rows.nth(1).locator("td")).to_have_text(["ok", UNKNOWN, UNKNOWN, UNKNOWN, "", "0"])
    titles = page.locator("#attention h3")
    await expect(titles.filter(has_text="dropped")).to_have_text(["bars_1m: 3 records dropped since the start"])
    await expect(titles.filter(has_text="gap")).to_have_text(["bars_1m:b: 1 gap since the start"])
    await page.evaluate("[...document.querySelectorAll('#attention article')].forEach((each) => (each.seen = true))")
    worker.checks["postgres"] = {"status": "failing", "for_seconds": 1, "cause": "no answer"}
    await expect(rows.nth(0).locator("td").first).to_have_text("waits for Postgres")
    # A screen reader reads what is new only.
    new = await page.evaluate("[...document.querySelectorAll('#attention article')].map((each) => !each.seen)")
    assert new == [True, False, False, False]


async def test_page_fits_a_phone_with_the_longest_names(page: Page) -> None:
    await page.set_viewport_size(PHONE)  # type: ignore[arg-type]
    worker = ScriptedWorker(page, make_stream(f"bars_1m:{200 * 'a'}", "bars_1m", lost=2**63 - 1))
    worker.samples = [[0, *[0] * 8], [5000, *[2**63 - 1] * 8]]
    worker.views |= {"pendingIds": 2**63 - 1, "flushedViews": 2**63 - 1}
    await worker.open()
    await expect(page.locator("#plot-records figcaption")).to_contain_text("aaa")
    assert await page.evaluate("document.documentElement.scrollWidth <= innerWidth")


async def test_history_is_that_of_the_workers_clock_and_closing_it_keeps_the_focus(page: Page) -> None:
    worker = ScriptedWorker(page)
    worker.now -= timedelta(days=3)
    worker.lookups = {"top": {"since": "2026-11-28T10:00:00Z", "top": [{"vodId": "..", "views": 1, "total": 1}]}}
    await worker.open()
    await page.get_by_role("button", name="..").click()
    await expect(page.locator("#history-total")).to_contain_text("viewer-worker history ..")
    worker.lookups["top"]["top"][0]["total"] = 2
    await expect(page.locator("#top-rows td").nth(2)).to_have_text("2")
    await page.keyboard.press("Escape")
    await expect(page.get_by_role("button", name="..")).to_be_focused()

    assert worker.asked == []
    await page.get_by_label("Show an id").fill("vod_1")
    await page.keyboard.press("Enter")
    await expect(page.locator("#history-total")).to_contain_text("1 view.")
    first = int(worker.asked[-1].rpartition("=")[2]) / 1000
    assert 0 <= worker.now.timestamp() - 47 * 3600 - first < 3600


async def test_title_of_a_hidden_page_does_not_say_that_all_is_well(page: Page) -> None:
    worker = ScriptedWorker(page)
    await worker.open()
    await expect(page).to_have_title("Healthy · viewer-worker")
    await page.evaluate("Object.defineProperty(document, 'hidden', { value: true, configurable: true })")
    await page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    await expect(page).to_have_title("Paused · viewer-worker")
    await page.evaluate("delete document.hidden; document.dispatchEvent(new Event('visibilitychange'))")
    await expect(page).to_have_title("Healthy · viewer-worker")
