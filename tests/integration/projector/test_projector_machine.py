"""Exactly once and in order, whatever happens: hypothesis interleaves writers with all that can happen to a projector.

The projector moves on only while a rule lets it, by a number of MongoDB commands; so a crash can fall between any two of them.
Batches, caches and pages are made tiny, so that a handful of events meets every border.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
from hypothesis import HealthCheck, Phase, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from pydantic import SecretStr
from pymongo.errors import PyMongoError
from pymongo.monitoring import CommandListener

from eventstore import tasks
from eventstore.client import Client, Database, connect, open_database
from eventstore.event import EVENTS
from eventstore.indexes import provision
from projector import aside, loop, owned, parking, partition, rebuild, repair, shared, stream
from projector.behind import marks_of
from projector.build import Build
from projector.builds import ensure_build
from projector.checkpoint import CHECKPOINTS, FencedError, PartitionId, ensure_layout
from projector.parking import PARKED
from projector.partition import Partition
from tests.eventually import eventually, eventually_equal
from tests.projecting import (
    Faults,
    Here,
    Writer,
    documents,
    expected_ledgers,
    expected_rooms,
    ledger,
    rooms,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from projector.projection import Projection

# A replica that crashed leaves its sockets to the collector, as it should.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")

AGGREGATES = st.sampled_from(["a", "b", "ä", "d.e"])
ROOMS = st.lists(st.sampled_from(["red", "blue", 7]), max_size=3)
TINY: dict[Any, dict[str, Any]] = {
    stream: {"BATCH_EVENTS": 3},
    repair: {"BATCH_EVENTS": 3, "GROUP": 2},
    loop: {
        "PENDING_BATCHES": 2, "TICK_SECONDS": 0.05, "IDLE_CHECKPOINT_SECONDS": 0.1, "COMMAND_SECONDS": 0.1,
    },
    owned: {"CACHED_AGGREGATES": 2, "PENDING_EVENTS": 4},
    shared: {"CACHED_MARKS": 2, "PENDING_EVENTS": 4},
    aside: {"TURN_EVENTS": 2, "TURNS": 2, "GROUP": 2},
    parking: {"_FIRST_PAUSE_SECONDS": 0.005, "_LONGEST_PAUSE_SECONDS": 0.02},
}  # fmt: skip


class _Steps(CommandListener):
    """Lets a test wait until a number of commands have been answered."""

    def __init__(self) -> None:
        self.answered = 0

    def started(self, event: Any) -> None:
        pass

    def succeeded(self, event: Any) -> None:
        self.answered += 1

    def failed(self, event: Any) -> None:
        self.answered += 1


class _Replica:
    """A process that runs all partitions of the layout that it found when it began."""

    def __init__(self, uri: str, name: str, build: Build, count: int, owner: str) -> None:
        self.steps = _Steps()
        self.client: Client = connect(SecretStr(uri), "projector", event_listeners=[self.steps])
        here = Here(open_database(self.client, name), owner)
        self.tasks = [
            asyncio.create_task(Partition(here, build, PartitionId(build.id, number, count)).run())
            for number in range(count)
        ]

    async def advance(self, commands: int) -> None:
        """Lets it go on until this many commands were answered, or half a second was too short for them."""
        wanted = self.steps.answered + commands
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.5):
                while self.steps.answered < wanted and not all(task.done() for task in self.tasks):
                    await asyncio.sleep(0)

    async def crash(self) -> None:
        """Its connections are gone first, so that nothing of its end reaches MongoDB."""
        await self.client.close()
        await tasks.end(self.tasks)
        for found in await asyncio.gather(*self.tasks, return_exceptions=True):
            assert found is None or isinstance(found, (FencedError, asyncio.CancelledError, PyMongoError)), repr(found)


class Projecting(RuleBasedStateMachine):
    """One build, one log, up to two replicas that both believe to be the owner."""

    uri: ClassVar[str]
    make: ClassVar[Callable[[Faults], Projection]]
    expect: ClassVar[Callable[[Any], Any]]
    saved: ClassVar[list[tuple[Any, str, Any]]] = []

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.run = self.runner.run
        self.name = f"test_{uuid.uuid4().hex[:12]}"
        self.faults = Faults()
        self.build = Build(type(self).make(self.faults))
        self.replicas: list[_Replica] = []
        self.positions: list[dict[str, Any]] = []
        self.count = 1
        self.owners = 0

    @initialize(before=st.integers(0, 3))
    def begin(self, before: int) -> None:
        async def begin() -> None:
            self.client = connect(SecretStr(self.uri), "test")
            self.database: Database = open_database(self.client, self.name)
            self.writer = Writer(self.database)
            await provision(self.database)
            for _ in range(before):  # these the scan of the new build finds
                await self.writer.append("a", rooms=["red"])
            await ensure_build(self.database, self.database, self.build.projection, self.count)
            await self.remember()
            first = _Replica(self.uri, self.name, self.build, self.count, "first")
            await eventually(self.is_scanned)
            await first.crash()

        self.run(begin())

    async def is_scanned(self) -> bool:
        return await self.database[CHECKPOINTS].find_one({"build": self.build.id, "scan": True}) is None

    async def remember(self) -> None:
        found = await self.database[CHECKPOINTS].find_one({"build": self.build.id})
        assert found is not None
        self.positions.append({"token": found["token"], "clusterTime": found["clusterTime"]})

    @rule(
        aggregate_id=AGGREGATES,
        names=st.lists(st.sampled_from(["counted", "counted", "noise", "closed", "left"]), min_size=1, max_size=4),
        where=ROOMS,
    )
    def append(self, aggregate_id: str, names: list[str], where: list[Any]) -> None:
        self.run(self.writer.append(aggregate_id, *names, rooms=where))

    @rule(
        aggregate_ids=st.lists(AGGREGATES, min_size=2, max_size=8),
        where=ROOMS,
    )
    def append_at_once(self, aggregate_ids: list[str], where: list[Any]) -> None:
        self.run(self.writer.insert([self.writer.next(each, rooms=where) for each in aggregate_ids]))

    @rule(aggregate_id=AGGREGATES, ahead=st.integers(1, 3), times=st.integers(1, 2))
    def will_fail(self, aggregate_id: str, ahead: int, times: int) -> None:
        self.faults.fail(aggregate_id, self.writer.heads[aggregate_id] + ahead, times)

    @precondition(lambda self: len(self.replicas) < 2)
    @rule()
    def start(self) -> None:
        async def start() -> None:
            self.owners += 1
            self.replicas.append(_Replica(self.uri, self.name, self.build, self.count, f"owner-{self.owners}"))

        self.run(start())

    @precondition(lambda self: self.replicas)
    @rule(index=st.integers(0, 1), commands=st.integers(1, 60))
    def advance(self, index: int, commands: int) -> None:
        self.run(self.replicas[index % len(self.replicas)].advance(commands))

    @precondition(lambda self: self.replicas)
    @rule(index=st.integers(0, 1))
    def crash(self, index: int) -> None:
        self.run(self.replicas.pop(index % len(self.replicas)).crash())
        self.run(self.remember())

    @rule(index=st.integers(0, 100))
    def resume_from_an_older_position(self, index: int) -> None:
        position = self.positions[index % len(self.positions)]
        self.run(self.set_positions(position))

    @rule()
    def lose_the_position(self) -> None:
        self.run(self.set_positions({"token": {"_data": "8200"}}))

    async def set_positions(self, position: dict[str, Any]) -> None:
        # Who stands still amid a transaction, or crashed in it, would hold this up.
        await self.client.admin.command("killAllSessions", [])
        # A new epoch, since no owner that still runs may go on from another position without knowing.
        change = {"$set": position, "$inc": {"epoch": 1}}
        await self.database[CHECKPOINTS].update_many({"build": self.build.id}, change)

    @rule(count=st.integers(1, 4))
    def change_partitions(self, count: int) -> None:
        self.count = count
        self.run(ensure_layout(self.database, self.build.id, count))

    def teardown(self) -> None:
        try:
            if hasattr(self, "database"):
                self.run(self.settle())
        finally:
            self.run(self.end())
            self.runner.close()

    async def settle(self) -> None:
        """Whoever ran has crashed, and one replica runs from now on: everything must come right."""
        for replica in self.replicas:
            await replica.crash()
        last = _Replica(self.uri, self.name, self.build, self.count, "last")
        self.replicas = [last]
        events = [each async for each in self.database[EVENTS].find()]
        note(f"{len(events)} events")
        expected = type(self).expect(events)
        await eventually_equal(lambda: documents(self.database, self.build.collection), expected)

        async def not_current() -> dict[str, Any]:
            assert not [task.result() for task in last.tasks if task.done()]
            marks = {key: mark async for key, mark in marks_of(self.database, self.build)}
            behind = {
                key: (marks.get(key, 0), head)
                for key, head in self.writer.heads.items()
                # Trailing events without a document keep the mark where it is.
                if any(
                    e["aggregateId"] == key and e["sequenceNo"] > marks.get(key, 0) and self.has_effect(e)
                    for e in events
                )
            }
            return behind | {row["_id"]: row async for row in self.database[PARKED].find()}

        await eventually_equal(not_current, {})
        assert await documents(self.database, self.build.collection) == expected

    def has_effect(self, event: dict[str, Any]) -> bool:
        projection = self.build.projection
        return projection.handles(event["eventName"]) and bool(projection.keys(event))

    async def end(self) -> None:
        for replica in self.replicas:
            await replica.crash()
        if hasattr(self, "client"):
            await self.client.admin.command("killAllSessions", [])  # transactions of those who crashed
            await self.client.drop_database(self.name)
            await self.client.close()


class ProjectingLedgers(Projecting):
    make = staticmethod(ledger)
    expect = staticmethod(expected_ledgers)


class ProjectingRooms(Projecting):
    make = staticmethod(rooms)
    expect = staticmethod(expected_rooms)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, values in TINY.items():
        for name, value in values.items():
            monkeypatch.setattr(module, name, value)
    for module in (aside, partition, rebuild):
        monkeypatch.setattr(module, "_log", _Silent())


class _Silent:
    """Faults by the hundred are no news here."""

    def bind(self, **_: Any) -> _Silent:
        return self

    def info(self, *_: Any, **__: Any) -> None:
        pass

    warning = error = exception = info


def play(machine: type[Projecting], uri: str, examples: int, steps: int) -> None:
    machine.uri = uri
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            print_blob=True,
            phases=[Phase.explicit, Phase.reuse, Phase.generate],
        ),
    )


MACHINES = pytest.mark.parametrize("machine", [ProjectingLedgers, ProjectingRooms])


@MACHINES
def test_every_event_is_applied_once_and_in_order(tiny: None, mongodb_uri: str, machine: type[Projecting]) -> None:
    play(machine, mongodb_uri, examples=12, steps=15)


@pytest.mark.faults
@pytest.mark.timeout(600)
@MACHINES
def test_every_event_is_applied_once_and_in_order_at_length(
    tiny: None, mongodb_uri: str, machine: type[Projecting]
) -> None:
    play(machine, mongodb_uri, examples=80, steps=30)
