"""The CustomResourceDefinitions, made from the models: `python -m projector.operator.crds` writes them into the chart.

A CRD's schema must be *structural*: every reference written out, no unions but int-or-string. msgspec emits JSON Schema
of the models; what is done here is only to bring that into the API server's dialect.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, NamedTuple

import click
import msgspec
import yaml

from projector.operator import resources
from projector.operator.resource_status import EventStoreStatus, ProjectionStatus
from projector.operator.resources import GROUP, VERSION, EventStoreSpec, Model, ProjectionSpec
from projector.projection import NAME_PATTERN

__all__ = ["KINDS", "Kind", "manifest", "structural"]


class Kind(NamedTuple):
    """What a CRD says beside its schema."""

    name: str
    plural: str
    short: str
    spec: type[Model]
    status: type[Model]
    columns: tuple[tuple[str, str, str, str], ...]
    """Printer columns: name, type, JSON path, description."""
    rules: tuple[resources.Rule, ...] = ()


def _condition(kind: str) -> str:
    return f'.status.conditions[?(@.type=="{kind}")].status'


_READY: Final = ("Ready", "string", _condition("Ready"), "Whether it can be relied on.")
_REASON: Final = ("Reason", "string", '.status.conditions[?(@.type=="Ready")].reason', "Why it is ready or not.")
_AGE: Final = ("Age", "date", ".metadata.creationTimestamp", "Time since it was made.")

KINDS: Final = (
    Kind(
        name="EventStore",
        plural="eventstores",
        short="es",
        spec=EventStoreSpec,
        status=EventStoreStatus,
        columns=(
            _READY,
            _REASON,
            ("Indexes", "string", ".status.indexSummary", "Ready indexes of those wanted."),
            ("Database", "string", ".spec.database", "Database of the log."),
            _AGE,
        ),
    ),
    Kind(
        name="Projection",
        plural="projections",
        short="proj",
        spec=ProjectionSpec,
        status=ProjectionStatus,
        columns=(
            _READY,
            _REASON,
            ("Lag", "integer", ".status.lagSeconds", "Seconds behind the log."),
            ("Parked", "integer", ".status.parked", "Aggregates set aside."),
            ("Version", "integer", ".status.version", "Version that is being read."),
            _AGE,
        ),
        rules=(
            resources.Rule(
                f"self.metadata.name.matches('{NAME_PATTERN}')",
                "the name of a Projection has at most 63 characters, begins with a letter, and has no dot",
            ),
        ),
    ),
)
"""The two kinds. `KINDS` is also what the reference page in docs/ is made of."""

_MODELS: Final = {model.__name__: model for model in Model.__subclasses__()}
_DROPPED: Final = ("title", "$defs")


def structural(model: type[Model], *, defaults: bool = True) -> dict[str, Any]:
    """The structural schema of a model, with its CEL rules.

    Without `defaults` for a status: what the API server filled in would differ from what was written, for ever.
    """
    schema = msgspec.json.schema(model)
    expanded = _expand(schema, schema["$defs"])
    return expanded if defaults else _without_defaults(expanded)


def _without_defaults(schema: dict[str, Any]) -> dict[str, Any]:
    schema = {key: value for key, value in schema.items() if key != "default"}
    if "properties" in schema:
        schema["properties"] = {name: _without_defaults(part) for name, part in schema["properties"].items()}
    if "items" in schema:
        schema["items"] = _without_defaults(schema["items"])
    return schema


def _expand(schema: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """One level of JSON Schema in the API server's dialect."""
    schema = dict(schema)
    if reference := schema.pop("$ref", None):
        name = reference.rsplit("/", 1)[1]
        target = _expand(definitions[name], definitions)
        rules = _MODELS[name].rules
        if rules:
            target["x-kubernetes-validations"] = [rule._asdict() for rule in rules]
        return target | _expand(schema, definitions)
    if union := schema.pop("anyOf", None):
        if schema.get("x-kubernetes-int-or-string"):
            schema["anyOf"] = [{"type": "integer"}, {"type": "string"}]
        else:
            # `X | None`: in a resource a field that is not given is absent, never null.
            [only] = [option for option in union if option != {"type": "null"}]
            schema = only | {key: value for key, value in schema.items() if key != "default"}
            return _expand(schema, definitions)
    schema = {key: value for key, value in schema.items() if key not in _DROPPED}
    if "enum" in schema:
        schema["type"] = "string"
    if "properties" in schema:
        schema["properties"] = {name: _expand(part, definitions) for name, part in schema["properties"].items()}
    if "items" in schema:
        schema["items"] = _expand(schema["items"], definitions)
    return schema


def manifest(kind: Kind) -> dict[str, Any]:
    """The CustomResourceDefinition of a kind."""
    schema: dict[str, Any] = {
        "type": "object",
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {"type": "object"},
            "spec": structural(kind.spec),
            "status": structural(kind.status, defaults=False),
        },
    }
    if kind.rules:
        schema["x-kubernetes-validations"] = [rule._asdict() for rule in kind.rules]
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{kind.plural}.{GROUP}"},
        "spec": {
            "group": GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": kind.name,
                "listKind": f"{kind.name}List",
                "plural": kind.plural,
                "singular": kind.name.lower(),
                "shortNames": [kind.short],
                "categories": ["eventprojector"],
            },
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "subresources": {"status": {}},
                    "additionalPrinterColumns": [
                        {"name": name, "type": type_, "jsonPath": path, "description": description}
                        for name, type_, path, description in kind.columns
                    ],
                    "schema": {"openAPIV3Schema": schema},
                }
            ],
        },
    }


def render(kind: Kind) -> str:
    """The manifest as YAML, as it lies in the chart."""
    return yaml.safe_dump(manifest(kind), sort_keys=False, allow_unicode=True, width=120)


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False), default=Path("deploy/helm/files/crds"))
def main(folder: Path) -> None:
    """Writes the CustomResourceDefinitions into FOLDER."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind in KINDS:
        (folder / f"{kind.plural}.yaml").write_text(render(kind))


if __name__ == "__main__":
    main()
