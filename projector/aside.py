"""The aggregates that a partition has set aside, in memory, and how they come back.

One way back for all: the aggregate is read anew from its mark, in pages, in turns that leave the others their time. Gaps,
failed events and events without payload are all healed by it.
"""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING, Final, Protocol

import structlog

from eventstore import log as event_log
from projector.changes import Failure
from projector.parking import PARKED, Parked, parked_id, read_parked

if TYPE_CHECKING:
    import asyncio

    from pymongo.asynchronous.client_session import AsyncClientSession

    from eventstore.client import Database
    from eventstore.event import EventDocument
    from projector.build import Build
    from projector.changes import Changes, Folder
    from projector.checkpoint import PartitionId
    from projector.metrics import Metrics
    from projector.settings import ProjectorSettings

__all__ = ["Aside", "ParkedWrites", "StoppedError", "Workshop"]

TURN_EVENTS: Final = 5_000
"""Events of one aggregate that are re-read before the others get their turn: as many as a batch."""

TURNS: Final = 20
"""Aggregates that get a turn before the next batch is read."""

_log = structlog.stdlib.get_logger(__name__)


class StoppedError(Exception):
    """The projection cannot go on without a person: too many aggregates are aside."""


class Workshop(Protocol):
    """What is needed of the loop of the partition."""

    log: Database
    database: Database
    build: Build
    partition: PartitionId
    folder: Folder
    metrics: Metrics
    settings: ProjectorSettings
    writing: asyncio.Lock

    def count(self, **outcomes: int) -> None:
        """Counts events by outcome."""

    async def flush(self) -> None:
        """Writes what has been folded."""


class ParkedWrites:
    """Records to write and to delete within the transaction of a batch."""

    def __init__(self, aside: Aside, changed: dict[str, Parked], healed: set[str]) -> None:
        self._aside = aside
        self._changed = changed
        self._healed = healed

    async def write(self, session: AsyncClientSession) -> None:
        """Writes them."""
        collection = self._aside.database[PARKED]
        build = self._aside.build.id
        if self._healed:
            ids = [parked_id(build, aggregate_id) for aggregate_id in self._healed]
            await collection.delete_many({"_id": {"$in": ids}}, session=session)
        for record in self._changed.values():
            document = record.dump()
            # A person's command since then (a higher revision) has the last word.
            query = {"_id": document["_id"], "revision": record.revision}
            result = await collection.update_one(query, {"$set": document}, session=session)
            if not result.matched_count and not await collection.count_documents(
                {"_id": document["_id"]}, session=session
            ):
                await collection.insert_one(document, session=session)

    def done(self) -> None:
        """They are written: forgets those that did not change again meanwhile."""
        self._aside.written(self._changed, self._healed)


