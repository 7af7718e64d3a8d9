"""A declared update (`{$set: …, $inc: …}`) compiled to a fold: each field's step is a closure over its split path.

Its meaning: references are replaced by what they find in the event, an entry whose reference finds nothing is left out,
and what remains happens to the document as `updateOne(…, upsert=True)` does it. The steps go in the server's order,
which is that of the paths, not that of the text.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

import msgspec
from bson.decimal128 import Decimal128

from projector import operators, targets
from projector.errors import FoldError, ProjectionError
from projector.expressions import Expression, compile_array, compile_value
from projector.paths import MISSING

if TYPE_CHECKING:
    from collections.abc import Callable

    from projector.handlers import Event, Fold, State
    from projector.paths import Getter
    from projector.targets import Path

__all__ = ["Update", "compile_update"]

_Step: TypeAlias = "Callable[[State, Event], None]"

_Fields: TypeAlias = dict[str, Any]


class Update(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What an event does to a document: MongoDB's update operators, each a document of field paths and values.

    A value is a literal, a reference to a field of the event (`$timestamp`, `$payload.amount`), or a document or array
    of these.
    """

    set: _Fields = msgspec.field(name="$set", default_factory=dict)
    """Sets fields."""
    set_on_insert: _Fields = msgspec.field(name="$setOnInsert", default_factory=dict)
    """Sets fields, if this event creates the document."""
    unset: _Fields = msgspec.field(name="$unset", default_factory=dict)
    """Removes fields; the values are "", true or 1."""
    inc: _Fields = msgspec.field(name="$inc", default_factory=dict)
    """Adds to numbers."""
    mul: _Fields = msgspec.field(name="$mul", default_factory=dict)
    """Multiplies numbers."""
    min: _Fields = msgspec.field(name="$min", default_factory=dict)
    """Sets fields to a value that is less, in BSON's order."""
    max: _Fields = msgspec.field(name="$max", default_factory=dict)
    """Sets fields to a value that is greater, in BSON's order."""
    push: _Fields = msgspec.field(name="$push", default_factory=dict)
    """Appends to arrays: a value, or {$each: […], $position, $sort, $slice}."""
    add_to_set: _Fields = msgspec.field(name="$addToSet", default_factory=dict)
    """Appends to arrays what they do not hold: a value, or {$each: […]}."""
    pull: _Fields = msgspec.field(name="$pull", default_factory=dict)
    """Removes from arrays what equals a value, is {$in: […]}, or is a document with these fields."""
    rename: dict[str, str] = msgspec.field(name="$rename", default_factory=dict)
    """Renames fields."""
    delete: bool = msgspec.field(name="$delete", default=False)
    """true, and alone: deletes the document."""


class _Planned(NamedTuple):
    """A step before the steps are put in order."""

    path: Path
    place: str
    step: _Step | None
    on_insert: bool = False
    sets: tuple[str, Getter] | None = None
    """A field of the document itself, when all that the step does is to set it."""


_COMBINES: Final[dict[str, operators.Combine]] = {
    "$set": operators.replace,
    "$setOnInsert": operators.replace,
    "$inc": operators.increment,
    "$mul": operators.multiply,
    "$min": operators.minimum,
    "$max": operators.maximum,
}


def compile_update(update: Update, place: str) -> tuple[Fold, frozenset[Path]]:
    """The fold, and the fields of an event that it reads. Raises ProjectionError that begins with the place."""
    planned: list[_Planned] = []
    references: set[Path] = set()
    # One conversion to the names of the vocabulary, so that each operator is spelled once, in the model.
    declared: dict[str, Any] = {
        name: getattr(update, field)
        for field, name in zip(Update.__struct_fields__, Update.__struct_encode_fields__, strict=True)
    }
    if declared.pop("$delete"):
        if any(declared.values()):
            raise ProjectionError(f"{place}.$delete: it must stand alone")
        return (lambda _key, _state, _event: None), frozenset()
    if not any(declared.values()):
        raise ProjectionError(
            f"{place}: it must have an operator with a field: {', '.join([*declared, '$delete: true'])}"
        )
    for operator, fields in declared.items():
        for name, spec in fields.items():
            at = f"{place}.{operator}.{name}"
            path = _target(name, at)
            if operator == "$rename":
                planned += _renaming(path, _target(spec, at), at)
            elif operator == "$unset":
                planned.append(_Planned(path, at, _unsetting(path, spec, at)))
            else:
                combine, argument = _operation(operator, spec, at)
                references |= argument.references
                sets = (name, argument.get) if combine is operators.replace and len(path) == 1 else None
                planned.append(_Planned(path, at, _step(path, combine, argument), operator == "$setOnInsert", sets))
    planned.sort(key=lambda entry: targets.order(entry.path))
    for one, other in itertools.pairwise(planned):  # in this order a conflict is between neighbours
        if targets.conflict(one.path, other.path):
            raise ProjectionError(f"{other.place}: {'.'.join(other.path)!r} is in conflict with {one.place}")
    return _fold([entry for entry in planned if entry.step is not None]), frozenset(references)


