"""Writes the reference pages that are made from code: `make docs`."""

from __future__ import annotations

import ast
import importlib
import inspect
import itertools
import json
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import yaml
from pydantic import SecretStr

from deploy.observability import log_events
from deploy.observability.catalogue import RULES, VALUES, exported

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from eventstore.settings import Settings

__all__ = ["FOLDER", "main", "pages"]

ROOT: Final = Path(__file__).parents[2]
FOLDER: Final = ROOT / "docs/reference"

SETTINGS: Final = {
    "All": ("eventstore.settings", "EventStoreSettings"),
    "Appender": ("appender.settings", "AppenderSettings"),
    "Projector": ("projector.settings", "ProjectorSettings"),
    "Operator": ("projector.operator.settings", "OperatorSettings"),
    "Sidecar injector": ("projector.operator.settings", "InjectorSettings"),
}


def pages() -> dict[str, str]:
    """The text of each, by file name."""
    return {
        "metrics.md": _metrics(),
        "settings.md": _settings(),
        "http-api.md": _api(json.loads((ROOT / "docs/openapi.json").read_text())),
        "chart.md": _chart(),
        "log-events.md": _log_events(),
        "alerts.md": _alerts(),
    }


def _table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    lines = [list(head)]
    lines.append(["---"] * len(lines[0]))
    lines += [[" ".join(str(cell).split()).replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _code(words: Iterable[str]) -> str:
    return ", ".join(f"`{word}`" for word in words)


def _page(title: str, *parts: str) -> str:
    return "\n".join([f"# {title}\n", *parts])


# Metrics, alerts, logs


def _metrics() -> str:
    parts = [
        (
            "All processes serve `/metrics`. Labels are bounded: no label ever holds an aggregateId, a path or an error text."
            " Prometheus adds its own (`namespace`, `pod`, `instance`, `job`).\n"
        )
    ]
    by_component: dict[str, list[Any]] = {}
    for metric in exported():
        by_component.setdefault(metric.component, []).append(metric)
    for component, metrics in by_component.items():
        rows = []
        for metric in metrics:
            name = next(iter(metric.series))[0].removesuffix("_bucket")
            labels = [
                f"{label} ({', '.join(sorted(VALUES[name, label]))})" if (name, label) in VALUES else label
                for label in metric.labels
            ]
            rows.append((f"`{name}`", metric.kind, ", ".join(labels), metric.text.rstrip(".")))
        parts += [f"## {component.capitalize()}\n", _table(("metric", "type", "labels", "meaning"), rows)]
    rules = [
        rule
        for group in yaml.safe_load((RULES / "recording-rules.yaml").read_text())["groups"]
        for rule in group["rules"]
    ]
    parts += [
        "## Recorded\n",
        "By the recording rules of the chart; dashboards and alerts use them.\n",
        _table(("series", "expression"), ((f"`{rule['record']}`", f"`{rule['expr']}`") for rule in rules)),
    ]
    return _page("Metrics", *parts)


def _alerts() -> str:
    rows = []
    for path in sorted(RULES.glob("*.yaml")):
        for group in yaml.safe_load(path.read_text())["groups"]:
            for rule in group["rules"]:
                if "alert" in rule:
                    link = f"[{rule['alert']}](../runbooks/{rule['alert']}.md)"
                    rows.append((link, rule["labels"]["severity"], rule.get("for", "at once"), f"`{rule['expr']}`"))
    return _page(
        "Alerts",
        "Shipped by the chart as a PrometheusRule (`monitoring.prometheusRule.enabled`); leave some out by"
        " `excludeRules`, and label all by `ruleLabels`. Each has a runbook.\n",
        _table(("alert", "severity", "after", "expression"), rows),
    )


def _log_events() -> str:
    rows = (
        (f"`{event.name}`", event.level, event.part, _code(event.fields), log_events.MEANINGS.get(event.name, ""))
        for event in log_events.found()
    )
    return _page(
        "Log events",
        "One JSON object a line on standard output: `event` is a name of this table, beside it `timestamp`, `level`,"
        " `logger`, `component` and the fields. A line tells a change of state, never a single event: normal operation is"
        " silent. Credentials appear in no line. `LOG_FORMAT=console` is for eyes, `LOG_LEVEL` sets the lowest level.\n",
        "Lines of libraries (pymongo, aiohttp, kopf) have the same form, and their message as `event`.\n",
        _table(("event", "level", "part", "fields", "meaning"), rows),
    )


# Settings


def _settings() -> str:
    parts = [
        (
            "From the environment. A setting that is marked *secret* may stand in a file instead:"
            " `MONGODB_URI_FILE=/run/secrets/uri` is the same as `MONGODB_URI=…`, and wins over it.\n"
        )
    ]
    for title, (module, name) in SETTINGS.items():
        settings: type[Settings] = getattr(importlib.import_module(module), name)
        texts = dict(_attribute_docstrings(settings))
        prefix = str(settings.model_config.get("env_prefix", ""))
        rows = []
        for field, info in settings.model_fields.items():
            secret = info.annotation is SecretStr
            default = info.default.get_secret_value() if secret else info.default
            shown = "" if default is None or default == () else f"`{default}`"
            rows.append((f"`{(prefix + field).upper()}`{' (secret)' if secret else ''}", shown, texts.get(field, "")))
        parts += [f"## {title}\n", _table(("variable", "default", "meaning"), rows)]
    parts += [
        "## Traces\n",
        "Off unless one of the first three is set. All other variables of OpenTelemetry hold as it documents them.\n",
        _table(
            ("variable", "default", "meaning"),
            (
                (
                    "`OTEL_EXPORTER_OTLP_ENDPOINT`",
                    "",
                    "Where traces go (OTLP over HTTP), such as `http://collector:4318`.",
                ),
                ("`OTEL_EXPORTER_OTLP_TRACES_ENDPOINT`", "", "The same, for traces alone and with the whole path."),
                (
                    "`OTEL_TRACES_EXPORTER`",
                    "",
                    "`otlp` turns traces on with OpenTelemetry's default endpoint, `none` off.",
                ),
                ("`OTEL_TRACES_SAMPLER`", "`parentbased_always_on`", "Which traces are kept."),
                (
                    "`OTEL_SERVICE_NAME`",
                    "`eventprojector-appender`, `…-projector`",
                    "Name of the service in the traces.",
                ),
                ("`OTEL_SDK_DISABLED`", "`false`", "`true` turns traces off."),
            ),
        ),
    ]
    return _page("Settings", *parts)


def _attribute_docstrings(settings: type) -> Iterator[tuple[str, str]]:
    """The texts below the fields of a class."""
    body = ast.parse(textwrap.dedent(inspect.getsource(settings))).body[0]
    assert isinstance(body, ast.ClassDef)
    for field, text in itertools.pairwise(body.body):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            yield ast.unparse(field.target), inspect.cleandoc(str(text.value.value))


# The chart


def _chart() -> str:
    """The chart's README, which `make chart` makes; what it links to lies outside of the site."""
    text = (ROOT / "deploy/helm/README.md").read_text()
    first, _, rest = text.partition("\n# ")
    text = f"# {rest}" if first.startswith("<!--") else text
    for _ in range(text.count("](../../")):
        start = text.index("](../../")
        opening = text.rindex("[", 0, start)
        end = text.index(")", start)
        text = f"{text[:opening]}{text[opening + 1 : start]} (`{text[start + 8 : end]}`){text[end + 1 :]}"
    return text


# The HTTP API


def _api(document: Mapping[str, Any]) -> str:
    schemas = document["components"]["schemas"]
    parts = [
        (
            f"{document['info']['description']} This page is made from the OpenAPI document that the appender serves at"
            " `/openapi.json`.\n"
        ),
        (
            "Errors are RFC 9457 `application/problem+json` with a stable `type`; a 503 has `Retry-After`. Repeat what was"
            " answered with 503, or not answered at all, with the same eventIds: nothing is appended twice.\n"
        ),
    ]
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            if method not in {"get", "post"}:
                continue
            parts.append(f"## `{method.upper()} {path}`\n")
            parts.append(f"{operation['summary']}.\n")
            if operation.get("description"):
                parts.append(f"{operation['description']}\n")
            parameters = [*operations.get("parameters", ()), *operation.get("parameters", ())]
            if parameters:
                rows = ((f"`{p['name']}`", p["in"], _type(p["schema"]), p.get("description", "")) for p in parameters)
                parts.append(_table(("parameter", "in", "type", "meaning"), rows))
            content = operation.get("requestBody", {}).get("content", {})
            if content:
                bodies = ((f"`{kind}`", _type(body.get("schema", {}))) for kind, body in content.items())
                parts.append(_table(("body", "schema"), bodies))
            answers = (
                (code, _answer(document, answer), _contents(document, answer))
                for code, answer in operation["responses"].items()
            )
            parts.append(_table(("code", "meaning", "body"), answers))
    parts.append("## Schemas\n")
    for name, schema in schemas.items():
        parts.append(f"### {name}\n")
        if schema.get("description"):
            parts.append(f"{schema['description']}\n")
        required = set(schema.get("required", ()))
        rows = (
            (f"`{field}`", _type(inner), "required" if field in required else "", inner.get("description", ""))
            for field, inner in schema.get("properties", {}).items()
        )
        parts.append(_table(("field", "type", "", "meaning"), rows))
    return _page("HTTP API of the appender", *parts)


def _resolved(document: Mapping[str, Any], node: Mapping[str, Any]) -> Mapping[str, Any]:
    while "$ref" in node:
        found: Any = document
        for part in node["$ref"].removeprefix("#/").split("/"):
            found = found[part]
        node = found
    return node


def _answer(document: Mapping[str, Any], answer: Mapping[str, Any]) -> str:
    return str(_resolved(document, answer).get("description", ""))


def _contents(document: Mapping[str, Any], answer: Mapping[str, Any]) -> str:
    content = _resolved(document, answer).get("content", {})
    return "; ".join(f"`{kind}`: {_type(body.get('schema', {}))}" for kind, body in content.items())


def _type(schema: Mapping[str, Any]) -> str:
    if "$ref" in schema:
        name = schema["$ref"].rsplit("/", 1)[-1]
        return f"[{name}](#{name.lower()})"
    for choice in ("anyOf", "oneOf"):
        if choice in schema:
            return " or ".join(_type(each) for each in schema[choice])
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}))}"
    if "enum" in schema:
        return _code(str(value) for value in schema["enum"])
    kind = schema.get("type", "any")
    return " or ".join(kind) if isinstance(kind, list) else str(kind)


def main() -> None:
    """Writes them."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (FOLDER / name).write_text(text)


if __name__ == "__main__":
    main()
