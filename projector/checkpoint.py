"""Checkpoints: where each partition of a build resumes, and the fence that keeps a stale owner's writes out.

Every write of a partition, documents and marks and all, is one transaction with the update of its checkpoint, which names
the owner's epoch. Whoever takes over raises the epoch first (Occurrent ADR 0116, 0117): from then on the former owner's
update matches nothing and its transaction ends without a trace. Epochs never go back, not by a release and not by a
change of the number of partitions.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from pymongo import ReturnDocument

from eventstore.event import SLOTS
from eventstore.orphans import past_orphans
from projector.position import Position

if TYPE_CHECKING:
    from pymongo.asynchronous.client_session import AsyncClientSession

    from eventstore.client import Database

__all__ = ["CHECKPOINTS", "Checkpoint", "FencedError", "PartitionId", "ensure_layout", "layout_of"]

CHECKPOINTS: Final = "projector.checkpoints"


class FencedError(Exception):
    """Another owner has taken the partition, or its layout is gone: nothing was written."""


@dataclass(frozen=True, slots=True)
class PartitionId:
    """Partition `number` of `count` of a build."""

    build: str
    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.build}/{self.number}-of-{self.count}"

    @property
    def slots(self) -> range:
        """The slots that it reads."""
        return range(self.number * SLOTS // self.count, (self.number + 1) * SLOTS // self.count)


@dataclass(slots=True)
class Checkpoint:
    """A partition's position, as its owner of this epoch may move it."""

    database: Database
    partition: PartitionId
    epoch: int
    position: Position
    session: AsyncClientSession
    """The session of all its transactions: one partition has one at a time."""
    scan: bool = False
    """The log must be read before the stream: the build is new."""

    @classmethod
    async def take(cls, database: Database, partition: PartitionId, owner: str, *, again: bool = False) -> Checkpoint:
        """Raises the epoch, which fences every former owner, and reads the position.

        `again`: only if this owner is the last one that took it; without a lease in hand it must not take it from another.
        Raises FencedError when that is not so, or there is no such partition.
        """
        mine = {"_id": str(partition)} | ({"owner": owner} if again else {})
        session = database.client.start_session()
        taken = {"owner": owner, "takenAt": "$$NOW"}
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(session.end_session)
            # A former owner that was killed amid a transaction holds the checkpoint first of all.
            found = await past_orphans(
                database.client,
                "projector",
                lambda: database[CHECKPOINTS].find_one_and_update(
                    mine,
                    [{"$set": {"epoch": {"$add": ["$epoch", 1]}, **taken}}],
                    return_document=ReturnDocument.AFTER,
                ),
            )
            if found is None:
                raise FencedError(f"{partition} has another owner, or is no longer in the layout of its build")
            stack.pop_all()
        return cls(
            database, partition, int(found["epoch"]), Position.load(found), session, scan=found.get("scan", False)
        )

    async def close(self) -> None:
        """Ends its session."""
        await self.session.end_session()

    async def move(self, position: Position, session: AsyncClientSession | None = None) -> None:
        """Moves it, within the transaction of `session` where there is one. Raises FencedError."""
        result = await self.database[CHECKPOINTS].update_one(
            {"_id": str(self.partition), "epoch": self.epoch},
            {"$set": position.dump(), "$currentDate": {"updatedAt": True}},
            session=session,
        )
        if not result.matched_count:
            raise FencedError(f"{self.partition} has another owner")
        self.position = position

    async def scanned(self) -> None:
        """Notes that the log has been read up to the position. Raises FencedError."""
        query = {"_id": str(self.partition), "epoch": self.epoch}
        if not (await self.database[CHECKPOINTS].update_one(query, {"$set": {"scan": False}})).matched_count:
            raise FencedError(f"{self.partition} has another owner")
        self.scan = False


async def layout_of(database: Database, build: str) -> list[dict[str, Any]]:
    """All checkpoints of a build (at most 64 partitions)."""
    return await database[CHECKPOINTS].find({"build": build}).to_list(1_000)


def _is(present: list[dict[str, Any]], count: int) -> bool:
    return len(present) == count and all(found["partitions"] == count for found in present)


async def ensure_layout(database: Database, build: str, count: int, start: Position | None = None) -> bool:
    """Makes `count` partitions the layout of a build; True when it had another one, or none.

    A new layout resumes from the oldest time of the one before: what was applied already, the marks tell.
    Its owners are fenced by the same transaction. A build without checkpoints begins with a scan of the log and
    then at `start`; without a start nothing is made.
    """

    if _is(await layout_of(database, build), count):
        return False

    async def change(session: AsyncClientSession) -> bool:
        present = await database[CHECKPOINTS].find({"build": build}, session=session).to_list(1_000)
        if _is(present, count):
            return False
        if present:
            oldest = Position(None, min(Position.load(found).cluster_time for found in present))
            await database[CHECKPOINTS].delete_many({"build": build}, session=session)
        elif start is not None:
            oldest = start
        else:
            return False
        epoch = 1 + max((int(found["epoch"]) for found in present), default=0)
        scan = any(found.get("scan", False) for found in present) if present else True
        await database[CHECKPOINTS].insert_many(
            [
                {"_id": str(PartitionId(build, number, count)), "build": build, "partitions": count, "epoch": epoch}
                | {"scan": scan, **oldest.dump()}
                for number in range(count)
            ],
            session=session,
        )
        return True

    async with database.client.start_session() as session:
        return await past_orphans(database.client, "projector", lambda: session.with_transaction(change))
