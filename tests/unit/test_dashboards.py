"""Dashboards and rules: current, by Grafana's rules, and naming nothing that does not exist."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from deploy.observability.catalogue import PROCESS, exported, known
from deploy.observability.dashboards import FOLDER, dashboards
from deploy.observability.expressions import Expression, of_dashboards, of_rules, problems, selectors

KNOWN = known()
BOARDS: dict[str, dict[str, Any]] = {path.name: json.loads(path.read_text()) for path in FOLDER.glob("*.json")}
PANELS = [
    pytest.param(panel, id=f"{name}: {panel['title']}")
    for name, board in BOARDS.items()
    for panel in board["panels"]
    if panel["type"] != "row"
]
EXPRESSIONS = [*of_rules(), *of_dashboards()]


def test_committed_dashboards_are_current() -> None:
    assert {path.name: path.read_text() for path in FOLDER.glob("*.json")} == dashboards()


@pytest.mark.parametrize("expression", EXPRESSIONS, ids=lambda expression: expression.where)
def test_expression_names_known_metrics_and_labels(expression: Expression) -> None:
    assert problems(expression, KNOWN) == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sum(appender_requests_total)", "no such metric: appender_requests_total"),
        ('rate(projector_lag_seconds{aggregate="a"}[5m])', "no such label (selector): aggregate"),
        ("sum by (route) (rate(appender_events_appended_total[5m]))", "no such label (grouping): route"),
        ("histogram_quantile(0.9, sum by (le) (rate(appender_batch_events_sum[5m])))", "no such label (grouping): le"),
        (
            "projector_lag_seconds and on (name) projector_partitions_owned",
            "no such label (matching, left): name",
        ),
        ('projector_health{state=~"paused|broken"}', "never has state: broken"),
        ("sum(", "does not parse"),
    ],
)
def test_what_does_not_exist_is_found(text: str, words: str) -> None:
    assert any(problem.startswith(words) for problem in problems(Expression("here", text), KNOWN))


@pytest.mark.parametrize("name", BOARDS)
def test_dashboard_is_by_the_rules(name: str) -> None:
    board = BOARDS[name]
    assert board["uid"] == f"eventprojector-{name.removesuffix('.json')}"
    assert board["editable"] is False
    variables = {variable["name"]: variable for variable in board["templating"]["list"]}
    assert {"datasource", "namespace", "instance"} <= variables.keys()
    assert variables["datasource"]["type"] == "datasource"
    (link,) = board["links"]
    assert link["type"] == "dashboards"
    assert link["tags"] == board["tags"]
    assert link["includeVars"]
    assert link["keepTime"]
    identifiers = [panel["id"] for panel in board["panels"]]
    assert len(set(identifiers)) == len(identifiers)


@pytest.mark.parametrize("panel", PANELS)
def test_panel_says_what_it_shows(panel: dict[str, Any]) -> None:
    assert panel["title"]
    assert panel["description"].endswith(".")
    assert panel["fieldConfig"]["defaults"]["unit"]
    assert panel["datasource"]["uid"] == "${datasource}"
    references = [target["refId"] for target in panel["targets"]]
    assert references == list("ABCDEFGH"[: len(references)])
    for target in panel["targets"]:
        assert target["datasource"]["uid"] == "${datasource}"
        assert not re.search(r"\b(rate|increase)\((?:[^\[]*)\[(?!\$__rate_interval])", target["expr"])


@pytest.mark.parametrize("expression", list(of_dashboards()), ids=lambda expression: expression.where)
def test_every_selector_asks_for_the_chosen_namespaces(expression: Expression) -> None:
    if "variable namespace" not in expression.where:
        chosen = Expression(expression.where, expression.text.replace('namespace=~"$namespace"', 'namespace="chosen"'))
        for selector in selectors(chosen):
            assert ("namespace", "chosen") in {(m.name, m.value) for m in selector.matchers.matchers}, str(selector)


@pytest.mark.parametrize("name", BOARDS)
def test_panels_do_not_overlap(name: str) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in BOARDS[name]["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken
        assert place["x"] + place["w"] <= 24
        taken |= cells


def test_every_exported_metric_is_shown_or_alerted_on() -> None:
    text = "\n".join(expression.text for expression in EXPRESSIONS)
    unused = {
        metric.name
        for metric in exported()
        if metric.component != PROCESS and not any(re.search(rf"\b{name}\b", text) for name, _ in metric.series)
    }
    assert unused == set()
