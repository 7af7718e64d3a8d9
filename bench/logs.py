"""Logs of a given size and interleaving, written fast, and the one read model that ours and all peers make of them.

A read model is a document per aggregate: how many events it had, its last event's name and time, and the group that handled it.
"""

from __future__ import annotations

import csv
import datetime
import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import bson
from bson.int64 import Int64
from bson.raw_bson import RawBSONDocument

from eventstore.event import EVENTS, slot_of
from eventstore.indexes import AGGREGATE_SEQUENCE, VALIDATOR
from projector.declared import from_definition

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from pymongo.database import Database

    from projector.projection import Projection

Document = dict[str, Any]

RECEIPT: Final = Path(__file__).resolve().parents[2] / "shared" / "data" / "receipt.csv"
"""A real log: 8,577 events of 1,434 building permits (Process mining, CoSeLoG project)."""

BATCH: Final = 5_000
_NAMES: Final = (
    "Confirmation of receipt",
    "T02 Check confirmation of receipt",
    "T06 Determine necessity of stop advice",
)
_START: Final = datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC)


def projection(name: str = "permits", version: int = 1) -> Projection:
    """Ours."""
    return from_definition({"name": name, "version": version, "on": {"*": _UPDATE}})


_UPDATE: Final = {
    "$inc": {"events": 1},
    "$set": {"status": "$eventName", "lastAt": "$timestamp", "group": "$payload.org:group"},
}


def update(event: Document) -> Document:
    """The peers': the update of one event."""
    return {
        "$inc": {"events": 1},
        "$set": {
            "status": event["eventName"],
            "lastAt": event["timestamp"],
            "group": event["payload"]["org:group"],
        },
    }


def _event(number: int, aggregate_id: str, sequence_no: int, name: str, payload: Document) -> Document:
    return {
        "_id": f"018d4b1a-0000-7000-8000-{number:012d}",
        "aggregateId": aggregate_id,
        "sequenceNo": Int64(sequence_no),
        "eventName": name,
        "timestamp": _START + datetime.timedelta(milliseconds=number),
        "payload": payload,
        "slot": slot_of(aggregate_id),
    }


def round_robin(events: int, aggregates: int, waves: int = 1) -> Iterator[Document]:
    """All aggregates in turn: the worst interleaving, in which no batch holds an aggregate twice if there are enough of them.

    Several waves divide the aggregates among them, one after the other: so the log gets longer, and what happens at any
    moment stays the same.
    """
    width = aggregates // waves
    for number in range(events):
        wave, at = divmod(number, events // waves)
        aggregate = wave * width + at % width
        payload = {
            "case:channel": "Internet",
            "org:group": f"Group {number % 9}",
            "org:resource": f"Resource{aggregate % 40:02d}",
            "amount": number % 1_000,
        }
        name = _NAMES[number % len(_NAMES)]
        yield _event(number, f"case-{aggregate:07d}", at // width + 1, name, payload)


def receipt(events: int, path: Path = RECEIPT) -> Iterator[Document]:
    """receipt.csv in the order of time, as often as it takes, each time with cases of its own."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: datetime.datetime.fromisoformat(row["time:timestamp"]))
    heads: dict[str, int] = {}
    for number, (copy, row) in enumerate(itertools.product(range(-(-events // len(rows))), rows)):
        if number == events:
            return
        aggregate_id = f"{row['case:concept:name']}/{copy}"
        heads[aggregate_id] = heads.get(aggregate_id, 0) + 1
        payload = {key: value for key, value in row.items() if key not in {"case:concept:name", "concept:name"}}
        yield _event(number, aggregate_id, heads[aggregate_id], row["concept:name"], payload)


def provision(database: Database[Document]) -> None:
    """An empty log."""
    database.client.drop_database(database.name)
    database.create_collection(EVENTS, validator=VALIDATOR)
    database[EVENTS].create_indexes([AGGREGATE_SEQUENCE])


def write(database: Database[Document], events: Iterable[Document]) -> int:
    """Writes events as fast as they go in, a batch a command, in their order; returns how many."""
    written = 0
    for batch in _batched(events):
        documents = [RawBSONDocument(bson.encode(event)) for event in batch]
        reply = database.command({"insert": EVENTS, "documents": documents, "ordered": True})
        if reply["n"] != len(documents):
            raise RuntimeError(reply)
        written += len(documents)
    return written


def _batched(events: Iterable[Document]) -> Iterator[list[Document]]:
    iterator = iter(events)
    while batch := list(itertools.islice(iterator, BATCH)):
        yield batch


def check(database: Database[Document], collection: str, events: int) -> None:
    """Raises RuntimeError unless the read model is right: every aggregate's last event and number of events."""
    last = {"$group": {"_id": "$aggregateId", "last": {"$last": "$sequenceNo"}, "lastAt": {"$last": "$timestamp"}}}
    stages = [{"$sort": {"aggregateId": 1, "sequenceNo": 1}}, last]
    rows = database[EVENTS].aggregate(stages, hint="aggregate_sequence", allowDiskUse=True)
    expected = {row["_id"]: row for row in rows}
    found = {row["_id"]: row for row in database[collection].find({}, {"events": 1, "lastAt": 1})}
    wrong = [key for key, row in expected.items() if (found.get(key) or {}).get("events") != row["last"]]
    wrong += [key for key, row in expected.items() if key in found and found[key]["lastAt"] != row["lastAt"]]
    if wrong or len(found) != len(expected) or sum(row["events"] for row in found.values()) != events:
        raise RuntimeError(f"{collection} is wrong: {wrong[:3]}, {len(found)} documents of {len(expected)}")
