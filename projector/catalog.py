"""What the operator and the projector tell each other, and where: two collections in the database of the read models.

The operator writes definitions and reads statuses, the projector (`run --from-database`) does the opposite, and neither
needs the other's API. A definition is the declared form of a projection and how it is to be run; a status is one
document per projection, written by whoever runs it.
"""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING, Any, Final

import bson
import msgspec
from msgspec import Struct, field
from pymongo.errors import DuplicateKeyError

if TYPE_CHECKING:
    from eventstore.client import Database

__all__ = [
    "DEFINITIONS",
    "STATUS",
    "DefinitionRecord",
    "Source",
    "StatusRecord",
    "read_definition",
    "read_definitions",
    "read_statuses",
    "remove_definition",
    "write_definition",
]

DEFINITIONS: Final = "projector.definitions"
STATUS: Final = "projector.status"

_MOST: Final = 10_000
"""More projections than any database has; a bound, since what is read here is kept in memory."""


class Source(Struct, frozen=True, kw_only=True):
    """The resource that a definition comes from; its owner, as long as it is there."""

    kind: str
    namespace: str
    name: str
    uid: str
    generation: int

    def same_resource(self, other: Source) -> bool:
        """Whether both name one resource, or one that was deleted and made again."""
        return (self.kind, self.namespace, self.name) == (other.kind, other.namespace, other.name)


class DefinitionRecord(Struct, frozen=True, kw_only=True, rename="camel"):
    """A document of `projector.definitions`."""

    name: str = field(name="_id")
    definition: dict[str, Any]
    """The declared form, canonical: `projector.declared.from_definition` compiles it."""
    partitions: int = 1
    paused: bool = False
    rebuild: dict[str, Any] = field(default_factory=dict)
    """`{"cutover": "Automatic" | "Manual"}`."""
    source: Source | None = None
    deleted: bool = False
    """The read model is to be dropped, and then this document."""
    deletion_policy: str = "Retain"
    updated_at: datetime.datetime | None = None


class StatusRecord(Struct, frozen=True, kw_only=True, rename="camel"):
    """A document of `projector.status`; any field may be missing."""

    name: str = field(name="_id")
    version: int | None = None
    """The version that readers see; None before the first cut-over."""
    live: str | None = None
    """The build that readers see (`permits.v1`, `permits.v1-2` …)."""
    candidate: str | None = None
    """The build that is to follow it."""
    state: str = "unknown"
    lag_seconds: float | None = None
    backlog_events: int | None = None
    parked: int | None = None
    rebuild: dict[str, Any] | None = None
    """`{"percent": …, "eta": …}` while a version is being built."""
    partitions: list[dict[str, Any]] = field(default_factory=list)
    updated_at: datetime.datetime | None = None
    error: str | None = None


async def read_definitions(database: Database) -> dict[str, DefinitionRecord]:
    """All definitions by name. Raises `msgspec.ValidationError` for a document that is none."""
    rows = await database[DEFINITIONS].find().limit(_MOST).to_list()
    return {row["_id"]: msgspec.convert(row, DefinitionRecord) for row in rows}


async def read_definition(database: Database, name: str) -> DefinitionRecord | None:
    """One definition. Raises `msgspec.ValidationError` for a document that is none."""
    row = await database[DEFINITIONS].find_one({"_id": name})
    return None if row is None else msgspec.convert(row, DefinitionRecord)


async def write_definition(database: Database, record: DefinitionRecord, before: DefinitionRecord | None) -> bool:
    """Makes `record` the definition of its name where `before` was read; True when it had to be written.

    Says False too, and writes nothing, when `before` is no longer there: another one was faster, so read again.
    """
    if before is not None and _content(before) == _content(record):
        return False
    row = msgspec.to_builtins(record, builtin_types=(datetime.datetime,)) | {
        "updatedAt": datetime.datetime.now(datetime.UTC)
    }
    if before is None:
        try:
            await database[DEFINITIONS].insert_one(row)
        except DuplicateKeyError:
            return False
        return True
    same = {"_id": record.name, "updatedAt": before.updated_at}
    return (await database[DEFINITIONS].replace_one(same, row)).matched_count == 1


async def remove_definition(database: Database, name: str, uid: str, *, drop: bool) -> None:
    """Ends a projection whose definition comes from the resource `uid`; with `drop` its read model goes too.

    Without `drop` the definition is gone at once. With it, it is marked, and the projector removes it after the data.
    """
    mine = {"_id": name, "source.uid": uid}
    if drop:
        now = datetime.datetime.now(datetime.UTC)
        mark = {"deleted": True, "deletionPolicy": "Delete", "updatedAt": now}
        await database[DEFINITIONS].update_one({**mine, "deleted": {"$ne": True}}, {"$set": mark})
    else:
        await database[DEFINITIONS].delete_one(mine)


async def read_statuses(database: Database) -> dict[str, StatusRecord]:
    """The status of every projection by name; a document that cannot be understood counts as an unknown status."""
    found = {}
    for row in await database[STATUS].find().limit(_MOST).to_list():
        try:
            found[row["_id"]] = msgspec.convert(row, StatusRecord, strict=False)
        except msgspec.ValidationError:
            found[row["_id"]] = StatusRecord(name=row["_id"])
    return found


def _content(record: DefinitionRecord) -> bytes:
    """All but the time, as bytes, since the order of an index's fields counts and a dict's equality forgets it."""
    row = msgspec.to_builtins(record, builtin_types=(datetime.datetime,))
    return bson.encode({key: value for key, value in row.items() if key != "updatedAt"})
