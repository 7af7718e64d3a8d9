"""From a decoded request to documents for the log: every check that needs more than a type, and BSON once per event.

The C encoder of BSON is the judge of payload and metadata: it refuses keys and integers that MongoDB could not hold and
tells the size. Only when it refuses is the payload walked in Python, to name the field.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import bson
from bson.errors import InvalidDocument
from bson.raw_bson import RawBSONDocument
from msgspec import Struct

from appender.problems import Invalid, TooLarge
from appender.requests import MAX_REQUEST_EVENTS, find_value
from eventstore.client import CODEC
from eventstore.event import (
    INT64_MAX,
    INT64_MIN,
    aggregate_id_problem,
    event_id_problem,
    new_event_id,
)

if TYPE_CHECKING:
    from appender.requests import EventLine, NewEvent

__all__ = ["Append", "Event", "check_aggregate_id", "check_distinct", "encode_append", "encode_event", "same", "whole"]

MAX_LEVELS: Final = 100
"""MongoDB's documented limit of nesting. A deeper document can make the server refuse the whole message, neighbours too."""

_ENVELOPE_BYTES: Final = 160
"""Names, types and fixed values of an event document's own fields; only the size limit leans on it."""

_UTC: Final = datetime.UTC


class Event(Struct, gc=False):
    """An event that is ready for the log but for its number."""

    event_id: str
    event_name: str
    timestamp: datetime.datetime
    payload: RawBSONDocument
    metadata: RawBSONDocument | None
    given_id: bool
    given_timestamp: bool
    size: int


class Append(Struct):
    """Events for one aggregate, all or nothing; and, once appended, where they stand.

    `first` is the number of the first event, the others follow it; `numbers` are the numbers one by one when the events
    were there already.
    """

    aggregate_id: str
    expected: int | None
    events: Sequence[Event]
    first: int = 0
    numbers: list[int] | None = None

    @property
    def sequence_nos(self) -> Sequence[int]:
        """The numbers of the events, in their order."""
        return self.numbers or range(self.first, self.first + len(self.events))


def encode_event(
    new: NewEvent | EventLine, limit: int, field: str, traceparent: str | None = None, deep: bool = True
) -> Event:
    """The event as BSON. `field` is its place in the request, for messages; `deep` is False where the body cannot be
    nested beyond the limit. Raises Invalid and TooLarge.
    """
    event_id = new.event_id
    given = event_id is not None
    if event_id is None:
        event_id = new_event_id()
    elif problem := event_id_problem(event_id):
        raise Invalid(f"{field}eventId", problem)
    if not new.event_name or "\0" in new.event_name:
        raise Invalid(f"{field}eventName", "must not be empty and must not contain NUL")
    metadata: dict[str, Any] | None = new.metadata
    if traceparent is not None and (metadata is None or "traceparent" not in metadata):
        metadata = {**(metadata or {}), "traceparent": traceparent}
    payload = _document(new.payload, f"{field}payload", deep)
    encoded = _document(metadata, f"{field}metadata", deep) if metadata is not None else None
    size = len(payload.raw) + _ENVELOPE_BYTES + len(new.event_name) + (len(encoded.raw) if encoded else 0)
    if size > limit:
        place = field.rstrip(".") or "The event"
        raise TooLarge(f"{place} has {size} bytes as BSON; an event may have {limit}.", field=field.rstrip(".") or None)
    when = new.timestamp
    if when is not None:
        try:
            when = when.astimezone(_UTC)  # here, so that no timestamp can spoil a whole batch later
        except OverflowError as error:
            raise Invalid(f"{field}timestamp", "must lie in the years 1 to 9999 in UTC") from error
    return Event(
        event_id,
        new.event_name,
        when if when is not None else datetime.datetime.now(_UTC),
        payload,
        encoded,
        given,
        when is not None,
        size,
    )


