"""The page at `/` in Chromium, of real workers on real servers. With SCREENSHOTS=folder, pictures are kept there."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import Page, expect

from tests.support.records import make_document
from tests.support.world import CliWorker, World
from worker.dev.servers import ValkeyServer

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