def _fold(planned: list[_Planned]) -> Fold:
    inserting = _steps(planned)
    updating = _steps([entry for entry in planned if not entry.on_insert])
    places = {entry.step: entry.place for entry in planned}

    def fold(key: Any, state: State | None, event: Event) -> State | None:
        if state is None:
            state = {"_id": key}
            steps = inserting
        else:
            steps = updating
        try:
            for step in steps:
                step(state, event)
        except FoldError as error:
            raise FoldError(f"{places[step]}: {error}") from error
        return state

    return fold


def _steps(planned: list[_Planned]) -> tuple[_Step, ...]:
    """The steps in their order. Fields that are simply set one after the other are one step: most of an update are such."""
    steps: list[_Step] = []
    for simple, group in itertools.groupby(planned, lambda entry: entry.sets is not None):
        entries = list(group)
        if simple and len(entries) > 1:
            steps.append(_setting(tuple(entry.sets for entry in entries if entry.sets)))
        else:
            steps += [entry.step for entry in entries if entry.step]
    return tuple(steps)


def _setting(fields: tuple[tuple[str, Getter], ...]) -> _Step:
    def set_all(state: State, event: Event) -> None:
        for name, get in fields:
            value = get(event)
            if value is not MISSING:
                state[name] = value

    return set_all


def _step(path: Path, combine: operators.Combine, argument: Expression) -> _Step:
    get = argument.get
    last = path[-1]
    if isinstance(combine, operators.Pull):

        def pull(state: State, event: Event) -> None:
            value = get(event)
            at = targets.container(state, path, create=False)
            if value is not MISSING and at is not None:
                combine(targets.read(at, last), value)

        return pull

    if len(path) > 1:

        def nested(state: State, event: Event) -> None:
            value = get(event)
            if value is not MISSING:
                at = targets.container(state, path, create=True)
                if at is not None:
                    targets.write(at, last, combine(targets.read(at, last), value))

        return nested

    if combine is operators.replace:

        def replace(state: State, event: Event) -> None:
            value = get(event)
            if value is not MISSING:
                state[last] = value

        return replace

    def step(state: State, event: Event) -> None:
        value = get(event)
        if value is not MISSING:
            state[last] = combine(state.get(last, MISSING), value)

    return step


def _operation(operator: str, spec: Any, place: str) -> tuple[operators.Combine, Expression]:
    """What an operator does, and its compiled argument."""
    match operator:
        case "$push":
            return _push(spec, place)
        case "$addToSet":
            if isinstance(spec, dict) and "$each" in spec:
                _only(spec, ("$each",), place)
                return operators.add_all_to_set, _each(spec, place)
            return operators.add_to_set, compile_value(spec, place)
        case "$pull":
            return _pull(spec, place)
    argument = compile_value(spec, place)
    value = argument.value
    if (
        operator in ("$inc", "$mul")
        and value is not MISSING
        and (isinstance(value, bool) or not isinstance(value, int | float | Decimal128))
    ):
        raise ProjectionError(f"{place}: {spec!r} must be a number")
    return _COMBINES[operator], argument


def _each(spec: dict[str, Any], place: str) -> Expression:
    """The argument of `$each`: an array, or a reference to one."""
    each = spec["$each"]
    argument = compile_value(each, f"{place}.$each")
    if argument.value is not MISSING and not isinstance(argument.value, list):
        raise ProjectionError(f"{place}.$each: {each!r} must be an array or a reference to one")
    return argument