def encode_append(
    aggregate_id: str,
    expected: float | None,
    events: Sequence[NewEvent],
    limit: int,
    *,
    field: str = "",
    traceparent: str | None = None,
    deep: bool = True,
) -> Append:
    """The events of one aggregate as BSON. Raises Invalid and TooLarge."""
    check_aggregate_id(aggregate_id, field)
    if expected is not None:
        expected = whole(expected, field)
    if len(events) == 1:
        return Append(
            aggregate_id, expected, (encode_event(events[0], limit, f"{field}events[0].", traceparent, deep),)
        )
    if len(events) > MAX_REQUEST_EVENTS:
        raise TooLarge(
            f"{field}events has {len(events)} items; an atomic append may have {MAX_REQUEST_EVENTS} (send a stream of lines)",
            field=f"{field}events",
        )
    encoded = [
        encode_event(new, limit, f"{field}events[{index}].", traceparent, deep) for index, new in enumerate(events)
    ]
    return Append(aggregate_id, expected, encoded)


def check_aggregate_id(aggregate_id: str, field: str = "") -> None:
    """Raises Invalid when it is none."""
    if problem := aggregate_id_problem(aggregate_id):
        raise Invalid(f"{field}aggregateId", problem)


def whole(expected: float, field: str = "") -> int:
    """An expectedSequenceNo as the integer that it is. Raises Invalid when it is none of 63 bits."""
    if not 0 <= expected <= INT64_MAX or expected != int(expected):
        raise Invalid(f"{field}expectedSequenceNo", f"must be a whole number from 0 to {INT64_MAX}")
    return int(expected)


def check_distinct(appends: Sequence[Append]) -> None:
    """Raises Invalid when an eventId stands twice in a request: one of the two could never be appended."""
    seen: set[str] = set()
    for append in appends:
        for event in append.events:
            if event.given_id:
                if event.event_id in seen:
                    raise Invalid("eventId", f"{event.event_id!r} stands twice in the request")
                seen.add(event.event_id)


def same(event: Event, aggregate_id: str, stored: dict[str, Any]) -> bool:
    """Whether a stored event is this one: a repeat may carry another trace, and the clock's time when it gave none."""
    if stored["aggregateId"] != aggregate_id or stored["eventName"] != event.event_name:
        return False
    if event.given_timestamp and stored["timestamp"] != _milliseconds(event.timestamp):
        return False
    if stored["payload"] != bson.decode(event.payload.raw, CODEC):
        return False
    given = bson.decode(event.metadata.raw, CODEC) if event.metadata is not None else {}
    kept = dict(stored.get("metadata") or {})
    given.pop("traceparent", None)
    kept.pop("traceparent", None)
    return given == kept


def _milliseconds(when: datetime.datetime) -> datetime.datetime:
    return when.replace(microsecond=when.microsecond // 1000 * 1000)


def _document(value: dict[str, Any], field: str, deep: bool) -> RawBSONDocument:
    try:
        raw = bson.encode(value, check_keys=True)
    except (InvalidDocument, OverflowError, UnicodeEncodeError, RecursionError) as error:
        path, reason = find_value(value, _unstorable, _unstorable_key) or ("", f"cannot be stored: {error}")
        raise Invalid(_join(field, path), reason) from error
    if deep and _levels(value) > MAX_LEVELS:
        raise Invalid(field, f"is nested deeper than {MAX_LEVELS} levels")
    return RawBSONDocument(raw)


def _unstorable(value: Any) -> str | None:
    if isinstance(value, int) and not INT64_MIN <= value <= INT64_MAX:
        return "must be an integer of 64 bits"
    return None


def _unstorable_key(key: str) -> str | None:
    if key.startswith("$"):
        return "is no valid key: it must not start with $"
    if "." in key:
        return "is no valid key: it must not contain a dot"
    if "\0" in key:
        return "is no valid key: it must not contain NUL"
    return None


def _join(field: str, path: str) -> str:
    if not path:
        return field
    return f"{field}{path}" if path.startswith("[") else f"{field}.{path}"


def _levels(root: dict[str, Any]) -> int:
    """How deep a document is nested, itself included; stops counting above the limit."""
    level: list[Any] = [root]
    for depth in range(MAX_LEVELS + 2):
        if not level:
            return depth
        level = [
            item
            for value in level
            for item in (value.values() if isinstance(value, dict) else value)
            if isinstance(item, dict | list)
        ]
    return MAX_LEVELS + 1
