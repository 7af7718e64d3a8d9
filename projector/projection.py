"""What a projection is: a name, a version, where its read model lies, and a fold of events per key.

The loop (and the rebuild, the repair, `verify`) knows projections by this class alone. A declared one (YAML, custom
resource) is compiled to it by `projector.declared`; one in Python is written with it:

    permits = Projection("permits", version=1)

    @permits.on("Confirmation of receipt")
    def confirm(state, event):
        state["status"] = "confirmed"
        state["confirmedAt"] = event["timestamp"]

A fold must be a function of its arguments: a crash, a rebuild and `verify` fold the same events again.
"""

from __future__ import annotations

import datetime
import re
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, TypeVar

import msgspec
from bson.binary import Binary
from bson.datetime_ms import DatetimeMS
from bson.objectid import ObjectId
from pymongo import IndexModel

from eventstore.event import EVENTS
from projector.errors import FoldError, ProjectionError
from projector.handlers import DELETE, Event, Fold, Handler, State, fold_of
from projector.paths import MISSING, getter, minimal, reference

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["ANY", "DELETE", "Event", "FoldError", "IndexSpec", "Projection", "ProjectionError", "State"]

ANY: Final = "*"
"""In place of an event name: every event that no other handler of the projection names."""

AGGREGATE_ID: Final = "$aggregateId"

NAME_PATTERN: Final = r"^[a-z][a-z0-9_-]{0,62}$"
COLLECTION_PATTERN: Final = r"^[A-Za-z][A-Za-z0-9_-]{0,62}$"
"""No dot, so that no read model can meet the versions, marks and other bookkeeping, which all have one."""

_KEY_TYPES: Final = (str, int, ObjectId, datetime.datetime, DatetimeMS, Binary, bytes)
"""What may be a key. Not bool and float, which Python takes for equal to integers where MongoDB does not or vice versa;
not documents, whose equality hangs on the order of their fields."""

_HandlerT = TypeVar("_HandlerT", bound="Handler")


class IndexSpec(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True, rename="camel"
):
    """An index of a read model, as it is declared: `{keys: {status: 1, confirmedAt: -1}, unique: true}`."""

    keys: Annotated[dict[str, Literal[1, -1, "2dsphere", "hashed", "text"]], msgspec.Meta(min_length=1)]
    """Fields in their order, each with a direction or a kind."""
    name: Annotated[str, msgspec.Meta(min_length=1, max_length=127)] | None = None
    """Default: MongoDB's own (`status_1_confirmedAt_-1`)."""
    unique: bool = False
    """A document that breaks it fails its event, so only for what the events promise."""
    sparse: bool = False
    partial_filter: dict[str, Any] | None = None
    """MongoDB's partialFilterExpression: only documents that match it are in the index."""
    expire_after_seconds: Annotated[int, msgspec.Meta(ge=0)] | None = None

    @property
    def index_name(self) -> str:
        """The given name, or the one that MongoDB makes from the keys."""
        return self.name or "_".join(f"{field}_{kind}" for field, kind in self.keys.items())

    def model(self) -> IndexModel:
        """As pymongo's `create_indexes` takes it."""
        options: dict[str, Any] = {"unique": True} if self.unique else {}
        if self.sparse:
            options["sparse"] = True
        if self.partial_filter is not None:
            options["partialFilterExpression"] = self.partial_filter
        if self.expire_after_seconds is not None:
            options["expireAfterSeconds"] = self.expire_after_seconds
        return IndexModel(list(self.keys.items()), name=self.index_name, **options)


