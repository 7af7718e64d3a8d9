"""Reading a range of the log in index order, and writing the documents that come of it: the fast way to fill a new build.

Each aggregate is folded whole, so that its document is written once, and no mark or document is ever read. What cannot be folded is
set aside with a record, as a partition does it; the partition takes such an aggregate up, from its first event, when the
scan is done. Memory holds one aggregate's document, a batch of events and a batch of documents, however long the log.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any, Final

import pymongo
from bson.int64 import Int64

from eventstore import tasks
from eventstore.event import EVENTS
from eventstore.indexes import AGGREGATE_SEQUENCE
from projector import scans
from projector.aside import StoppedError
from projector.changes import DocumentWrites, EventFailedError, Failure, unstorable
from projector.owned import OwnedChanges, marked
from projector.parking import PARKED, Parked

if TYPE_CHECKING:
    from pymongo.asynchronous.client_session import AsyncClientSession

    from eventstore.client import Database
    from projector.build import Build
    from projector.changes import Changes
    from projector.projection import Projection, State
    from projector.scans import Range

__all__ = ["Pace", "Scanner"]

READ_EVENTS: Final = 2_000
"""Events decoded at once. Measured: 1,000 to 5,000 are alike; with MongoDB's own batches of 16 MiB it takes twice the time, since
what is decoded no longer fits into the processor's caches."""

WRITE_DOCUMENTS: Final = 2_000
WRITE_BYTES: Final = 4 * 2**20
WRITE_EVENTS: Final = 100_000
"""Bounds of a transaction. The commit costs 2 to 3 ms, which 2,000 documents (30 ms) make small; a scan that is killed repeats at
most this."""

WRITE_SECONDS: Final = 60.0


class Pace:
    """Holds a scan to a number of events per second; 0: as fast as it goes."""

    def __init__(self, events_per_second: float) -> None:
        self._rate = events_per_second
        self._due = time.monotonic()

    async def spend(self, events: int) -> None:
        """Waits until these events have had their time. What was not used before is not caught up."""
        if self._rate:
            now = time.monotonic()
            await asyncio.sleep(max(0.0, self._due - now))
            self._due = max(now, self._due) + events / self._rate


class _Folding:
    """The aggregate that is being folded."""

    __slots__ = ("aggregate_id", "applied", "failed", "mark", "passed", "state")

    def __init__(self, aggregate_id: str) -> None:
        self.aggregate_id = aggregate_id
        self.mark = 0
        self.passed = 0  # events after the one that failed
        self.state: State | None = None
        self.applied = False
        self.failed = False


class _Pending:
    """What waits to be written, of whole aggregates up to `after`."""

    def __init__(self) -> None:
        self.writes = DocumentWrites()
        self.marks: dict[str, int] = {}
        self.failures: list[Failure] = []
        self.events = 0
        self.bytes = 0
        self.after: str | None = None

    def add(self, aggregate_id: str, mark: int, state: State) -> None:
        """A document. Raises what cannot be stored."""
        self.bytes += self.writes.store(marked(aggregate_id, mark, state), aggregate_id, stored=False)
        self.marks[aggregate_id] = mark

    @property
    def full(self) -> bool:
        """Whether it is enough for a transaction."""
        return (
            len(self.marks) >= WRITE_DOCUMENTS
            or self.bytes >= WRITE_BYTES
            or self.events >= WRITE_EVENTS
            or len(self.failures) >= WRITE_DOCUMENTS
        )


