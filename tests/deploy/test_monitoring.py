"""deploy/prometheus and deploy/grafana: the rules, the runbook and the dashboard fit together and fit a real worker."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import yaml
from jsonschema import Draft7Validator

from tests.support.grpc_calls import MetricCalls, log_metric
from tests.support.records import Records
from tests.support.tools import tool
from worker.dev.servers import free_port

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "deploy" / "prometheus"
GRAFANA = ROOT / "deploy" / "grafana"
SCHEMAS = Path(__file__).with_name("schemas")
RUNBOOK = (ROOT / "docs" / "how-to" / "alerts.md").read_text()
RULES: list[dict[str, Any]] = yaml.safe_load((PROMETHEUS / "rules.yaml").read_text())["groups"][0]["rules"]
DASHBOARD: dict[str, Any] = json.loads((GRAFANA / "dashboard.json").read_text())
PANELS: list[dict[str, Any]] = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = {target["expr"] for panel in PANELS for target in panel["targets"]}
# Of a rule, what it selects: its expression has a result only when the alert fires.
SELECTORS = {selector for rule in RULES for selector in re.findall(r"\w+\{[^}]*\}", rule["expr"])}


def check(document: Any, schema: str, definition: str | None = None) -> list[str]:
    """How a document breaks a published schema, or one definition of it."""
    published = json.loads((SCHEMAS / f"{schema}.json").read_text())
    if definition is not None:
        published["$ref"] = f"#/definitions/{definition}"
    errors = Draft7Validator(published).iter_errors(document)
    return [f"{list(error.absolute_path)}: {error.message}" for error in errors]


def test_dashboard_follows_the_schemas_of_grafana() -> None:
    assert check(DASHBOARD, "grafana-dashboard") == []
    for panel in PANELS:
        schema = f"grafana-{panel['type']}"
        assert check(panel["options"], schema, "Options") == [], panel["title"]
        if custom := panel["fieldConfig"]["defaults"].get("custom"):
            assert check(custom, schema, "FieldConfig") == [], panel["title"]
        for target in panel["targets"]:
            assert check(target, "grafana-prometheus") == [], panel["title"]


def test_every_panel_has_a_unit_a_description_and_the_variables_of_the_dashboard() -> None:
    for panel in PANELS:
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["description"].endswith("."), panel["title"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}, panel["title"]
    for query in QUERIES:
        assert query.count('{job="$job"') == query.count("{"), query
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len({*ids}) == len(ids)
    assert {"datasource", "job"} == {variable["name"] for variable in DASHBOARD["templating"]["list"]}


def test_every_alert_has_a_section_in_the_runbook_and_a_link_to_it() -> None:
    sections = re.findall(r"^## (\w+)$", RUNBOOK, re.MULTILINE)
    assert sections == [rule["alert"] for rule in RULES]
    for rule in RULES:
        assert rule["annotations"]["runbook_url"] == f"https://example.com/alerts.md#{rule['alert'].lower()}"


def test_the_tests_of_promtool_see_every_alert_fire() -> None:
    tests = yaml.safe_load(Path(__file__).with_name("alerts.yaml").read_text())["tests"]
    fired = {case["alertname"] for test in tests for case in test.get("alert_rule_test", ()) if case["exp_alerts"]}
    samples = str([case["exp_samples"] for test in tests for case in test.get("promql_expr_test", ())])
    fired |= set(re.findall(r'alertname="(\w+)"', samples))
    assert fired == {rule["alert"] for rule in RULES}


def test_promtool_accepts_the_configuration() -> None:
    promtool = tool("promtool", "prometheus")
    done = subprocess.run(
        [promtool, "check", "config", PROMETHEUS / "prometheus.yaml"], capture_output=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


class Prometheus:
    """A server that scrapes one worker, with the configuration in deploy/ at a faster pace."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._program = tool("prometheus", "prometheus")
        self._address = f"127.0.0.1:{free_port()}"

    @contextlib.asynccontextmanager
    async def scraping(self, target: str) -> AsyncIterator[None]:
        config = yaml.safe_load((PROMETHEUS / "prometheus.yaml").read_text())
        config["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
        config["rule_files"] = [str(PROMETHEUS / name) for name in config["rule_files"]]
        config["scrape_configs"][0]["static_configs"][0]["targets"] = [target]
        path = self._folder / "prometheus.yaml"
        path.write_text(yaml.safe_dump(config))
        with (self._folder / "log").open("wb") as log:
            server = await asyncio.create_subprocess_exec(
                self._program,
                f"--config.file={path}",
                f"--storage.tsdb.path={self._folder / 'data'}",
                f"--web.listen-address={self._address}",
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        try:
            async with aiohttp.ClientSession(f"http://{self._address}") as self._session:
                yield
        finally:
            server.kill()
            await server.wait()

    async def is_ready(self) -> bool:
        try:
            async with self._session.get("/-/ready") as response:
                return response.ok
        except aiohttp.ClientConnectionError:
            return False

    async def has_series(self, query: str) -> bool:
        return bool((await self._ask("query", query=query))["result"])

    async def rules(self) -> list[dict[str, Any]]:
        return [rule for group in (await self._ask("rules"))["groups"] for rule in group["rules"]]

    async def _ask(self, path: str, **parameters: str) -> dict[str, Any]:
        async with self._session.get(f"/api/v1/{path}", params=parameters) as response:
            answer: dict[str, Any] = await response.json()
        assert answer["status"] == "success", f"{parameters}: {answer['error']}"
        return dict(answer["data"])


@contextlib.asynccontextmanager
async def traffic(records: Records, calls: MetricCalls) -> AsyncIterator[None]:
    """Views, messages, entries of two streams and calls over gRPC, during the block."""
    stop = asyncio.Event()

    async def go_on() -> None:
        async with calls.channel() as channel:
            while not stop.is_set():
                await records.world.view("vod_1")
                await records.world.announce("vod_1")
                await records.add()
                await log_metric(channel)
                await asyncio.sleep(0.05)

    task = asyncio.create_task(go_on())
    try:
        yield
    finally:
        stop.set()
        await task


async def test_prometheus_answers_every_query_of_the_dashboard_and_the_rules(records: Records, tmp_path: Path) -> None:
    calls, prometheus = MetricCalls(records), Prometheus(tmp_path)
    worker = calls.start(PIPELINES="view_counts,view_events,chunk_requests,metrics", VIEW_EVENTS_FLUSH_INTERVAL="50ms")
    address = json.loads(await worker.wait_for_log('"started"'))["url"].removeprefix("http://")
    left = {query.replace("$job", "viewer-worker").replace("$__rate_interval", "1m") for query in QUERIES} | SELECTORS

    async def all_have_series() -> bool:
        for query in [*left]:
            if await prometheus.has_series(query):
                left.discard(query)
        return not left

    async def all_evaluated() -> bool:
        return all(rule["health"] != "unknown" for rule in await prometheus.rules())

    async with traffic(records, calls), prometheus.scraping(address):
        await records.wait(prometheus.is_ready)
        with contextlib.suppress(TimeoutError):
            await records.wait(all_have_series)
        assert left == set(), "no series"
        await records.wait(all_evaluated)
        found = await prometheus.rules()
    assert [rule["name"] for rule in found] == [rule["alert"] for rule in RULES]
    assert {rule["name"]: rule["lastError"] for rule in found if rule["health"] != "ok"} == {}
    assert [rule["name"] for rule in found if rule["state"] == "firing"] == []
