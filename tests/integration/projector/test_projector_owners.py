"""Who runs what: leases, fences, second owners, replicas that come and go, partitions that change in number."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from eventstore import tasks
from projector import loop as loop_module
from projector.build import Build
from projector.builds import read_control, set_control
from projector.checkpoint import CHECKPOINTS, Checkpoint, FencedError
from projector.lease import LEASES, REPLICAS, Leases
from projector.metrics import HEALTH_STATES, Metrics
from projector.partition import Partition
from tests.eventually import eventually, eventually_equal
from tests.projecting import (
    KINDS,
    Faults,
    Here,
    Writer,
    all_events,
    begun,
    documents,
    expected_ledgers,
    ledger,
    metric,
    only,
    running,
    same,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from eventstore.client import Database


@contextlib.asynccontextmanager
async def writing(writer: Writer) -> AsyncIterator[None]:
    """Appends to thirty aggregates, on and on, while the context lasts.

    It ends between two appends: one that was cancelled may still come into the log later.
    """
    stop = asyncio.Event()

    async def write() -> None:
        while not stop.is_set():
            for number in range(30):
                await writer.append(f"aggregate-{number}", rooms=[f"room-{number % 4}"])

    task = asyncio.create_task(write())
    try:
        yield
    finally:
        stop.set()
        try:
            await asyncio.wait_for(asyncio.shield(task), 30)
        finally:
            await tasks.end([task])


async def some(database: Database, build: str, more_than: int) -> bool:
    """Whether the read model has more than so many applied events."""
    return await applied(database, build) > more_than


async def applied(database: Database, collection: str) -> int:
    found = await documents(database, collection)
    return sum(
        len(row["applied"]) if isinstance(row["applied"], list) else sum(map(len, row["applied"].values()))
        for row in found.values()
    )


async def test_a_lease_goes_by_the_servers_clock(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, other = Leases(database, "mine", 1.0), Leases(database, "other", 1.0)
    assert await mine.acquire("x")
    assert await mine.acquire("x")  # once more is no harm
    assert not await other.acquire("x")
    real = time.time
    with monkeypatch.context() as patched:
        patched.setattr(time, "time", lambda: real() + 3600)
        assert not await other.acquire("x")  # its clock is an hour ahead
    assert await mine.renew(["x", "y"]) == {"x"}
    assert await other.holders(["x"]) == {"x": "mine"}
    await eventually(lambda: other.acquire("x"), "the lease of one second has ended")
    assert await mine.renew(["x"]) == set()
    await mine.release("x")  # it is no longer its own to release
    assert await other.holders(["x"]) == {"x": "other"}
    await other.release("x")
    assert await mine.acquire("x")


async def test_only_one_of_many_gets_a_free_lease(database: Database) -> None:
    for round_ in range(5):
        takers = [Leases(database, f"owner-{number}", 30) for number in range(8)]
        got = await asyncio.gather(*(each.acquire(f"lease-{round_}") for each in takers))
        assert sum(got) == 1


@KINDS
async def test_each_take_over_fences_the_one_before(database: Database, make: Any, expect: Any) -> None:
    """Two owners at once, over and over, both in the belief to be the only one."""
    build = await begun(database, make())
    writer = Writer(database)
    async with writing(writer):
        owners: list[asyncio.Task[None]] = []
        for number in range(6):
            partition = Partition(Here(database, f"owner-{number}"), build, only(build))
            owners.append(asyncio.create_task(partition.run()))
            seen = await applied(database, build.collection)
            await eventually(lambda: some(database, build.collection, seen + 20))  # noqa: B023
    *stale, last = owners
    for each in await asyncio.gather(*stale, return_exceptions=True):
        assert isinstance(each, FencedError)
    await eventually_equal(lambda: documents(database, build.collection), expect(await all_events(database)))
    assert not last.done()
    partition.stop()
    await last


@KINDS
async def test_a_stale_owners_write_leaves_no_trace(
    database: Database, monkeypatch: pytest.MonkeyPatch, make: Any, expect: Any
) -> None:
    """An owner folds, stands still before it writes, and goes on when another has long applied the same events."""
    build = await begun(database, make())
    writer = Writer(database)
    first, second = Here(database, "first"), Here(database, "second")
    standing, go_on = asyncio.Event(), asyncio.Event()
    real = loop_module.Loop._transaction

    async def stands(self: Any, *rest: Any) -> None:
        if self.metrics is first.metrics:
            standing.set()
            await go_on.wait()
        await real(self, *rest)

    task = asyncio.create_task(Partition(first, build, only(build)).run())
    await eventually(lambda: stored_owner(database, "first"))
    monkeypatch.setattr(loop_module.Loop, "_transaction", stands)
    await writer.append("a", "counted", "counted", rooms=["x"])
    await standing.wait()
    async with second.runs(build, only(build)):
        await writer.append("a", "counted", rooms=["x"])
        await eventually_equal(lambda: documents(database, build.collection), expect(await all_events(database)))
        before = await everything(database, build.collection)
        go_on.set()
        with pytest.raises(FencedError):
            await asyncio.wait_for(task, 30)
        after = await everything(database, build.collection)
        assert after == before
    assert (
        metric(second.metrics, "projector_events_processed_total", projection=build.projection.name, outcome="applied")
        == 3
    )


async def stored_owner(database: Database, owner: str) -> bool:
    return await database[CHECKPOINTS].find_one({"owner": owner, "scan": False}) is not None


async def everything(database: Database, collection: str) -> list[Any]:
    """Documents and marks, with the bookkeeping."""
    return [
        sorted([row async for row in database[name].find()], key=lambda row: str(row["_id"]))
        for name in (collection, f"{collection}.marks")
    ]


async def test_an_owner_does_not_take_back_what_it_lost(database: Database) -> None:
    """Its connection fails at the moment when another has taken over: it must end, not fence the other one."""
    build = await begun(database, ledger())
    mine = await Checkpoint.take(database, only(build), "mine")
    again = await Checkpoint.take(database, only(build), "mine", again=True)
    other = await Checkpoint.take(database, only(build), "other")
    assert [each.epoch for each in (mine, again, other)] == [mine.epoch, mine.epoch + 1, mine.epoch + 2]
    with pytest.raises(FencedError):
        await Checkpoint.take(database, only(build), "mine", again=True)
    with pytest.raises(FencedError):
        await mine.move(mine.position)
    await other.move(other.position)
    for each in (mine, again, other):
        await each.close()


async def test_a_stolen_lease_ends_the_partition_and_it_comes_back(database: Database) -> None:
    writer = Writer(database)
    metrics = Metrics()
    async with running(database, [ledger()], metrics, lease_seconds=1.0) as supervisor:
        await writer.append("a")
        await eventually_equal(lambda: documents(database, "ledger"), expected_ledgers(await all_events(database)))
        thief = Leases(database, "thief", 3600)
        await database[LEASES].update_one({"_id": "ledger.v1/0-of-1"}, {"$set": {"owner": "thief"}})
        assert await thief.renew(["ledger.v1/0-of-1"])
        await eventually(same(lambda: not supervisor.running))
        await writer.append("a")
        stolen = await Checkpoint.take(database, only(Build(ledger())), "thief")
        await stolen.close()
        await thief.release("ledger.v1/0-of-1")
        await eventually_equal(lambda: documents(database, "ledger"), expected_ledgers(await all_events(database)))


async def test_a_shutdown_gives_everything_back_at_once(database: Database) -> None:
    """With leases of five minutes: whoever had to wait for their end would be too late."""
    writer = Writer(database)
    for _ in range(2):
        async with running(database, [ledger()], lease_seconds=300):
            await writer.append("a")
            await eventually_equal(lambda: documents(database, "ledger"), expected_ledgers(await all_events(database)))
        assert await database[LEASES].count_documents({}) == 0
        assert await database[REPLICAS].count_documents({}) == 0


async def holders(database: Database) -> Counter[str]:
    return Counter([lease["owner"] async for lease in database[LEASES].find()])


@KINDS
@pytest.mark.timeout(120)
async def test_replicas_and_partitions_change_while_events_flow(database: Database, make: Any, expect: Any) -> None:
    """1 -> 4 -> 2 replicas, 1 -> 8 -> 3 partitions: shared evenly each time, and every event is applied once."""
    projection = make()
    name, collection = projection.name, f"{projection.name}.v1"
    writer = Writer(database)

    async def shared_as(*counts: int) -> None:
        async def evenly() -> bool:
            return sorted((await holders(database)).values()) == sorted(counts)

        await eventually(evenly, f"shared as {counts}", timeout=40)
        seen = await applied(database, collection)
        await eventually(lambda: some(database, collection, seen + 30))

    async with contextlib.AsyncExitStack() as stack:
        replicas = [contextlib.AsyncExitStack() for _ in range(4)]
        for each in replicas:
            stack.push_async_callback(each.aclose)

        async def start(number: int) -> None:
            await replicas[number].enter_async_context(running(database, [make()], lease_seconds=1.0))

        async with writing(writer):
            await start(0)
            await shared_as(1)
            await set_control(database, name, partitions=8)
            await shared_as(8)
            for number in (1, 2, 3):
                await start(number)
            await shared_as(2, 2, 2, 2)
            for number in (0, 3):
                await replicas[number].aclose()
            await shared_as(4, 4)
            await set_control(database, name, partitions=3)
            await shared_as(1, 2)
        await eventually_equal(lambda: documents(database, collection), expect(await all_events(database)))


async def test_replicas_with_different_projections_run_all_of_their_own(database: Database) -> None:
    """A share of the partitions is a share among those who can run them."""
    names = ["one", "two", "three", "four"]
    writer = Writer(database)
    async with (
        running(database, [ledger(name=name) for name in names], lease_seconds=1.0) as many,
        running(database, [ledger(name="five")], lease_seconds=1.0) as single,
    ):
        await writer.append("a")
        for name in [*names, "five"]:
            await eventually_equal(lambda: documents(database, name), expected_ledgers(await all_events(database)))  # noqa: B023
        assert len(many.running) == 4
        assert len(single.running) == 1


async def test_a_failed_projection_waits_for_a_person_and_the_others_go_on(database: Database) -> None:
    faults, metrics, writer = Faults(), Metrics(), Writer(database)
    for number in range(2):
        faults.fail(f"bad-{number}", 1)
    async with running(database, [ledger(faults), ledger(name="other")], metrics, max_parked=1, lease_seconds=1.0):
        for number in range(2):
            await writer.append(f"bad-{number}")
        await eventually(same(lambda: health(metrics, "ledger") == {"failed"}))
        control = await read_control(database, "ledger")
        assert control is not None
        assert control.failed is not None
        assert "set aside" in control.failed
        await writer.append("a")
        await eventually_equal(lambda: documents(database, "other"), expected_ledgers(await all_events(database)))
        assert health(metrics, "ledger") == {"failed"}
        faults.heal()
        await set_control(database, "ledger", failed=None)
        await eventually_equal(lambda: documents(database, "ledger"), expected_ledgers(await all_events(database)))
        await eventually(same(lambda: health(metrics, "ledger") == {"live"}))


def health(metrics: Metrics, projection: str) -> set[str]:
    """The states that are 1."""
    return {state for state in HEALTH_STATES if metric(metrics, "projector_health", projection=projection, state=state)}


async def test_a_paused_projection_stands_still_and_goes_on(database: Database) -> None:
    metrics, writer = Metrics(), Writer(database)
    async with running(database, [ledger()], metrics, lease_seconds=1.0) as supervisor:
        await writer.append("a")
        before = expected_ledgers(await all_events(database))
        await eventually_equal(lambda: documents(database, "ledger"), before)
        await set_control(database, "ledger", paused=True)
        await eventually(same(lambda: not supervisor.running and health(metrics, "ledger") == {"paused"}))
        await writer.append("a")
        assert await documents(database, "ledger") == before
        await set_control(database, "ledger", paused=False)
        await eventually_equal(lambda: documents(database, "ledger"), expected_ledgers(await all_events(database)))


async def test_a_slow_and_a_failing_projection_do_not_hold_another(database: Database) -> None:
    """One process, one shared stream: a handler that blocks for long, one that always fails, and one that is well."""
    from projector.projection import Projection

    slow = Projection("slow")

    @slow.on("*")
    def _(state: dict[str, Any], event: dict[str, Any]) -> None:
        time.sleep(0.01)
        state["steps"] = state.get("steps", 0) + 1

    failing = Projection("failing")

    @failing.on("*")
    def _(state: dict[str, Any], event: dict[str, Any]) -> None:
        raise RuntimeError("always")

    writer = Writer(database)
    async with running(database, [slow, failing, ledger()], lease_seconds=2.0) as supervisor:
        await writer.append("first")
        await eventually_equal(lambda: documents(database, "ledger"), expected_ledgers(await all_events(database)))
        await eventually_equal(lambda: applied_by(database, "slow"), 1)
        await writer.insert([writer.next(f"aggregate-{number % 50}") for number in range(400)])
        await eventually_equal(lambda: documents(database, "ledger"), expected_ledgers(await all_events(database)))
        # Four seconds of work in slices: the other one was through before it, and no lease was lost meanwhile.
        assert await applied_by(database, "slow") < 401
        partitions = {name: item.partition for name, item in supervisor.running.items()}
        await eventually_equal(lambda: applied_by(database, "slow"), 401, timeout=60)
        assert {name: item.partition for name, item in supervisor.running.items()} == partitions


async def applied_by(database: Database, collection: str) -> int:
    rows = await documents(database, f"{collection}.v1")
    return sum(row["steps"] for row in rows.values())


async def test_the_supervisor_lives_through_trouble_with_mongodb(database: Database) -> None:
    """A tick that fails is tried again; nothing is forgotten."""
    from pymongo.errors import AutoReconnect

    async with running(database, [ledger()], lease_seconds=1.0) as supervisor:
        await eventually(same(lambda: supervisor.running))
        real, failures = supervisor.leases.renew, iter(range(5))

        async def fails(names: Any) -> set[str]:
            if next(failures, None) is not None:
                raise AutoReconnect("away")
            return await real(names)

        supervisor.leases.renew = fails  # type: ignore[method-assign]
        await eventually(same(lambda: next(failures, None) is None))
        writer = Writer(database)
        await writer.append("a")
        await eventually_equal(lambda: documents(database, "ledger"), expected_ledgers(await all_events(database)))
