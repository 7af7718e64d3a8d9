"""Values in a declared update, compiled: literals, references to fields of the event, documents and arrays of them.

5, "text", true, null                 themselves
$payload.amount                       a field of the event
{$literal: $5}                        anything, as it stands
{$date: …} {$numberDecimal: …} …      what JSON and YAML have no word for, in MongoDB's Extended JSON
{who: $payload.user, at: $timestamp}  a document: a field whose reference finds nothing is left out
[$payload.a, 1]                       an array: null stands for a reference that finds nothing
"""

from __future__ import annotations

import datetime
from typing import Any, Final, NamedTuple

from bson import json_util
from bson.binary import Binary
from bson.datetime_ms import DatetimeMS
from bson.decimal128 import Decimal128
from bson.errors import BSONError
from bson.int64 import Int64
from bson.objectid import ObjectId
from bson.timestamp import Timestamp

from eventstore.event import INT64_MAX, INT64_MIN
from projector.errors import ProjectionError
from projector.paths import MISSING, Getter, fresh, getter, reference

__all__ = ["Expression", "compile_array", "compile_value", "constant"]

_EXTENDED: Final = frozenset(
    {"$date", "$oid", "$numberInt", "$numberLong", "$numberDouble", "$numberDecimal", "$binary", "$uuid"}
)
_JSON: Final = json_util.JSONOptions(tz_aware=True)
_PLAIN: Final = (
    str,
    float,
    bool,
    type(None),
    datetime.datetime,
    DatetimeMS,
    ObjectId,
    Decimal128,
    bytes,
    Binary,
    Timestamp,
)
_INT32: Final = range(-(2**31), 2**31)


class Expression(NamedTuple):
    """A compiled value: how to get it from an event, and which fields of the event that takes."""

    get: Getter
    references: frozenset[tuple[str, ...]] = frozenset()
    value: Any = MISSING
    """The value, when it is the same for every event."""


def constant(value: Any) -> Expression:
    """A value that is the same for every event, its containers new each time."""
    if isinstance(value, dict | list):
        return Expression(lambda _event: fresh(value), value=value)
    return Expression(lambda _event: value, value=value)


def compile_value(spec: Any, place: str) -> Expression:
    """Compiles one value. Raises ProjectionError that begins with the place."""
    match spec:
        case str() if spec.startswith("$"):
            try:
                path = reference(spec)
            except ProjectionError as error:
                raise ProjectionError(f"{place}: {error}") from None
            return Expression(getter(path), frozenset({path}))
        case dict():
            return _document(spec, place)
        case list():
            return compile_array(spec, place, gaps=True)
    return constant(_checked(spec, place))


def compile_array(spec: list[Any], place: str, *, gaps: bool) -> Expression:
    """Compiles an array. Where a reference finds nothing stands null (`gaps`), or nothing."""
    parts = [compile_value(item, f"{place}[{index}]") for index, item in enumerate(spec)]
    if all(part.value is not MISSING for part in parts):
        return constant([part.value for part in parts])
    getters = [part.get for part in parts]
    references = frozenset().union(*(part.references for part in parts))

    def array(event: dict[str, Any]) -> Any:
        values = [get(event) for get in getters]
        if gaps:
            return [None if value is MISSING else value for value in values]
        return [value for value in values if value is not MISSING]

    return Expression(array, references)


def _document(spec: dict[Any, Any], place: str) -> Expression:
    match list(spec):
        case ["$literal"]:
            return constant(_checked(spec["$literal"], place))
        case [str(name)] if name in _EXTENDED:
            try:
                return constant(_checked(json_util.object_hook(spec, _JSON), place))
            except (ValueError, TypeError, ArithmeticError, BSONError) as error:
                raise ProjectionError(f"{place}.{name}: {error}") from error
    for name in spec:
        if not isinstance(name, str):
            raise ProjectionError(f"{place}: the field name {name!r} must be a text")
        if name.startswith("$"):
            raise ProjectionError(
                f"{place}.{name}: expressions are not supported, only references, $literal and Extended JSON"
            )
        if "." in name or "\0" in name:
            raise ProjectionError(f"{place}: the field name {name!r} must not contain a dot or NUL")
    parts = {name: compile_value(item, f"{place}.{name}") for name, item in spec.items()}
    if all(part.value is not MISSING for part in parts.values()):
        return constant({name: part.value for name, part in parts.items()})
    getters = [(name, part.get) for name, part in parts.items()]
    references = frozenset().union(*(part.references for part in parts.values()))

    def document(event: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, get in getters if (value := get(event)) is not MISSING}

    return Expression(document, references)


def _checked(value: Any, place: str) -> Any:
    """A literal as BSON will hold it: integers by their size, dates with a time zone. Raises ProjectionError."""
    match value:
        case bool() | Int64():
            return value
        case int():
            if not INT64_MIN <= value <= INT64_MAX:
                raise ProjectionError(f"{place}: {value} does not fit into 64 bits")
            return value if value in _INT32 else Int64(value)
        case datetime.datetime():
            at = value.replace(microsecond=value.microsecond // 1000 * 1000, tzinfo=value.tzinfo or datetime.UTC)
            return at.astimezone(datetime.UTC)
        case dict():
            if not all(isinstance(name, str) and "\0" not in name for name in value):
                raise ProjectionError(f"{place}: field names must be texts without NUL")
            return {name: _checked(item, f"{place}.{name}") for name, item in value.items()}
        case list():
            return [_checked(item, f"{place}[{index}]") for index, item in enumerate(value)]
    if not isinstance(value, _PLAIN):
        raise ProjectionError(f"{place}: a {type(value).__name__} cannot be a value")
    return value
