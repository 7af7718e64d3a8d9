"""The declared form of a projection: its model, from which the custom resource's schema comes too, and its compiler.

name: permits
version: 1
readModel: {collection: permits, key: $aggregateId, indexes: [{keys: {status: 1}}]}
"on":
  Confirmation of receipt: {$set: {status: confirmed, confirmedAt: $timestamp}, $inc: {steps: 1}}
  "*": {$inc: {steps: 1}}
"""

from __future__ import annotations

import copy
import re
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeVar

import msgspec
from msgspec import Meta

from projector.errors import ProjectionError
from projector.paths import minimal
from projector.projection import AGGREGATE_ID, COLLECTION_PATTERN, NAME_PATTERN, IndexSpec, Projection
from projector.update import Update, compile_update

if TYPE_CHECKING:
    from projector.handlers import Fold
    from projector.targets import Path

_T = TypeVar("_T")

__all__ = ["Definition", "ReadModel", "from_definition"]


class ReadModel(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="camel"):
    """Where the documents lie, and which event goes to which."""

    collection: (
        Annotated[
            str, Meta(pattern=COLLECTION_PATTERN, description="Name of the view that readers use. Default: the name.")
        ]
        | None
    ) = None
    key: Annotated[
        str,
        Meta(
            pattern=r"^\$",
            description="The event's field that is the document's _id. An array names several documents; "
            "an event without the field goes to none.",
        ),
    ] = AGGREGATE_ID
    indexes: Annotated[tuple[IndexSpec, ...], Meta(description="Indexes of the read model beside _id.")] = ()


class Definition(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="camel"):
    """A projection as it is declared."""

    name: Annotated[str, Meta(pattern=NAME_PATTERN, description="Unique among the projections of a database.")]
    version: Annotated[
        int, Meta(ge=1, description="Raise it with every change of meaning: a new version is built beside the old one.")
    ] = 1
    read_model: ReadModel = ReadModel()
    on: Annotated[
        dict[Annotated[str, Meta(min_length=1)], Update],
        Meta(
            min_length=1, description='What each event name does; "*" stands for every event that no other entry names.'
        ),
    ]


def from_definition(definition: Any) -> Projection:
    """Compiles a declared projection, as YAML, JSON or MongoDB hold it.

    `definition` is a dict, and is not changed. Raises ProjectionError, for example
    `permits: on["Confirmation of receipt"].$inc.steps: 'one' must be a number`.
    """
    if not isinstance(definition, dict):
        raise ProjectionError(f"a projection must be a mapping, not {definition!r:.40}")
    name = definition.get("name")
    prefix = f"{name}: " if isinstance(name, str) else ""
    try:
        return _compiled(definition)
    except ProjectionError as error:
        raise ProjectionError(f"{prefix}{error}") from None


def _compiled(definition: dict[Any, Any]) -> Projection:
    model = _model(definition)
    where = model.read_model
    folds: list[tuple[str, Fold]] = []
    references: set[Path] = set()
    for event_name, update in model.on.items():
        fold, used = compile_update(update, _place(event_name))
        folds.append((event_name, fold))
        references |= used
    try:
        projection = Projection(
            model.name,
            model.version,
            collection=where.collection,
            key=where.key,
            indexes=where.indexes,
            fields=minimal(references),
        )
    except ProjectionError as error:
        raise ProjectionError(f"readModel.{error}") from None
    for event_name, fold in folds:
        projection.add(event_name, fold)
    projection.definition = {
        "name": model.name,
        "version": model.version,
        "readModel": {
            "collection": projection.collection,
            "key": where.key,
            "indexes": [msgspec.to_builtins(index) for index in where.indexes],
        },
        "on": copy.deepcopy(definition["on"]),
    }
    return projection


def _place(event_name: str) -> str:
    return f'on["{event_name}"]'


def _model(definition: dict[Any, Any]) -> Definition:
    """The definition in its model. Raises ProjectionError."""
    updates = definition.get("on")
    if updates is None and (True in definition or "true" in definition):
        raise ProjectionError('on: write it in quotes, "on": this YAML parser takes the bare word for true')
    for event_name, update in updates.items() if isinstance(updates, dict) else ():
        # One by one, because msgspec does not say which key of a dict it was at.
        _convert(update, Update, _place(event_name))
    return _convert(definition, Definition, "")


_AT: Final = re.compile(r"(?s)(?P<problem>.*?)(?: - at `\$\.?(?P<path>.*)`)?")


def _convert(value: Any, kind: type[_T], place: str) -> _T:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        found = _AT.fullmatch(str(error))
        path = found["path"] if found else None
        problem = found["problem"] if found else str(error)
        at = ".".join(part for part in (place, path) if part)
        raise ProjectionError(f"{at}: {problem}" if at else problem) from None
