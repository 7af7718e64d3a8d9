"""Folding documents that only this partition writes: those keyed by the aggregate.

The lease makes the partition their only writer, so they may be kept in memory between batches; the mark lies in the document
(`_mark`), and is written with it for nothing. A deleted document leaves its mark in the marks collection.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from bson.int64 import Int64

from projector.changes import (
    PENDING_EVENTS,
    Changes,
    DocumentWrites,
    Failure,
    Folder,
    Outcome,
    Typical,
    read_documents,
    unstorable,
    write_documents,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from collections.abc import Set as AbstractSet

    from pymongo.asynchronous.client_session import AsyncClientSession

    from eventstore.client import Database
    from projector.build import Build
    from projector.projection import Event, State

__all__ = ["MARK", "OwnedChanges", "OwnedFolder", "marked"]

MARK: Final = "_mark"

CACHED_AGGREGATES: Final = 50_000
CACHED_BYTES: Final = 16 * 2**20
"""Bounds of a generation of the cache (there are two), the latter as BSON: in Python it is some five to ten times as much. A miss
costs a share of one `find` for the whole batch, so a small cache is the cheaper mistake than a killed pod."""


class _Entry:
    """An aggregate in memory: its mark, its document, whether MongoDB has that document, and its last encoded size."""

    __slots__ = ("mark", "size", "state", "stored")

    def __init__(self, mark: int, state: State | None, size: int, *, stored: bool) -> None:
        self.mark = mark
        self.state = state
        self.stored = stored
        self.size = size


def marked(aggregate_id: str, mark: int, state: State) -> State:
    """The document as it is stored, with its mark."""
    whole: State = {"_id": aggregate_id, MARK: Int64(mark)}
    whole.update(state)
    whole["_id"] = aggregate_id  # a handler may have put anything there
    return whole


class OwnedChanges(Changes):
    """Documents keyed by the aggregate, and marks of deleted ones."""

    def __init__(
        self, database: Database, build: Build, writes: DocumentWrites, aggregates: Mapping[str, int], events: int
    ) -> None:
        self._database = database
        self._build = build
        self._writes = writes
        self._aggregates = aggregates
        self.events = events

    @property
    def aggregates(self) -> Mapping[str, int]:
        return self._aggregates

    async def write(self, session: AsyncClientSession) -> None:
        await write_documents(self._database, self._build.collection, self._build.marks, self._writes, session)

    def without(self, aggregate_id: str) -> Changes:
        new = _without(self._writes, {aggregate_id})
        aggregates = {key: mark for key, mark in self._aggregates.items() if key != aggregate_id}
        return OwnedChanges(self._database, self._build, new, aggregates, self.events)

    @property
    def divisible(self) -> bool:
        return len(self._aggregates) > 1

    def halves(self) -> tuple[Changes, Changes]:
        names = list(self._aggregates)
        half = len(names) // 2

        def part(kept: list[str], others: list[str], events: int) -> OwnedChanges:
            writes = _without(self._writes, set(others))
            return OwnedChanges(
                self._database, self._build, writes, {key: self._aggregates[key] for key in kept}, events
            )

        first, second, events = names[:half], names[half:], self.events // 2
        return part(first, second, events), part(second, first, self.events - events)


def _without(old: DocumentWrites, aggregate_ids: AbstractSet[str]) -> DocumentWrites:
    """The writes without those of some aggregates."""
    new = DocumentWrites(old.inserts.without(aggregate_ids), old.replaces.without(aggregate_ids))
    new.deletes = [key for key in old.deletes if key not in aggregate_ids]
    new.marks = {key: mark for key, mark in old.marks.items() if key not in aggregate_ids}
    return new


class OwnedFolder(Folder):
    """See the module. The cache has two generations: what was not touched for a whole one is dropped with the older."""

    def __init__(self, database: Database, build: Build) -> None:
        self._database = database
        self._build = build
        self._projection = build.projection
        self._young: dict[str, _Entry] = {}
        self._old: dict[str, _Entry] = {}
        # On its way to MongoDB an entry is dirty, then prepared (encoded, in `_writes` or `_failures`), then in flight.
        self._dirty: dict[str, _Entry] = {}
        self._prepared: dict[str, _Entry] = {}
        self._writes = DocumentWrites()
        self._failures: dict[str, Failure] = {}
        self._in_flight: dict[str, _Entry] = {}
        self._bytes = 0
        self._pending = 0
        self._pending_bytes = 0
        self.typical = Typical()

    @property
    def pending(self) -> int:
        return self._pending

    @property
    def limit(self) -> int:
        return PENDING_EVENTS

    @property
    def pending_bytes(self) -> int:
        return self._pending_bytes

    async def load(self, aggregate_ids: set[str]) -> None:
        self._make_room()
        young, old = self._young, self._old
        wanted = list(aggregate_ids.difference(young))
        if old:
            young.update({found: old.pop(found) for found in wanted if found in old})
            wanted = [found for found in wanted if found not in young]
        if not wanted:
            return
        count = total = 0
        async for documents in read_documents(self._database, self._build.collection, wanted):
            for document, size in documents:
                mark = int(document.pop(MARK, 0))
                young[document["_id"]] = _Entry(mark, document, size, stored=True)
                total += size
            count += len(documents)
        self._bytes += total
        self.typical.learn_bytes(count, total)
        if count == len(wanted):
            return
        absent = [aggregate_id for aggregate_id in wanted if aggregate_id not in young]
        rows = await self._database[self._build.marks].find({"_id": {"$in": absent}}).to_list(len(absent))
        marks = {row["_id"]: int(row["mark"]) for row in rows}
        for aggregate_id in absent:
            young[aggregate_id] = _Entry(marks.get(aggregate_id, 0), None, 0, stored=False)

    def _make_room(self) -> None:
        """Begins a new generation when this one is full; what is being written or waits for it stays."""
        if len(self._young) < CACHED_AGGREGATES and self._bytes < CACHED_BYTES:
            return
        self._old = self._young
        self._young = self._in_flight | self._prepared | self._dirty
        self._bytes = sum(entry.size for entry in self._young.values())

    def fold(self, events: Sequence[Event], aside: Collection[str]) -> Outcome:
        outcome = Outcome()
        gaps, passed = outcome.gaps, outcome.passed
        fold_of = self._projection.fold_of
        young, dirty = self._young, self._dirty
        applied = unhandled = duplicate = weight = 0
        for event in events:
            aggregate_id = event["aggregateId"]
            if aggregate_id in passed or aggregate_id in aside:
                passed[aggregate_id] = event["sequenceNo"]
                continue
            entry = young[aggregate_id]
            sequence_no = event["sequenceNo"]
            ahead = sequence_no - entry.mark
            if ahead == 1:
                fold = fold_of(event["eventName"])
                if fold is not None:
                    try:
                        entry.state = fold(aggregate_id, entry.state, event)
                    except Exception as error:  # noqa: BLE001 - a handler may raise anything: its aggregate is set aside
                        outcome.failures.append(Failure.of(event, "fold", error))
                        passed[aggregate_id] = sequence_no
                        continue
                    if aggregate_id not in dirty:
                        dirty[aggregate_id] = entry
                        weight += entry.size
                    applied += 1
                else:
                    unhandled += 1
                entry.mark = sequence_no
            elif ahead > 1:
                gaps[aggregate_id] = passed[aggregate_id] = sequence_no
            else:
                duplicate += 1
        tally = outcome.tally
        tally.applied, tally.unhandled, tally.duplicate = applied, unhandled, duplicate
        tally.aside = len(events) - applied - unhandled - duplicate
        self._pending += applied
        self._pending_bytes += weight
        return outcome

    def mark(self, aggregate_id: str) -> int:
        return self._young[aggregate_id].mark

    def skip(self, aggregate_id: str, sequence_no: int) -> None:
        entry = self._young[aggregate_id]
        entry.mark = sequence_no
        self._dirty[aggregate_id] = entry
        self._pending += 1

    def discard(self, aggregate_id: str) -> None:
        self._young.pop(aggregate_id, None)
        self._old.pop(aggregate_id, None)
        self._dirty.pop(aggregate_id, None)
        self._in_flight.pop(aggregate_id, None)
        if self._prepared.pop(aggregate_id, None) is not None and self._failures.pop(aggregate_id, None) is None:
            self._writes = _without(self._writes, {aggregate_id})

    def prepare(self) -> None:
        dirty, self._dirty = self._dirty, {}
        if again := self._prepared.keys() & dirty.keys():
            self._writes = _without(self._writes, again)
            for aggregate_id in again:
                dirty[aggregate_id].stored = True  # or not: what is written then is right in both cases
                self._failures.pop(aggregate_id, None)
        self._prepared |= dirty
        writes, store = self._writes, self._writes.store
        for aggregate_id, entry in dirty.items():
            state = entry.state
            if state is None:
                if entry.stored:
                    writes.deletes.append(aggregate_id)
                    entry.stored = False
                writes.marks[aggregate_id] = Int64(entry.mark)
                continue
            try:
                size = store(marked(aggregate_id, entry.mark, state), aggregate_id, stored=entry.stored)
            except Exception as error:  # noqa: BLE001 - an int beyond int64, an unknown type, too large
                self._failures[aggregate_id] = unstorable(aggregate_id, error)._replace(sequence_no=entry.mark)
                continue
            self._bytes += size - entry.size
            entry.size = size
            entry.stored = True

    def take(self) -> tuple[Changes, list[Failure]]:
        self.prepare()
        failures, self._failures = list(self._failures.values()), {}
        for failure in failures:
            del self._prepared[failure.aggregate_id]
            self.discard(failure.aggregate_id)
        writes, self._writes = self._writes, DocumentWrites()
        self._in_flight, self._prepared = self._prepared, {}
        events, self._pending, self._pending_bytes = self._pending, 0, 0
        marks = {aggregate_id: entry.mark for aggregate_id, entry in self._in_flight.items()}
        return OwnedChanges(self._database, self._build, writes, marks, events), failures
