"""The event document and the slot of its aggregate: the contract between appender, projector and operator.

`docs/` and the collection's validator (`eventstore.indexes`) say the same in their own words.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any, Final, NotRequired, TypedDict

import uuid_utils

if TYPE_CHECKING:
    import datetime

    from bson.int64 import Int64

__all__ = [
    "EVENTS",
    "INT64_MAX",
    "INT64_MIN",
    "MAX_AGGREGATE_ID_BYTES",
    "MAX_EVENT_ID_CHARACTERS",
    "SLOTS",
    "EventDocument",
    "aggregate_id_problem",
    "event_id_problem",
    "new_event_id",
    "slot_of",
]

EVENTS: Final = "events"
"""Name of the log's collection."""

SLOTS: Final = 1024
"""Number of slots. As many as Akka's slices: enough to share among any sensible number of partitions, and it can
never change, since the slot is stored in every event."""

MAX_AGGREGATE_ID_BYTES: Final = 512
MAX_EVENT_ID_CHARACTERS: Final = 128
INT64_MIN: Final = -(2**63)
INT64_MAX: Final = 2**63 - 1


class EventDocument(TypedDict):
    """One event as the collection `events` holds it. `_id` is the eventId; `timestamp` is UTC in milliseconds."""

    _id: str
    aggregateId: str
    sequenceNo: Int64
    eventName: str
    timestamp: datetime.datetime
    payload: dict[str, Any]
    metadata: NotRequired[dict[str, Any]]
    slot: int


def slot_of(aggregate_id: str) -> int:
    """The slot of an aggregate, 0 to 1023: the same on every machine and in every version."""
    return zlib.crc32(aggregate_id.encode()) % SLOTS


def new_event_id() -> str:
    """A UUIDv7: ordered in time, so that inserts into the `_id` index stay at its right edge."""
    return str(uuid_utils.uuid7())


def aggregate_id_problem(aggregate_id: str) -> str | None:
    """What is wrong with an aggregateId, or None. The text completes the sentence "aggregateId …"."""
    if not aggregate_id:
        return "must not be empty"
    if "\0" in aggregate_id:
        return "must not contain NUL"
    try:
        size = len(aggregate_id.encode())
    except UnicodeEncodeError:
        return "must be valid Unicode (it has a lone surrogate)"
    if size > MAX_AGGREGATE_ID_BYTES:
        return f"must be at most {MAX_AGGREGATE_ID_BYTES} bytes of UTF-8, not {size}"
    return None


def event_id_problem(event_id: str) -> str | None:
    """What is wrong with an eventId, or None. The text completes the sentence "eventId …"."""
    if not 1 <= len(event_id) <= MAX_EVENT_ID_CHARACTERS:
        return f"must have 1 to {MAX_EVENT_ID_CHARACTERS} characters, not {len(event_id)}"
    if "\0" in event_id:
        return "must not contain NUL"
    try:
        event_id.encode()
    except UnicodeEncodeError:
        return "must be valid Unicode (it has a lone surrogate)"
    return None
