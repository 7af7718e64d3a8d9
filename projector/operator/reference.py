"""The reference page of the custom resources, made from the CRDs: `python -m projector.operator.reference` writes it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click
import msgspec

from projector.catalog import DEFINITIONS, STATUS
from projector.operator.crds import KINDS, manifest
from projector.operator.injector import ANNOTATIONS
from projector.operator.ownership import CLAIMS
from projector.operator.resources import API_VERSION, GROUP, PAUSED_ANNOTATION

if TYPE_CHECKING:
    from collections.abc import Iterator

    from projector.operator.crds import Kind

__all__ = ["PRIVILEGES", "page"]

_HEAD: Final = f"""# Custom resources

Two kinds, both of `{API_VERSION}`: an [EventStore](#eventstore) is a log with its indexes, a [Projection](#projection) is
a read model. The operator measures MongoDB, compares it with the resource, acts, and says in the status what it found.

- The fold's key is written in quotes, `"on":`. YAML takes the bare word for `true`.
- The fields of an index are a list, because Kubernetes does not keep the order of a map.
- An index that no resource names is reported in `status.foreignIndexes` and never touched.
- `{PAUSED_ANNOTATION}: "true"` as an annotation: the operator changes nothing for the resource until it is gone.
- Deleting needs the operator, which holds a finalizer. Where it is gone for good:
  `kubectl patch KIND NAME --type merge -p '{{"metadata":{{"finalizers":null}}}}'`.
"""

_CONDITIONS: Final = """
### Conditions

`Ready` is the one to wait for (`kubectl wait --for=condition=Ready`). `Progressing` is True while something is being built,
`Degraded` while something is wrong that does not mend itself, `Paused` while the annotation stands. Each has the generation
of the spec that it is about.

| reason of Ready | what it means |
| --- | --- |
"""

_COMMON: Final = {
    "MongoUnavailable": "Unknown: MongoDB does not answer. What the status says of indexes is from before.",
    "AccessDenied": "MongoDB refuses the user, or a role is missing.",
    "InvalidConnection": "The connection string is wrong.",
    "SecretUnreadable": "The Secret, or the key in it, is missing, or the operator may not read it.",
    "BuildingIndexes": "An index is being built; `indexer_index_build_progress_ratio` tells how far it is.",
    "DuplicateKey": "A unique index cannot be built: the message names documents with the same values.",
    "IndexOptionsConflict": "An index with these keys, or this name, stands with other options.",
    "IndexKeySpecsConflict": "An index of this name stands on other keys.",
    "DriftDetected": "An index was changed, or its spec was, and MongoDB cannot change it in place:"
    " `allowRecreate` lets the operator build it anew beside the old one.",
    "Conflict": "Another resource owns an index (or the projection of this name); the first one keeps it.",
    "InvalidSpec": "An older version of the CRD let something through.",
    "InternalError": "Unknown: a defect; the operator's log has it whole.",
}
_REASONS: Final[dict[str, dict[str, str]]] = {
    "EventStore": {"Reconciled": "True: the log and its indexes are as wanted."} | _COMMON,
    "Projection": {
        "Live": "True: the version of the spec is read, and follows the log.",
        "Rebuilding": "The version is being built. True while an earlier one is read.",
        "Paused": "`spec.paused` is true.",
        "ProjectorSilent": "Unknown: no projector reports on it.",
        "ProjectionFailed": "The projector has stopped it; the message says why.",
        "InvalidDefinition": "The fold, or the key, is wrong; the message names the place.",
        "VersionUnchanged": "The fold changed, `spec.version` did not. The earlier definition stays in force.",
        "EventStoreNotFound": "There is no EventStore of that name in the namespace.",
        "Deleting": "The read model of an earlier resource of this name is still being dropped.",
    }
    | _COMMON,
}

_READS: Final = ("find", "listIndexes")
_WRITES: Final = ("find", "insert", "update", "remove")

PRIVILEGES: Final[tuple[tuple[str, tuple[str, ...]], ...]] = (
    ("", ("listCollections", "listIndexes", "createCollection", "createIndex", "dropIndex", "collMod", "find")),
    (CLAIMS, _WRITES),
    (DEFINITIONS, _WRITES),
    (STATUS, ("find",)),
)
"""What the operator's role needs in each database, by collection; the empty name stands for every collection."""

_RIGHTS: Final = """
## The operator's rights in MongoDB

A role for each database that it works on; `readWrite` and `dbAdmin` would do as well, and allow more.

```js
db.getSiblingDB("eventstore").createRole({role: "eventprojectorOperator", roles: [], privileges: [
"""
_RIGHTS_END: Final = """]})
```

`find` on every collection finds the documents that are in the way of a unique index. With the action `inprog` on the cluster
the operator also sees how far a build is; without it, only that one runs.
"""

_INJECTOR: Final = f"""
## Annotations of the sidecar injector

A pod with `{GROUP}/inject: "true"` gets the appender as a native sidecar, where the injector is installed.

| annotation | |
| --- | --- |
"""


def page() -> str:
    """The page as Markdown."""
    parts = [_HEAD]
    for kind in KINDS:
        parts += [f"\n## {kind.name}\n", *_fields(kind), _CONDITIONS.rstrip("\n") + "\n"]
        parts += [f"| `{reason}` | {text} |\n" for reason, text in _REASONS[kind.name].items()]
    parts.append(_RIGHTS)
    for collection, actions in PRIVILEGES:
        resource = _json({"db": "eventstore", "collection": collection})
        parts.append(f"  {{resource: {resource}, actions: {_json(actions)}}},\n")
    parts += [_RIGHTS_END, _INJECTOR]
    parts += [f"| `{GROUP}/{name}` | {meaning} |\n" for name, (_, meaning) in ANNOTATIONS.items()]
    return "".join(parts)


def _fields(kind: Kind) -> Iterator[str]:
    schema = manifest(kind)["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    yield f"\n{schema['properties']['spec']['description']}\n"
    for part in ("spec", "status"):
        yield f"\n### {kind.name} {part}\n\n| field | type | default | |\n| --- | --- | --- | --- |\n"
        yield from _rows(schema["properties"][part], part)
    rules = [*_rules(schema, kind.name)]
    yield "\n### Rules\n\n" + "".join(f"- {rule}\n" for rule in rules)


def _rows(schema: dict[str, Any], place: str) -> Iterator[str]:
    for name, part in schema.get("properties", {}).items():
        if name == "true":  # what the bare word `on` becomes: refused, and nothing to be told of
            continue
        path = f"{place}.{name}"
        required = name in schema.get("required", ())
        default = "required" if required else f"`{_json(part['default'])}`" if "default" in part else ""
        yield f"| `{path}` | {_type(part)} | {default} | {part.get('description', '')} |\n"
        inner = part.get("items", part)
        if not inner.get("x-kubernetes-preserve-unknown-fields"):
            yield from _rows(inner, f"{path}[]" if "items" in part else path)


def _type(schema: dict[str, Any]) -> str:
    if schema.get("x-kubernetes-int-or-string"):
        return "integer or string"
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if schema.get("type") == "array":
        return f"list of {_type(schema['items'])}s"
    text = str(schema.get("type", "any"))
    low, high = schema.get("minimum"), schema.get("maximum")
    return text if low is None else f"{text}, {low} …" if high is None else f"{text}, {low} … {high}"


def _rules(schema: dict[str, Any], place: str) -> Iterator[str]:
    for rule in schema.get("x-kubernetes-validations", ()):
        yield f"`{place}`: {rule['message']}"
    for name, part in schema.get("properties", {}).items():
        inner = part.get("items", part)
        yield from _rules(part, f"{place}.{name}")
        if inner is not part:
            yield from _rules(inner, f"{place}.{name}[]")


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()


@click.command()
@click.argument(
    "file", type=click.Path(path_type=Path, dir_okay=False), default=Path("docs/reference/custom-resources.md")
)
def main(file: Path) -> None:
    """Writes the page to FILE."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(page())


if __name__ == "__main__":
    main()
