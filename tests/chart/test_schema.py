"""The values' schema: closed, generated, and with messages where a schema cannot say it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import jsonschema
import pytest
import yaml

from tests.chart.matrix import MATRIX, TOKEN
from tests.chart.rendering import CHART, EMBEDDED, KUBERNETES, ROOT, Helm, Render, RenderError

if TYPE_CHECKING:
    from collections.abc import Iterator


def leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    if isinstance(value, dict) and value:
        for key, each in value.items():
            yield from leaves(each, (*path, key))
    else:
        yield path


def test_readme_and_schema_are_current() -> None:
    done = subprocess.run(
        [sys.executable, "deploy/chart.py", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_schema_is_draft_7_which_helm_reads() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    assert schema["$schema"] == "http://json-schema.org/draft-07/schema#"
    jsonschema.Draft7Validator.check_schema(schema)
    jsonschema.validate(yaml.safe_load((CHART / "values.yaml").read_text()), schema)


@pytest.mark.parametrize("values", [{}, EMBEDDED, MATRIX["all plumbing"]], ids=["nothing", "a trial", "all plumbing"])
def test_helm_lint_is_silent(values: dict[str, Any], run_helm: Helm) -> None:
    text = run_helm("lint", "--strict", "--kube-version", KUBERNETES, str(CHART), values=values)
    assert "WARNING" not in text
    assert "ERROR" not in text


def closed_objects(schema: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    if "properties" in schema:
        assert schema["additionalProperties"] is False, path
        yield path
        for key, each in schema["properties"].items():
            yield from closed_objects(each, (*path, key))


def test_every_object_of_the_schema_is_closed() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    assert len(list(closed_objects(schema))) > 20


@pytest.mark.parametrize(
    "path", ["replicaCount", "mongodb.url", "projector.replica", "image.name", "operator.rbac.crate"]
)
def test_a_typo_is_refused(path: str, render: Render) -> None:
    *folders, key = path.split(".")
    values: dict[str, Any] = {key: "x"}
    for folder in reversed(folders):
        values = {folder: values}
    with pytest.raises(RenderError, match=f"additional properties '{key}' not allowed"):
        render(EMBEDDED | values if folders != ["mongodb"] else values)


@pytest.mark.parametrize(
    ("values", "where"),
    [
        ({"operator": {"replicas": 2}}, "/operator/replicas"),
        ({"projector": {"replicas": -1}}, "/projector/replicas"),
        ({"projector": {"replicas": "3"}}, "/projector/replicas"),
        ({"projector": {"projections": {"source": "files"}}}, "/projector/projections/source"),
        ({"projector": {"projections": {"definitions": {"Bad Name": {}}}}}, "/projector/projections/definitions"),
        ({"mongodb": {"uri": "http://mongo"}}, "/mongodb/uri"),
        ({"image": {"digest": "sha256:abc"}}, "/image/digest"),
        ({"image": {"pullPolicy": "Sometimes"}}, "/image/pullPolicy"),
        ({"log": {"level": "loud"}}, "/log/level"),
        ({"appender": {"port": 0}}, "/appender/port"),
        ({"appender": {"deployment": {"auth": {"token": "short"}}}}, "/appender/deployment/auth/token"),
        ({"injector": {"failurePolicy": "Panic"}}, "/injector/failurePolicy"),
        ({"eventstore": {"database": "a.b"}}, "/eventstore/database"),
        ({"commonLabels": {"a": 1}}, "/commonLabels/a"),
        ({"monitoring": {"podMonitor": {"interval": "fast"}}}, "/monitoring/podMonitor/interval"),
        ({"networkPolicy": {"mongodbPorts": []}}, "/networkPolicy/mongodbPorts"),
    ],
)
def test_a_bad_value_is_refused_by_its_name(values: dict[str, Any], where: str, render: Render) -> None:
    with pytest.raises(RenderError, match=re.escape(f"at '{where}'")):
        render(values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mongodb": {}}, "Where is MongoDB?"),
        (
            {"mongodb": {"uri": "mongodb://a", "embedded": {"enabled": True}}},
            "Only one of mongodb.uri, mongodb.embedded.enabled",
        ),
        ({"appender": {"deployment": {"enabled": True}}}, "needs a token"),
        (
            {"appender": {"deployment": {"enabled": True, "auth": {"token": TOKEN, "existingSecret": {"name": "a"}}}}},
            "Only one of appender.deployment.auth.token and",
        ),
        (
            {"projector": {"auth": {"token": TOKEN, "existingSecret": {"name": "a"}}}},
            "Only one of projector.auth.token and projector.auth.existingSecret.name",
        ),
        ({"injector": {"enabled": True}, "operator": {"enabled": False}}, "injector.enabled needs operator.enabled"),
        ({"injector": {"enabled": True}, "operator": {"replicas": 0}}, "injector.enabled needs operator.enabled"),
        (
            {"injector": {"enabled": True, "certificate": {"source": "existingSecret"}}},
            "set injector.certificate.existingSecret and injector.certificate.caBundle",
        ),
        (
            {"injector": {"enabled": True, "certificate": {"existingSecret": "a"}}},
            "but injector.certificate.source is helm",
        ),
        ({"projector": {"projections": {"source": "module"}}}, "name it in projector.projections.module"),
        ({"projector": {"projections": {"source": "configMap"}}}, "fill projector.projections.definitions"),
        ({"projector": {"projections": {"existingConfigMap": "a"}}}, "would be read by nobody"),
        (
            {"projector": {"projections": {"source": "configMap", "existingConfigMap": "a", "definitions": {"b": {}}}}},
            "Only one of projector.projections.definitions and",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_in_words(values: dict[str, Any], message: str, render: Render) -> None:
    with pytest.raises(RenderError, match=re.escape(message)):
        render(values)


def test_every_value_is_read_by_a_template() -> None:
    """By its last name at least, in templates or helpers: a value that nobody reads is a promise that nobody keeps."""
    text = "\n".join(path.read_text() for path in (CHART / "templates").rglob("*") if path.is_file())
    # Passed on whole: what is in them is Kubernetes'.
    whole = {"podSecurityContext", "securityContext", "labels", "requests", "resources"}
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    unread = [path for path in leaves(values) if not whole & set(path) and not re.search(rf"\.{path[-1]}\b", text)]
    assert unread == []


def test_the_versions_agree() -> None:
    from eventstore import __version__

    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["appVersion"] == __version__
    assert f"ARG VERSION={__version__}\n" in (ROOT / "Dockerfile").read_text()
    assert f"eventprojector:{__version__}\n" in (ROOT / "Makefile").read_text()
