"""The projector as processes, under faults: killed, stopped past their leases, their MongoDB failing over.

After each the read models are what a fold of the log by other means gives: every event once, in its order, and nothing of a
stale owner.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import time
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from pydantic import SecretStr
from pymongo.errors import DuplicateKeyError, PyMongoError
from pymongo.write_concern import WriteConcern

from eventstore import tasks
from eventstore.client import connect, open_database
from eventstore.embedded import ReplicaSet
from eventstore.event import EVENTS
from eventstore.indexes import provision
from projector.behind import differences
from projector.build import Build
from projector.builds import set_control
from projector.checkpoint import CHECKPOINTS
from projector.lease import LEASES
from projector.metrics import Metrics
from projector.projection import Projection
from tests.conftest import need_mongod
from tests.eventually import eventually, eventually_equal
from tests.projecting import (
    Here,
    Writer,
    all_events,
    begun,
    documents,
    event,
    expected_ledgers,
    expected_rooms,
    ledger,
    metric,
    only,
    parked,
    rooms,
    running,
    same,
    seeded,
)
from tests.projector_process import ProjectorProcess, environment

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from eventstore.client import Database

RUN = ("run", "--module", "tests.projected")


class Stubborn(Writer):
    """A writer that repeats an append until it is known to be there, as clients of the appender do."""

    async def insert(self, events: Any) -> None:
        for each in events:
            while True:
                try:
                    await self.log[EVENTS].insert_one(dict(each))
                except DuplicateKeyError:
                    break  # it was there already: the first try had come through
                except PyMongoError:
                    await asyncio.sleep(0.05)  # not to wait for something: only not to hammer a server that is away
                    continue
                break


@contextlib.asynccontextmanager
async def writing(database: Database, aggregates: int = 40) -> AsyncIterator[Writer]:
    """Two writers, on and on, each with its own aggregates."""
    writer = Stubborn(database)
    stop = asyncio.Event()

    async def write(which: int) -> None:
        number = 0
        while not stop.is_set():
            number += 1
            names = [
                "counted",
                "noise",
                "counted",
                "closed" if number % 7 == 0 else "left" if number % 5 == 0 else "counted",
            ]
            where = [f"room-{number % 6}", f"room-{number % 4}"]
            await writer.append(f"aggregate-{which}-{number % aggregates}", *names, rooms=where)

    writers = [asyncio.create_task(write(which)) for which in range(2)]
    try:
        yield writer
    finally:
        stop.set()
        try:
            await asyncio.wait_for(asyncio.gather(*writers), 60)
        finally:
            await tasks.end(writers)


async def all_right(database: Database, timeout: float = 60) -> None:
    """Both read models are what the log says, and so are their marks."""
    events = await all_events(database)
    await eventually_equal(lambda: documents(database, "ledger.v1"), expected_ledgers(events), timeout)
    await eventually_equal(lambda: documents(database, "rooms.v1"), expected_rooms(events), timeout)
    assert await parked(database) == {}
    for projection in (ledger(), rooms()):
        handled = {(e["aggregateId"], e["sequenceNo"]) for e in events if projection.handles(e["eventName"])}
        async for found in differences(database, database, Build(projection)):
            beyond = [number for name, number in handled if name == found.aggregate_id and number > found.mark]
            assert not beyond, found


async def grown(database: Database, count: int) -> None:
    """Waits until the log has so many more events."""
    wanted = await database[EVENTS].estimated_document_count() + count

    async def is_longer() -> bool:
        return await database[EVENTS].estimated_document_count() >= wanted

    await eventually(is_longer)


async def kill_and_replace(mongodb_uri: str, database: Database, kills: int, seed: int) -> None:
    """Two replicas and two partitions; at random moments one is killed and another begins."""
    chance = random.Random(seed)
    print(f"TEST_SEED={seed}")
    env = environment(mongodb_uri, database.name, PROJECTOR_LEASE_SECONDS="0.5", LOG_LEVEL="warning")
    processes = [ProjectorProcess(*RUN, env=env) for _ in range(2)]
    try:
        for process in processes:
            await process.ready()
        for name in ("ledger", "rooms"):
            assert await set_control(database, name, partitions=2)
        async with writing(database):
            for _ in range(kills):
                victim = chance.randrange(2)
                await grown(database, chance.randrange(1, 60))
                processes[victim].end(signal.SIGKILL)
                processes[victim] = ProjectorProcess(*RUN, env=env)
                if chance.random() < 0.5:  # else the next one may die while it starts, or before it owns anything
                    await processes[victim].ready()
        await all_right(database)
        for process in processes:
            assert process.process.poll() is None, "".join(process.output)
    finally:
        for process in processes:
            process.end(signal.SIGKILL)
    for process in processes:
        assert '"reason": "unexpected"' not in "".join(process.output)


@pytest.mark.timeout(180)
async def test_killed_at_random_moments(mongodb_uri: str, database: Database) -> None:
    await kill_and_replace(mongodb_uri, database, 4, seeded(1))


@pytest.mark.faults
@pytest.mark.timeout(580)
async def test_killed_at_fifty_random_moments(mongodb_uri: str, database: Database) -> None:
    await kill_and_replace(mongodb_uri, database, 50, seeded(2))


async def owners(database: Database) -> set[str]:
    return {lease["owner"] async for lease in database[LEASES].find()}


@pytest.mark.timeout(180)
async def test_a_process_stopped_past_its_lease_leaves_no_trace(mongodb_uri: str, database: Database) -> None:
    """SIGSTOP while it writes, another takes over, SIGCONT: what it still has in its hands is refused by the epoch."""
    env = environment(mongodb_uri, database.name, PROJECTOR_LEASE_SECONDS="0.5")
    with ProjectorProcess.run(*RUN, env=env) as first:
        await first.ready()
        async with writing(database):
            await eventually(lambda: shown(database))
            with ProjectorProcess.run(*RUN, env=env) as second:
                await second.ready()
                for stopped in (first, second, first):
                    other = second if stopped is first else first
                    epochs = await epochs_of(database)
                    stopped.process.send_signal(signal.SIGSTOP)
                    # All partitions have a new owner, and it gets on, whatever the stopped one holds open.
                    await eventually(lambda: taken_since(database, epochs))  # noqa: B023
                    await eventually(lambda: owned_by_one(database))
                    seen = await total(database)
                    await eventually(lambda: more_than(database, seen))  # noqa: B023
                    stopped.process.send_signal(signal.SIGCONT)
                    await stopped.ready()
                    assert other.process.poll() is None
                assert second.process.poll() is None
                lost = "".join([*first.output, *second.output]).count('"event": "partition_lost"')
                fenced = [
                    await sample(each, 'projector_stream_restarts_total{projection="rooms",reason="fenced"}')
                    for each in (first, second)
                ]
                fenced += [
                    await sample(each, 'projector_stream_restarts_total{projection="ledger",reason="fenced"}')
                    for each in (first, second)
                ]
                assert sum(fenced) >= 1
                assert lost >= 1
                await grown(database, 20)
        with ProjectorProcess.run(*RUN, env=env):
            await all_right(database)


async def epochs_of(database: Database) -> dict[str, int]:
    return {row["_id"]: row["epoch"] async for row in database[CHECKPOINTS].find()}


async def taken_since(database: Database, before: dict[str, int]) -> bool:
    now = await epochs_of(database)
    return any(now[name] > epoch for name, epoch in before.items())


async def owned_by_one(database: Database) -> bool:
    """Both leases are held, by one process."""
    live = [row["owner"] async for row in database[LEASES].find({"$expr": {"$gt": ["$expiresAt", "$$NOW"]}})]
    return len(live) == 2 and len(set(live)) == 1


async def shown(database: Database) -> bool:
    return bool(await documents(database, "ledger.v1")) and bool(await documents(database, "rooms.v1"))


async def total(database: Database) -> int:
    return sum([row["mark"] async for row in database["rooms.v1.marks"].find()])


async def more_than(database: Database, seen: int) -> bool:
    return await total(database) > seen


async def sample(process: ProjectorProcess, name: str) -> float:
    """A sample of the process's own metrics."""
    import aiohttp

    async with aiohttp.ClientSession() as session, session.get(f"{process.url}/metrics") as answer:
        text = await answer.text()
    return float(next((line.rpartition(" ")[2] for line in text.splitlines() if line.startswith(name)), 0))


