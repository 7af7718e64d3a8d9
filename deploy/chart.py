"""Makes the chart's `values.schema.json` and `README.md` from `values.yaml` and the comments in it: `make chart`.

A comment above a key that begins with `# --` is its description, up to the next empty comment line or key; a line
`# @schema {…}` (YAML) adds JSON Schema to what the default value tells. `$ref: NAME` there names one of DEFINITIONS.
Every object is closed: a value that no template knows is an error at the install, not a surprise after it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

if TYPE_CHECKING:
    from collections.abc import Iterator

FOLDER = Path(__file__).parent
CHART = FOLDER / "helm"

DEFINITIONS: dict[str, Any] = {
    "strings": {"type": "object", "additionalProperties": {"type": "string"}},
    "object": {"type": "object", "additionalProperties": True},
    "objects": {"type": "array", "items": {"type": "object", "additionalProperties": True}},
    "port": {"type": "integer", "minimum": 1, "maximum": 65535},
    "intOrPercent": {"oneOf": [{"type": "integer", "minimum": 0}, {"type": "string", "pattern": "^[0-9]+%$"}]},
}
"""`object` and `objects` are Kubernetes' own: the API server knows their fields, in the version that the cluster has."""

FROM_HELM: dict[str, Any] = {
    "global": {"type": "object", "description": "Helm's own: values that a parent chart shares. Read by nothing here."},
    "enabled": {"type": "boolean", "description": "For a parent chart's `condition`. Read by nothing here."},
}
"""Keys that stand beside the chart's own where it is a dependency of another."""

TYPES = {bool: "boolean", int: "integer", float: "number", str: "string"}


class ValuesError(ValueError):
    """A key of values.yaml that lacks a description, or whose default does not tell its type."""


class Value(NamedTuple):
    """One key of values.yaml."""

    path: tuple[str, ...]
    default: Any
    description: str
    extra: dict[str, Any]
    children: list[Value]


def read_values(text: str) -> list[Value]:
    """All keys with their comments. Raises ValuesError and yaml.YAMLError."""
    return list(_mapping(yaml.compose(text, yaml.SafeLoader), yaml.safe_load(text), text.splitlines(), ()))


def _mapping(node: Any, values: dict[str, Any], lines: list[str], path: tuple[str, ...]) -> Iterator[Value]:
    for key, value in node.value:
        here = (*path, key.value)
        description, extra = _comment(lines, key.start_mark.line, here)
        default = values[key.value]
        leaf = not isinstance(default, dict) or bool(extra)
        children = [] if leaf else list(_mapping(value, default, lines, here))
        if not leaf and not children:
            raise ValuesError(f"{'.'.join(here)}: an empty map does not tell what may be in it; add # @schema")
        yield Value(here, default, description, extra, children)


def _comment(lines: list[str], line: int, path: tuple[str, ...]) -> tuple[str, dict[str, Any]]:
    """Description and schema from the comment lines just above `line`."""
    start = line
    while start > 0 and lines[start - 1].lstrip().startswith("#"):
        start -= 1
    description: list[str] = []
    extra: dict[str, Any] = {}
    for comment in (each.strip().removeprefix("#").strip() for each in lines[start:line]):
        if comment.startswith("-- "):
            description = [comment.removeprefix("-- ")]
        elif comment.startswith("@schema "):
            extra = yaml.safe_load(comment.removeprefix("@schema "))
        elif description:
            description.append(comment)
    if not description:
        raise ValuesError(f"{'.'.join(path)}: has no description (# -- …)")
    return " ".join(description), extra


def schema(values: list[Value]) -> dict[str, Any]:
    """JSON Schema (draft 7, which is what Helm reads) of the whole."""
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "Values of the chart eventprojector",
        "type": "object",
        "additionalProperties": False,
        "properties": {value.path[-1]: _schema(value) for value in values} | FROM_HELM,
        "definitions": DEFINITIONS,
    }


def _schema(value: Value) -> dict[str, Any]:
    about = {"description": value.description}
    if value.children:
        return about | {
            "type": "object",
            "additionalProperties": False,
            "properties": {child.path[-1]: _schema(child) for child in value.children},
        }
    if "$ref" in value.extra:
        if value.extra["$ref"] not in DEFINITIONS:
            raise ValuesError(f"{'.'.join(value.path)}: there is no definition {value.extra['$ref']}")
        return about | {"$ref": f"#/definitions/{value.extra['$ref']}"}
    if isinstance(value.default, list):
        if "items" not in value.extra:
            raise ValuesError(f"{'.'.join(value.path)}: a list does not tell what may be in it; add # @schema")
        return about | {"type": "array"} | value.extra
    if "type" not in value.extra and type(value.default) not in TYPES:
        raise ValuesError(f"{'.'.join(value.path)}: its default does not tell its type; add # @schema")
    return about | ({} if "type" in value.extra else {"type": TYPES[type(value.default)]}) | value.extra


def readme(values: list[Value], prose: str) -> str:
    """The prose with the tables of all values in place of its line `<!-- values -->`."""
    return prose.replace("<!-- values -->", "\n".join(_sections(values)).strip())


def _sections(values: list[Value]) -> Iterator[str]:
    single = [value for value in values if not value.children]
    yield "### General\n"
    yield from _table(single)
    for value in values:
        if value.children:
            yield f"### {value.path[0]}\n\n{value.description}\n"
            yield from _table(list(_leaves(value)))


def _leaves(value: Value) -> Iterator[Value]:
    for child in value.children:
        if child.children:
            yield from _leaves(child)
        else:
            yield child


def _table(values: list[Value]) -> Iterator[str]:
    yield "| value | default | meaning |\n| --- | --- | --- |"
    for value in values:
        default = json.dumps(value.default)
        yield f"| `{'.'.join(value.path)}` | `{default}` | {value.description.replace('|', chr(92) + '|')} |"
    yield ""


def generated() -> dict[Path, str]:
    """What the two files should hold."""
    values = read_values((CHART / "values.yaml").read_text())
    return {
        CHART / "values.schema.json": json.dumps(schema(values), indent=2) + "\n",
        CHART / "README.md": readme(values, (FOLDER / "chart.md").read_text()),
    }


def main() -> None:
    """Writes the files; with `--check` only tells which of them are out of date, by exit code 1."""
    stale = [path for path, text in generated().items() if not path.exists() or path.read_text() != text]
    if "--check" in sys.argv[1:]:
        sys.exit("\n".join(f"{path.relative_to(FOLDER.parent)}: run make chart" for path in stale) or None)
    for path, text in generated().items():
        path.write_text(text)


if __name__ == "__main__":
    main()
