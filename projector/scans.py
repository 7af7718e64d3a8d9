"""How far the scan of a new build is: a plan of ranges of aggregateId in `projector.scans`, and what has been read of each.

A range's progress moves in the transaction that writes its documents, and only for the scan's present owner. So a scan that
was killed is resumed where it was, what was written is never written again, and a scanner that was paused beyond its lease
can write nothing any more, even when its build has been dropped and begun again under the same name.
"""

from __future__ import annotations

import datetime
import time
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from pymongo import ReturnDocument

from eventstore.event import EVENTS
from eventstore.orphans import past_orphans
from projector.checkpoint import CHECKPOINTS, FencedError
from projector.parking import build_range

if TYPE_CHECKING:
    from pymongo.asynchronous.client_session import AsyncClientSession

    from eventstore.client import Database
    from projector.checkpoint import Checkpoint

__all__ = ["SCANS", "Progress", "Range", "begin", "claim", "drop", "finish", "progress_of"]

SCANS: Final = "projector.scans"

RANGE_EVENTS: Final = 25_000
"""Events of a range, about. Smaller ranges cost a query each (1 ms); larger ones leave processes idle at the end, and tell less of
the progress when one aggregate is very long."""

MOST_RANGES: Final = 512
_SAMPLES_PER_RANGE: Final = 20
"""Samples of the log from which a boundary is estimated: ranges then differ by about a quarter, and processes take the next one
when they are done, so that it does not matter."""


class Range(NamedTuple):
    """A range of aggregateId (`start` inclusive, `below` exclusive, None: open), claimed by a scanner."""

    id: str
    build: str
    owner: str
    start: str
    below: str | None
    after: str | None
    """Read up to and with this aggregate; None: nothing yet."""

    @property
    def query(self) -> dict[str, Any]:
        """The events that are still to be read."""
        bounds = {"$gte": self.start} if self.after is None else {"$gt": self.after}
        return {"aggregateId": bounds | ({} if self.below is None else {"$lt": self.below})}

    async def advance(
        self, database: Database, after: str | None, events: int, session: AsyncClientSession, *, done: bool = False
    ) -> None:
        """Notes within the transaction that the range has been read up to `after`. Raises FencedError."""
        result = await database[SCANS].update_one(
            {"_id": self.id, "owner": self.owner},
            {"$set": {"after": after, "done": done}, "$inc": {"events": events}},
            session=session,
        )
        if not result.matched_count:
            raise FencedError(f"the scan of {self.build} has another owner, or was cancelled")


class Progress(NamedTuple):
    """How far a scan is. `total` is the server's estimate when it began."""

    events: int
    total: int
    done: bool
    eta: datetime.datetime | None
    """When it will be done at the pace since it was begun or resumed; None while nothing can be said."""

    @property
    def ratio(self) -> float:
        """0 to 1; 1 only when it is done."""
        return 1.0 if self.done else min(0.999, self.events / max(1, self.total))


def _plan_id(build: str) -> str:
    return f"{build}/plan"


async def begin(log: Database, database: Database, checkpoint: Checkpoint, owner: str) -> int:
    """Makes `owner` the owner of the build's scan, with the plan that it has or a new one; returns the events of the log, about.

    Raises FencedError when the checkpoint, that of the build's first partition, has another owner or is gone.
    """
    build = checkpoint.partition.build
    scans = database[SCANS]
    known = await scans.find_one({"_id": _plan_id(build)})
    plan, rows = (known, []) if known is not None else await _new_plan(log, build)
    now = datetime.datetime.now(datetime.UTC)

    async def write(session: AsyncClientSession) -> None:
        # Written, not only read: a build that is being dropped at this moment must not get a plan that nobody removes.
        mine = {"_id": str(checkpoint.partition), "epoch": checkpoint.epoch}
        changed = await database[CHECKPOINTS].update_one(mine, {"$set": {"scannedBy": owner}}, session=session)
        if not changed.matched_count:
            raise FencedError(f"{checkpoint.partition} has another owner")
        if rows:
            await scans.insert_many([plan, *rows], session=session)
        read = await _events(database, build, session)
        begun = {"owner": owner, "resumedAt": now, "resumedWith": read}
        await scans.update_one({"_id": _plan_id(build)}, {"$set": begun}, session=session)
        ranges = {"_id": build_range(build), "start": {"$exists": True}}
        await scans.update_many(ranges, {"$set": {"owner": owner, "claimed": False}}, session=session)

    async def transaction() -> None:
        async with database.client.start_session() as session:
            await session.with_transaction(write)

    # The scanner before, killed amid a transaction, may still hold what this writes.
    await past_orphans(database.client, "projector", transaction)
    return int(plan["total"])


