"""PodMonitors, rules and dashboards: for the last two whatever lies in the chart's `files/rules` and `files/dashboards`."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from tests.chart.matrix import MONITORING
from tests.chart.rendering import CHART, EMBEDDED, KUBERNETES, Helm, Render, RenderError, find, pods

if TYPE_CHECKING:
    from pathlib import Path

DASHBOARD = '{"title": "{{ not a template }}", "uid": "x"}\n'
RULES = """
groups:
  - name: projector
    interval: 30s
    rules:
      - record: projector:rate
        expr: sum(rate(x[5m]))
      - alert: Stuck
        expr: x > 0
        labels: {severity: critical, team: nobody}
        annotations: {summary: "{{ $labels.projection }} is stuck"}
      - alert: Slow
        expr: x > 1
  - name: slow
    rules: [{alert: Slow, expr: x > 2}]
"""


@pytest.fixture(scope="session")
def chart_with_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the chart with one file of rules and one dashboard."""
    copy = tmp_path_factory.mktemp("chart") / "eventprojector"
    shutil.copytree(CHART, copy, ignore=shutil.ignore_patterns("rules", "dashboards"))
    for folder, name, text in (("rules", "r.yaml", RULES), ("dashboards", "overview.json", DASHBOARD)):
        (copy / "files" / folder).mkdir()
        (copy / "files" / folder / name).write_text(text)
    return copy


def monitoring(run_helm: Helm, chart: Path, **values: Any) -> list[dict[str, Any]]:
    text = run_helm(
        "template",
        "shop",
        str(chart),
        "--namespace=shop",
        f"--kube-version={KUBERNETES}",
        *(f"--api-versions={api}" for api in MONITORING),
        values=EMBEDDED | {"monitoring": values},
    )
    return [manifest for manifest in yaml.safe_load_all(text) if manifest]


def test_rules_are_taken_over_word_for_word(run_helm: Helm, chart_with_files: Path) -> None:
    manifests = monitoring(run_helm, chart_with_files, prometheusRule={"enabled": True, "additionalLabels": {"a": "b"}})
    rule = find(manifests, "PrometheusRule", "shop-eventprojector")
    assert rule["metadata"]["labels"]["a"] == "b"
    groups = yaml.safe_load(RULES)["groups"]
    for group in groups:
        for each in group["rules"]:
            if "alert" in each:
                each.setdefault("labels", {})
    assert rule["spec"]["groups"] == groups


@pytest.mark.parametrize("missing", ["projector", "operator"])
def test_what_a_release_does_not_run_is_not_missed(run_helm: Helm, missing: str) -> None:
    values = EMBEDDED | {missing: {"enabled": False}, "monitoring": {"prometheusRule": {"enabled": True}}}
    text = run_helm(
        "template", "shop", str(CHART), "--namespace=shop", f"--kube-version={KUBERNETES}",
        *(f"--api-versions={api}" for api in MONITORING), values=values,
    )  # fmt: skip
    rule = find([each for each in yaml.safe_load_all(text) if each], "PrometheusRule", "shop-eventprojector")
    alerts = {each.get("alert") for group in rule["spec"]["groups"] for each in group["rules"]}
    absent = {"ProjectorMetricsAbsent", "OperatorMetricsAbsent"}
    assert absent - alerts == {f"{missing.capitalize()}MetricsAbsent"}


def test_alerts_can_be_left_out_and_labelled(run_helm: Helm, chart_with_files: Path) -> None:
    values = {"enabled": True, "excludeRules": ["Slow"], "ruleLabels": {"team": "orders"}}
    rule = find(monitoring(run_helm, chart_with_files, prometheusRule=values), "PrometheusRule", "shop-eventprojector")
    [group] = rule["spec"]["groups"]  # a group without rules goes
    recording, alert = group["rules"]
    assert "labels" not in recording
    assert alert["labels"] == {"severity": "critical", "team": "orders"}


def test_dashboards_are_config_maps_that_grafana_finds(run_helm: Helm, chart_with_files: Path) -> None:
    values = {"enabled": True, "namespace": "grafana", "annotations": {"grafana_folder": "Events"}}
    manifests = monitoring(run_helm, chart_with_files, dashboards=values)
    board = find(manifests, "ConfigMap", "shop-eventprojector-dashboard-overview")
    assert board["metadata"]["namespace"] == "grafana"
    assert board["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert board["metadata"]["annotations"] == {"grafana_folder": "Events"}
    assert board["data"] == {"eventprojector-overview.json": DASHBOARD}


def test_the_shipped_files_are_rendered(render: Render) -> None:
    values = {"monitoring": {"prometheusRule": {"enabled": True}, "dashboards": {"enabled": True}}}
    manifests = render(values, apis=MONITORING)
    files = [yaml.safe_load(path.read_text()) for path in sorted((CHART / "files" / "rules").glob("*.yaml"))]
    alerts = {rule.get("alert") for file in files for group in file["groups"] for rule in group["rules"]}
    groups = find(manifests, "PrometheusRule", "shop-eventprojector")["spec"]["groups"]
    assert {rule.get("alert") for group in groups for rule in group["rules"]} == alerts
    assert len({group["name"] for group in groups}) == len(groups), "Prometheus refuses two groups of one name"
    boards = [each for each in manifests if each["metadata"].get("labels", {}).get("grafana_dashboard")]
    assert len(boards) == len(list((CHART / "files" / "dashboards").glob("*.json")))
    for board in boards:
        [text] = board["data"].values()
        assert json.loads(text)
        # The largest object that etcd takes is 1.5 MiB, the largest ConfigMap 1 MiB.
        assert len(text) < 1024 * 1024


@pytest.mark.parametrize("name", ["podMonitor", "prometheusRule"])
def test_what_happens_without_the_definitions(name: str, render: Render) -> None:
    kind = name[0].upper() + name[1:]

    def kinds(mode: str) -> set[str]:
        values = {"monitoring": {name: {"enabled": True, "renderMode": mode}}}
        return {each["kind"] for each in render(values)}

    assert kind not in kinds("skipIfMissing")
    assert kind in kinds("alwaysRender")
    with pytest.raises(RenderError, match=f"has no {kind}"):
        kinds("failIfMissing")


def test_pod_monitors_scrape_ports_that_exist(render: Render) -> None:
    token = {"deployment": {"enabled": True, "auth": {"token": "correct-horse-battery"}}}
    manifests = render(
        {"appender": token, "monitoring": {"podMonitor": {"enabled": True, "interval": "15s"}}}, apis=MONITORING
    )
    components = find(manifests, "PodMonitor", "shop-eventprojector-components")["spec"]
    sidecars = find(manifests, "PodMonitor", "shop-eventprojector-sidecars")["spec"]
    scraped = [endpoint["port"] for endpoint in components["podMetricsEndpoints"]]
    honoured = [endpoint["port"] for endpoint in components["podMetricsEndpoints"] if endpoint.get("honorLabels")]
    assert honoured == ["operator-ops"], "its conditions carry the namespace of the resource"
    assert all(endpoint["interval"] == "15s" for endpoint in components["podMetricsEndpoints"])
    for component in ("projector", "operator", "appender"):
        [container] = pods(manifests)[f"Deployment shop-eventprojector-{component}"]["containers"]
        assert {port["name"] for port in container["ports"]} & set(scraped) == {f"{component}-ops"}
    assert [endpoint["port"] for endpoint in sidecars["podMetricsEndpoints"]] == ["appender-ops"]
    assert sidecars["namespaceSelector"] == {"matchNames": ["shop"]}
