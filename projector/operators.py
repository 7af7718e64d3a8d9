"""What each update operator makes of a value: (what is there, or MISSING; the argument) -> what is there afterwards.

MongoDB is the judge: `tests/integration/test_operators_against_mongodb.py` gives the same to a real server. A number
keeps the type that it would have there: int32 grows to int64 where it must, int64 stays int64 (`bson.Int64`), and what
is beyond int64 is an error.
"""

from __future__ import annotations

import datetime
import decimal
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from bson.decimal128 import Decimal128, create_decimal128_context
from bson.int64 import Int64

from eventstore.event import INT64_MAX, INT64_MIN
from projector.bson_order import contains, equal, order_key, type_name
from projector.errors import FoldError
from projector.paths import MISSING

__all__ = [
    "Combine",
    "Pull",
    "Push",
    "add_all_to_set",
    "add_to_set",
    "increment",
    "maximum",
    "minimum",
    "multiply",
    "push",
    "replace",
]

Combine: TypeAlias = Callable[[Any, Any], Any]
"""(what is there or MISSING, the argument) -> what is there afterwards. An array is changed in place."""

_INT32_MIN: Final = -(2**31)
_INT32_MAX: Final = 2**31 - 1
_DECIMAL: Final = create_decimal128_context()
_ORDERED: Final = frozenset({datetime.datetime, int, str})
"""Types whose values Python orders among themselves as MongoDB does; the usual ones, so not worth a key."""


def replace(_current: Any, value: Any) -> Any:
    """`$set`."""
    return value


def increment(current: Any, amount: Any) -> Any:
    """`$inc`. A field that is not there becomes the amount."""
    if type(current) is int and type(amount) is int:
        total = current + amount
        if _INT32_MIN <= total <= _INT32_MAX:
            return total
    if current is MISSING:
        return _number(amount, "$inc by")
    return _arithmetic(current, amount, "$inc", _DECIMAL.add, lambda a, b: a + b)


def multiply(current: Any, factor: Any) -> Any:
    """`$mul`. A field that is not there becomes 0, of the factor's type."""
    return _arithmetic(0 if current is MISSING else current, factor, "$mul", _DECIMAL.multiply, lambda a, b: a * b)


def minimum(current: Any, value: Any) -> Any:
    """`$min`, in MongoDB's order of types and values."""
    if current is MISSING:
        return value
    kind = type(value)
    if kind is type(current) and kind in _ORDERED:
        return min(current, value)
    return value if order_key(value) < order_key(current) else current


def maximum(current: Any, value: Any) -> Any:
    """`$max`, in MongoDB's order of types and values."""
    if current is MISSING:
        return value
    kind = type(value)
    if kind is type(current) and kind in _ORDERED:
        return max(current, value)
    return value if order_key(value) > order_key(current) else current


def push(current: Any, value: Any) -> Any:
    """`$push` of one value at the end."""
    values = _array(current, "$push")
    values.append(value)
    return values


def add_to_set(current: Any, value: Any) -> Any:
    """`$addToSet` of one value, which may be an array or a document as a whole."""
    values = _array(current, "$addToSet")
    if not contains(values, value):
        values.append(value)
    return values


def add_all_to_set(current: Any, added: Any) -> Any:
    """`$addToSet` with `$each`."""
    if not isinstance(added, list):
        raise FoldError(f"$each needs an array, not {type_name(added)}")
    values = _array(current, "$addToSet")
    for value in added:
        if not contains(values, value):
            values.append(value)
    return values


@dataclass(frozen=True, slots=True)
class Push:
    """`$push` with `$each` and what goes with it; called as a Combine."""

    position: int | None = None
    sort: int | tuple[tuple[tuple[str, ...], int], ...] | None = None
    """1 or -1 by the whole values; or the paths in them, each with 1 or -1."""
    slice: int | None = None

    def __call__(self, current: Any, added: Any) -> Any:
        if not isinstance(added, list):
            raise FoldError(f"$each needs an array, not {type_name(added)}")
        values = _array(current, "$push")
        if self.position is None:
            values.extend(added)
        else:
            values[self.position : self.position] = added
        if isinstance(self.sort, int):
            values.sort(key=order_key, reverse=self.sort < 0)
        elif self.sort is not None:
            for path, direction in reversed(self.sort):
                values.sort(key=functools.partial(_part_key, path), reverse=direction < 0)
        if self.slice is not None:
            return values[self.slice :] if self.slice < 0 else values[: self.slice]
        return values


