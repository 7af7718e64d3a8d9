"""Indexes as values: what is wanted, what is there, and what must be done about the difference. No I/O.

Two indexes are compared by what the server means, not by what was written: 1 and 1.0 are one direction, a text index
keeps its fields in `weights`, a collation comes back with every default filled in.

The facts that `plan` leans on were measured on MongoDB 6.0: an index is told from another one by its keys, unique,
sparse, partialFilterExpression and collation, so two that differ in one of these can stand side by side; `hidden` and
`expireAfterSeconds` do not tell indexes apart, can be changed by collMod, but a TTL cannot be taken away; unique can be
added by collMod, not taken away.
"""

from __future__ import annotations

import enum
import hashlib
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from bson import json_util
from bson.int64 import Int64

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

__all__ = ["Action", "Found", "Index", "Step", "plan"]

ID_INDEX: Final = "_id_"

_COLLATION_DEFAULTS: Final = {"strength": 3, "caseLevel": False, "numericOrdering": False}
"""Defaults that no locale changes. The others (caseFirst, alternate …) differ by locale, so one that is not asked for
is not compared: to miss a difference there is cheaper than to see one for ever that is none."""


@dataclass(frozen=True)
class Index:
    """An index in normal form: equal when the server would call them equal, name and collation defaults aside."""

    name: str
    keys: tuple[tuple[str, int | str], ...]
    unique: bool = False
    sparse: bool = False
    hidden: bool = False
    expire_after_seconds: int | None = None
    partial_filter: Mapping[str, Any] | None = None
    collation: Mapping[str, Any] | None = None

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Index:
        """From an index as `listIndexes` gives it, or as `pymongo.IndexModel.document` holds it."""
        expires = document.get("expireAfterSeconds")
        collation = document.get("collation")
        return cls(
            name=document["name"],
            keys=_keys(document["key"], document.get("weights", {})),
            unique=bool(document.get("unique")),
            sparse=bool(document.get("sparse")),
            hidden=bool(document.get("hidden")),
            expire_after_seconds=None if expires is None else int(expires),
            partial_filter=document.get("partialFilterExpression"),
            collation=None if collation is None or collation.get("locale") == "simple" else dict(collation),
        )

    def document(self) -> dict[str, Any]:
        """As `createIndexes` takes it."""
        document: dict[str, Any] = {"name": self.name, "key": dict(self.keys)}
        if self.unique:
            document["unique"] = True
        if self.sparse:
            document["sparse"] = True
        if self.hidden:
            document["hidden"] = True
        if self.expire_after_seconds is not None:
            document["expireAfterSeconds"] = self.expire_after_seconds
        if self.partial_filter is not None:
            document["partialFilterExpression"] = dict(self.partial_filter)
        if self.collation is not None:
            document["collation"] = dict(self.collation)
        return document

    def differences(self, found: Index) -> tuple[str, ...]:
        """The options in which an index that was found is not what is wanted; names do not count."""
        differing = []
        if self.keys != found.keys:
            differing.append("keys")
        differing += [
            option
            for option, ours, theirs in (
                ("unique", self.unique, found.unique),
                ("sparse", self.sparse, found.sparse),
                ("hidden", self.hidden, found.hidden),
                ("expireAfterSeconds", self.expire_after_seconds, found.expire_after_seconds),
                ("partialFilterExpression", _canonical(self.partial_filter), _canonical(found.partial_filter)),
            )
            if ours != theirs
        ]
        if not _same_collation(self.collation, found.collation):
            differing.append("collation")
        return tuple(differing)

    def digest(self) -> str:
        """Eight hexadecimal digits that change with the keys and options, not with the name."""
        text = json_util.dumps(_canonical(replace(self, name="").document()), sort_keys=True)
        keys = ",".join(f"{name}:{order}" for name, order in self.keys)  # sort_keys loses their order
        return hashlib.sha256(f"{keys}|{text}".encode()).hexdigest()[:8]

    def beside(self) -> Index:
        """The same index under the name that it gets when it is built beside the one that it replaces."""
        return replace(self, name=f"{self.name}-{self.digest()}")


@dataclass(frozen=True)
class Found:
    """An index of a collection as it was measured."""

    index: Index
    build: str | None = None
    """The buildUUID while it is being built."""


class Action(enum.Enum):
    """What to do about one wanted index."""

    KEEP = "keep"
    CREATE = "create"
    WAIT = "wait"
    """It is being built: join the build."""
    MODIFY = "modify"
    """collMod can do it."""
    BESIDE = "beside"
    """Build the new one under another name, then drop the old one."""
    INSTEAD = "instead"
    """MongoDB allows no second one beside it: drop the old one, then build."""
    DRIFTED = "drifted"
    """It differs, and what would mend it was not allowed."""
    TAKEN = "taken"
    """An index of another name has its keys and options."""