@pytest.mark.timeout(120)
async def test_sigterm_under_load_gives_back_at_once(mongodb_uri: str, database: Database) -> None:
    """With leases of five minutes, so that the next one could not wait for their end."""
    env = environment(mongodb_uri, database.name, PROJECTOR_LEASE_SECONDS="300")
    async with writing(database):
        for _ in range(2):
            with ProjectorProcess.run(*RUN, env=env) as process:
                await process.ready()
                seen = await total(database)
                await eventually(lambda: more_than(database, seen))  # noqa: B023
                assert process.end() == 0, "".join(process.output)
            assert await owners(database) == set()
    with ProjectorProcess.run(*RUN, env=env):
        await all_right(database)


# MongoDB fails over


async def fail_over(kinds: list[str], database_name: str) -> None:
    """Under load the primary is killed, told to step down, or cut off, as `kinds` says."""
    need_mongod()
    metrics = Metrics()
    with ReplicaSet(members_count=3) as replica_set:
        async with connect(SecretStr(replica_set.uri), "test") as client:
            database = open_database(client, database_name)
            await provision(database)
            async with (
                running(database, [ledger(), rooms()], metrics, lease_seconds=3.0),
                writing(database, aggregates=10),
            ):
                await eventually(lambda: shown(database), timeout=60)
                for kind in kinds:
                    await one_fail_over(replica_set, client, kind)
                    await repeated(lambda: grown(database, 30))
                    await repeated(lambda: progress(database))
            async with running(database, [ledger(), rooms()], lease_seconds=3.0):
                await all_right(database)
    # Not once was a position lost, nor anything but the absence of the server found wrong.
    for name in ("ledger", "rooms"):
        for reason in ("history_lost", "unexpected"):
            assert metric(metrics, "projector_stream_restarts_total", projection=name, reason=reason) == 0, (
                name,
                reason,
            )