class Scanner:
    """Scans ranges of a build's plan for its owner. `retry_seconds` and `max_parked` are the projector's settings."""

    def __init__(
        self, log: Database, database: Database, build: Build, *, pace: Pace, retry_seconds: float, max_parked: int
    ) -> None:
        self._events = log[EVENTS]
        self._database = database
        self._build = build
        self._projection = build.projection
        self._fields = scan_fields(build.projection)
        self._pace = pace
        self._retry_seconds = retry_seconds
        self._max_parked = max_parked
        self._aside = 0
        self._pending = _Pending()
        self._writing: asyncio.Task[None] | None = None

    async def run(self, owner: str) -> None:
        """Scans ranges until none is left.

        Raises FencedError when another owner took over or the build was dropped, StoppedError when too much is set aside, and
        errors of pymongo: then the range stays claimed until the scan is taken over anew.
        """
        while (range_ := await scans.claim(self._database, self._build.id, owner)) is not None:
            try:
                await self._scan(range_)
            finally:
                await self._abandon()

    async def _abandon(self) -> None:
        """Ends a write that is under way when the scan ends early, so that its transaction does not stay open."""
        writing, self._writing = self._writing, None
        self._pending = _Pending()
        if writing is not None:
            writing.cancel()
            await asyncio.gather(writing, return_exceptions=True)

    async def _scan(self, range_: Range) -> None:
        # Not raw batches: to cut a batch into documents pymongo makes an object of each, which costs more than decoding them.
        cursor = self._events.find(
            range_.query, self._fields, sort=AGGREGATE_SEQUENCE.document["key"], batch_size=READ_EVENTS
        )
        folding: _Folding | None = None
        async with cursor:
            reading = asyncio.create_task(cursor.to_list(READ_EVENTS))
            try:
                while events := await reading:
                    # MongoDB reads the next batch while this one is folded.
                    reading = asyncio.create_task(cursor.to_list(READ_EVENTS))
                    await asyncio.sleep(0)  # lets it ask
                    folding = self._fold(events, folding)
                    if self._pending.full:
                        await self._flush(range_)
                    await self._pace.spend(len(events))
            finally:
                await tasks.end([reading])
        if folding is not None:
            self._close(folding)
        await self._flush(range_, done=True)
        if self._writing is not None:
            await self._writing

    def _fold(self, events: list[dict[str, Any]], folding: _Folding | None) -> _Folding | None:
        """Folds a batch, which may begin and end amid an aggregate; returns the aggregate that it ends with."""
        fold_of = self._projection.fold_of
        at = folding if folding is not None else _Folding("")
        for event in events:
            aggregate_id = event["aggregateId"]
            if aggregate_id != at.aggregate_id:
                self._close(at)
                at = _Folding(aggregate_id)
            if at.failed:
                at.passed += 1
                continue
            sequence_no = event["sequenceNo"]
            if sequence_no != at.mark + 1:
                self._fail(at, _gap(aggregate_id, at.mark + 1, sequence_no))
                continue
            fold = fold_of(event["eventName"])
            if fold is not None:
                try:
                    at.state = fold(aggregate_id, at.state, event)
                except Exception as error:  # noqa: BLE001 - a handler may raise anything: its aggregate is set aside
                    self._fail(at, Failure.of(event, "fold", error))
                    continue
                at.applied = True
            at.mark = sequence_no
        return at

    def _fail(self, folding: _Folding, failure: Failure) -> None:
        folding.failed = True
        folding.passed += 1
        folding.state = None
        self._pending.failures.append(failure)
        self._aside += 1
        if self._aside > self._max_parked:
            raise StoppedError(f"more than {self._max_parked} aggregates are set aside: {failure.reason}")

    def _close(self, folding: _Folding) -> None:
        """An aggregate has been read to its end: its document, or the mark of a deleted one, is to be written."""
        aggregate_id, pending = folding.aggregate_id, self._pending
        if not aggregate_id:
            return
        if folding.applied and not folding.failed:
            if folding.state is None:
                pending.writes.marks[aggregate_id] = pending.marks[aggregate_id] = Int64(folding.mark)
            else:
                try:
                    pending.add(aggregate_id, folding.mark, folding.state)
                except Exception as error:  # noqa: BLE001 - whatever cannot be BSON
                    self._fail(folding, unstorable(aggregate_id, error)._replace(sequence_no=folding.mark))
        pending.after = aggregate_id
        pending.events += folding.mark + folding.passed

    async def _flush(self, range_: Range, *, done: bool = False) -> None:
        """Writes what has come together while reading goes on; waits for the write before."""
        pending, self._pending = self._pending, _Pending()
        if self._writing is not None:
            await self._writing
        self._writing = asyncio.create_task(self._write(range_, pending, done=done))
        await asyncio.sleep(0)  # lets it begin

    async def _write(self, range_: Range, pending: _Pending, *, done: bool) -> None:
        changes: Changes = OwnedChanges(self._database, self._build, pending.writes, pending.marks, pending.events)
        while True:
            try:
                await self._transaction(range_, changes, pending, done=done)
                return
            except EventFailedError as error:
                # MongoDB tells the document, not the event: it is one of those up to the last.
                failure = error.failure._replace(sequence_no=pending.marks[error.failure.aggregate_id])
                pending.failures.append(failure)
                self._aside += 1
                changes = changes.without(failure.aggregate_id)

    async def _transaction(self, range_: Range, changes: Changes, pending: _Pending, *, done: bool) -> None:
        async def write(session: AsyncClientSession) -> None:
            await range_.advance(self._database, pending.after or range_.after, pending.events, session, done=done)
            await changes.write(session)
            for failure in pending.failures:
                record = Parked.of(self._build.id, failure, None, self._retry_seconds).dump()
                await self._database[PARKED].replace_one({"_id": record["_id"]}, record, upsert=True, session=session)

        with pymongo.timeout(WRITE_SECONDS):
            async with self._database.client.start_session() as session:
                await session.with_transaction(write)


def scan_fields(projection: Projection) -> dict[str, int] | None:
    """What `find` is to return of an event; None: all of it."""
    if projection.fields is None:
        return None
    wanted = {name.partition(".")[0] for name in projection.fields}
    fields = dict.fromkeys(("aggregateId", "sequenceNo", "eventName", *projection.fields), 1)
    # A declared projection has named all that it reads; a handler in Python may read these without saying so.
    declared = projection.definition is not None
    if not declared:
        fields["slot"] = 1
    return fields | ({"_id": 0} if declared and "_id" not in wanted else {})


def _gap(aggregate_id: str, missing: int, found: int) -> Failure:
    reason = f"the log has event {found} of this aggregate, but not {missing}"
    return Failure(aggregate_id, missing, None, None, "gap", reason)
