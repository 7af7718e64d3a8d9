"""What `bench.project` measures beside the projector: what one would write by hand, and what MongoDB itself can do.

Each runs in a process of its own and returns the seconds that it took; times begin when the process is ready.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

import bson
from bson.raw_bson import RawBSONDocument
from pymongo import MongoClient, ReplaceOne, UpdateOne

from bench.logs import BATCH, update
from eventstore.event import EVENTS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pymongo.database import Database

Document = dict[str, Any]

TOKENS: Final = "bench.tokens"
MODEL: Final = "bench.model"


def _database(uri: str, name: str) -> Database[Document]:
    return MongoClient(uri, w="majority", journal=True, tz_aware=True).get_database(name)


def _inserts(token: Document) -> dict[str, Any]:
    return {"pipeline": [{"$match": {"operationType": "insert"}}], "resume_after": token}


def naive(uri: str, name: str, token: Document, events: int) -> float:
    """An event, an update, a saved token."""
    database = _database(uri, name)
    database.client.admin.command("ping")
    begun = time.perf_counter()
    with database[EVENTS].watch(**_inserts(token)) as stream:
        for _ in range(events):
            change = next(stream)
            event = change["fullDocument"]
            database[MODEL].update_one({"_id": event["aggregateId"]}, update(event), upsert=True)
            database[TOKENS].update_one({"_id": "naive"}, {"$set": {"token": change["_id"]}}, upsert=True)
    return time.perf_counter() - begun


def batched(uri: str, name: str, token: Document, events: int) -> float:
    """A thousand events, a bulk_write, a saved token: no transaction, so a crash applies events twice."""
    database = _database(uri, name)
    database.client.admin.command("ping")
    begun = time.perf_counter()
    done = 0
    with database[EVENTS].watch(**_inserts(token), batch_size=1_000) as stream:
        while done < events:
            batch: list[Document] = []
            while len(batch) < 1_000 and (change := stream.try_next()) is not None:
                batch.append(change)
            if not batch:
                continue
            database[MODEL].bulk_write(
                [
                    UpdateOne(
                        {"_id": change["fullDocument"]["aggregateId"]}, update(change["fullDocument"]), upsert=True
                    )
                    for change in batch
                ],
                ordered=False,
            )
            database[TOKENS].update_one({"_id": "batched"}, {"$set": {"token": batch[-1]["_id"]}}, upsert=True)
            done += len(batch)
    return time.perf_counter() - begun


def drained(uri: str, name: str, token: Document, events: int) -> float:
    """The change stream read by pymongo, and nothing done."""
    database = _database(uri, name)
    database.client.admin.command("ping")
    begun = time.perf_counter()
    with database[EVENTS].watch(**_inserts(token), batch_size=BATCH) as stream:
        for _ in range(events):
            next(stream)
    return time.perf_counter() - begun


def drained_raw(uri: str, name: str, token: Document, events: int) -> float:
    """The change stream as the server delivers it: whole events, not decoded."""
    database = _database(uri, name).with_options(codec_options=bson.codec_options.CodecOptions(RawBSONDocument))
    database.client.admin.command("ping")
    begun = time.perf_counter()
    done = 0
    pipeline = [{"$changeStream": {"resumeAfter": token}}, {"$match": {"operationType": "insert"}}]
    with database.client.start_session() as session:
        reply = database.command(
            {"aggregate": EVENTS, "pipeline": pipeline, "cursor": {"batchSize": 0}}, session=session
        )
        cursor = reply["cursor"]["id"]
        while done < events:
            reply = database.command({"getMore": cursor, "collection": EVENTS, "batchSize": BATCH}, session=session)
            done += len(reply["cursor"]["nextBatch"])
    return time.perf_counter() - begun


def documents_alone(uri: str, name: str, _token: Document, events: int) -> float:
    """The documents that come of each batch of events, written by bulk_write: no stream, no fold, no transaction."""
    database = _database(uri, name)
    operations = list(_writes(database, events))
    begun = time.perf_counter()
    for batch in operations:
        database[MODEL].bulk_write(batch, ordered=False)
    return time.perf_counter() - begun


def _writes(database: Database[Document], events: int) -> Iterator[list[ReplaceOne[Document]]]:
    counts: dict[str, int] = {}
    changed: dict[str, Document] = {}
    for number, event in enumerate(database[EVENTS].find().sort("_id", 1), 1):
        key = event["aggregateId"]
        counts[key] = counts.get(key, 0) + 1
        changed[key] = {"_id": key, "events": counts[key], **update(event)["$set"]}
        if number % BATCH == 0 or number == events:
            yield [ReplaceOne({"_id": key}, document, upsert=True) for key, document in changed.items()]
            changed = {}


def bare_latency(uri: str, name: str, token: Document, events: int) -> float:
    """A change stream and one update, nothing else: what `bench.project` compares its latency with."""
    database = _database(uri, name)
    with database[EVENTS].watch(**_inserts(token)) as stream:
        for _ in range(events):
            event = next(stream)["fullDocument"]
            change = {"$inc": {"events": 1}, "$set": {"sentAt": event["payload"]["sentAt"]}}
            database[MODEL].update_one({"_id": event["aggregateId"]}, change, upsert=True)
    return 0.0
