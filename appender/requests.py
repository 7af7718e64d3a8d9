"""The bodies that the appender takes and gives: decoded and checked by msgspec, and the source of the OpenAPI schemas."""

from __future__ import annotations

import datetime
import json
import math
import re
from typing import TYPE_CHECKING, Annotated, Any, Final

import msgspec
from msgspec import Meta, Struct

from appender.problems import Invalid, Malformed
from eventstore.event import INT64_MAX, MAX_AGGREGATE_ID_BYTES, MAX_EVENT_ID_CHARACTERS

if TYPE_CHECKING:
    from collections.abc import Callable

    from appender.problems import Problem

__all__ = [
    "MAX_REQUEST_EVENTS",
    "AggregateHead",
    "AppendRequest",
    "Appended",
    "AppendedEvent",
    "AppendedLine",
    "AppendedSeveral",
    "CloudEvent",
    "EventLine",
    "HistoryPage",
    "NewAppend",
    "NewEvent",
    "ProblemDocument",
    "SeveralRequest",
    "StoredEvent",
    "decode",
    "find_value",
]

MAX_REQUEST_EVENTS: Final = 1_000
"""Events of one atomic request: one transaction, kept well inside MongoDB's limits; more go as a stream of lines."""

NO_NUL: Final = "^[^\\u0000]*$"
KEY: Final = "^([^$.\\u0000][^.\\u0000]*)?$"
JSON_MEDIA_TYPE: Final = "^[^;]*[/+][Jj][Ss][Oo][Nn] *(;.*)?$"

AggregateId = Annotated[
    str,
    Meta(
        description=f"1 to {MAX_AGGREGATE_ID_BYTES} bytes of UTF-8 without NUL.",
        extra_json_schema={"minLength": 1, "maxLength": MAX_AGGREGATE_ID_BYTES, "pattern": NO_NUL},
    ),
]
EventId = Annotated[
    str,
    Meta(
        description="Makes the append idempotent: repeated, it returns the original sequenceNo. A UUIDv7 when absent.",
        extra_json_schema={"minLength": 1, "maxLength": MAX_EVENT_ID_CHARACTERS, "pattern": NO_NUL},
    ),
]
EventName = Annotated[str, Meta(description="What happened.", extra_json_schema={"minLength": 1, "pattern": NO_NUL})]
Timestamp = Annotated[
    datetime.datetime,
    Meta(
        tz=True,
        description="When it happened, RFC 3339 with offset; kept in milliseconds. The appender's clock when absent.",
    ),
]
Document = Annotated[
    dict[str, Any],
    Meta(
        description="A JSON object: keys neither start with $ nor contain a dot or NUL; integers fit 64 bits; 100 levels.",
        extra_json_schema={
            "propertyNames": {"pattern": KEY},
            "additionalProperties": {"$ref": "#/components/schemas/Value"},
        },
    ),
]
Expected = Annotated[
    int | float,  # JSON Schema's integers, which some clients write as 7.0: `appender.encoding.whole` has the say
    Meta(
        extra_json_schema={"type": "integer", "minimum": 0, "maximum": INT64_MAX},
        description="The last sequenceNo that the caller saw; 0: the aggregate must be new; absent: any.",
    ),
]
Count = Annotated[int, Meta(ge=0, le=INT64_MAX)]
SequenceNo = Annotated[int, Meta(ge=1, le=INT64_MAX)]


class _In(Struct, forbid_unknown_fields=True, rename="camel", gc=False):
    """What comes in: an unknown field is a mistake, not something to drop."""


class _Out(Struct, rename="camel", omit_defaults=True, gc=False):
    """What goes out."""


class NewEvent(_In):
    """An event to append."""

    event_name: EventName
    payload: Document
    event_id: EventId | None = None
    timestamp: Timestamp | None = None
    metadata: Document | None = None


Events = Annotated[list[NewEvent], Meta(min_length=1, extra_json_schema={"maxItems": MAX_REQUEST_EVENTS})]


class AppendRequest(_In):
    """Events for one aggregate, all or nothing."""

    events: Events
    expected_sequence_no: Expected | None = None


class NewAppend(_In):
    """Events for one of several aggregates."""

    aggregate_id: AggregateId
    events: Events
    expected_sequence_no: Expected | None = None


class SeveralRequest(_In):
    """Events for several aggregates, all or nothing; an aggregate stands in it once."""

    appends: Annotated[list[NewAppend], Meta(min_length=1, extra_json_schema={"maxItems": MAX_REQUEST_EVENTS})]


class EventLine(_In):
    """One line of a stream: an event with its aggregate."""

    aggregate_id: AggregateId
    event_name: EventName
    payload: Document
    event_id: EventId | None = None
    timestamp: Timestamp | None = None
    metadata: Document | None = None
    expected_sequence_no: Expected | None = None


