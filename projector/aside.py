"""The aggregates that a partition has set aside, in memory, and how they come back.

One way back for all: the aggregate is read anew from its mark, in pages, in turns that leave the others their time. Gaps,
failed events and events without payload are all healed by it.
"""

from __future__ import annotations

import dataclasses
import datetime
from operator import attrgetter
from typing import TYPE_CHECKING, Final, Protocol

import structlog

from eventstore import log as event_log
from projector.changes import Failure
from projector.parking import PARKED, Parked, parked_id, read_parked

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection
    from contextlib import AbstractAsyncContextManager

    from pymongo.asynchronous.client_session import AsyncClientSession

    from eventstore.client import Database
    from projector.build import Build
    from projector.changes import Changes, Folder, Outcome
    from projector.checkpoint import PartitionId
    from projector.metrics import Metrics
    from projector.projection import Event
    from projector.settings import ProjectorSettings

__all__ = ["Aside", "ParkedWrites", "StoppedError", "Workshop", "reset"]

TURN_EVENTS: Final = 5_000
"""Events that are re-read of aggregates aside before the next batch gets its turn: as many as a batch."""

TURNS: Final = 20
"""Aggregates that get a turn before the next batch does."""

GROUP: Final = 200
"""Aggregates whose gaps are read by one query: its `$or` has an index seek for each, and MongoDB plans a few hundred well."""

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

    def count(self, **outcomes: int) -> None:
        """Counts events by outcome."""

    async def flush(self) -> None:
        """Writes what has been folded."""

    def portions(self, events: list[Event]) -> AsyncIterator[list[Event]]:
        """A batch in parts that may be folded in one go."""

    def fold(self, events: list[Event], aside: Collection[str]) -> Outcome:
        """Folds a part of a batch."""

    async def make_way(self) -> None:
        """Called after each batch of events: waits while too much is folded and not written."""

    def between_writes(self) -> AbstractAsyncContextManager[None]:
        """No write is under way while it lasts."""


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

    def refused(self, record: Parked) -> None:
        """Adds the record of an aggregate that turned out to stand in the way of this very write."""
        self._changed[record.aggregate_id] = record
        self._healed.discard(record.aggregate_id)

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

    async def load(self) -> None:
        """Reads all records, before the loop begins."""
        limit = self._loop.settings.max_parked
        found = await read_parked(self.database, self.build.id, self._loop.partition.slots, limit=limit + 1)
        self.records.update({record.aggregate_id: record for record in found})
        self._check_cap()

    async def follow_commands(self) -> None:
        """Reads the records again to see what people have ordered.

        Only of those that are known: one that has just been released may still be there, and is not taken up again.
        """
        if not self.records:
            return
        limit = self._loop.settings.max_parked
        for record in await read_parked(self.database, self.build.id, self._loop.partition.slots, limit=limit + 1):
            known = self.records.get(record.aggregate_id)
            if known is not None and known.revision < record.revision:
                record.since = record.due = datetime.datetime.now(datetime.UTC)  # whatever the person's clock said
                self.records[record.aggregate_id] = record
                self._changed.pop(record.aggregate_id, None)

    def passed(self, passed: dict[str, int]) -> None:
        """Notes the last sequenceNo that the stream brought of each aggregate aside."""
        for aggregate_id, sequence_no in passed.items():
            self._saw(aggregate_id, sequence_no)

    def _saw(self, aggregate_id: str, sequence_no: int) -> None:
        # The highest, since a missing event may come late.
        self._seen[aggregate_id] = max(sequence_no, self._seen.get(aggregate_id, 0))

    def fail(self, failure: Failure) -> None:
        """Sets an aggregate aside; what was folded of it and not written is forgotten, for it is read again."""
        aggregate_id = failure.aggregate_id
        self._loop.folder.discard(aggregate_id)
        before = self.records.get(aggregate_id)
        record = Parked.of(self.build.id, failure, before, self._loop.settings.retry_seconds)
        self._put(record)
        self._saw(aggregate_id, failure.sequence_no)
        self._healed.discard(aggregate_id)
        self._loop.count(failed=1)
        if record.state == "parked" and (before is None or before.state != "parked"):
            self._loop.metrics.parked_total.labels(self.build.projection.name).inc()
        if before is None or record.state == "parked":
            self._log.warning(
                "aggregate_parked" if record.state == "parked" else "aggregate_set_aside",
                aggregate_id=aggregate_id, sequence_no=record.sequence_no, category=record.category, reason=record.reason,
            )  # fmt: skip

    def refuse(self, failure: Failure, changes: Changes, parked: ParkedWrites) -> Changes:
        """Sets the aggregate aside whose document MongoDB refused; returns the changes without it."""
        aggregate_id = failure.aggregate_id
        if not failure.sequence_no:  # MongoDB tells the document, not the event: it is one of those up to the last
            failure = failure._replace(sequence_no=changes.aggregates[aggregate_id])
        self.fail(failure)
        parked.refused(self.records[aggregate_id])
        return changes.without(aggregate_id)

    def _put(self, record: Parked) -> None:
        self.records[record.aggregate_id] = record
        self._changed[record.aggregate_id] = record
        self._check_cap()

    def _check_cap(self) -> None:
        if len(self.records) > self._loop.settings.max_parked:
            raise StoppedError(f"more than {self._loop.settings.max_parked} aggregates are set aside")

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
            self._saw(aggregate_id, sequence_no)
        names = list(gaps)
        for start in range(0, len(names), GROUP):
            await self._heal_group(names[start : start + GROUP])

    async def _heal_group(self, names: list[str]) -> None:
        """Reads a number of aggregates at once, which are in memory; whatever is not simply healed by it gets a turn."""
        folder = self._loop.folder
        marks = {name: folder.mark(name) for name in names if name not in self.records}
        budget = TURN_EVENTS
        async for events in self._read(marks, budget):
            budget -= len(events)
            async for portion in self._loop.portions(events):
                outcome = self._loop.fold(portion, self.records)
                self._loop.count(healed=outcome.tally.applied, unhandled=outcome.tally.unhandled)
                for failure in outcome.failures:
                    self.fail(failure)
            await self._loop.make_way()
        for name in marks:
            if name in self.records:
                continue
            number = folder.mark(name) + 1
            if number > self._seen.get(name, 0):
                self._seen.pop(name, None)
            elif budget > 0:
                self.fail(_missing(name, number))
            else:  # there is more of it than fits into a turn
                self._put(Parked(self.build.id, name, number, None, None, "gap", "being read from the log"))

    async def heal_due(self) -> None:
        """Gives turns to those whose time has come, the longest due first."""
        budget = TURN_EVENTS
        due = sorted((record for record in self.records.values() if record.is_due), key=attrgetter("due"))
        for record in due[:TURNS]:
            if self.records.get(record.aggregate_id) is record:  # it may have failed anew in another's turn
                budget -= await self._turn(record, budget)
            if budget <= 0:
                return

    async def _turn(self, record: Parked, budget: int) -> int:
        """Reads an aggregate on from its mark; returns how many events it read."""
        loop, folder, name = self._loop, self._loop.folder, record.aggregate_id
        async with loop.between_writes():  # nothing of it is under way while it is read
            await folder.load({name})
        if record.category == "write" and record.event_id is None:
            return await self._isolate(record)
        mark = folder.mark(name)
        until = record.sequence_no - 1 if mark < record.sequence_no - 1 else None
        if until is None:
            record.settled = True
            if not record.is_due:
                return 0
            if record.category == "reset":
                await self._look_at_reset(record, mark)
                return 0
            if record.category == "write":
                budget = 1  # to know that it is this event again
        failure, complete, read = await self._replay(record, until, budget)
        # Only now it shows whether MongoDB takes the document; and what has been reached shall not be forgotten by a failure. But
        # a fold that failed has left half a document behind.
        if self.records.get(name) is record and (failure is None or failure.category == "gap"):
            await loop.flush()
        if self.records.get(name) is not record:
            return read
        if failure is not None:
            self.fail(failure)
        elif complete and folder.mark(name) >= self._seen.get(name, 0):
            self._release(name)
        elif complete:
            self.fail(_missing(name, folder.mark(name) + 1))
        elif until is None:
            record.category, record.reason = "gap", "being read from the log"
        return read

    async def _isolate(self, record: Parked) -> int:
        """Finds, by halving, the event that makes a document which cannot be stored; what comes before it is written."""
        loop, folder, name = self._loop, self._loop.folder, record.aggregate_id
        before, refused = folder.mark(name), record.sequence_no
        read = 0
        while refused - before > 1:
            failure, complete, count = await self._replay(record, (before + refused) // 2, TURN_EVENTS)
            read += count
            if failure is None and self.records.get(name) is record:
                await loop.flush()
            if (now := self.records[name]) is not record:
                if now.category != "write" or now.event_id is not None:
                    return read
                now.attempts, record = record.attempts, now
                refused = min(refused, record.sequence_no)
                async with loop.between_writes():
                    await folder.load({name})
            elif failure is not None:
                self.fail(failure)
                return read
            elif complete:
                break
            before = folder.mark(name)
        record = dataclasses.replace(record, sequence_no=refused, settled=True)
        async for events in event_log.batches_after(loop.log, {name: before}, limit=1):
            record.event_id, record.event_name = events[0]["_id"], events[0]["eventName"]
        self._put(record)
        return read

    async def _look_at_reset(self, record: Parked, mark: int) -> None:
        """An aggregate that lost events which were applied is current again when the log has them back, and not before."""
        head = await event_log.head(self._loop.log, record.aggregate_id)
        if head < mark:
            self.fail(reset(record.aggregate_id, mark, head))
        else:
            record.category, record.reason = "gap", "being read from the log"

    def _release(self, aggregate_id: str) -> None:
        """It is current again."""
        self._seen.pop(aggregate_id, None)
        del self.records[aggregate_id]
        self._changed.pop(aggregate_id, None)
        self._healed.add(aggregate_id)
        self._log.info("aggregate_healed", aggregate_id=aggregate_id)

    async def _replay(self, record: Parked, until: int | None, budget: int) -> tuple[Failure | None, bool, int]:
        """Folds events from the log above the mark: the failure met, whether the log's end was, and how many were read."""
        folder, name = self._loop.folder, record.aggregate_id
        mark = folder.mark(name)
        limit = budget if until is None else max(1, min(budget, until - mark))
        read = 0
        async for events in self._read({name: mark}, limit):
            async for event in self._one_by_one(events):
                if self.records.get(name) is not record:
                    return None, False, read  # MongoDB refused what was folded of it
                if until is not None and event["sequenceNo"] > until:
                    self._skip(name, record.skips, until)
                    number = folder.mark(name) + 1
                    return (_missing(name, number) if number <= until else None), False, read
                read += 1
                if failure := self._apply(event, record.skips):
                    return failure, False, read
            await self._loop.make_way()
        if self.records.get(name) is not record:
            return None, False, read
        if read < limit:
            self._skip(name, record.skips)
        return None, read < limit, read

    async def _one_by_one(self, events: list[Event]) -> AsyncIterator[Event]:
        async for portion in self._loop.portions(events):
            for event in portion:
                yield event

    def _read(self, marks: dict[str, int], limit: int) -> AsyncIterator[list[Event]]:
        return event_log.batches_after(self._loop.log, marks, limit=limit, fields=self.build.projection.fields)

    def _apply(self, event: Event, skips: tuple[int, ...]) -> Failure | None:
        """Folds one event from the log, or passes it over."""
        folder, name = self._loop.folder, event["aggregateId"]
        number = int(event["sequenceNo"])
        self._skip(name, skips, number)
        if number <= folder.mark(name):
            return None
        outcome = self._loop.fold([event], ())
        if outcome.failures:
            return outcome.failures[0]
        if outcome.gaps:
            return _missing(name, folder.mark(name) + 1)
        self._loop.count(healed=outcome.tally.applied, unhandled=outcome.tally.unhandled)
        return None

    def _skip(self, aggregate_id: str, skips: tuple[int, ...], up_to: int | None = None) -> None:
        """Passes over the events that a person named, as far as they are next."""
        folder = self._loop.folder
        while (number := folder.mark(aggregate_id) + 1) in skips and (up_to is None or number <= up_to):
            folder.skip(aggregate_id, number)
            self._loop.count(skipped=1)


def _missing(aggregate_id: str, number: int) -> Failure:
    return Failure(aggregate_id, number, None, None, "gap", f"the log has no event {number} of this aggregate")


def reset(aggregate_id: str, mark: int, head: int) -> Failure:
    """The failure of an aggregate whose log ends before what was applied of it."""
    reason = f"event {mark} was applied, but the log ends with {head}: it was restored, or is another one"
    return Failure(aggregate_id, mark, None, None, "reset", reason)
