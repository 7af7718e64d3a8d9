"""Python handlers: `(state, event)` or, typed, `(state, payload)` and `(state, payload, event)`, made to folds."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Final, TypeAlias, get_type_hints

import msgspec

from projector.errors import FoldError, ProjectionError
from projector.paths import fresh

__all__ = ["DELETE", "Event", "Fold", "Handler", "State", "fold_of"]

Event: TypeAlias = dict[str, Any]
"""An event document as the log holds it, or those of its fields that the projection asked for."""

State: TypeAlias = dict[str, Any]
"""A document of the read model without bookkeeping; `_id` is the key. `_mark` is never in it."""

Fold: TypeAlias = Callable[[Any, State | None, Event], State | None]
"""(key, the document or None, event) -> the document or None. It may change the document that it is given."""

Handler: TypeAlias = Callable[..., Any]


class _Delete:
    """The type of DELETE."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "DELETE"


DELETE: Final = _Delete()
"""A handler returns it to delete the document."""


def fold_of(handler: Handler, event_name: str) -> Fold:
    """The fold of a handler. Raises ProjectionError when its parameters do not fit."""
    place = f"handler of {event_name!r}"
    if inspect.iscoroutinefunction(handler):
        raise ProjectionError(f"{place}: it must not be async, because a fold waits for nothing")
    payload_type, takes_event = _parameters(handler, place)

    # The event is copied: other projections and other documents are given the same one, and a handler that keeps a list
    # of it in the state, and later appends to that, would change it for them. A copy is cheaper than that mistake.
    def call(state: State, event: Event) -> Any:
        return handler(state, fresh(event))

    def call_typed(state: State, event: Event) -> Any:
        try:
            payload = msgspec.convert(event.get("payload", {}), payload_type)
        except msgspec.ValidationError as error:
            raise FoldError(f"{place}: the payload is no {payload_type.__name__}: {error}") from error
        return handler(state, payload, fresh(event)) if takes_event else handler(state, payload)

    chosen = call if payload_type is None else call_typed

    def fold(key: Any, state: State | None, event: Event) -> State | None:
        if state is None:
            state = {"_id": key}
        result: Any = chosen(state, event)
        if result is DELETE:
            return None
        if result is None:
            result = state
        elif not isinstance(result, dict):
            raise FoldError(f"{place}: it returned a {type(result).__name__}, not None, a dict or DELETE")
        if result.get("_id") != key:
            if "_id" in result:
                raise FoldError(f"{place}: it changed the document's _id")
            result = {"_id": key, **result}
        document: State = result
        if "_mark" in document:
            raise FoldError(f"{place}: the field _mark is the projector's own")
        return document

    return fold


def _parameters(handler: Handler, place: str) -> tuple[Any, bool]:
    """The type of payload that a handler asks for (None: it takes the event), and whether it takes the event too."""
    try:
        parameters = list(inspect.signature(handler).parameters.values())
    except (TypeError, ValueError) as error:
        raise ProjectionError(f"{place}: {error}") from error
    required = [p for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    if len(parameters) < 2 or any(p.kind is p.KEYWORD_ONLY for p in required):
        raise ProjectionError(f"{place}: it must take (state, event), (state, payload) or (state, payload, event)")
    annotation = parameters[1].annotation
    if isinstance(annotation, str):
        annotation = _resolve(handler, annotation, place)
    typed = isinstance(annotation, type) and (
        issubclass(annotation, msgspec.Struct) or dataclasses.is_dataclass(annotation)
    )
    if len(required) != 2 and not (typed and len(required) == 3):
        raise ProjectionError(f"{place}: it must take (state, event), or a typed payload and perhaps the event")
    return (annotation if typed else None), len(required) == 3


def _resolve(handler: Handler, annotation: str, place: str) -> Any:
    """The type that an annotation written as text names; the other annotations may name what only a checker imports."""
    known = {"Event": Event, "State": State, "Any": Any, "dict": dict}
    space = known | getattr(inspect.unwrap(handler), "__globals__", {})
    try:
        return get_type_hints(SimpleNamespace(__annotations__={"event": annotation}), globalns=space)["event"]
    except NameError as error:
        raise ProjectionError(
            f"{place}: {error}; import what its second parameter is annotated with at run time"
        ) from error
