"""Where in a document an update operator works: dotted paths, through documents and, by numbers, through arrays.

As on the server: a path creates the documents that it lacks (never arrays), fills an array with null up to a new index,
and cannot lead through a value that is neither.
"""

from __future__ import annotations

from typing import Any, Final, TypeAlias

from projector.bson_order import type_name
from projector.errors import FoldError, ProjectionError
from projector.paths import MISSING

__all__ = ["Path", "conflict", "container", "order", "read", "remove", "rename", "target", "write"]

Path: TypeAlias = tuple[str, ...]

_MOST_PADDING: Final = 1_500_000
"""The server's own limit of nulls that one update adds to an array (its error 34)."""


def target(text: str, *, reserved: bool = True) -> Path:
    """The parts of a field's path; `reserved`: none of the bookkeeping's. Raises ProjectionError without a place."""
    path = tuple(text.split("."))
    if not all(path):
        raise ProjectionError("a path must not have empty parts")
    if reserved and path[0].startswith("_"):
        raise ProjectionError(f"the field {path[0]!r} is the projector's own: names that begin with _ are reserved")
    if any(part.startswith("$") for part in path):
        raise ProjectionError("a part of a path must not begin with $ (positional operators are not supported)")
    if "\0" in text:
        raise ProjectionError("a path must not contain NUL")
    return path


def order(path: Path) -> tuple[tuple[str, int], ...]:
    """A key that sorts paths as the server applies them: new fields get into a document in this order."""
    return tuple(("0", int(part)) if _is_number(part) and str(int(part)) == part else (part, 0) for part in path)


def conflict(one: Path, other: Path) -> bool:
    """Whether one update may not name both: they are the same, or one lies in the other."""
    shorter = min(len(one), len(other))
    return one[:shorter] == other[:shorter]


def container(document: dict[str, Any], path: Path, *, create: bool) -> dict[str, Any] | list[Any] | None:
    """The document or array in which the last part of the path lies; None when it is not there and not to be created.

    Raises FoldError when the path leads through something else.
    """
    at: Any = document
    for depth, part in enumerate(path[:-1]):
        below = read(at, part)
        if below is MISSING:
            if not create:
                return None
            below = {}
            write(at, part, below)
        if not isinstance(below, dict) and not (isinstance(below, list) and _is_number(path[depth + 1])):
            raise FoldError(
                f"there cannot be a field {path[depth + 1]!r} in {'.'.join(path[: depth + 1])!r}, "
                f"which is {type_name(below)}"
            )
        at = below
    found: dict[str, Any] | list[Any] = at
    return found


def read(at: dict[str, Any] | list[Any], part: str) -> Any:
    """The value of a field or of an array's element, or MISSING."""
    if isinstance(at, dict):
        return at.get(part, MISSING)
    index = int(part)
    return at[index] if index < len(at) else MISSING


def write(at: dict[str, Any] | list[Any], part: str, value: Any) -> None:
    """Sets a field or an array's element. Raises FoldError for an index far beyond the array's end."""
    if isinstance(at, dict):
        at[part] = value
        return
    index = int(part)
    padding = index - len(at)
    if padding > _MOST_PADDING:
        raise FoldError(f"index {index} is more than {_MOST_PADDING} beyond the end of the array")
    if padding >= 0:
        at.extend([None] * (padding + 1))
    at[index] = value


def remove(document: dict[str, Any], path: Path) -> None:
    """`$unset`: an element of an array becomes null; what is not there stays away."""
    try:
        at = container(document, path, create=False)
    except FoldError:
        return
    if isinstance(at, dict):
        at.pop(path[-1], None)
    elif at is not None and int(path[-1]) < len(at):
        at[int(path[-1])] = None


def rename(document: dict[str, Any], source: Path, destination: Path) -> None:
    """`$rename`: nothing happens when the source is not there. Raises FoldError where arrays are in the way."""
    at = container(document, source, create=False)
    value = MISSING if at is None else read(at, source[-1])
    if at is None or value is MISSING:
        return
    for path in (source, destination):
        if _through_array(document, path):
            raise FoldError(f"{'.'.join(path)!r} is in an array, where $rename does not work")
    to = container(document, destination, create=True)
    if to is not None:
        write(to, destination[-1], value)
    remove(document, source)


def _through_array(document: dict[str, Any], path: Path) -> bool:
    at: Any = document
    for part in path[:-1]:
        at = at.get(part)
        if not isinstance(at, dict):
            return isinstance(at, list)
    return False


def _is_number(part: str) -> bool:
    return part.isascii() and part.isdecimal()
