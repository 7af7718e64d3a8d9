"""References to fields of an event (`$timestamp`, `$payload.org:group`), compiled to getters.

A reference means what a field path means in MongoDB's aggregation language: through an array it collects from each
document in it, a number is a field name (never an index), and a field that is not there is *missing*, which is not the
same as null.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from projector.errors import ProjectionError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["MISSING", "Getter", "fresh", "getter", "minimal", "reference"]

Getter: TypeAlias = Callable[[dict[str, Any]], Any]
"""Takes an event, returns a value that is the caller's own (never a container that the event holds), or MISSING."""


class _Missing:
    """The type of MISSING."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "MISSING"


MISSING: Final = _Missing()
"""The value of a field that is not there."""

_PLAIN: Final = frozenset({"_id", "aggregateId", "sequenceNo", "eventName", "timestamp", "slot"})
"""The fields of an event that hold a plain value."""
_DOCUMENTS: Final = frozenset({"payload", "metadata"})
_ALIASES: Final = {"eventId": "_id"}


def reference(text: str) -> tuple[str, ...]:
    """The parts of a reference: `$payload.a.b` -> `("payload", "a", "b")`; `$eventId` is `$_id`.

    Raises ProjectionError with what is wrong, without a place.
    """
    if text.startswith("$$"):
        raise ProjectionError(f"{text!r}: variables are not supported, because a fold must always give the same result")
    parts = tuple(text[1:].split("."))
    root = _ALIASES.get(parts[0], parts[0])
    if not all(parts) or any(part.startswith("$") or "\0" in part for part in parts):
        raise ProjectionError(f"{text!r} is not a path; write {{$literal: …}} for a text that begins with $")
    if root in _PLAIN and len(parts) > 1:
        raise ProjectionError(f"{text!r}: an event's {parts[0]} has no fields of its own")
    if root not in _PLAIN and root not in _DOCUMENTS:
        known = ", ".join(f"${name}" for name in sorted(_PLAIN | _DOCUMENTS | set(_ALIASES)))
        raise ProjectionError(f"{text!r}: an event has no field {root!r} (do you mean $payload.{root}? it has {known})")
    return (root, *parts[1:])


def minimal(paths: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    """The paths as dotted names, none below another: MongoDB refuses both `a` and `a.b` in one projection."""
    kept: list[tuple[str, ...]] = []
    for path in sorted(set(paths)):
        if not kept or path[: len(kept[-1])] != kept[-1]:
            kept.append(path)
    return tuple(".".join(path) for path in kept)


def getter(path: Sequence[str]) -> Getter:
    """Compiles a path as `reference` returns it."""
    root, *rest = path
    below = tuple(rest)
    if not below:
        if root in _DOCUMENTS:
            return lambda event: fresh(event.get(root, MISSING))
        return lambda event: event.get(root, MISSING)
    if len(below) > 1:
        return lambda event: fresh(_lookup(event.get(root), below))
    [name] = below

    def field(event: dict[str, Any]) -> Any:
        # The usual case by itself, since this runs for every reference in every event.
        try:
            value = event[root][name]
        except (KeyError, TypeError):
            return fresh(_lookup(event.get(root), below))
        kind = type(value)
        return fresh(value) if kind is dict or kind is list else value

    return field


def fresh(value: Any) -> Any:
    """The value with new dicts and lists: what one document changes in place must not be seen by another one."""
    kind = type(value)
    if kind is dict:
        return {name: fresh(item) for name, item in value.items()}
    if kind is list:
        return [fresh(item) for item in value]
    return value


def _lookup(value: Any, path: tuple[str, ...], at: int = 0) -> Any:
    """What the aggregation language finds at this path below a value, or MISSING."""
    for index in range(at, len(path)):
        if isinstance(value, list):
            found = (_lookup(item, path, index) for item in value if isinstance(item, dict))
            return [item for item in found if item is not MISSING]
        if not isinstance(value, dict):
            return MISSING
        value = value.get(path[index], MISSING)
    return value
