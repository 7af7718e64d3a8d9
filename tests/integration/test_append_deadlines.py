"""MongoDB does not answer: callers hear so in time, and a repeat tells what became of their events."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from pymongo import MongoClient

from eventstore.embedded import ReplicaSet
from tests.appending import Api, event, eventually, local_appender
from tests.conftest import need_mongod

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def replica_set() -> Iterator[ReplicaSet]:
    """A MongoDB that this test may freeze."""
    need_mongod()
    with ReplicaSet() as running:
        yield running


async def test_a_frozen_mongodb(replica_set: ReplicaSet) -> None:
    async with local_appender(replica_set.uri, "frozen", deadline_seconds=1.0) as api:
        await api.append("warm", event())
        replica_set.members[0].pause()
        calls = [api.append(f"a{n % 5}", event(eventId=f"e{n}"), event(eventId=f"f{n}")) for n in range(30)]
        answers = await asyncio.gather(*calls)
        assert {status for status, _ in answers} == {503}
        kinds = {problem["type"].rsplit(":", 1)[1] for _, problem in answers}
        assert kinds <= {"outcome-unknown", "unavailable"}
        assert "outcome-unknown" in kinds
        for number, (_, problem) in enumerate(answers):
            if problem["type"].endswith("outcome-unknown"):
                assert problem["eventIds"] == [f"e{number}", f"f{number}"]
        assert (await api.call("GET", "/readyz"))[0] == 503
        assert (await api.call("GET", "/healthz"))[0] == 200

        replica_set.members[0].resume()
        await api.ready()
        for number in range(30):
            await eventually(lambda number=number: repeated(api, number))
        with MongoClient(replica_set.uri) as client:
            for aggregate in range(5):
                found = list(client["frozen"]["events"].find({"aggregateId": f"a{aggregate}"}).sort({"sequenceNo": 1}))
                assert [each["sequenceNo"] for each in found] == list(range(1, 13))
                assert {each["_id"] for each in found} == {
                    f"{kind}{n}" for kind in "ef" for n in range(aggregate, 30, 5)
                }


async def repeated(api: Api, number: int) -> bool:
    status, _ = await api.append(f"a{number % 5}", event(eventId=f"e{number}"), event(eventId=f"f{number}"))
    return status in {200, 201}


async def test_a_dead_mongodb(replica_set: ReplicaSet) -> None:
    async with local_appender(replica_set.uri, "dead", deadline_seconds=1.0) as api:
        await api.append("a", event(eventId="first"))
        member = replica_set.members[0]
        member.kill()
        answers = await asyncio.gather(*(api.append("a", event(eventId=f"e{n}")) for n in range(10)))
        assert {status for status, _ in answers} == {503}
        assert all(problem["type"].endswith(("unavailable", "outcome-unknown")) for _, problem in answers)
        member.start()
        await api.ready(60)
        assert (await api.append("a", event(eventId="first")))[0] == 200
        for number in range(10):
            status, _ = await api.append("a", event(eventId=f"e{number}"))
            assert status in {200, 201}
        assert (await api.call("GET", "/v1/aggregates/a"))[1]["sequenceNo"] == 11
