"""How MongoDB compares values of any two BSON types: as Python keys, so that `<`, `==` and `sorted` do the comparing.

Source: "Comparison/Sort Order" in MongoDB's manual. Text compares by its UTF-8 bytes (no collation), which is the order
of code points; documents by type, name and value of field after field, so the order of their fields counts; numbers by
what they are worth, whatever their type, with NaN below all others and equal to itself.
"""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING, Any, Final

from bson.binary import Binary
from bson.datetime_ms import DatetimeMS
from bson.decimal128 import Decimal128
from bson.int64 import Int64
from bson.max_key import MaxKey
from bson.min_key import MinKey
from bson.objectid import ObjectId
from bson.timestamp import Timestamp

from projector.errors import FoldError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["contains", "equal", "order_key", "type_name"]

_EPOCH: Final = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
_MILLISECOND: Final = datetime.timedelta(milliseconds=1)
_PLAIN: Final = frozenset({str, ObjectId, datetime.datetime})
"""Types whose values Python finds equal to others of their type alone, and exactly when MongoDB does."""


def order_key(value: Any) -> tuple[Any, ...]:
    """A key that compares as MongoDB compares the value. Raises FoldError for a type that no fold should compare."""
    rank, key = _ranked(type(value))
    return (rank, key(value))


def equal(left: Any, right: Any) -> bool:
    """Whether MongoDB finds the two equal: 1 and 1.0 are, true and 1 are not."""
    if type(left) is type(right) and type(left) in _PLAIN:
        return bool(left == right)
    return order_key(left) == order_key(right)


def contains(values: list[Any], value: Any) -> bool:
    """Whether one of the values equals the value."""
    if type(value) in _PLAIN:
        return value in values
    key = order_key(value)
    return any(order_key(item) == key for item in values)


def type_name(value: Any) -> str:
    """What MongoDB calls the type of a value."""
    for kind, name in _NAMES.items():
        if isinstance(value, kind):
            return name
    return type(value).__name__


def _number(value: Any) -> tuple[int, Any]:
    if type(value) is Decimal128:
        value = value.to_decimal()
    return (0, 0) if value != value else (1, value)  # noqa: PLR0124 - only NaN differs from itself


def _document(value: dict[str, Any]) -> tuple[Any, ...]:
    parts = []
    for name, item in value.items():
        rank, key = _ranked(type(item))
        parts.append((rank, name, key(item)))
    return tuple(parts)


def _binary(value: bytes) -> tuple[int, int, bytes]:
    return (len(value), value.subtype if isinstance(value, Binary) else 0, bytes(value))


def _milliseconds(value: datetime.datetime) -> int:
    if value.tzinfo is None:
        value = value.replace(tzinfo=datetime.UTC)  # as the driver writes it
    return (value - _EPOCH) // _MILLISECOND


_RANKS: Final[dict[type, tuple[int, Callable[[Any], Any]]]] = {
    MinKey: (0, lambda _: ()),
    type(None): (1, lambda _: ()),
    int: (2, _number),
    Int64: (2, _number),
    float: (2, _number),
    Decimal128: (2, _number),
    str: (3, lambda value: value),
    dict: (4, _document),
    list: (5, lambda value: tuple(order_key(item) for item in value)),
    bytes: (6, _binary),
    Binary: (6, _binary),
    ObjectId: (7, lambda value: value.binary),
    bool: (8, lambda value: value),
    datetime.datetime: (9, _milliseconds),
    DatetimeMS: (9, int),
    Timestamp: (10, lambda value: (value.time, value.inc)),
    MaxKey: (99, lambda _: ()),
}

_NAMES: Final[dict[type, str]] = {
    type(None): "null",
    bool: "bool",
    Int64: "long",
    int: "int",
    float: "double",
    Decimal128: "decimal",
    str: "string",
    dict: "object",
    list: "array",
    bytes: "binData",
    ObjectId: "objectId",
    datetime.datetime: "date",
    DatetimeMS: "date",
}


def _ranked(kind: type) -> tuple[int, Callable[[Any], Any]]:
    try:
        return _RANKS[kind]
    except KeyError:
        raise FoldError(f"a {kind.__name__} cannot be compared") from None
