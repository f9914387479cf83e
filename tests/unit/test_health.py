"""The answers of the health endpoints, computed from the status."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import aiohttp
import pytest

from tests.support.fakes import FakeClock
from tests.support.openapi import assert_documented
from worker.observability.metrics import Metrics
from worker.observability.status import Status
from worker.web.answer import Answer
from worker.web.health import Health
from worker.web.server import WebServer


class DocumentedHealth(Health):
    """Compares every answer with the OpenAPI document."""

    def health(self) -> Answer:
        return documented("/health", super().health())

    def live(self) -> Answer:
        return documented("/livez", super().live())

    def ready(self) -> Answer:
        return documented("/readyz", super().ready())


def documented(path: str, answer: Answer) -> Answer:
    assert_documented(path, answer.code, answer.body)
    return answer


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def status(clock: FakeClock) -> Status:
    return Status(clock.monotonic, ("redis", "postgres"))


@pytest.fixture
def health(status: Status, clock: FakeClock) -> Health:
    return DocumentedHealth(status, clock, "1.2.3", timedelta(seconds=30))


def all_ok(status: Status) -> None:
    status.ok("redis")
    status.ok("postgres")


def test_healthy_answer_has_the_fields_that_existing_probes_expect(status: Status, health: Health) -> None:
    all_ok(status)
    answer = health.health()
    assert answer.code == 200
    assert answer.body["status"] == "healthy"
    assert answer.body["timestamp"] == "2024-01-01T00:00:00.000Z"
    assert answer.body["service"] == "viewer-worker"
    assert answer.body["version"] == "1.2.3"


def test_outage_is_degraded_within_the_grace_and_unhealthy_after(
    status: Status, health: Health, clock: FakeClock
) -> None:
    all_ok(status)
    status.failing("redis", "Connection refused", "Check REDIS_URL.")
    clock.advance(29)
    assert (health.health().code, health.health().body["status"]) == (200, "degraded")
    clock.advance(2)
    answer = health.health()
    assert (answer.code, answer.body["status"]) == (503, "unhealthy")
    checks: Any = answer.body["checks"]
    assert checks["redis"] == {
        "status": "failing",
        "for_seconds": 31,
        "cause": "Connection refused",
        "remedy": "Check REDIS_URL.",
    }
    status.ok("redis")
    assert health.health().body["status"] == "healthy"


def test_outage_of_a_server_that_was_never_reached_counts_from_the_start(
    status: Status, health: Health, clock: FakeClock
) -> None:
    status.ok("redis")
    assert health.health().body["status"] == "degraded"
    clock.advance(31)
    assert health.health().code == 503


def test_hold_stays_degraded(status: Status, health: Health, clock: FakeClock) -> None:
    all_ok(status)
    status.hold("postgres", "marker missing", "adopt")
    clock.advance(10_000)
    assert (health.health().code, health.health().body["status"]) == (200, "degraded")
    assert health.ready().code == 503


def test_liveness_depends_only_on_the_loops(status: Status, health: Health, clock: FakeClock) -> None:
    status.failing("redis", "x", "y")
    status.expect_beat("view_counts", within=10)
    assert health.live().code == 200
    clock.advance(11)
    assert health.live().code == 503
    assert health.live().body["stuck_loops"] == ["view_counts"]
    status.expect_beat("view_counts", within=10)
    assert health.live().code == 200


def test_ready_only_while_all_checks_pass_and_not_when_stopping(status: Status, health: Health) -> None:
    assert health.ready().code == 503
    all_ok(status)
    assert health.ready().code == 200
    status.stop()
    assert health.ready().code == 503
    assert health.ready().body["status"] == "stopping"


def test_quarantined_keys_are_listed(status: Status, clock: FakeClock) -> None:
    health = DocumentedHealth(status, clock, "1", timedelta(seconds=1), quarantined=lambda: {"vod:views:x": "bad"})
    assert health.health().body["quarantined_keys"] == {"vod:views:x": "bad"}


@pytest.fixture
async def url(status: Status, health: Health) -> AsyncIterator[str]:
    server = WebServer(health, [], Metrics().registry, "127.0.0.1", 0)
    await server.start()
    yield server.url
    await server.close()


@pytest.mark.parametrize("path", ["/health", "/ping", "/livez", "/readyz"])
async def test_endpoints_answer_json_to_get_and_head_only(url: str, status: Status, path: str) -> None:
    all_ok(status)
    async with aiohttp.ClientSession(url) as session:
        async with session.get(path) as response:
            assert response.status == 200
            assert response.content_type == "application/json"
            assert "status" in await response.json()
        async with session.head(path) as response:
            assert response.status == 200
        for method in ("POST", "PUT", "DELETE"):
            async with session.request(method, path) as response:
                assert (response.status, response.headers["Allow"]) == (405, "GET,HEAD")
                assert await response.json() == {"error": f"{method} is not allowed here"}
        async with session.get("/nothing-here") as response:
            assert response.status == 404
            assert await response.json() == {"error": "there is no such endpoint"}
            assert response.headers["Server"] == "viewer-worker"


def test_answers_are_utf_8_and_valid_with_any_text() -> None:
    body = Answer(200, {"id": "vidéo …", "odd": "\udc80"}).response().body
    assert isinstance(body, bytes)
    assert "vidéo …".encode() in body
    assert json.loads(body) == {"id": "vidéo …", "odd": "\udc80"}


async def test_metrics_are_served_in_both_formats(url: str) -> None:
    async with aiohttp.ClientSession(url) as session:
        async with session.get("/metrics") as response:
            text = await response.text()
            assert response.content_type == "text/plain"
        async with session.get("/metrics", headers={"Accept": "application/openmetrics-text"}) as response:
            assert response.content_type == "application/openmetrics-text"
            assert (await response.text()).endswith("# EOF\n")
    for name in (
        "redis_up",
        "postgres_up",
        "view_count_flushes_total",
        "view_count_flushed_views_total",
        "view_count_pending_keys",
        "view_count_oldest_pending_seconds",
        "view_count_settle_replays_total",
        "view_count_holds",
        "view_count_flush_failures_total",
        "view_count_flush_seconds_bucket",
        "view_count_quarantined_keys",
        "process_resident_memory_bytes",
    ):
        assert f"\n{name}" in text, name


async def test_client_that_never_reads_does_not_delay_the_close(status: Status, health: Health) -> None:
    server = WebServer(health, [], Metrics().registry, "127.0.0.1", 0)
    await server.start()
    port = int(server.url.rpartition(":")[2])
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 5000)
    await asyncio.sleep(0.5)
    await asyncio.wait_for(server.close(), 10)
    writer.transport.abort()


async def test_any_address_of_ipv6_serves_both_families(health: Health) -> None:
    server = WebServer(health, [], Metrics().registry, "::", 0)
    await server.start()
    port = int(server.url.rpartition(":")[2])
    for host in ("127.0.0.1", "::1"):
        _, writer = await asyncio.open_connection(host, port)
        writer.close()
    await server.close()