async def _new_plan(log: Database, build: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The log in ranges."""
    total = await log[EVENTS].estimated_document_count()
    bounds = ["", *await _boundaries(log, min(MOST_RANGES, total // RANGE_EVENTS))]
    blank: dict[str, Any] = {"build": build, "after": None, "events": 0, "done": False}
    rows = [
        blank | {"_id": f"{build}/{number:04d}", "start": start, "below": below}
        for number, (start, below) in enumerate(zip(bounds, [*bounds[1:], None], strict=True))
    ]
    return {"_id": _plan_id(build), "build": build, "total": total, "ranges": len(rows), "done": False}, rows


async def _boundaries(log: Database, ranges: int) -> list[str]:
    """aggregateIds that divide the log into about equal parts, by a sample of it."""
    if ranges < 2:
        return []
    size = ranges * _SAMPLES_PER_RANGE
    cursor = await log[EVENTS].aggregate(
        [{"$sample": {"size": size}}, {"$project": {"_id": 0, "aggregateId": 1}}], batchSize=size
    )
    # By the bytes of UTF-8, as the server compares texts: Python's own order is the same, since it goes by code point.
    sample = sorted([row["aggregateId"] async for row in cursor])
    return sorted({sample[number * len(sample) // ranges] for number in range(1, ranges)}) if sample else []


async def claim(database: Database, build: str, owner: str) -> Range | None:
    """A range that nobody reads yet; None when there is none left. Raises FencedError when the owner is another one."""
    row = await database[SCANS].find_one_and_update(
        {"_id": build_range(build), "start": {"$exists": True}, "owner": owner, "claimed": False, "done": False},
        {"$set": {"claimed": True}},
        return_document=ReturnDocument.AFTER,
    )
    if row is not None:
        return Range(row["_id"], build, owner, row["start"], row["below"], row["after"])
    if await database[SCANS].find_one({"_id": _plan_id(build), "owner": owner}, {"_id": 1}) is None:
        raise FencedError(f"the scan of {build} has another owner, or was cancelled")
    return None


async def finish(database: Database, build: str, owner: str) -> bool:
    """Lets the partitions go on to the stream, when all ranges are done; False when one is not, or by another owner."""
    scans = database[SCANS]

    async def write(session: AsyncClientSession) -> bool:
        open_ranges = {"_id": build_range(build), "start": {"$exists": True}, "done": False}
        if await scans.find_one(open_ranges, {"_id": 1}, session=session) is not None:
            return False
        mine = {"_id": _plan_id(build), "owner": owner}
        if not (await scans.update_one(mine, {"$set": {"done": True}}, session=session)).matched_count:
            return False
        await database[CHECKPOINTS].update_many({"build": build}, {"$set": {"scan": False}}, session=session)
        return True

    async with database.client.start_session() as session:
        return await session.with_transaction(write)


async def progress_of(database: Database, build: str) -> Progress | None:
    """How far the scan of a build is; None when it was not begun."""
    plan = await database[SCANS].find_one({"_id": _plan_id(build)})
    if plan is None:
        return None
    events, total, done = await _events(database, build), int(plan["total"]), bool(plan["done"])
    eta = None
    if not done and "resumedAt" in plan:
        read, took = events - plan["resumedWith"], time.time() - plan["resumedAt"].timestamp()
        if read > 0 and took > 0:
            seconds = max(0, total - events) * took / read
            eta = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=seconds)
    return Progress(events, total, done, eta)


async def _events(database: Database, build: str, session: AsyncClientSession | None = None) -> int:
    cursor = await database[SCANS].aggregate(
        [{"$match": {"_id": build_range(build)}}, {"$group": {"_id": None, "events": {"$sum": "$events"}}}],
        session=session,
    )
    return sum([int(row["events"]) async for row in cursor])


async def drop(database: Database, build: str) -> None:
    """Removes a build's plan, which cancels a scan: its next write finds no range of its own."""

    query = {"_id": build_range(build)}
    await past_orphans(database.client, "projector", lambda: database[SCANS].delete_many(query))
