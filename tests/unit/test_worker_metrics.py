"""The metrics of a worker that has just started, and the alert rules on them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from prometheus_client import Counter, Gauge, Histogram

from tests.support.fakes import FakeClock
from worker.app.connections import open_connections
from worker.app.counters import build_counters
from worker.app.pipelines import build_pipelines, name_checks
from worker.db.target.table import REASONS
from worker.observability.metrics import Metrics
from worker.observability.status import MESSAGES, SERVERS, VIEW_COUNTS, Status
from worker.pipelines.records import RECORD_TYPES
from worker.settings.environment import load_settings

ROOT = Path(__file__).parents[2]
AGREEMENT = "view_count_last_agreement_timestamp_seconds"


@pytest.fixture
async def started() -> Metrics:
    """The metrics of a worker with all pipelines, as they are before it connects."""
    settings = load_settings(environ={"PIPELINES": ",".join(["view_counts", *RECORD_TYPES])})
    metrics = Metrics()
    status = Status(FakeClock().monotonic, (*SERVERS, VIEW_COUNTS, MESSAGES, *name_checks(settings)))
    async with open_connections(settings) as (database, redis):
        build_counters(settings, database, redis, status, metrics)
        build_pipelines(settings, database, redis, status, metrics)
    return metrics


def test_counters_with_known_labels_are_0_at_the_start(started: Metrics) -> None:
    text = (ROOT / "docs" / "reference" / "metrics.md").read_text()
    expected: dict[str, list[dict[str, str]]] = {
        "view_count_target_skipped_total": [{"reason": reason} for reason in REASONS],
        "view_count_updates_invalid_total": [
            {"reason": kind}
            for kind in re.findall(r"`(\w+)`", text.partition("cannot be counted, by `reason`:")[2].partition("|")[0])
        ],
    }
    for pipeline in RECORD_TYPES:
        labels = {"pipeline": pipeline}
        for counter in vars(started.records).values():
            if isinstance(counter, Counter) and counter._labelnames == ("pipeline",):
                expected.setdefault(f"{counter._name}_total", []).append(labels)
        expected.setdefault("timescale_write_errors_total", []).extend(
            labels | {"error_type": error} for error in ("write_failed", "queue_full")
        )
    assert len(expected) > 12
    for name, series in expected.items():
        for labels in series:
            assert started.registry.get_sample_value(name, labels) == 0, (name, labels)


def test_time_of_the_last_agreement_has_no_sample_before_the_first(started: Metrics) -> None:
    # With a 0 or the time of the start, an alert on its age would fire, or not fire, for no agreement at all.
    assert started.registry.get_sample_value(AGREEMENT) is None
    started.last_agreement.set_to_current_time()
    assert (started.registry.get_sample_value(AGREEMENT) or 0) > 1_700_000_000


@pytest.mark.parametrize("server", ["redis", "postgres"])
def test_state_of_a_server_has_two_names(server: str) -> None:
    metrics = Metrics()
    for up in (1, 0):
        getattr(metrics, f"{server}_up").set(up)
        for name in (f"{server}_up", f"viewer_worker_{server}_up"):
            assert metrics.registry.get_sample_value(name) == up


def test_alert_rules_use_metrics_and_labels_that_exist() -> None:
    always = {"job", "instance"}
    families = {
        metric._name + suffix: always | {*metric._labelnames, *labels}
        for metrics in (Metrics(), Metrics().records)
        for metric in vars(metrics).values()
        for kind, suffix, labels in ((Counter, "_total", ()), (Gauge, "", ()), (Histogram, "_bucket", ("le",)))
        if isinstance(metric, kind)
    }
    families |= dict.fromkeys((AGREEMENT, "viewer_worker_redis_up", "viewer_worker_postgres_up"), always)
    groups = yaml.safe_load((ROOT / "deploy" / "prometheus" / "rules.yaml").read_text())["groups"]
    rules = {rule["alert"]: rule for group in groups for rule in group["rules"]}
    for name, rule in rules.items():
        expression, texts = rule["expr"], " ".join(rule["annotations"].values())
        metrics = set(re.findall(r'(\w+)\{job="viewer-worker"[,}]', expression))
        assert metrics, name
        assert metrics <= set(families), name
        labels = set.intersection(*(families[metric] for metric in metrics))
        kept = set(re.findall(r"\w+", " ".join(re.findall(r"by \((.*?)\)", expression)))) or labels
        assert kept <= labels, name
        assert set(re.findall(r"\$labels\.(\w+)", texts)) <= kept, name
        # A state has to last: at a start each is 0 for a moment. A window lasts by itself.
        assert ("for" in rule) is ("increase(" not in expression), name
    for name, metric in {"ViewsNotFlushed": AGREEMENT, "ViewerWorkerAbsent": "viewer_worker_build_info"}.items():
        assert f"absent({metric}{{" in rules[name]["expr"]
