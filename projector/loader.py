"""Projections from where they lie: a folder of YAML (a ConfigMap), Python modules.

The YAML is that of YAML 1.2's JSON schema: `on`, `yes` and dates are texts, and a key that stands twice is refused.
"""

from __future__ import annotations

import importlib
import re
from typing import TYPE_CHECKING, Any, Final

import yaml

from projector.declared import from_definition
from projector.errors import ProjectionError
from projector.projection import Projection

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

__all__ = ["distinct", "load_file", "load_folder", "load_modules"]


def load_folder(folder: Path) -> list[Projection]:
    """The projections of all `*.yaml` and `*.yml` files in a folder, several documents a file, in the files' order.

    Raises ProjectionError, which names the file, for what is no projection, and when there is none at all.
    """
    if not folder.is_dir():
        raise ProjectionError(f"{folder}: there is no such folder")
    files = sorted(file for file in folder.iterdir() if file.suffix in (".yaml", ".yml") and file.is_file())
    projections = distinct(projection for file in files for projection in load_file(file))
    if not projections:
        raise ProjectionError(f"{folder}: there is no projection in it (*.yaml, *.yml)")
    return projections


def load_file(file: Path) -> list[Projection]:
    """The projections of one YAML file. Raises ProjectionError, which names the file."""
    try:
        documents = yaml.load_all(file.read_text(), Loader=_Loader)
        return [from_definition(document) for document in documents if document is not None]
    except (ProjectionError, yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ProjectionError(f"{file}: {error}") from error


def load_modules(names: Sequence[str]) -> list[Projection]:
    """The projections that Python modules (`package.module`) hold in their variables.

    Raises ProjectionError, which names the module, also for one that cannot be imported or holds none.
    """
    found: dict[int, Projection] = {}  # one that a module imports from another is still one
    for name in names:
        try:
            module = importlib.import_module(name)
        except Exception as error:
            raise ProjectionError(f"module {name}: {type(error).__name__}: {error}") from error
        held = [value for value in vars(module).values() if isinstance(value, Projection)]
        if not held:
            raise ProjectionError(f"module {name}: there is no Projection in it")
        for projection in held:
            if projection.event_names == ():
                raise ProjectionError(f"module {name}: {projection.name}: it has no handler")
            projection.module = name
            found[id(projection)] = projection
    return distinct(found.values())


def distinct(projections: Iterable[Projection]) -> list[Projection]:
    """The projections, if no two share a name or a read model. Raises ProjectionError."""
    kept: list[Projection] = []
    for projection in projections:
        for other in kept:
            if projection.name == other.name:
                raise ProjectionError(f"there are two projections {projection.name!r}")
            if projection.collection == other.collection:
                raise ProjectionError(
                    f"the projections {other.name!r} and {projection.name!r} share a read model, {projection.collection!r}"
                )
        kept.append(projection)
    return kept


class _Loader(yaml.CSafeLoader):
    """PyYAML's safe loader with the words of JSON: YAML 1.1 takes `on` for true, `1:30` for 90 and `010` for 8."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} must be a text (quote it)", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_WORDS: Final = {
    "null": (r"~|null|", "~n\0"),
    "bool": (r"true|false", "tf"),
    "int": (r"[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
    "float": (r"[-+]?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?|[-+]?\.(inf|nan)", "-+.0123456789"),
}
_Loader.yaml_implicit_resolvers = {}
for _tag, (_pattern, _firsts) in _WORDS.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), [*_firsts, ""])
