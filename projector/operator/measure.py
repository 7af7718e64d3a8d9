"""What is there: the indexes of a collection with those being built, their progress, the validator. Reads only.

Plain `listIndexes` shows an index that is being built as if it were finished; `includeBuildUUIDs` tells them apart.
Progress stands in `$currentOp` alone, on the thread that builds, phase by phase.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple
from uuid import UUID

from pymongo.errors import OperationFailure

from eventstore.errors import Meaning, classify
from projector.operator.indexes import Found, Index

if TYPE_CHECKING:
    from bson.binary import Binary

    from eventstore.client import Client, Database

__all__ = ["Progress", "collection_options", "indexes_of", "progress_of"]

_NAMESPACE_NOT_FOUND: Final = 26


class Progress(NamedTuple):
    """How far the build of an index is."""

    phase: str
    ratio: float
    """0 to 1 over the whole build: its first half is the scan of the collection, its second what follows (sorting and
    inserting keys). The server knows no more."""


async def indexes_of(database: Database, collection: str) -> list[Found] | None:
    """The indexes of a collection, those being built too; None when there is no such collection."""
    try:
        # A collection has at most 64 indexes: one batch.
        reply = await database.command("listIndexes", collection, includeBuildUUIDs=True, cursor={"batchSize": 1_000})
    except OperationFailure as error:
        if error.code == _NAMESPACE_NOT_FOUND:
            return None
        raise
    return [_found(entry) for entry in reply["cursor"]["firstBatch"]]


def _found(entry: dict[str, Any]) -> Found:
    if "buildUUID" not in entry:
        return Found(Index.from_document(entry))
    build: Binary | UUID = entry["buildUUID"]
    return Found(Index.from_document(entry["spec"]), str(build if isinstance(build, UUID) else build.as_uuid()))


async def progress_of(client: Client, database: str, collection: str) -> dict[str, Progress]:
    """The progress of each index of a collection that is being built, by name.

    Empty when the user may not see other users' operations (action `inprog`): the build itself needs no such right.
    """
    pipeline: list[dict[str, Any]] = [
        {"$currentOp": {"allUsers": True, "idleConnections": False}},
        {"$match": {"ns": f"{database}.{collection}", "msg": {"$regex": "^Index Build"}}},
        {"$project": {"msg": 1, "progress": 1, "names": "$command.indexes.name"}},
        {"$limit": 100},
    ]
    try:
        rows = await (await client.admin.aggregate(pipeline)).to_list()
    except OperationFailure as error:
        if classify(error) is Meaning.DENIED:
            return {}
        raise
    found: dict[str, Progress] = {}
    for row in rows:
        message, counts = row.get("msg", ""), row.get("progress", {})
        done = min(1.0, counts.get("done", 0) / max(1, counts.get("total", 0)))
        scanning = "scanning collection" in message
        # It is the phase twice, then the numbers: `Index Build: draining Index Build: draining: 1/2 50%`.
        phase = message.removeprefix("Index Build: ").split("Index Build:", 1)[0].strip(" :")
        for name in row.get("names") or ():
            found[name] = Progress(phase, done / 2 if scanning else 0.5 + done / 2)
    return found


async def collection_options(database: Database, collection: str) -> dict[str, Any] | None:
    """The options of a collection, its validator among them; None when there is no such collection."""
    reply = await database.command("listCollections", filter={"name": collection})
    batch = reply["cursor"]["firstBatch"]
    return batch[0].get("options", {}) if batch else None
