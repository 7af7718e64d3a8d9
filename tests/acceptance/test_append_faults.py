"""The worst days: primaries that die, step down or freeze, and appenders that are killed, all of it under load.

Clients repeat what was not acknowledged, with the same eventIds, as the answers tell them to. Afterwards the log is read by
itself: every acknowledged event once, under the number that was told, and no gap.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
from pymongo import MongoClient
from pymongo.errors import PyMongoError

from eventstore.embedded import Member, ReplicaSet
from eventstore.event import EVENTS
from tests.appending import Api, Process, event, eventually
from tests.conftest import need_mongod

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]

ALLOWED = {200, 201, 503}
NAME = "test_faults"


@pytest.fixture(scope="module")
def replica_set() -> Iterator[ReplicaSet]:
    need_mongod()
    with ReplicaSet(members_count=3, cache_gib=0.25) as running:
        yield running


class Load:
    """Writers that append to some aggregates and repeat until each event is acknowledged."""

    def __init__(self, urls: list[str], prefix: str) -> None:
        self.urls = urls
        self.prefix = prefix
        self.acknowledged: dict[str, tuple[str, int]] = {}
        self.statuses: set[int] = set()
        self.problems: set[str] = set()
        self.stopping = False

    async def run(self, writers: int) -> None:
        """Writes until `stopping`; then each writer ends with its event acknowledged."""
        connector = aiohttp.TCPConnector(limit=0)
        async with (
            aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(40)) as session,
            asyncio.TaskGroup() as group,
        ):
            for writer in range(writers):
                group.create_task(self._write(writer, session))

    async def _write(self, writer: int, session: aiohttp.ClientSession) -> None:
        number = 0
        while not self.stopping:
            number += 1
            aggregates = [f"{self.prefix}-{'hot' if writer % 4 == 0 else writer}"]
            if writer % 4 == 1:
                aggregates.append(f"{self.prefix}-hot")
            appends = [
                {
                    "aggregateId": aggregate,
                    "events": [
                        event(eventId=f"{self.prefix}.{writer}.{number}.{index}.{n}") for n in range(1 + writer % 3)
                    ],
                }
                for index, aggregate in enumerate(aggregates)
            ]
            while not await self._post(appends, Api(random.choice(self.urls), session)):
                await asyncio.sleep(random.uniform(0, 0.1))

    async def _post(self, appends: list[dict[str, Any]], api: Api) -> bool:
        try:
            if len(appends) == 1:
                status, body = await api.append(appends[0]["aggregateId"], *appends[0]["events"])
                answers = [body]
            else:
                status, body = await api.append_several(*appends)
                answers = body.get("appends", [])
        except (aiohttp.ClientError, TimeoutError):
            return False  # the appender was killed
        self.statuses.add(status)
        if status not in {200, 201}:
            self.problems.add(f"{status} {body['type']}")
            if body["type"].endswith("outcome-unknown"):
                assert body["eventIds"] == [each["eventId"] for append in appends for each in append["events"]]
            return False
        for answer in answers:
            for each in answer["events"]:
                assert each["eventId"] not in self.acknowledged
                self.acknowledged[each["eventId"]] = (answer["aggregateId"], each["sequenceNo"])
        return True

    async def progresses(self, seconds: float = 45.0) -> None:
        """Waits until appends are acknowledged that were not sent before."""
        before = len(self.acknowledged)
        await eventually(lambda: len(self.acknowledged) > before + 50, seconds)

    def check(self, uri: str) -> None:
        """The log against what was acknowledged."""
        assert self.statuses <= ALLOWED, self.problems
        with MongoClient[dict[str, Any]](uri, readConcernLevel="majority") as client:
            query = {"aggregateId": {"$regex": f"^{self.prefix}-"}}
            stored = list(client[NAME][EVENTS].find(query).sort({"aggregateId": 1, "sequenceNo": 1}))
        where: dict[str, tuple[str, int]] = {}
        numbers: dict[str, list[int]] = {}
        for each in stored:
            assert each["_id"] not in where
            where[each["_id"]] = (each["aggregateId"], each["sequenceNo"])
            numbers.setdefault(each["aggregateId"], []).append(each["sequenceNo"])
        for found in numbers.values():
            assert found == list(range(1, len(found) + 1))
        assert where == self.acknowledged


async def primary_beside(replica_set: ReplicaSet, other: Member | None = None) -> Member:
    """The member that says it is primary, and is not `other`."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for member in replica_set.members:
            if member is not other and member.process is not None and await asyncio.to_thread(_is_primary, member):
                return member
        await asyncio.sleep(0.1)
    raise TimeoutError("no primary")


def _is_primary(member: Member) -> bool:
    with contextlib.suppress(PyMongoError), _direct(member) as client:
        return bool(client.admin.command("hello")["isWritablePrimary"])
    return False


def _direct(member: Member) -> MongoClient[dict[str, Any]]:
    return MongoClient(
        "127.0.0.1", member.port, directConnection=True, serverSelectionTimeoutMS=1_000, socketTimeoutMS=5_000
    )


def _step_down(member: Member) -> None:
    with contextlib.suppress(PyMongoError), _direct(member) as client:
        client.admin.command("replSetStepDown", 5, force=True)


async def healthy(replica_set: ReplicaSet) -> None:
    """All members are there again."""

    def states() -> bool:
        for member in replica_set.members:
            with contextlib.suppress(PyMongoError), _direct(member) as client:
                found = client.admin.command("replSetGetStatus")["members"]
                return all(each["state"] in {1, 2} for each in found)
        return False

    await eventually(lambda: asyncio.to_thread(states), 60)


@pytest.mark.parametrize("seed", range(3))
async def test_primaries_that_fail(replica_set: ReplicaSet, seed: int) -> None:
    """Twelve faults over three rounds: killed, stepped down, cut off, twice each way of coming back."""
    chance = random.Random(seed)
    faults = ["kill", "step down", "freeze", "freeze briefly"]
    chance.shuffle(faults)
    with Process.several(2, replica_set.uri, NAME) as processes:
        async with aiohttp.ClientSession() as session:
            for process in processes:
                await Api(process.url, session).ready()
        load = Load([process.url for process in processes], f"f{seed}")
        running = asyncio.create_task(load.run(32))
        for fault in faults:
            await load.progresses()
            await asyncio.sleep(chance.uniform(0, 0.5))
            old = await primary_beside(replica_set)
            match fault:
                case "kill":
                    old.kill()
                case "step down":
                    await asyncio.to_thread(_step_down, old)
                case "freeze" | "freeze briefly":
                    old.pause()
            if fault == "freeze briefly":
                await asyncio.sleep(chance.uniform(0.5, 3.0))  # around the election: both outcomes are wanted
            elif fault != "step down":
                await primary_beside(replica_set, old)
                await load.progresses()  # service is back although the old primary is not
            if fault == "kill":
                old.start()
            elif fault != "step down":
                old.resume()
            await load.progresses()
            await healthy(replica_set)
        load.stopping = True
        await running
    load.check(replica_set.uri)


@pytest.mark.parametrize("seed", range(2))
async def test_appenders_that_are_killed(replica_set: ReplicaSet, seed: int) -> None:
    chance = random.Random(seed)
    with Process.several(2, replica_set.uri, NAME) as processes:
        load = Load([process.url for process in processes], f"k{seed}")
        running = asyncio.create_task(load.run(32))
        for _ in range(12):
            await load.progresses()
            await asyncio.sleep(chance.uniform(0, 0.3))
            process = chance.choice(processes)
            process.kill()
            process.start()
        await load.progresses()
        load.stopping = True
        await running
    load.check(replica_set.uri)
