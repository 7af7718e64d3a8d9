"""What the tests of the projector share: a writer of events, two projections, and what must come out of them.

The expectation is a fold of its own over what lies in the log, in plain Python. Documents keep every event that went into
them, in order, so that one that was applied twice, lost or out of its turn shows.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import os
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any, TypeAlias

import pytest
from bson.int64 import Int64

from eventstore.client import MAJORITY
from eventstore.event import EVENTS, new_event_id, slot_of
from projector.build import Build
from projector.builds import ensure_build, read_control
from projector.checkpoint import PartitionId
from projector.metrics import Metrics
from projector.parking import PARKED
from projector.partition import Partition
from projector.projection import DELETE, Projection
from projector.settings import ProjectorSettings
from projector.sources import OwnSource
from projector.stream import EventStream
from projector.supervisor import Supervisor
from projector.wanted import FixedCatalog
from tests.eventually import eventually, eventually_equal

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence

    from eventstore.client import Database
    from projector.position import Position
    from projector.sources import Source

__all__ = [
    "KINDS",
    "Document",
    "Faults",
    "Here",
    "Writer",
    "all_events",
    "aside_at",
    "begun",
    "cut_over_to",
    "documents",
    "event",
    "expected_ledgers",
    "expected_rooms",
    "ledger",
    "metric",
    "named",
    "only",
    "parked",
    "rooms",
    "running",
    "same",
    "seeded",
    "settings",
]

Document: TypeAlias = dict[str, Any]


def event(aggregate_id: str, sequence_no: int, name: str = "counted", **payload: Any) -> Document:
    """An event as it lies in the log."""
    return {
        "_id": new_event_id(),
        "aggregateId": aggregate_id,
        "sequenceNo": Int64(sequence_no),
        "eventName": name,
        "timestamp": datetime.datetime.now(datetime.UTC),
        "payload": payload,
        "slot": slot_of(aggregate_id),
    }


class Writer:
    """Appends as an appender does; the unique index keeps it honest."""

    def __init__(self, log: Database) -> None:
        self.log = log
        self.heads: Counter[str] = Counter()

    def next(self, aggregate_id: str, name: str = "counted", **payload: Any) -> Document:
        """The next event of an aggregate, not yet written."""
        self.heads[aggregate_id] += 1
        return event(aggregate_id, self.heads[aggregate_id], name, **payload)

    async def append(self, aggregate_id: str, *names: str, **payload: Any) -> None:
        """Appends events of these names ("counted" by default) to one aggregate."""
        await self.insert([self.next(aggregate_id, name, **payload) for name in names or ("counted",)])

    async def insert(self, events: Sequence[Mapping[str, Any]]) -> None:
        """Inserts events, several in one transaction, as they are."""
        if len(events) == 1:
            await self.log[EVENTS].insert_one(dict(events[0]))
            return
        async with self.log.client.start_session() as session:

            async def write(inside: Any) -> None:
                await self.log[EVENTS].insert_many([dict(each) for each in events], session=inside)

            await session.with_transaction(write, write_concern=MAJORITY)


class Faults:
    """Makes handlers fail: events by aggregate and sequenceNo, a number of times or always."""

    def __init__(self) -> None:
        self._left: dict[tuple[str, int], float] = {}

    def fail(self, aggregate_id: str, sequence_no: int, times: float = float("inf")) -> None:
        """The event fails this many times."""
        self._left[aggregate_id, sequence_no] = times

    def heal(self) -> None:
        """Nothing fails any more."""
        self._left.clear()

    def strike(self, event_: Mapping[str, Any]) -> None:
        """Called by a handler for each event."""
        key = event_["aggregateId"], event_["sequenceNo"]
        left = self._left.get(key, 0)
        if left > 0:
            self._left[key] = left - 1
            raise RuntimeError(f"made to fail: {key}")


# A document per aggregate. "noise" has no handler.


def ledger(faults: Faults | None = None, name: str = "ledger", **options: Any) -> Projection:
    """A projection keyed by the aggregate: a list of what was applied; "closed" deletes it, and it may begin anew."""
    projection = Projection(name, **options)

    @projection.on("counted")
    def _(state: Document, event: Document) -> None:
        state.setdefault("applied", []).append(event["sequenceNo"])
        if faults is not None:
            faults.strike(event)  # after the change: a half-changed document must be thrown away

    @projection.on("closed")
    def _(state: Document, event: Document) -> Any:
        if faults is not None:
            faults.strike(event)
        return DELETE

    return projection


def expected_ledgers(events: Iterable[Mapping[str, Any]]) -> dict[str, Document]:
    """What `ledger` must have made of these events."""
    found: dict[str, list[int]] = {}
    for each in sorted(events, key=lambda e: (e["aggregateId"], e["sequenceNo"])):
        if each["eventName"] == "counted":
            found.setdefault(each["aggregateId"], []).append(each["sequenceNo"])
        elif each["eventName"] == "closed":
            found.pop(each["aggregateId"], None)
    return {key: {"_id": key, "applied": applied} for key, applied in found.items()}


# A document per room, into which all aggregates write. An event goes to all rooms that it names, or to none.


def rooms(faults: Faults | None = None, name: str = "rooms", **options: Any) -> Projection:
    """A projection of shared documents: by room, what was applied of each aggregate.

    "left" takes the aggregate's entry out of the room, and the last one deletes the room.
    """
    projection = Projection(name, key="$payload.rooms", **options)

    @projection.on("counted")
    def _(state: Document, event: Document) -> None:
        state.setdefault("applied", {}).setdefault(event["aggregateId"], []).append(event["sequenceNo"])
        if faults is not None:
            faults.strike(event)

    @projection.on("left")
    def _(state: Document, event: Document) -> Any:
        if faults is not None:
            faults.strike(event)
        state.setdefault("applied", {}).pop(event["aggregateId"], None)
        return None if state["applied"] else DELETE

    return projection


def expected_rooms(events: Iterable[Mapping[str, Any]]) -> dict[str, Document]:
    """What `rooms` must have made of these events, whatever the order across aggregates was."""
    found: defaultdict[str, dict[str, list[int]]] = defaultdict(dict)
    for each in sorted(events, key=lambda e: (e["aggregateId"], e["sequenceNo"])):
        for room in dict.fromkeys(each["payload"].get("rooms", ())):
            if each["eventName"] == "counted":
                found[room].setdefault(each["aggregateId"], []).append(each["sequenceNo"])
            elif each["eventName"] == "left":
                found[room].pop(each["aggregateId"], None)
    return {room: {"_id": room, "applied": applied} for room, applied in found.items() if applied}


async def documents(database: Database, collection: str) -> dict[Any, Document]:
    """A read model by key, without bookkeeping."""
    return {row["_id"]: row async for row in database[collection].find({}, {"_mark": 0})}


# Running


def settings(**changes: Any) -> ProjectorSettings:
    """Settings with leases short enough for tests; `retry_seconds` is long unless it is what is tested."""
    return ProjectorSettings(**({"lease_seconds": 2.0, "retry_seconds": 60.0, "drain_seconds": 10.0} | changes))


async def begun(database: Database, projection: Projection, partitions: int = 1) -> Build:
    """A new build of a projection, of which nothing has been read yet."""
    await ensure_build(database, database, projection, partitions)
    return Build(projection)


def only(build: Build) -> PartitionId:
    """The one partition of a build."""
    return PartitionId(build.id, 0, 1)


async def all_events(log: Database) -> list[Document]:
    """The whole log."""
    return [each async for each in log[EVENTS].find()]


async def parked(database: Database) -> dict[str, Document]:
    """The records of aggregates aside, by aggregate."""
    return {row["aggregateId"]: row async for row in database[PARKED].find()}


class Here:
    """What a partition needs around it, for a test that runs partitions without a supervisor."""

    def __init__(
        self, database: Database, owner: str = "owner", metrics: Metrics | None = None, **changes: Any
    ) -> None:
        self.log = self.database = database
        self.owner = owner
        self.uri = None
        self.metrics = metrics or Metrics()
        self.settings = settings(**changes)
        for name in ("ledger", "rooms"):
            self.metrics.start(name)

    def source(self, build: Build, position: Position, slots: range) -> Source:
        """A stream of its own."""
        return OwnSource(EventStream(self.log, position, slots=slots, fields=build.projection.fields))

    @contextlib.asynccontextmanager
    async def runs(self, build: Build, partition: PartitionId) -> AsyncIterator[Partition]:
        """Runs a partition, which has caught up when the context begins; ends it in good order, or as it ended by itself."""
        running_ = Partition(self, build, partition)
        task = asyncio.create_task(running_.run())
        try:
            await eventually(same(lambda: running_.progress.caught_up or task.done()))
            yield running_
        finally:
            running_.stop()
            await asyncio.wait_for(asyncio.gather(task), 30)


@contextlib.asynccontextmanager
async def running(
    database: Database, projections: Sequence[Projection], metrics: Metrics | None = None, **changes: Any
) -> AsyncIterator[Supervisor]:
    """Runs projections under a supervisor, as `projector run` does, until the context ends."""
    supervisor = Supervisor(database, database, FixedCatalog(projections), settings(**changes), metrics or Metrics())
    stopping = asyncio.Event()
    task = asyncio.create_task(supervisor.run(stopping))
    try:
        yield supervisor
    finally:
        stopping.set()
        await asyncio.wait_for(task, 60)


def metric(metrics: Metrics, name: str, **labels: str) -> float | None:
    """The value of a sample by its full name; None when there is none."""
    return metrics.registry.get_sample_value(name, labels)


def seeded(default: int) -> int:
    """The seed of a random test: TEST_SEED, so that a failure can be repeated."""
    return int(os.environ.get("TEST_SEED", default))


def same(look: Callable[[], Any]) -> Callable[[], Any]:
    """Makes a plain function one that can be awaited."""

    async def asked() -> Any:
        return look()

    return asked


KINDS = pytest.mark.parametrize(
    ("make", "expect"), [(ledger, expected_ledgers), (rooms, expected_rooms)], ids=["owned", "shared"]
)
"""Both kinds of projection: documents of one aggregate, and documents into which all write."""


async def aside_at(database: Database, aggregate_id: str, sequence_no: int, state: str = "parked") -> bool:
    """Whether an aggregate is aside there."""
    record = (await parked(database)).get(aggregate_id)
    return record is not None and (record["sequenceNo"], record["state"]) == (sequence_no, state)


async def named(database: Database, aggregate_id: str) -> dict[str, Any]:
    """The record, once it says which event it is."""
    record = (await parked(database)).get(aggregate_id)
    return record if record is not None and record["eventId"] is not None else {}


async def cut_over_to(database: Database, name: str, build: str) -> None:
    """Waits until a build is the one that readers see."""

    async def look() -> str | None:
        control = await read_control(database, name)
        return control.live if control else None

    await eventually_equal(look, build)
