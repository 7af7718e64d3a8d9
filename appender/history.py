"""Histories as JSON: pages, or a stream of lines. Values that JSON lacks are written as MongoDB's Extended JSON."""

from __future__ import annotations

import datetime
import math
from typing import TYPE_CHECKING, Any, Final

import msgspec
from bson import json_util
from bson.int64 import Int64

from eventstore import log

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from eventstore.client import Database

__all__ = ["MAX_PAGE_EVENTS", "PAGE_BYTES", "encode_stored", "read"]

MAX_PAGE_EVENTS: Final = 1_000
PAGE_BYTES: Final = 4 * 1024 * 1024
"""A page ends here even if it could hold more events, so that events of a megabyte do not make a page of a gigabyte."""

READ_AT_ONCE: Final = 200
"""Events decoded at once: the loop is blocked for about 2 ms, and memory holds no more than MongoDB sends at once."""

_PLAIN: Final = frozenset({str, int, bool, type(None), Int64})


async def read(
    database: Database, aggregate_id: str, *, after: int, limit: int = 0
) -> AsyncIterator[tuple[int, bytes]]:
    """Each event above `after` in order, as its sequenceNo and its JSON; at most `limit` of them, 0 for all."""
    async with log.find_history(database, aggregate_id, after=after).limit(limit) as cursor:
        while events := await cursor.to_list(READ_AT_ONCE):
            for event in events:
                yield int(event["sequenceNo"]), encode_stored(event)


def encode_stored(event: dict[str, Any]) -> bytes:
    """A stored event as the API shows it."""
    shown = {
        "eventId": event["_id"],
        "aggregateId": event["aggregateId"],
        "sequenceNo": int(event["sequenceNo"]),
        "eventName": event["eventName"],
        "timestamp": _when(event["timestamp"]),
        "payload": _document(event["payload"]),
    }
    if "metadata" in event:
        shown["metadata"] = _document(event["metadata"])
    return msgspec.json.encode(shown, enc_hook=int)  # the one type that msgspec does not know here is bson's Int64


def _when(value: Any) -> Any:
    if isinstance(value, datetime.datetime):
        return value.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return _extended(value)  # a year that Python's dates do not reach


def _document(value: dict[str, Any]) -> Any:
    return value if _plain(value) else _extended(value)


def _plain(value: Any) -> bool:
    kind = type(value)
    if kind in _PLAIN:
        return True
    if kind is dict:
        return all(_plain(item) for item in value.values())
    if kind is list:
        return all(_plain(item) for item in value)
    return kind is float and math.isfinite(value)


def _extended(value: Any) -> msgspec.Raw:
    return msgspec.Raw(json_util.dumps(value, json_options=json_util.RELAXED_JSON_OPTIONS).encode())
