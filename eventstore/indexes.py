"""The log's collection: its validator and its unique index, made where they are missing.

`appender serve` and `projector run` call `provision` at start unless `EVENTSTORE_PROVISION=false`; the operator does so
in every reconcile. It is safe to call from any number of processes at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from pymongo import ASCENDING, IndexModel
from pymongo.errors import OperationFailure

from eventstore.event import EVENTS, MAX_EVENT_ID_CHARACTERS, SLOTS

if TYPE_CHECKING:
    from eventstore.client import Database

__all__ = ["AGGREGATE_SEQUENCE", "VALIDATOR", "ensure_collection", "missing", "provision"]

AGGREGATE_SEQUENCE: Final = IndexModel(
    [("aggregateId", ASCENDING), ("sequenceNo", ASCENDING)], name="aggregate_sequence", unique=True
)
"""The one index beside `_id`: it makes a sequenceNo unique, finds an aggregate's head, reads its history in order."""

_NAMESPACE_EXISTS: Final = 48

VALIDATOR: Final[dict[str, Any]] = {
    "$jsonSchema": {
        "bsonType": "object",
        "title": "event",
        "required": ["_id", "aggregateId", "sequenceNo", "eventName", "timestamp", "payload", "slot"],
        "properties": {
            "_id": {"bsonType": "string", "minLength": 1, "maxLength": MAX_EVENT_ID_CHARACTERS},
            "aggregateId": {"bsonType": "string", "minLength": 1},
            "sequenceNo": {"bsonType": "long", "minimum": 1},
            "eventName": {"bsonType": "string", "minLength": 1},
            "timestamp": {"bsonType": "date"},
            "payload": {"bsonType": "object"},
            "metadata": {"bsonType": "object"},
            "slot": {"bsonType": "int", "minimum": 0, "maximum": SLOTS - 1},
        },
        "additionalProperties": False,
    }
}
"""Keeps other writers honest: the fields, their BSON types, and nothing else."""


async def provision(database: Database) -> None:
    """Creates the log's collection, validator and unique index where they are missing; changes nothing that fits.

    Raises `pymongo.errors.OperationFailure` with code 85 or 86 when an index of other options is in the way.
    """
    if not await ensure_collection(database, EVENTS, validator=VALIDATOR):
        await _align_validator(database)
    await database[EVENTS].create_indexes([AGGREGATE_SEQUENCE])


async def missing(database: Database) -> str | None:
    """What the log lacks for writing to be safe, in words; None when its unique index is there.

    For a writer that may not create it. Without the index two appends could get the same sequenceNo.
    """
    wanted = AGGREGATE_SEQUENCE.document
    async for index in await database[EVENTS].list_indexes():
        if index.get("unique") and dict(index["key"]) == dict(wanted["key"]):
            return None
    return f"the collection {database.name}.{EVENTS} has no unique index {wanted['name']}"


async def ensure_collection(database: Database, name: str, **options: Any) -> bool:
    """Creates a collection; False when there is one (or a view) of that name already, whatever its options."""
    try:
        await database.create_collection(name, check_exists=False, **options)
    except OperationFailure as error:
        if error.code != _NAMESPACE_EXISTS:
            raise
        return False
    return True


async def _align_validator(database: Database) -> None:
    """Sets the validator of a collection that was there already, when it is another one."""
    reply = await database.command("listCollections", filter={"name": EVENTS})
    options = reply["cursor"]["firstBatch"][0].get("options", {})
    if options.get("validator") != VALIDATOR:
        await database.command("collMod", EVENTS, validator=VALIDATOR)