class CloudEvent(Struct, gc=False):
    """A CloudEvent 1.0 in structured mode; further attributes go to the metadata."""

    specversion: Annotated[str, Meta(pattern="^1\\.0$")]
    id: EventId
    source: Annotated[str, Meta(min_length=1)]
    type: EventName
    subject: AggregateId
    data: Document
    time: Timestamp | None = None
    datacontenttype: Annotated[str, Meta(pattern=JSON_MEDIA_TYPE)] | None = None


class AppendedEvent(_Out):
    """Where an event stands."""

    event_id: EventId
    sequence_no: SequenceNo


class Appended(_Out):
    """Where the events of one aggregate stand."""

    aggregate_id: AggregateId
    first_sequence_no: SequenceNo
    last_sequence_no: SequenceNo
    events: list[AppendedEvent]


class AppendedSeveral(_Out):
    """Where the events of several aggregates stand, in the order of the request."""

    appends: list[Appended]


class AppendedLine(_Out):
    """The answer to one line of a stream; a problem document with an eventId stands in its place when it failed."""

    status: int
    aggregate_id: AggregateId
    event_id: EventId
    sequence_no: SequenceNo


class StoredEvent(_Out):
    """An event as the log holds it. Values that JSON lacks (another writer's dates) are in MongoDB's Extended JSON."""

    event_id: EventId
    aggregate_id: AggregateId
    sequence_no: SequenceNo
    event_name: EventName
    timestamp: datetime.datetime
    payload: dict[str, Any]
    metadata: dict[str, Any] | None = None


class HistoryPage(_Out):
    """Events of an aggregate in order; `next` is the path of the next page while there may be one."""

    aggregate_id: AggregateId
    events: list[StoredEvent]
    next: str | None = None


class AggregateHead(_Out):
    """An aggregate's last sequenceNo."""

    aggregate_id: AggregateId
    sequence_no: SequenceNo


class ProblemDocument(_Out):
    """RFC 9457."""

    type: str
    title: str
    status: int
    detail: str
    field: str | None = None
    actual_sequence_no: Count | None = None
    aggregate_id: AggregateId | None = None
    event_ids: list[EventId] | None = None


_AT: Final = re.compile(r" - at `(key in )?\$\.?(?P<path>.*)`$")
_FIELD: Final = re.compile(r"field `(?P<name>[^`]*)`")
_EXPLAINED_BYTES: Final = 1024 * 1024
"""Larger bodies are refused without a search for the value at fault: the search blocks the loop for about 20 ms per MiB."""


def decode(decoder: msgspec.json.Decoder[Any], body: bytes, prefix: str = "") -> Any:
    """The decoded and checked body; `prefix` stands before the names of fields. Raises Malformed or Invalid."""
    try:
        return decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _refusal(error, body, prefix) from error


def _refusal(error: Exception, body: bytes, prefix: str) -> Problem:
    """What a decoding error means for the caller, naming the field where there is one."""
    if isinstance(error, RecursionError):
        return Malformed("The body is not valid JSON for this service: it is nested too deep")
    if not isinstance(error, msgspec.ValidationError):
        field, reason = _value_at_fault(body) or (None, str(error))
        return Malformed(f"The body is not valid JSON: {prefix + field + ' ' if field else ''}{reason}", field=field)
    text = str(error)
    at = _AT.search(text)
    path = at["path"] if at else ""
    reason = text[: at.start()] if at else text
    if "[...]" in path and (found := _value_at_fault(body)):
        path, reason = found
    named = _FIELD.search(reason)
    field = ".".join(part for part in (path, named["name"] if named else "") if part)
    if reason.startswith("Object contains unknown field"):
        reason = "is not a known field"
    elif reason.startswith("Object missing required field"):
        reason = "is required"
    elif reason[0].isupper():
        reason = f"is not valid: {reason}"
    return Invalid(prefix + field, reason) if field else Invalid("", f"The body {reason}")


def _value_at_fault(body: bytes) -> tuple[str, str] | None:
    """The path of a value that a lenient parser lets through and JSON does not, and what is wrong with it."""
    if len(body) > _EXPLAINED_BYTES:
        return None
    try:
        lenient = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return find_value(lenient, _not_json, _not_json)


def _not_json(value: Any) -> str | None:
    if isinstance(value, float) and not math.isfinite(value):
        return "must be a finite number (JSON has no NaN and no Infinity)"
    if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
        return "must be valid Unicode (it has a lone surrogate)"
    return None


def find_value(
    root: Any, fault: Callable[[Any], str | None], key_fault: Callable[[str], str | None]
) -> tuple[str, str] | None:
    """The path of a value below `root` of which `fault` says what is wrong, or of a key of which `key_fault` does; and
    what it says. For error messages: it is slow.
    """
    stack: list[tuple[str, Any]] = [("", root)]
    while stack:
        path, value = stack.pop()
        if reason := fault(value):
            return path, reason
        if isinstance(value, dict):
            for key, item in value.items():
                below = f"{path}.{key}" if path else key
                if reason := key_fault(key):
                    return below.encode(errors="backslashreplace").decode(), reason
                stack.append((below, item))
        elif isinstance(value, list):
            stack += [(f"{path}[{index}]", item) for index, item in enumerate(value)]
    return None