async def one_fail_over(replica_set: ReplicaSet, client: Any, kind: str) -> None:
    primary = await asyncio.to_thread(replica_set.wait_for_primary)
    match kind:
        case "step down":
            with contextlib.suppress(PyMongoError):
                await client.admin.command("replSetStepDown", 5)
        case "kill":
            primary.kill()
            await asyncio.to_thread(replica_set.wait_for_primary)
            primary.start()
        case "cut off":
            primary.pause()
            try:
                await asyncio.to_thread(wait_for_another, replica_set, primary)
            finally:
                primary.resume()
    await asyncio.to_thread(replica_set.wait_for_primary)


def wait_for_another(replica_set: ReplicaSet, stopped: Any) -> None:
    others = ReplicaSet(members=[member for member in replica_set.members if member is not stopped])
    others.wait_for_primary()


async def progress(database: Database) -> None:
    seen = await total(database)
    await eventually(lambda: more_than(database, seen), timeout=60)


async def repeated(action: Any) -> None:
    """Until it goes through without an error of MongoDB; at most a minute."""
    deadline = time.monotonic() + 60
    while True:
        try:
            await action()
            return
        except PyMongoError:
            assert time.monotonic() < deadline


@pytest.mark.timeout(180)
async def test_a_primary_is_killed_under_load(database_name: str) -> None:
    await fail_over(["kill"], database_name)


@pytest.mark.faults
@pytest.mark.timeout(580)
async def test_primaries_fail_over_and_over_under_load(database_name: str) -> None:
    kinds = ["step down", "kill", "cut off"] * 3
    random.Random(seeded(3)).shuffle(kinds)
    await fail_over(kinds, database_name)


# One aggregate with a million events


def counting() -> Projection:
    """A document that knows only how many events there were, and refuses one out of its turn."""
    projection = Projection("counting", fields=[])

    @projection.on("*")
    def _(state: dict[str, Any], event: dict[str, Any]) -> None:
        state["events"] = state.get("events", 0) + 1
        if state["events"] != event["sequenceNo"]:
            raise ValueError(f"event {event['sequenceNo']} after {state['events'] - 1}")

    return projection


MANY = 1_000_000


async def many(database: Database, first: int) -> None:
    fast = database.get_collection(EVENTS, write_concern=WriteConcern(w=1))
    for start in range(first, MANY + 1, 20_000):
        numbers = range(start, min(start + 20_000, MANY + 1))
        await fast.insert_many([event("a", number) for number in numbers], ordered=False)


def resident() -> int:
    return int(psutil.Process().memory_info().rss)


@pytest.mark.faults
@pytest.mark.timeout(580)
async def test_an_aggregate_of_a_million_events_is_repaired_and_healed(database: Database) -> None:
    """From the log after a lost position, and in turns after a gap: in bounded memory, while others go on."""
    writer = Writer(database)
    repaired, healed = counting(), ledger_of_others()
    await many(database, 2)  # the first one is missing
    build = await begun(database, repaired)
    others = await begun(database, healed)
    here = Here(database, retry_seconds=3600)
    before = resident()
    async with here.runs(build, only(build)) as partition, here.runs(others, only(others)):
        await eventually(lambda: parked(database))
        await database[EVENTS].insert_one(event("a", 1))
        await writer.append("b")
        await eventually_equal(lambda: documents(database, build.collection), {
            "a": {"_id": "a", "events": MANY}, "b": {"_id": "b", "events": 1},
        }, timeout=300)  # fmt: skip
        await eventually_equal(lambda: parked(database), {})
        await eventually(same(lambda: partition.progress.caught_up))
    assert resident() - before < 300 * 2**20
    # And all of it again, by the repair: the document is taken away, and the position too.
    await database[build.collection].delete_one({"_id": "a"})
    await database[CHECKPOINTS].update_one({"build": build.id}, {"$set": {"token": {"_data": "8200"}}})
    again = Here(database)
    async with again.runs(build, only(build)):
        await eventually_equal(lambda: documents(database, build.collection), {
            "a": {"_id": "a", "events": MANY}, "b": {"_id": "b", "events": 1},
        }, timeout=300)  # fmt: skip
    assert metric(again.metrics, "projector_repaired_events_total", projection="counting") == MANY
    assert resident() - before < 300 * 2**20


def ledger_of_others() -> Projection:
    """A second build that reads the same, as an ordinary neighbour."""
    projection = Projection("neighbour", fields=[])

    @projection.on("none of these")
    def _(state: dict[str, Any], event: dict[str, Any]) -> None:
        state["events"] = 1

    return projection
