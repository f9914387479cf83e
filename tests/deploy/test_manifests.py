"""The files in deploy/ are valid and consistent with each other and with the worker."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.tools import tool
from worker.contract.durations import parse_duration
from worker.settings.model import Settings

DEPLOY = Path(__file__).parents[2] / "deploy"
PROMETHEUS_CONFIG = DEPLOY / "prometheus" / "prometheus.yaml"
PROVISIONING = DEPLOY / "grafana" / "provisioning"
BIN = Path(sys.executable).parent
MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
WORKLOADS = [manifest for manifest in MANIFESTS if manifest.stem not in ("service", "podmonitor")]
SCHEMAS = Path(__file__).with_name("schemas")
FOLLOWS = (BIN / "check-jsonschema", "--regex-variant", "python", "--schemafile")
DRAIN = Settings.model_fields["shutdown_timeout"].default


def compose() -> dict[str, Any]:
    return load(DEPLOY / "compose.yaml")


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def succeeds(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def containers(manifest: dict[str, Any]) -> dict[str, dict[str, Any]]:
    pod = manifest["spec"]["template"]["spec"]
    return {container["name"]: container for container in [*pod.get("initContainers", ()), *pod["containers"]]}


def test_compose_file_follows_its_schema() -> None:
    succeeds(BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", DEPLOY / "compose.yaml")


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda path: path.name)
def test_kubernetes_manifest_follows_its_schema(manifest: Path) -> None:
    schema = SCHEMAS / f"{load(manifest)['kind'].lower()}.json"
    if schema.exists():
        succeeds(*FOLLOWS, schema, manifest)
    else:
        succeeds(BIN / "kubernetes-validate", "--strict", manifest)


def test_pod_monitor_finds_the_port_of_the_workers_under_the_name_that_the_rules_expect() -> None:
    monitor, deployment = (load(DEPLOY / "kubernetes" / f"{name}.yaml") for name in ("podmonitor", "deployment"))
    pod = deployment["spec"]["template"]
    assert monitor["spec"]["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    assert endpoint["port"] in {port["name"] for port in containers(deployment)["viewer-worker"]["ports"]}
    (relabeling,) = endpoint["relabelings"]
    rules = (DEPLOY / "prometheus" / "rules.yaml").read_text()
    assert set(re.findall(r'job="([^"]+)"', rules)) == {relabeling["replacement"]}


def test_kubectl_gets_a_valid_prometheus_rule_from_the_commands_of_the_page(tmp_path: Path) -> None:
    page = (DEPLOY.parent / "docs" / "how-to" / "deploy.md").read_text()
    (block,) = (code for code in re.findall(r"```sh\n(.*?)```", page, re.DOTALL) if "PrometheusRule" in code)
    (rule,) = re.findall(r"^\(printf .*?\| kubectl apply -f -$", block, re.DOTALL | re.MULTILINE)
    made = tmp_path / "rule.yaml"
    succeeds("sh", "-euc", f"cd {DEPLOY.parent}; kubectl() {{ cat > {made}; }}; {rule}")
    succeeds(*FOLLOWS, SCHEMAS / "prometheusrule.json", made)
    assert load(made)["spec"] == load(DEPLOY / "prometheus" / "rules.yaml")


def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    analyze = tool("systemd-analyze", "systemd")
    unit = tmp_path / "viewer-worker.service"
    text = (DEPLOY / "systemd" / unit.name).read_text()
    # systemd-analyze also looks for the program, which is not installed here.
    unit.write_text(re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", text, flags=re.MULTILINE))
    succeeds(analyze, "verify", "--man=no", unit)


def test_make_secrets_creates_the_secrets_of_the_compose_file(tmp_path: Path) -> None:
    shutil.copytree(DEPLOY, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("secrets"))
    succeeds(tmp_path / "make-secrets")
    made = {f"secrets/{path.name}" for path in (tmp_path / "secrets").iterdir()}
    declared = {name: secret["file"] for name, secret in compose()["secrets"].items()}
    assert set(declared.values()) <= made
    used = {name for service in compose()["services"].values() for name in service.get("secrets", ())}
    assert used == set(declared)


def test_secrets_are_private_and_never_overwritten(tmp_path: Path) -> None:
    shutil.copytree(DEPLOY, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("secrets"))
    succeeds(tmp_path / "make-secrets")
    before = {path.name: path.read_text() for path in (tmp_path / "secrets").iterdir()}
    assert (tmp_path / "secrets").stat().st_mode & 0o077 == 0
    assert subprocess.run([tmp_path / "make-secrets"], capture_output=True, check=False).returncode == 1
    assert {path.name: path.read_text() for path in (tmp_path / "secrets").iterdir()} == before
    assert "SHA256" not in before["redis_users.acl"]


@pytest.mark.parametrize("name", ["worker", "migrate", "grant", "redis", "producer", "prometheus", "grafana"])
def test_compose_services_are_read_only_and_unprivileged(name: str) -> None:
    service = compose()["services"][name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]


def test_one_compose_service_builds_the_image_that_the_others_wait_for() -> None:
    services = compose()["services"]
    (builder,) = (name for name, service in services.items() if "build" in service)
    users = {name for name, service in services.items() if service["image"] == services[builder]["image"]} - {builder}
    assert users == {"worker"}
    for name in users:
        assert services[name]["pull_policy"] == "never"
        assert builder in starts_after(name)


def test_monitoring_starts_only_with_its_profile_and_mounts_files_that_exist() -> None:
    services = compose()["services"]
    assert {name for name, service in services.items() if service.get("profiles") == ["monitoring"]} == {
        "prometheus",
        "grafana",
    }
    for name in ("prometheus", "grafana"):
        assert all(port.startswith("127.0.0.1:") for port in services[name]["ports"])
        sources = [volume.split(":")[0] for volume in services[name]["volumes"]]
        assert all((DEPLOY / source).exists() for source in sources if source.startswith("."))
    assert f"--config.file=/etc/prometheus/{PROMETHEUS_CONFIG.name}" in services["prometheus"]["command"]
    (scraped,) = load(PROMETHEUS_CONFIG)["scrape_configs"]
    port = Settings.model_fields["health_check_port"].default
    assert scraped["static_configs"] == [{"targets": [f"worker:{port}"]}]
    (provider,) = load(PROVISIONING / "dashboards" / "viewer-worker.yaml")["providers"]
    assert f"./grafana/dashboard.json:{provider['options']['path']}/dashboard.json:ro" in services["grafana"]["volumes"]
    (source,) = load(PROVISIONING / "datasources" / "prometheus.yaml")["datasources"]
    assert source["url"] == "http://prometheus:9090"
    assert source["jsonData"]["timeInterval"] == load(PROMETHEUS_CONFIG)["global"]["scrape_interval"]


def starts_after(name: str) -> set[str]:
    """All services that a service of the Compose file waits for."""
    direct = set(compose()["services"][name].get("depends_on", ()))
    return direct.union(*map(starts_after, direct))


@pytest.mark.parametrize("manifest", WORKLOADS, ids=lambda path: path.name)
def test_worker_in_kubernetes_is_read_only_and_unprivileged(manifest: Path) -> None:
    pod = load(manifest)["spec"]["template"]["spec"]
    (worker,) = (found for found in containers(load(manifest)).values() if found["image"].startswith("viewer-worker:"))
    security = pod.get("securityContext", {}) | worker["securityContext"]
    assert security["runAsNonRoot"] is security["readOnlyRootFilesystem"] is True
    assert security["allowPrivilegeEscalation"] is False
    assert security["capabilities"] == {"drop": ["ALL"]}
    assert security["runAsUser"] == 10001


def test_sidecar_never_takes_its_application_out_of_service() -> None:
    sidecar = containers(load(DEPLOY / "kubernetes" / "sidecar.yaml"))["viewer-worker"]
    assert sidecar["restartPolicy"] == "Always"
    assert "readinessProbe" not in sidecar
    assert {sidecar[probe]["httpGet"]["path"] for probe in ("startupProbe", "livenessProbe")} == {"/livez"}


def test_standalone_worker_has_a_readiness_and_a_liveness_probe() -> None:
    worker = containers(load(DEPLOY / "kubernetes" / "deployment.yaml"))["viewer-worker"]
    assert worker["readinessProbe"]["httpGet"]["path"] == "/readyz"
    assert worker["livenessProbe"]["httpGet"]["path"] == "/livez"


def test_every_platform_waits_longer_than_the_worker_drains() -> None:
    unit = (DEPLOY / "systemd" / "viewer-worker.service").read_text()
    stop = re.search(r"^TimeoutStopSec=(\S+)$", unit, re.MULTILINE)
    assert stop is not None
    grace_periods = [parse_duration(stop[1]), parse_duration(compose()["services"]["worker"]["stop_grace_period"])]
    for name in ("deployment", "sidecar"):
        pod = load(DEPLOY / "kubernetes" / f"{name}.yaml")["spec"]["template"]["spec"]
        grace_periods.append(timedelta(seconds=pod["terminationGracePeriodSeconds"]))
    assert all(period > DRAIN for period in grace_periods)


def test_every_setting_in_deploy_exists() -> None:
    named = {name for service in ("worker", "migrate") for name in compose()["services"][service]["environment"]}
    for manifest in WORKLOADS:
        named |= {entry["name"] for found in containers(load(manifest)).values() for entry in found.get("env", ())}
    unit = (DEPLOY / "systemd" / "viewer-worker.service").read_text()
    named |= set(re.findall(r"^Environment=(\w+)=", unit, re.MULTILINE))
    assert {name.removesuffix("_FILE").lower() for name in named} <= set(Settings.model_fields)


def test_metrics_reach_the_worker_over_grpc() -> None:
    port = Settings.model_fields["grpc_port"].default
    worker = compose()["services"]["worker"]
    assert f"127.0.0.1:{port}:{port}" in worker["ports"]
    assert "metrics" in worker["environment"]["PIPELINES"]
    deployment, service = (load(DEPLOY / "kubernetes" / f"{name}.yaml") for name in ("deployment", "service"))
    replica = containers(deployment)["viewer-worker"]
    assert {"name": "grpc", "containerPort": port} in replica["ports"]
    assert any(entry["name"] == "PIPELINES" and "metrics" in entry["value"] for entry in replica["env"])
    assert service["spec"]["selector"].items() <= deployment["spec"]["template"]["metadata"]["labels"].items()
    assert service["spec"]["ports"][0]["targetPort"] == "grpc"


def test_alerts_fire_when_they_should_and_not_at_a_start() -> None:
    succeeds(tool("promtool", "prometheus"), "test", "rules", Path(__file__).with_name("alerts.yaml"))