class Aside:
    """The records of one partition; `in` and iteration are over aggregateIds."""

    def __init__(self, loop: Workshop) -> None:
        self._loop = loop
        self.database = loop.database
        self.build = loop.build
        self.records: dict[str, Parked] = {}
        self._seen: dict[str, int] = {}
        self._changed: dict[str, Parked] = {}
        self._healed: set[str] = set()
        self._log = _log.bind(projection=self.build.projection.name, partition=str(loop.partition))

    @property
    def dirty(self) -> bool:
        """Whether records wait to be written."""
        return bool(self._changed or self._healed)

    @property
    def due(self) -> bool:
        """Whether an aggregate should get a turn now."""
        return any(record.is_due for record in self.records.values())

    async def reload(self) -> None:
        """Reads the records again: at the start all, later to see the commands of people."""
        limit = self._loop.settings.max_parked
        found = await read_parked(self.database, self.build.id, self._loop.partition.slots, limit=limit + 1)
        for record in found:
            known = self.records.get(record.aggregate_id)
            if known is None or known.revision < record.revision:
                self.records[record.aggregate_id] = record
                self._changed.pop(record.aggregate_id, None)
        self._check_cap()
        self._measure()

    def passed(self, passed: dict[str, int]) -> None:
        """Notes the last sequenceNo that the stream brought of each aggregate aside."""
        self._seen.update(passed)

    def fail(self, failure: Failure) -> None:
        """Sets an aggregate aside; what was folded of it and not written is forgotten, for it is read again."""
        aggregate_id = failure.aggregate_id
        self._loop.folder.discard(aggregate_id)
        before = self.records.get(aggregate_id)
        record = Parked.of(self.build.id, failure, before, self._loop.settings.retry_seconds)
        self._put(record)
        self._seen[aggregate_id] = max(failure.sequence_no, self._seen.get(aggregate_id, 0))
        self._healed.discard(aggregate_id)
        self._loop.count(failed=1)
        if record.state == "parked":
            self._loop.metrics.parked_total.labels(self.build.projection.name).inc()
        if before is None or record.state == "parked":
            self._log.warning(
                "aggregate_parked" if record.state == "parked" else "aggregate_set_aside",
                aggregate_id=aggregate_id, sequence_no=record.sequence_no, category=record.category, reason=record.reason,
            )  # fmt: skip
        self._check_cap()

    def refuse(self, failure: Failure, changes: Changes) -> Changes:
        """Sets the aggregate aside whose document MongoDB refused; returns the changes without it."""
        if not failure.sequence_no:
            failure = failure._replace(sequence_no=self._loop.folder.mark(failure.aggregate_id))
        self.fail(failure)
        return changes.without(failure.aggregate_id)

    def _put(self, record: Parked) -> None:
        self.records[record.aggregate_id] = record
        self._changed[record.aggregate_id] = record
        self._measure()

    def _check_cap(self) -> None:
        if len(self.records) > self._loop.settings.max_parked:
            raise StoppedError(f"more than {self._loop.settings.max_parked} aggregates are set aside")

    def _measure(self) -> None:
        name = self.build.projection.name
        parked = sum(record.state == "parked" for record in self.records.values())
        self._loop.metrics.parked.labels(name, "parked").set(parked)
        self._loop.metrics.parked.labels(name, "retrying").set(len(self.records) - parked)
        oldest = min((record.since.timestamp() for record in self.records.values()), default=0)
        self._loop.metrics.parked_oldest.labels(name).set(oldest)

    def snapshot(self) -> ParkedWrites:
        """What is to be written now."""
        return ParkedWrites(self, dict(self._changed), set(self._healed))

    def written(self, changed: dict[str, Parked], healed: set[str]) -> None:
        """Called when a snapshot has been committed."""
        for aggregate_id, record in changed.items():
            if self._changed.get(aggregate_id) is record:
                del self._changed[aggregate_id]
        self._healed -= healed

    # The way back

    async def heal_gaps(self, gaps: dict[str, int]) -> None:
        """Reads the missing events before these from the log and applies them; what the log lacks is set aside."""
        for aggregate_id, sequence_no in gaps.items():
            self._seen[aggregate_id] = sequence_no
            await self._turn(aggregate_id, None)

    async def heal_due(self) -> None:
        """Gives a turn to those whose time has come."""
        due = [record for record in self.records.values() if record.is_due]
        for record in due[:TURNS]:
            await self._turn(record.aggregate_id, record)

    async def _turn(self, aggregate_id: str, record: Parked | None) -> None:
        loop, folder = self._loop, self._loop.folder
        if record is not None:
            await loop.flush()  # what an earlier turn folded must not be forgotten now, or it would never get on
        async with loop.writing:  # nothing of it is under way while it is read
            folder.discard(aggregate_id)
            await folder.load({aggregate_id})
        until, budget = None, TURN_EVENTS
        if record is not None and record.category == "write":
            budget = 1  # a refused document does not tell which of its events it was
        elif record is not None and folder.mark(aggregate_id) < record.sequence_no - 1:
            until = record.sequence_no - 1  # first, and for good, what comes before the failing event
        failure, complete, healed = await self._replay(aggregate_id, record.skips if record else (), until, budget)
        loop.count(healed=healed)
        if failure is not None:
            self.fail(failure)
        elif complete and folder.mark(aggregate_id) >= self._seen.get(aggregate_id, 0):
            if record is not None:
                await loop.flush()  # only now it shows whether MongoDB takes the document
            if self.records.get(aggregate_id) is record:
                self._release(aggregate_id)
        elif complete:
            number = folder.mark(aggregate_id) + 1
            self.fail(
                Failure(aggregate_id, number, None, None, "gap", f"the log has no event {number} of this aggregate")
            )
        elif record is None:
            number = folder.mark(aggregate_id) + 1
            self._put(Parked(self.build.id, aggregate_id, number, None, None, "gap", "being read from the log"))
        elif until is None:  # there is more: its next turn is the next one
            record.due = datetime.datetime.now(datetime.UTC)

    def _release(self, aggregate_id: str) -> None:
        """It is current again."""
        self._seen.pop(aggregate_id, None)
        if self.records.pop(aggregate_id, None) is not None:
            self._changed.pop(aggregate_id, None)
            self._healed.add(aggregate_id)
            self._log.info("aggregate_healed", aggregate_id=aggregate_id)
            self._measure()

    async def _replay(
        self, aggregate_id: str, skips: tuple[int, ...], until: int | None, budget: int
    ) -> tuple[Failure | None, bool, int]:
        """Folds events from the log above the mark: the failure met, whether the log's end was, and how many were applied."""
        folder = self._loop.folder
        applied = 0
        while budget > 0:
            size = min(budget, event_log.PAGE)
            page = await event_log.history(self._loop.log, aggregate_id, after=folder.mark(aggregate_id), limit=size)
            for event in page:
                number = int(event["sequenceNo"])
                if until is not None and number > until:
                    return None, False, applied
                failure, count = self._apply(aggregate_id, event, skips)
                applied += count
                if failure is not None:
                    return failure, False, applied
            self._skip(aggregate_id, skips)
            budget -= len(page)
            if len(page) < size:
                return None, True, applied
        return None, False, applied

    def _apply(self, aggregate_id: str, event: EventDocument, skips: tuple[int, ...]) -> tuple[Failure | None, int]:
        """Folds one event from the log, or passes it over."""
        folder = self._loop.folder
        number = int(event["sequenceNo"])
        self._skip(aggregate_id, skips, number)
        if number <= folder.mark(aggregate_id):
            return None, 0
        outcome = folder.fold([dict(event)], ())
        if outcome.failures:
            return outcome.failures[0], 0
        if outcome.gaps:
            missing = folder.mark(aggregate_id) + 1
            reason = f"the log has event {number} of this aggregate, but not {missing}"
            return Failure(aggregate_id, missing, None, None, "gap", reason), 0
        return None, outcome.tally.applied

    def _skip(self, aggregate_id: str, skips: tuple[int, ...], up_to: int | None = None) -> None:
        """Passes over the events that a person named, as far as they are next."""
        folder = self._loop.folder
        while (number := folder.mark(aggregate_id) + 1) in skips and (up_to is None or number <= up_to):
            folder.skip(aggregate_id, number)
            self._loop.count(skipped=1)