class Projection:
    """A projection, declared or in Python.

    `key` says to which document an event goes: a reference to a field of the event (`$payload.customerId`: one key, or
    several when it is an array), or a function of the event that returns a key, several, or None for no document.
    `fields` names the fields of an event that the handlers and a key function read (`payload.amount`), so that no others
    are read from MongoDB; None asks for whole events. Raises ProjectionError for what cannot be a projection.
    """

    def __init__(
        self,
        name: str,
        version: int = 1,
        *,
        collection: str | None = None,
        key: str | Callable[[Event], Any] = AGGREGATE_ID,
        indexes: Sequence[IndexSpec] = (),
        fields: Sequence[str] | None = None,
    ) -> None:
        if not re.fullmatch(NAME_PATTERN, name):
            raise ProjectionError(f"name: {name!r} must be 1 to 63 of a-z, 0-9, _ and -, beginning with a letter")
        if version < 1:
            raise ProjectionError(f"version: {version} must be at least 1")
        collection = collection or name
        if not re.fullmatch(COLLECTION_PATTERN, collection) or collection == EVENTS:
            raise ProjectionError(
                f"collection: {collection!r} must be 1 to 63 letters, digits, _ and -, beginning with a letter, "
                f"and not {EVENTS!r}, which is the log"
            )
        self.name = name
        self.version = version
        self.collection = collection
        self.indexes = tuple(indexes)
        self.definition: dict[str, Any] | None = None
        """The declared form, canonical; None for one in Python."""
        self.module: str | None = None
        """The module that it was loaded from, by which another process can load it too."""
        self.aggregate_keyed = key == AGGREGATE_ID
        self._key = key if callable(key) else getter(_key_path(key))
        self.fields: tuple[str, ...] | None = None
        if fields is not None:
            paths = {_field_path(field) for field in fields}
            self.fields = minimal(paths if callable(key) or self.aggregate_keyed else {*paths, _key_path(key)})
        self._folds: dict[str, Fold] = {}
        self._any: Fold | None = None

    def __repr__(self) -> str:
        return f"Projection({self.name!r}, version={self.version})"

    @property
    def versioned(self) -> str:
        """The collection that the view `collection` shows while this version is the current one."""
        return f"{self.collection}.v{self.version}"

    def on(self, event_name: str) -> Callable[[_HandlerT], _HandlerT]:
        """Decorates the handler of an event name, or of `"*"`: of every event that no other handler names."""

        def register(handler: _HandlerT) -> _HandlerT:
            self.add(event_name, fold_of(handler, event_name))
            return handler

        return register

    def add(self, event_name: str, fold: Fold) -> None:
        """Registers a fold. Raises ProjectionError when the event name has one."""
        if not event_name:
            raise ProjectionError("on: an event name must not be empty")
        if event_name in self._folds or (event_name == ANY and self._any is not None):
            raise ProjectionError(f"on[{event_name!r}]: it has a handler already")
        if event_name == ANY:
            self._any = fold
        else:
            self._folds[event_name] = fold

    def handles(self, event_name: str) -> bool:
        """Whether events of this name change documents."""
        return event_name in self._folds or self._any is not None

    def fold_of(self, event_name: str) -> Fold | None:
        """The fold of events of this name; None when they change nothing. What `apply` does, for loops in which a call counts."""
        return self._folds.get(event_name, self._any)

    @property
    def event_names(self) -> tuple[str, ...] | None:
        """The event names that are handled; None when all are."""
        return None if self._any is not None else tuple(self._folds)

    def keys(self, event: Event) -> tuple[Any, ...]:
        """The documents that the event goes to, none of them twice.

        Raises FoldError for a key that cannot be one, and whatever a key function raises.
        """
        if self.aggregate_keyed:
            return (event["aggregateId"],)
        found = self._key(event)
        if found is MISSING or found is None:
            return ()
        several = found if isinstance(found, list | tuple | set | frozenset) else (found,)
        for key in several:
            if not isinstance(key, _KEY_TYPES) or isinstance(key, bool):
                raise FoldError(
                    f"key: a {type(key).__name__} cannot be one; it must be a text, integer, ObjectId, date or binary"
                )
        return tuple(dict.fromkeys(several))

    def apply(self, key: Any, state: State | None, event: Event) -> State | None:
        """The document after the event; None when there is none (any more).

        `state` is None when there is no document, and may be changed in place, also when this raises: then it must be
        thrown away. Raises FoldError, and whatever a handler in Python raises. An event that is not handled changes
        nothing.
        """
        fold = self.fold_of(event["eventName"])
        return state if fold is None else fold(key, state, event)


def _key_path(key: str) -> tuple[str, ...]:
    if not key.startswith("$"):
        raise ProjectionError(f"key: {key!r} must be a reference to a field of the event, such as $payload.customerId")
    try:
        return reference(key)
    except ProjectionError as error:
        raise ProjectionError(f"key: {error}") from None


def _field_path(field: str) -> tuple[str, ...]:
    try:
        return reference(f"${field}")
    except ProjectionError as error:
        raise ProjectionError(f"fields: {error}") from None
