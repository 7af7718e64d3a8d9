"""Alerts and recording rules: they are right (promtool), and each alert is shown not firing, firing and recovering."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import missing

ROOT = Path(__file__).parents[2]
RULES = sorted((ROOT / "deploy/helm/files/rules").glob("*.yaml"))
ALERTS = {
    path.stem: [rule for group in yaml.safe_load(path.read_text())["groups"] for rule in group["rules"]]
    for path in RULES
    if path.stem != "recording-rules"
}


def _promtool(*arguments: str | Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        missing("no promtool: apt-get install prometheus")
    done = subprocess.run([promtool, *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_accepts_all_rules() -> None:
    _promtool("check", "rules", "--lint=all", "--lint-fatal", *RULES)


@pytest.mark.parametrize("alert", ALERTS)
def test_alert_fires_and_recovers(alert: str) -> None:
    _promtool("test", "rules", Path(__file__).with_name(f"{alert}.yaml"))


@pytest.mark.parametrize("alert", ALERTS)
def test_every_rule_of_an_alert_is_shown_quiet_firing_and_recovered(alert: str) -> None:
    document = yaml.safe_load(Path(__file__).with_name(f"{alert}.yaml").read_text())
    shown: list[dict[str, str]] = []
    for test in document["tests"]:
        checks = [check for check in test["alert_rule_test"] if check["alertname"] == alert]
        fired = [index for index, check in enumerate(checks) if check["exp_alerts"]]
        for index in fired:
            shown += [expected["exp_labels"] for expected in checks[index]["exp_alerts"]]
        if fired and test is document["tests"][0]:
            assert fired[0] > 0, "shown firing, but not before it fires"
            assert fired[-1] < len(checks) - 1, "shown firing, but not after it"
    for rule in ALERTS[alert]:
        assert any(rule["labels"].items() <= labels.items() for labels in shown), (
            f"never shown firing: {rule['labels']}"
        )


@pytest.mark.parametrize("alert", ALERTS)
def test_alert_tells_what_how_much_and_what_to_do(alert: str) -> None:
    site = re.search(r"^site_url: (\S+)", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert site is not None
    for rule in ALERTS[alert]:
        assert rule["alert"] == alert
        assert rule["labels"]["severity"] in {"critical", "warning"}
        annotations: dict[str, Any] = rule["annotations"]
        assert annotations.keys() == {"summary", "description", "runbook_url"}
        assert re.search(r"\{\{ \$value \| humanize\w* }}", annotations["description"])
        assert annotations["summary"].endswith(".")
        assert annotations["runbook_url"] == f"{site[1]}runbooks/{alert}/"


@pytest.mark.parametrize("alert", ALERTS)
def test_alert_has_a_runbook(alert: str) -> None:
    text = (ROOT / "docs/runbooks" / f"{alert}.md").read_text()
    assert text.startswith(f"# {alert}\n")
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == ["Meaning", "Impact", "Diagnosis", "Mitigation"]


def test_no_runbook_without_an_alert() -> None:
    found = {path.stem for path in (ROOT / "docs/runbooks").glob("*.md")} - {"index"}
    assert found == ALERTS.keys()
