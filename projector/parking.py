"""Aggregates that were set aside: an event failed, or is missing from the log, while all other aggregates go on.

A record is written in the same transaction that lets the checkpoint pass the event, so nothing is lost by a crash. It says where
and why; the log holds the events, hence nothing is copied. While its state is `retrying` the partition tries again by itself,
with growing pauses; after `retry_seconds` it is `parked`, and waits for `projector parked retry` or `skip`.
"""

from __future__ import annotations

import datetime
import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal

from eventstore.event import slot_of

if TYPE_CHECKING:
    from eventstore.client import Database
    from projector.changes import Failure

__all__ = ["PARKED", "Parked", "build_range", "parked_id", "read_parked", "retry_parked", "skip_parked"]

PARKED: Final = "projector.parked"

_FIRST_PAUSE_SECONDS: Final = 0.2
_LONGEST_PAUSE_SECONDS: Final = 10.0
_SKIPS: Final = 1_000


def parked_id(build: str, aggregate_id: str) -> str:
    """The record's `_id`: one aggregate is set aside at most once per build."""
    return f"{build}/{aggregate_id}"


def build_range(build: str) -> dict[str, str]:
    """A condition on `_id` for everything of one build (`permits.v1/…`), which the index on `_id` answers."""
    return {"$gte": f"{build}/", "$lt": f"{build}0"}  # "0" comes after "/"


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


@dataclass(slots=True)
class Parked:
    """An aggregate that was set aside, at the event that stands in its way."""

    build: str
    aggregate_id: str
    sequence_no: int
    event_id: str | None
    event_name: str | None
    category: str
    reason: str
    attempts: int = 1
    state: Literal["retrying", "parked"] = "retrying"
    since: datetime.datetime = field(default_factory=_now)
    due: datetime.datetime = field(default_factory=_now)
    skips: tuple[int, ...] = ()
    revision: int = 0
    """Raised by each command of a person, so that the partition sees it and no answer to an older one overwrites it."""
    settled: bool = False
    """Whether all that comes before the event is known to be folded; in memory alone."""

    @classmethod
    def of(cls, build: str, failure: Failure, before: Parked | None, retry_seconds: float) -> Parked:
        """The record after one more failure."""
        record = cls(build, *failure)
        if before is not None:
            record.skips, record.revision = before.skips, before.revision
            if record.sequence_no <= before.sequence_no:  # else it got past that event, and this one has its own time
                record.attempts, record.since = before.attempts + 1, before.since
            if record.sequence_no == before.sequence_no and record.event_id is None:
                record.event_id, record.event_name = before.event_id, before.event_name
        pause = min(_LONGEST_PAUSE_SECONDS, _FIRST_PAUSE_SECONDS * 2 ** min(record.attempts, 16))
        record.due = _now() + datetime.timedelta(seconds=pause * random.uniform(0.5, 1))  # noqa: S311 - jitter
        if (_now() - record.since).total_seconds() >= retry_seconds or record.category == "reset":
            record.state = "parked"  # what was applied and is no longer in the log, only a person can judge
        return record

    @classmethod
    def load(cls, document: dict[str, Any]) -> Parked:
        """From its document."""
        return cls(
            document["build"],
            document["aggregateId"],
            int(document["sequenceNo"]),
            document.get("eventId"),
            document.get("eventName"),
            document["category"],
            document["reason"],
            attempts=document["attempts"],
            state=document["state"],
            since=document["since"],
            due=document["due"],
            skips=tuple(document.get("skips", ())),
            revision=document.get("revision", 0),
        )

    def dump(self) -> dict[str, Any]:
        """Its document in `projector.parked`."""
        return {
            "_id": parked_id(self.build, self.aggregate_id),
            "build": self.build,
            "aggregateId": self.aggregate_id,
            "slot": slot_of(self.aggregate_id),
            "sequenceNo": self.sequence_no,
            "eventId": self.event_id,
            "eventName": self.event_name,
            "category": self.category,
            "reason": self.reason,
            "attempts": self.attempts,
            "state": self.state,
            "since": self.since,
            "due": self.due,
            "skips": list(self.skips),
            "revision": self.revision,
        }

    @property
    def is_due(self) -> bool:
        """Whether the partition should give it a turn now."""
        return not self.settled or (self.state == "retrying" and _now() >= self.due)


async def read_parked(
    database: Database, build: str, slots: range | None = None, *, after: str = "", limit: int = 1_000
) -> list[Parked]:
    """A page of a build's records by aggregateId, of a partition's slots where given."""
    query: dict[str, Any] = {"_id": build_range(build) | ({"$gt": parked_id(build, after)} if after else {})}
    if slots is not None:
        query["slot"] = {"$gte": slots.start, "$lt": slots.stop}
    found = await database[PARKED].find(query).sort("_id", 1).limit(limit).to_list(limit)
    return [Parked.load(document) for document in found]


async def retry_parked(database: Database, build: str, aggregate_id: str | None = None) -> int:
    """Asks for another try of one aggregate, or of all of a build; returns how many. The owner sees it within a tick."""
    query = {"_id": build_range(build) if aggregate_id is None else parked_id(build, aggregate_id)}
    now = _now()
    result = await database[PARKED].update_many(
        query, {"$set": {"state": "retrying", "due": now, "since": now, "attempts": 0}, "$inc": {"revision": 1}}
    )
    return result.matched_count


async def skip_parked(database: Database, build: str, aggregate_id: str, sequence_no: int) -> bool:
    """Has one event passed over for good, and the aggregate tried again; False when it is not set aside at that event."""
    now = _now()
    result = await database[PARKED].update_one(
        {"_id": parked_id(build, aggregate_id), "sequenceNo": sequence_no},
        {
            "$set": {"state": "retrying", "due": now, "since": now, "attempts": 0},
            "$push": {"skips": {"$each": [sequence_no], "$slice": -_SKIPS}},
            "$inc": {"revision": 1},
        },
    )
    return bool(result.matched_count)
