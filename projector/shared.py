"""Folding documents that several partitions may write: those keyed by anything but the aggregate.

Events are only checked for their order here; the documents are read, folded and written within the transaction, so that two
partitions that meet in a document cannot lose an update: one gets a WriteConflict and runs its batch again. Marks lie in
a collection of their own, keyed by the aggregate; only this partition writes these, so they may be kept in memory.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import bson
from bson.int64 import Int64

from projector.changes import (
    FIRST_GUESS_BYTES,
    PENDING_EVENTS,
    SLICE_SECONDS,
    Changes,
    DocumentWrites,
    EventFailedError,
    Failure,
    Folder,
    Outcome,
    Typical,
    give_way,
    read_documents,
    unstorable,
    write_documents,
)
from projector.errors import FoldError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from pymongo.asynchronous.client_session import AsyncClientSession

    from eventstore.client import Database
    from projector.build import Build
    from projector.projection import Event, State

__all__ = ["SharedFolder"]

CACHED_MARKS: Final = 100_000

TRANSACTION_SECONDS: Final = 5.0
"""How long the folds of one transaction may take together: far from the minute after which MongoDB ends it, and long enough for
its fixed costs not to matter."""

MOST_KEYS: Final = 1_000
"""Documents that one event may go to: all of them are read and written by one transaction."""


class _Accepted(NamedTuple):
    """An event in its turn, with the documents that it goes to."""

    event: Event
    keys: tuple[Any, ...]


class _SharedChanges(Changes):
    def __init__(
        self,
        database: Database,
        build: Build,
        accepted: list[_Accepted],
        marks: dict[str, tuple[int, int]],
        typical: Typical,
    ) -> None:
        self._database = database
        self._build = build
        self._accepted = accepted
        self._marks = marks  # as they are in MongoDB, and as they are to be
        self._typical = typical
        self.events = len(accepted)

    @property
    def aggregates(self) -> Mapping[str, int]:
        return {aggregate_id: mark for aggregate_id, (_, mark) in self._marks.items()}

    async def write(self, session: AsyncClientSession) -> None:
        states = await self._read(session)
        stored = set(states)
        last = await self._fold(states)
        writes = DocumentWrites(
            marks={aggregate_id: Int64(mark) for aggregate_id, (_, mark) in self._marks.items()},
            marks_before={aggregate_id: before for aggregate_id, (before, _) in self._marks.items()},
        )
        for key, event in last.items():
            _add(writes, key, states[key], event, stored=key in stored)
        await write_documents(self._database, self._build.collection, self._build.marks, writes, session)

    async def _fold(self, states: dict[Any, State | None]) -> dict[Any, Event]:
        """Folds the events in the documents; returns the last event that went into each."""
        last: dict[Any, Event] = {}
        apply = self._build.projection.apply
        folds, took = 0, 0.0
        since = time.perf_counter()
        for event, event_keys in self._accepted:
            for key in event_keys:
                try:
                    states[key] = apply(key, states.get(key), event)
                except Exception as error:
                    raise EventFailedError(Failure.of(event, "fold", error)) from error
                last[key] = event
            folds += len(event_keys)
            if (held := time.perf_counter() - since) > SLICE_SECONDS:
                took += held
                await give_way(held)
                since = time.perf_counter()
        self._typical.learn_write(folds, took + time.perf_counter() - since)
        return last

    async def _read(self, session: AsyncClientSession) -> dict[Any, State | None]:
        """The documents that the events go to, as they are in this transaction."""
        keys = list({key for accepted in self._accepted for key in accepted.keys})
        states: dict[Any, State | None] = {}
        try:
            async for documents in read_documents(self._database, self._build.collection, keys, session):
                states.update({document["_id"]: document for document, _ in documents})
                self._typical.learn_bytes(len(documents), sum(size for _, size in documents))
        except Exception:
            for event, event_keys in self._accepted:
                try:
                    bson.encode({"": event_keys})
                except Exception as error:
                    raise EventFailedError(Failure.of(event, "fold", error)) from error
            raise
        return states

    def without(self, aggregate_id: str) -> Changes:
        accepted = [item for item in self._accepted if item.event["aggregateId"] != aggregate_id]
        marks = {aggregate: mark for aggregate, mark in self._marks.items() if aggregate != aggregate_id}
        return _SharedChanges(self._database, self._build, accepted, marks, self._typical)

    @property
    def divisible(self) -> bool:
        return len(self._accepted) > 1

    def halves(self) -> tuple[Changes, Changes]:
        half = len(self._accepted) // 2
        reached = {item.event["aggregateId"]: int(item.event["sequenceNo"]) for item in self._accepted[:half]}
        before = {aggregate: (self._marks[aggregate][0], mark) for aggregate, mark in reached.items()}
        after = {
            aggregate: (reached.get(aggregate, known), mark)
            for aggregate, (known, mark) in self._marks.items()
            if reached.get(aggregate, known) < mark
        }
        return (
            _SharedChanges(self._database, self._build, self._accepted[:half], before, self._typical),
            _SharedChanges(self._database, self._build, self._accepted[half:], after, self._typical),
        )


def _add(writes: DocumentWrites, key: Any, state: State | None, event: Event, *, stored: bool) -> None:
    """Adds the write of one document; `event` is the last one that went into it."""
    if state is None:
        if stored:
            writes.deletes.append(key)
        return
    try:
        writes.store({"_id": key} | state | {"_id": key}, event["aggregateId"], stored=stored)
    except Exception as error:
        raise EventFailedError(unstorable(event["aggregateId"], error)) from error


class SharedFolder(Folder):
    """See the module."""

    def __init__(self, database: Database, build: Build) -> None:
        self._database = database
        self._build = build
        self._projection = build.projection
        self._marks: dict[str, int] = {}
        self._stored: dict[str, int] = {}  # the marks as MongoDB has them, or will when what is in flight is written
        self._dirty: dict[str, int] = {}
        self._in_flight: Collection[str] = ()
        self._accepted: list[_Accepted] = []
        self._pending = 0
        self.typical = Typical()

    @property
    def pending(self) -> int:
        return self._pending or len(self._dirty)

    @property
    def pending_bytes(self) -> int:
        return self._pending * self.typical.bytes if self.typical.bytes > FIRST_GUESS_BYTES else 0

    @property
    def limit(self) -> int:
        # They are folded within the transaction, whose time is limited.
        return max(1, min(PENDING_EVENTS, int(TRANSACTION_SECONDS / self.typical.write_seconds)))

    async def load(self, aggregate_ids: set[str]) -> None:
        wanted = list(aggregate_ids.difference(self._marks))
        if not wanted:
            return
        if len(self._marks) + len(wanted) > CACHED_MARKS:  # what is being written or waits for it stays
            kept = {*self._in_flight, *self._dirty, *aggregate_ids}
            self._marks = {aggregate: mark for aggregate, mark in self._marks.items() if aggregate in kept}
            self._stored = {aggregate: self._stored[aggregate] for aggregate in self._marks}
        rows = await self._database[self._build.marks].find({"_id": {"$in": wanted}}).to_list(len(wanted))
        found = {row["_id"]: int(row["mark"]) for row in rows}
        marks = {aggregate_id: found.get(aggregate_id, 0) for aggregate_id in wanted}
        self._marks.update(marks)
        self._stored.update(marks)

    def fold(self, events: Sequence[Event], aside: Collection[str]) -> Outcome:
        outcome = Outcome()
        tally, gaps, passed = outcome.tally, outcome.gaps, outcome.passed
        handles, keys_of = self._projection.handles, self._keys_of
        marks = self._marks
        for event in events:
            aggregate_id = event["aggregateId"]
            if aggregate_id in passed or aggregate_id in aside:
                passed[aggregate_id] = event["sequenceNo"]
                tally.aside += 1
                continue
            sequence_no = event["sequenceNo"]
            ahead = sequence_no - marks[aggregate_id]
            if ahead < 1:
                tally.duplicate += 1
                continue
            if ahead > 1:
                gaps[aggregate_id] = passed[aggregate_id] = sequence_no
                tally.aside += 1
                continue
            keys: tuple[Any, ...] = ()
            if handles(event["eventName"]):
                try:
                    keys = keys_of(event)
                except Exception as error:  # noqa: BLE001 - a key function may raise anything
                    outcome.failures.append(Failure.of(event, "fold", error))
                    passed[aggregate_id] = sequence_no
                    tally.aside += 1
                    continue
            marks[aggregate_id] = sequence_no
            if keys:
                self._accepted.append(_Accepted(event, keys))
                self._pending += len(keys)
                self._dirty[aggregate_id] = sequence_no
                tally.applied += 1
            else:
                tally.unhandled += 1
        return outcome

    def _keys_of(self, event: Event) -> tuple[Any, ...]:
        keys = self._projection.keys(event)
        if len(keys) > MOST_KEYS:
            raise FoldError(f"key: the event goes to {len(keys)} documents, more than {MOST_KEYS}")
        return keys

    def mark(self, aggregate_id: str) -> int:
        return self._marks[aggregate_id]

    def skip(self, aggregate_id: str, sequence_no: int) -> None:
        self._marks[aggregate_id] = sequence_no
        self._dirty[aggregate_id] = sequence_no

    def discard(self, aggregate_id: str) -> None:
        self._marks.pop(aggregate_id, None)
        self._stored.pop(aggregate_id, None)
        if self._dirty.pop(aggregate_id, None) is not None:
            self._accepted = [item for item in self._accepted if item.event["aggregateId"] != aggregate_id]

    def take(self) -> tuple[Changes, list[Failure]]:
        accepted, self._accepted, self._pending = self._accepted, [], 0
        dirty, self._dirty = self._dirty, {}
        self._in_flight = dirty.keys()
        marks = {aggregate_id: (self._stored[aggregate_id], mark) for aggregate_id, mark in dirty.items()}
        self._stored.update(dirty)
        return _SharedChanges(self._database, self._build, accepted, marks, self.typical), []