@dataclass(frozen=True)
class Step:
    """What to do about one index, and what it is about."""

    action: Action
    name: str
    """Its name in the spec."""
    wanted: Index
    """The index under the name that it has, or gets, in MongoDB."""
    found: Found | None = None
    differing: tuple[str, ...] = ()
    leftovers: tuple[str, ...] = ()
    """Names under which an earlier form of it still stands: to be dropped."""


_MODIFIABLE: Final = frozenset({"hidden", "expireAfterSeconds", "unique"})


def plan(
    wanted: Sequence[Index], found: Iterable[Found], owned: Collection[str], *, recreate: bool = False
) -> list[Step]:
    """What must be done so that each wanted index is there: one step for each, in their order.

    `owned` are the names that the resource owns, those of replacements among them; `recreate` says whether an index may
    be dropped to be replaced. A name that is neither wanted nor owned gets no step.
    """
    by_name = {one.index.name: one for one in found}
    default = by_name[ID_INDEX].index.collation if ID_INDEX in by_name else None  # the collection's own
    others = {index.name for index in wanted}
    steps = []
    for one in wanted:
        index = one if one.collation is not None or default is None else replace(one, collation=default)
        suffixed = re.compile(rf"{re.escape(one.name)}-[0-9a-f]{{8}}")
        ours = [one.name] if one.name in by_name else []
        ours += [name for name in by_name if name in owned and name not in others and suffixed.fullmatch(name)]
        steps.append(_step(index, ours, by_name, recreate=recreate))
    return steps


def _step(wanted: Index, ours: Sequence[str], by_name: Mapping[str, Found], *, recreate: bool) -> Step:
    """The step for one index; `ours` are the names under which it may stand, its own name first."""
    for name in ours:
        here = by_name[name]
        if wanted.differences(here.index):
            continue
        if here.build is not None:
            return Step(Action.WAIT, wanted.name, replace(wanted, name=name), here)
        leftovers = tuple(other for other in ours if other != name) if recreate else ()
        return Step(Action.KEEP, wanted.name, replace(wanted, name=name), here, leftovers=leftovers)
    if not ours:
        twin = next((one for one in by_name.values() if _collide(wanted, one.index)), None)
        return Step(Action.TAKEN, wanted.name, wanted, twin) if twin else Step(Action.CREATE, wanted.name, wanted)
    here = by_name[ours[0]]
    if here.build is not None:
        return Step(Action.WAIT, wanted.name, here.index, here)  # of an earlier spec: it is changed when it stands
    return _change(wanted, here, by_name, recreate=recreate)


def _change(wanted: Index, here: Found, by_name: Mapping[str, Found], *, recreate: bool) -> Step:
    """How an index that stands can become the wanted one."""
    differing = wanted.differences(here.index)
    removes_unique = "unique" in differing and not wanted.unique
    removes_ttl = "expireAfterSeconds" in differing and wanted.expire_after_seconds is None
    if set(differing) <= _MODIFIABLE and not removes_unique and not removes_ttl:
        return Step(Action.MODIFY, wanted.name, replace(wanted, name=here.index.name), here, differing)
    if not recreate:
        return Step(Action.DRIFTED, wanted.name, wanted, here, differing)
    blocking = [one for one in by_name.values() if _collide(wanted, one.index)]
    if not blocking:
        return Step(Action.BESIDE, wanted.name, wanted.beside() if wanted.name in by_name else wanted, here, differing)
    if blocking == [here]:
        return Step(Action.INSTEAD, wanted.name, wanted, here, differing)
    return Step(Action.TAKEN, wanted.name, wanted, next(one for one in blocking if one != here))


def _collide(one: Index, other: Index) -> bool:
    """Whether the server takes both for the same index, so that it allows only one of them."""
    return not set(one.differences(other)) - {"hidden", "expireAfterSeconds"}


def _keys(key: Mapping[str, Any], weights: Mapping[str, Any]) -> tuple[tuple[str, int | str], ...]:
    """The fields and their order; those of a text index are in its weights, among themselves without an order."""
    keys: list[tuple[str, int | str]] = []
    text = sorted([name for name, order in key.items() if order == "text" and name != "_fts"] or weights)
    for name, order in key.items():
        if name == "_ftsx":
            continue
        if order == "text":
            keys += [(part, "text") for part in text]
            text = []
        else:
            keys.append((name, order if isinstance(order, str) else int(order)))
    return tuple(keys)


def _same_collation(wanted: Mapping[str, Any] | None, found: Mapping[str, Any] | None) -> bool:
    if wanted is None or found is None:
        return wanted is found
    return all(found.get(key) == value for key, value in (_COLLATION_DEFAULTS | dict(wanted)).items())


def _canonical(value: Any) -> Any:
    """A value that is equal where MongoDB's is: the order of fields aside, numbers by value, booleans no numbers."""
    match value:
        case bool():
            return ("bool", value)
        case Int64():
            return int(value)
        case dict():
            return {name: _canonical(part) for name, part in sorted(value.items())}
        case list() | tuple():
            return [_canonical(part) for part in value]
    return value
