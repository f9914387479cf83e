"""The page at `/` in Chromium, of real workers on real servers. With SCREENSHOTS=folder, pictures are kept there."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.async_api import Page, Route, expect

from tests.support.records import make_document
from tests.support.world import CliWorker, World
from worker.dev.servers import ValkeyServer
from worker.web.page import files
from worker.web.page.samples import VIEW_COLUMNS

expect.set_options(timeout=20_000)

HOSTILE = (
    "<img src=x onerror=document.title='owned'>",
    "'\"><script>document.title='owned'</script>",
    "javascript:alert(1)",
    "a/b?c=d&e=f#g %2F..",
    "line\u2028break\u202eright-to-left",
    "видео-№7 🎬",
)
PHONE = {"width": 360, "height": 740}
UNKNOWN = "\u2013"
DESKTOP = {"width": 1100, "height": 900}


async def open_page(page: Page, world: World) -> None:
    await page.goto(f"http://127.0.0.1:{world.environment['HEALTH_CHECK_PORT']}/")


async def keep_picture(page: Page, name: str) -> None:
    if folder := os.environ.get("SCREENSHOTS"):
        await page.screenshot(path=Path(folder) / f"page-{name}.png", full_page=True)


async def find_barriers(page: Page, axe: str) -> list[str]:
    """What axe-core finds on the page as it is."""
    # In a world of its own, which the page's policy does not forbid.
    session = await page.context.new_cdp_session(page)
    frame = (await session.send("Page.getFrameTree"))["frameTree"]["frame"]["id"]
    made = await session.send("Page.createIsolatedWorld", {"frameId": frame, "worldName": "axe"})
    await session.send("Runtime.evaluate", {"expression": axe, "contextId": made["executionContextId"]})
    found = await session.send(
        "Runtime.evaluate",
        {
            "expression": "axe.run().then(({violations}) => JSON.stringify(violations))",
            "contextId": made["executionContextId"],
            "awaitPromise": True,
            "returnByValue": True,
        },
    )
    violations: list[dict[str, Any]] = json.loads(found["result"]["value"])
    return [f"{each['id']}: {node['html']}" for each in violations for node in each["nodes"]]


async def test_page_shows_numbers_and_ids_as_they_change(
    page: Page, world: World, start: Callable[..., CliWorker], axe: str
) -> None:
    world.environment |= {"PIPELINES": "view_counts,chunk_requests", "CHUNKLOG_BATCH_TIMEOUT": "50ms"}
    await start().wait_for_log("lease taken")
    for number, vod_id in enumerate(HOSTILE, start=1):
        await world.view(vod_id, 10 * number)
        await world.announce(vod_id, 10 * number)
    await world.redis.xadd(world.stream, {"data": '{"time":"2026-11-27T10:00:00Z","path":"/1"}'})
    await open_page(page, world)

    await expect(page.locator("#status")).to_have_text("Healthy")
    await expect(page.locator("#attention")).to_contain_text("All checks pass.")
    top = page.locator("#top-rows tr")
    await expect(top).to_have_count(len(HOSTILE))
    shown = await page.locator("#top-rows button").all_inner_texts()
    assert shown[0] == "видео-№7 🎬"
    assert shown[1] == "line\\u{2028}break\\u{202e}right-to-left"
    assert set(shown) >= {HOSTILE[0], HOSTILE[1], HOSTILE[2], HOSTILE[3]}
    await expect(page.locator("#pipeline-rows")).to_contain_text("chunk_requests")
    await expect(page.locator("#part-rows")).to_contain_text("this worker")
    # A sample after the first has a rate.
    await expect(page.locator("#plot-views figcaption")).to_contain_text(re.compile(r"written \d"))

    for vod_id in HOSTILE[:4]:
        await page.get_by_role("button", name=vod_id, exact=True).click()
        await expect(page.locator("#history-total")).to_contain_text("Flushed up to")
        assert await page.locator("#history-id").inner_text() == vod_id
        await page.get_by_role("button", name="Close").click()
    await page.get_by_label("Show an id").fill("a/b?c=d&e=f#g %2F..")
    await page.keyboard.press("Enter")
    await expect(page.locator("#history-total")).to_contain_text("40 views")
    await page.get_by_label("Last 30 days").check()
    await page.get_by_text("As a table").click()
    await expect(page.locator("#history-rows")).to_contain_text("40")
    assert await find_barriers(page, axe) == []
    await page.keyboard.press("Escape")

    for scheme in ("light", "dark"):
        await page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
        for size in (DESKTOP, PHONE):
            await page.set_viewport_size(size)  # type: ignore[arg-type]
            assert await find_barriers(page, axe) == []
            assert await page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert "owned" not in await page.title()


@pytest.mark.timeout(300)
@pytest.mark.skipif("SCREENSHOTS" not in os.environ, reason="makes pictures only")
async def test_pictures_of_busy_minutes(
    page: Page, world: World, start: Callable[..., CliWorker], valkey: ValkeyServer
) -> None:
    settings = {"PIPELINES": "view_counts,chunk_requests,bars_1m", "BARS_1M_STREAM": f"bars {world.prefix}"}
    worker = start(**settings, BATCH_INTERVAL_MS="5000", HEALTH_GRACE="2s")
    await worker.wait_for_log("lease taken")
    await open_page(page, world)
    chance = random.Random(17)
    for second in range(120):
        for _ in range(chance.randint(60, 90) + (40 if second > 70 else 0)):
            vod_id = f"vod_{min(int(chance.paretovariate(0.7)), 40):03}"
            await world.view(vod_id)
            await world.announce(vod_id)
        for number in range(chance.randint(20, 30)):
            await world.redis.xadd(world.stream, {"data": make_document(number)})
        if second % 4 == 0:
            bar = {"symbol": "ABC", "timestamp": 1764322000000 + 60_000 * second, "open": 1, "high": 2, "low": 1}
            bar |= {"close": 2, "volume": 10, "vwap": 1.5}
            await world.redis.xadd(settings["BARS_1M_STREAM"], {"data": json.dumps(bar)})
        await asyncio.sleep(0.8)
    await keep_picture(page, "normal")
    await page.locator("#top-rows button").first.click()
    await expect(page.locator("#history-total")).to_contain_text("Flushed up to")
    await page.locator("#history").screenshot(path=Path(os.environ["SCREENSHOTS"]) / "page-history.png")
    await page.keyboard.press("Escape")
    await page.emulate_media(color_scheme="dark")
    await page.set_viewport_size(PHONE)  # type: ignore[arg-type]
    await page.evaluate("scrollTo(0, 0)")
    await page.wait_for_timeout(300)  # the plots have their new size
    await page.screenshot(path=Path(os.environ["SCREENSHOTS"]) / "page-phone.png")
    await page.emulate_media(color_scheme="light")
    await page.set_viewport_size(DESKTOP)  # type: ignore[arg-type]

    valkey.kill()
    await expect(page.locator("#status")).to_have_text("Unhealthy")
    await asyncio.sleep(6)
    await keep_picture(page, "outage")
    valkey.start()
    await expect(page.locator("#status")).to_have_text("Healthy")
    await world.redis.connection_pool.disconnect()
    await world.redis.xadd(world.stream, {"data": "not JSON"})
    await world.redis.set(world.keys.marker, "unreadable")
    await world.view("vod_1")
    await expect(page.locator("#attention")).to_contain_text("1 dead letter")
    await expect(page.locator("#status")).to_have_text("Degraded")
    await asyncio.sleep(6)
    await keep_picture(page, "hold")


async def test_page_survives_an_outage_of_redis_and_a_restart_of_the_worker(
    page: Page, world: World, start: Callable[..., CliWorker], valkey: ValkeyServer, axe: str
) -> None:
    worker = start(HEALTH_GRACE="1s")
    await worker.wait_for_log("lease taken")
    await open_page(page, world)
    await expect(page.locator("#status")).to_have_text("Healthy")

    valkey.kill()
    await expect(page.locator("#status")).to_have_text("Unhealthy")
    await expect(page.locator("#attention h3").first).to_have_text(re.compile("^Redis.*: failing$"))
    await expect(page.locator("#attention")).to_contain_text("What to do:")
    assert await find_barriers(page, axe) == []
    valkey.start()
    await expect(page.locator("#status")).to_have_text("Healthy")

    worker.kill()
    await expect(page.locator("#status")).to_have_text("No connection")
    await expect(page.locator("#attention h3").first).to_have_text("This page has lost the worker")
    assert await find_barriers(page, axe) == []
    restarted = start()
    await restarted.wait_for_log("started")
    await expect(page.locator("#status")).to_have_text("Healthy")
    await expect(page.locator("#identity")).to_contain_text(f"process {restarted.process.pid} ")
    restarted.terminate()
    assert await restarted.wait(timeout=5) == 0  # an open page does not delay the stop


async def test_page_begins_with_a_hold_and_dead_letters_and_says_what_to_do(
    page: Page, world: World, start: Callable[..., CliWorker], axe: str
) -> None:
    world.environment |= {"PIPELINES": "view_counts,chunk_requests", "CHUNKLOG_BATCH_TIMEOUT": "50ms"}
    worker = start()
    await world.view("vod_1")
    await worker.wait_for_log("flushed")
    await world.redis.xadd(world.stream, {"data": "not JSON"})
    await world.redis.set(world.prefix + "vod_2", "not a number")
    await world.redis.set(world.keys.marker, "unreadable")
    await open_page(page, world)

    await expect(page.locator("#status")).to_have_text("Degraded")
    first = page.locator("#attention article").first
    await expect(first.locator("h3")).to_have_text("View counts: on hold")
    await expect(first).to_contain_text("What to do: ")
    await expect(first).to_contain_text("viewer-worker adopt")
    await expect(page.locator("#attention")).to_contain_text("chunk_requests: 1 dead letter")
    await expect(page.locator("#attention")).to_contain_text("viewer-worker dead-letters show")
    await expect(page.locator("#attention")).to_contain_text("Counters that cannot be counted")
    assert await find_barriers(page, axe) == []


async def test_page_of_a_replica_that_stands_by_names_the_worker_that_does_the_work(
    page: Page, world: World, start: Callable[..., CliWorker]
) -> None:
    working = start(HEALTH_CHECK_PORT="0")
    await working.wait_for_log("lease taken")
    await start().wait_for_log("started")
    await open_page(page, world)
    await expect(page.locator("#attention h3")).to_have_text(["All checks pass. Another worker does the work."])
    await expect(page.locator("#attention")).to_contain_text("This worker takes over if it stops.")
    await expect(page.locator("#attention")).to_contain_text(f":{working.process.pid}:")
    await keep_picture(page, "standby")


class Worker:
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
    worker = Worker(page)
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
    worker = Worker(
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
    worker = Worker(page, make_stream(f"bars_1m:{200 * 'a'}", "bars_1m", lost=2**63 - 1))
    worker.samples = [[0, *[0] * 8], [5000, *[2**63 - 1] * 8]]
    worker.views |= {"pendingIds": 2**63 - 1, "flushedViews": 2**63 - 1}
    await worker.open()
    await expect(page.locator("#plot-records figcaption")).to_contain_text("aaa")
    assert await page.evaluate("document.documentElement.scrollWidth <= innerWidth")


async def test_history_is_that_of_the_workers_clock_and_closing_it_keeps_the_focus(page: Page) -> None:
    worker = Worker(page)
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
    worker = Worker(page)
    await worker.open()
    await expect(page).to_have_title("Healthy · viewer-worker")
    await page.evaluate("Object.defineProperty(document, 'hidden', { value: true, configurable: true })")
    await page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    await expect(page).to_have_title("Paused · viewer-worker")
    await page.evaluate("delete document.hidden; document.dispatchEvent(new Event('visibilitychange'))")
    await expect(page).to_have_title("Healthy · viewer-worker")