def _push(spec: Any, place: str) -> tuple[operators.Combine, Expression]:
    if not isinstance(spec, dict) or not {"$each", "$position", "$sort", "$slice"} & spec.keys():
        return operators.push, compile_value(spec, place)
    if "$each" not in spec:
        raise ProjectionError(f"{place}: {', '.join(spec)} must stand beside $each")
    _only(spec, ("$each", "$position", "$sort", "$slice"), place)
    numbers = {name: spec.get(name) for name in ("$position", "$slice")}
    for name, number in numbers.items():
        if name in spec and (not isinstance(number, int) or isinstance(number, bool)):
            raise ProjectionError(f"{place}.{name}: {number!r} must be an integer")
    sort = _sort(spec["$sort"], f"{place}.$sort") if "$sort" in spec else None
    return operators.Push(numbers["$position"], sort, numbers["$slice"]), _each(spec, place)


def _sort(spec: Any, place: str) -> int | tuple[tuple[Path, int], ...]:
    """`1`, `-1`, or `{path: 1 or -1}`."""
    directions = spec if isinstance(spec, dict) else {"": spec}
    if not directions or any(type(value) is not int or value not in (1, -1) for value in directions.values()):
        raise ProjectionError(f"{place}: {spec!r} must be 1, -1 or a document of paths with 1 or -1")
    if not isinstance(spec, dict):
        return int(spec)
    return tuple((_target(path, f"{place}.{path}", reserved=False), int(value)) for path, value in spec.items())


def _pull(spec: Any, place: str) -> tuple[operators.Combine, Expression]:
    if not isinstance(spec, dict) or list(spec) == ["$literal"]:
        return operators.Pull(), compile_value(spec, place)
    if "$in" in spec:
        _only(spec, ("$in",), place)
        return operators.Pull(several=True), _in(spec["$in"], f"{place}.$in")
    parts: dict[str, Expression] = {}
    for name, item in spec.items():
        if not isinstance(name, str) or name.startswith("$") or "." in name:
            raise ProjectionError(
                f"{place}: {name!r}: a condition is {{$in: […]}} or field names (without dots) with values"
            )
        if isinstance(item, dict) and "$in" in item:
            _only(item, ("$in",), f"{place}.{name}")
            several = _in(item["$in"], f"{place}.{name}.$in")
            parts[name] = Expression(_wrapped(several), several.references)
        else:
            parts[name] = compile_value(item, f"{place}.{name}")
    getters = [(name, part.get) for name, part in parts.items()]

    def condition(event: Event) -> Any:
        # Without one of its values a condition would find more than was meant: then nothing is pulled.
        values = {name: get(event) for name, get in getters}
        return MISSING if any(value is MISSING for value in values.values()) else values

    return operators.Pull(), Expression(condition, frozenset().union(*(part.references for part in parts.values())))


def _in(spec: Any, place: str) -> Expression:
    if isinstance(spec, list):
        return compile_array(spec, place, gaps=False)
    argument = compile_value(spec, place)
    if argument.value is not MISSING and not isinstance(argument.value, list):
        raise ProjectionError(f"{place}: {spec!r} must be an array or a reference to one")
    return argument


def _wrapped(several: Expression) -> Callable[[Event], Any]:
    def get(event: Event) -> Any:
        values = several.get(event)
        return values if values is MISSING else {"$in": values}

    return get


def _unsetting(path: Path, spec: Any, place: str) -> _Step:
    if spec not in ("", 1, True):
        raise ProjectionError(f'{place}: {spec!r} must be "", true or 1')
    return lambda state, _event: targets.remove(state, path)


def _renaming(source: Path, destination: Path, place: str) -> list[_Planned]:
    """Both paths, of which the server works on the destination's turn."""
    return [
        _Planned(source, place, None),
        _Planned(destination, place, lambda state, _event: targets.rename(state, source, destination)),
    ]


def _target(text: Any, place: str, *, reserved: bool = True) -> Path:
    if not isinstance(text, str):
        raise ProjectionError(f"{place}: {text!r} must be a text")
    try:
        return targets.target(text, reserved=reserved)
    except ProjectionError as error:
        raise ProjectionError(f"{place}: {error}") from None


def _only(spec: dict[str, Any], known: tuple[str, ...], place: str) -> None:
    for name in spec:
        if name not in known:
            raise ProjectionError(f"{place}: {name!r} cannot stand here, only {', '.join(known)}")