@dataclass(frozen=True, slots=True)
class Pull:
    """`$pull`; called as a Combine. `several`: the argument is that of `$in`."""

    several: bool = False

    def __call__(self, current: Any, value: Any) -> Any:
        if current is MISSING:
            return MISSING
        if not isinstance(current, list):
            raise FoldError(f"$pull needs an array, but there is {type_name(current)}")
        if self.several:
            wanted = _wanted(value)
            current[:] = [item for item in current if not _matches(item, wanted)]
        elif isinstance(value, dict):
            conditions = [(name, _condition(name, part)) for name, part in value.items()]
            current[:] = [item for item in current if not _has_all(item, conditions)]
        else:
            current[:] = [item for item in current if not equal(item, value)]
        return current


def _has_all(item: Any, conditions: list[tuple[str, list[Any]]]) -> bool:
    """Whether an element is a document that meets every condition."""
    return isinstance(item, dict) and all(_matches(item.get(name, MISSING), wanted) for name, wanted in conditions)


def _condition(name: str, part: Any) -> list[Any]:
    """What a field may equal, by one field of `$pull`'s condition. The definition's own ones were checked when it was
    loaded; this also sees what a reference to a document of the event brings."""
    if "." in name or name.startswith("$"):
        raise FoldError(f"$pull: {name!r} cannot be a field of a condition")
    if isinstance(part, dict) and any(key.startswith("$") for key in part):
        if list(part) == ["$in"]:
            return _wanted(part["$in"])
        raise FoldError(f"$pull: of conditions on a field only $in is supported, not {', '.join(part)}")
    return [part]


def _wanted(values: Any) -> list[Any]:
    if not isinstance(values, list):
        raise FoldError(f"$in needs an array, not {type_name(values)}")
    return values


def _matches(value: Any, wanted: list[Any]) -> bool:
    """Whether a query for these values finds a field: it equals one of them, or is an array that holds one; null finds
    a field that is not there."""
    if value is MISSING:
        return None in wanted
    return contains(wanted, value) or (isinstance(value, list) and any(contains(wanted, item) for item in value))


def _part_key(path: tuple[str, ...], value: Any) -> tuple[Any, ...]:
    """The key of what `$sort` finds in an element: null when there is nothing; a number is an array's index."""
    if not isinstance(value, dict):
        return order_key(None)
    for name in path:
        if isinstance(value, list) and name.isdecimal() and str(int(name)) == name and int(name) < len(value):
            value = value[int(name)]
        elif isinstance(value, dict) and name in value:
            value = value[name]
        else:
            return order_key(None)
    return order_key(value)


def _array(current: Any, operator: str) -> list[Any]:
    if current is MISSING:
        return []
    if not isinstance(current, list):
        raise FoldError(f"{operator} needs an array, but there is {type_name(current)}")
    return current


def _number(value: Any, what: str) -> Any:
    if not isinstance(value, int | float | Decimal128) or isinstance(value, bool):
        raise FoldError(f"{what} needs a number, not {type_name(value)}")
    return value


def _arithmetic(
    current: Any,
    operand: Any,
    operator: str,
    decimals: Callable[[decimal.Decimal, decimal.Decimal], decimal.Decimal],
    numbers: Callable[[Any, Any], Any],
) -> Any:
    """Adds or multiplies in the wider of the two types: int32 < int64 < double < Decimal128.

    What gives an equal number of the same type leaves the field as it is, down to the sign of 0 and a decimal's zeros.
    """
    _number(current, f"{operator} of a field")
    _number(operand, f"{operator} by")
    if isinstance(current, Decimal128) or isinstance(operand, Decimal128):
        exact = decimals(_decimal(current), _decimal(operand))
        unchanged = isinstance(current, Decimal128) and current.to_decimal() == exact
        return current if unchanged else Decimal128(exact)
    if isinstance(current, float) or isinstance(operand, float):
        rounded = numbers(float(current), float(operand))
        return current if isinstance(current, float) and current == rounded else rounded
    result = numbers(int(current), int(operand))
    if not INT64_MIN <= result <= INT64_MAX:
        raise FoldError(f"{operator}: {current} and {operand} give more than 64 bits hold")
    if isinstance(current, Int64) or isinstance(operand, Int64) or not _INT32_MIN <= result <= _INT32_MAX:
        return Int64(result)
    return result


def _decimal(number: Any) -> decimal.Decimal:
    """As the server converts it: a double by its first 15 significant digits."""
    if isinstance(number, Decimal128):
        return number.to_decimal()
    if isinstance(number, float):
        return decimal.Decimal(f"{number:.14e}" if number else f"{number:.0f}")  # 0 without digits, but with its sign
    return decimal.Decimal(int(number))
