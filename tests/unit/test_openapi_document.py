"""The OpenAPI document has every endpoint of the worker, and the limits in the code."""

from __future__ import annotations

import re
from datetime import timedelta
from pathlib import Path
from typing import Any

import aiohttp
import jsonschema_rs
import pytest

from tests.support.fakes import FakeClock, FakeHistories, FakeNumbers, FakeRecords
from tests.support.http import serving
from tests.support.openapi import DOCUMENT, assert_documented
from worker import __version__
from worker.contract.ids import MAX_ID_BYTES
from worker.observability.metrics import Metrics
from worker.observability.status import State, Status
from worker.web import history_api, records_api, views_api
from worker.web.health import Health
from worker.web.history_api import HistoryApi
from worker.web.records_api import RecordsApi
from worker.web.server import WebServer
from worker.web.views_api import ViewsApi

SCHEMAS = DOCUMENT["components"]["schemas"]
# These answer that the id is empty.
WITHOUT_AN_ID = {"/v1/bars", "/v1/sessions", "/v1/metrics"}


def test_document_is_valid_and_of_this_version() -> None:
    import schemathesis  # takes a second, which the other tests need not wait for

    schemathesis.openapi.from_dict(DOCUMENT).validate()
    assert DOCUMENT["info"]["version"] == __version__


def test_every_route_is_in_the_document_and_the_reverse() -> None:
    clock = FakeClock()
    health = Health(Status(clock.monotonic, ()), clock, "0", timedelta())
    apis = (HistoryApi(FakeHistories(), clock), ViewsApi(FakeNumbers()), RecordsApi(FakeRecords(), clock))
    server = WebServer(health, [route for api in apis for route in api.routes()], Metrics().registry, "127.0.0.1", 0)
    resources = server._runner.app.router.resources()
    paths = {resource.canonical.replace("{service_and_metric}", "{service}/{metric}") for resource in resources}
    assert paths == set(DOCUMENT["paths"]) | WITHOUT_AN_ID


def parameter(path: str, name: str) -> Any:
    (found,) = (each for each in DOCUMENT["paths"][path]["get"]["parameters"] if each.get("name") == name)
    return found["schema"]


def test_limits_are_those_of_the_code() -> None:
    assert SCHEMAS["Id"]["maxLength"] == MAX_ID_BYTES
    assert parameter("/v1/views", "ids")["maxItems"] == views_api.MAX_IDS
    assert parameter("/v1/top", "limit")["maximum"] == views_api.MAX_LIMIT
    assert parameter("/v1/bars/{symbol}", "latest")["maximum"] == records_api.MAX_LATEST
    assert parameter("/v1/views/{vod_id}/history", "bucket")["enum"] == list(history_api.BUCKETS)
    assert SCHEMAS["Bars"]["properties"]["bars"]["maxItems"] == records_api.MAX_BARS
    assert SCHEMAS["MetricValues"]["properties"]["values"]["maxItems"] == records_api.MAX_VALUES
    assert SCHEMAS["MetricBuckets"]["properties"]["buckets"]["maxItems"] == records_api.MAX_BUCKETS
    # A range of 1500 buckets that does not begin with one touches another.
    assert SCHEMAS["History"]["properties"]["buckets"]["maxItems"] == history_api.MAX_BUCKETS + 1
    assert SCHEMAS["Check"]["properties"]["status"]["enum"] == list(State)


async def test_worker_serves_the_document() -> None:
    async with serving([]) as url, aiohttp.ClientSession() as session, session.get(f"{url}/openapi.json") as response:
        assert (response.status, response.content_type) == (200, "application/json")
        assert await response.json() == DOCUMENT


@pytest.mark.parametrize(
    ("path", "code", "body"),
    [
        ("/v1/views/a", 200, {"vodId": "a", "views": 1, "pending": 0, "new": 1}),
        ("/v1/views/a", 200, {"vodId": "a", "views": 1}),
        ("/v1/views/a/history", 200, {"vodId": "a", "bucket": "hour", "asOf": "soon", "buckets": []}),
        ("/v1/views", 503, {"error": "no answer in time"}),
        ("/v1/sessions/a", 500, {"error": "a mistake"}),
        ("/v1/new", 200, {}),
    ],
)
def test_answer_that_is_not_in_the_document_fails_a_test(path: str, code: int, body: object) -> None:
    with pytest.raises((jsonschema_rs.ValidationError, AssertionError)):
        assert_documented(path, code, body)


def test_reference_describes_every_documented_endpoint() -> None:
    reference = (Path(__file__).parents[2] / "docs/reference/http.md").read_text()
    for path in DOCUMENT["paths"]:
        assert re.search("GET " + re.sub(r"{\w+}", r"\\S+?", path) + r"[?`]", reference), path
