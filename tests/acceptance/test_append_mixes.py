"""Three appenders, one log: any mix of appends leaves what was acknowledged, in order, and nothing else.

The checker reads the collection by itself; it knows of the appenders only what their clients were told.
"""

from __future__ import annotations

import asyncio
import itertools
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pydantic import SecretStr
from pymongo import MongoClient

from eventstore.client import connect, open_database
from eventstore.event import EVENTS
from eventstore.indexes import provision
from tests.appending import Api, Process, event

if TYPE_CHECKING:
    from collections.abc import Iterator

AGGREGATES = ("hot", "a", "b", "c")


@dataclass(frozen=True)
class Step:
    """One append of a writer. `shared`: its eventIds are those of other writers' steps with the same number."""

    targets: tuple[str, ...]
    events: int
    expect: str
    shared: int | None
    repeat: bool


STEPS = st.builds(
    Step,
    targets=st.one_of(
        st.sampled_from(AGGREGATES).map(lambda one: (one,)),
        st.just(("hot",)),
        st.lists(st.sampled_from(AGGREGATES), min_size=2, max_size=3, unique=True).map(tuple),
    ),
    events=st.sampled_from([1, 1, 1, 2, 5]),
    expect=st.sampled_from(["any", "any", "last seen", "new", "wrong"]),
    shared=st.one_of(st.none(), st.none(), st.integers(0, 5)),
    repeat=st.booleans(),
)


@dataclass
class Record:
    """What the clients were told."""

    acknowledged: dict[str, tuple[str, int]] = field(default_factory=dict)
    """By eventId: aggregate and number."""
    refused: set[str] = field(default_factory=set)
    arrival: dict[tuple[int, str], list[str]] = field(default_factory=dict)
    """By writer and aggregate: eventIds in the order in which the writer appended them."""

    def told(self, event_id: str, aggregate_id: str, number: int) -> None:
        before = self.acknowledged.setdefault(event_id, (aggregate_id, number))
        assert before == (aggregate_id, number), f"{event_id} was {before}, now {(aggregate_id, number)}"


@pytest.fixture(scope="module")
def appenders(mongodb_uri: str) -> Iterator[list[Process]]:
    async def wait(processes: list[Process]) -> None:
        async with aiohttp.ClientSession() as session:
            for process in processes:
                await Api(process.url, session).ready()

    with Process.several(3, mongodb_uri, "test_mixes") as processes:
        asyncio.run(wait(processes))
        yield processes


async def write(writer: int, steps: list[Step], api: Api, record: Record, prefix: str) -> None:
    """One client of one appender, step after step."""
    seen: dict[str, int] = {}
    for number, step in enumerate(steps):
        appends = []
        for target in step.targets:
            key = f"shared-{step.shared}" if step.shared is not None else f"{writer}-{number}"
            ids = [f"{prefix}-{key}-{target}-{step.events}-{len(step.targets)}-{n}" for n in range(step.events)]
            append: dict[str, Any] = {
                "aggregateId": f"{prefix}-{target}",
                "events": [event(eventId=each, payload={"n": n}) for n, each in enumerate(ids)],
            }
            match step.expect:
                case "last seen":
                    append["expectedSequenceNo"] = seen.get(target, 0)
                case "new":
                    append["expectedSequenceNo"] = 0
                case "wrong":
                    append["expectedSequenceNo"] = 1_000
            appends.append(append)
        for _ in range(2 if step.repeat else 1):
            await _post(writer, appends, api, record, seen, step)


async def _post(
    writer: int, appends: list[dict[str, Any]], api: Api, record: Record, seen: dict[str, int], step: Step
) -> None:
    if len(appends) == 1:
        fields = {key: value for key, value in appends[0].items() if key == "expectedSequenceNo"}
        status, body = await api.append(appends[0]["aggregateId"], *appends[0]["events"], **fields)
        answers = [body]
    else:
        status, body = await api.append_several(*appends)
        answers = body.get("appends", [body])
    ids = [each["eventId"] for append in appends for each in append["events"]]
    if status == 409:
        assert body["type"].endswith(("sequence-conflict", "event-id-conflict"))
        if step.shared is None:
            record.refused.update(set(ids) - record.acknowledged.keys())
        if body["type"].endswith("sequence-conflict"):
            target = body["aggregateId"].split("-", 1)[1]
            seen[target] = max(seen.get(target, 0), body["actualSequenceNo"])
        return
    assert status in {200, 201}, body
    for target, append, answer in zip(step.targets, appends, answers, strict=True):
        assert [each["eventId"] for each in answer["events"]] == [each["eventId"] for each in append["events"]]
        for each in answer["events"]:
            record.told(each["eventId"], answer["aggregateId"], each["sequenceNo"])
        seen[target] = max(seen.get(target, 0), answer["lastSequenceNo"])
        if status == 201 and step.shared is None:
            record.arrival.setdefault((writer, target), []).extend(each["eventId"] for each in append["events"])


def check(uri: str, record: Record, prefix: str) -> None:
    """The log against what was told."""
    client: MongoClient[dict[str, Any]] = MongoClient(uri)
    with client:
        stored = list(
            client["test_mixes"][EVENTS].find({"aggregateId": {"$regex": f"^{prefix}-"}}).sort({"sequenceNo": 1})
        )
    numbers: dict[str, list[int]] = {}
    where: dict[str, tuple[str, int]] = {}
    for each in stored:
        numbers.setdefault(each["aggregateId"], []).append(each["sequenceNo"])
        assert each["_id"] not in where
        where[each["_id"]] = (each["aggregateId"], each["sequenceNo"])
    for aggregate_id, found in numbers.items():
        assert found == list(range(1, len(found) + 1)), aggregate_id
    assert where == record.acknowledged  # nothing lost, nothing unasked, each with the number that was told
    assert not record.refused & where.keys()
    for ids in record.arrival.values():
        positions = [where[each][1] for each in dict.fromkeys(ids)]
        assert positions == sorted(positions)


@settings(
    max_examples=15,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(writers=st.lists(st.lists(STEPS, min_size=1, max_size=12), min_size=3, max_size=9))
def test_any_mix_of_appends(mongodb_uri: str, appenders: list[Process], writers: list[list[Step]]) -> None:
    prefix = uuid.uuid4().hex  # not of `random`, which hypothesis seeds
    record = Record()

    async def run() -> None:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(60)) as session:
            apis = itertools.cycle([Api(process.url, session) for process in appenders])
            async with asyncio.TaskGroup() as group:
                for writer, (steps, api) in enumerate(zip(writers, apis, strict=False)):
                    group.create_task(write(writer, steps, api, record, prefix))

    asyncio.run(run())
    check(mongodb_uri, record, prefix)


def test_a_hot_aggregate_under_three_appenders(mongodb_uri: str, appenders: list[Process]) -> None:
    """Appends without expectation always succeed, however many write at once."""
    record = Record()
    prefix = uuid.uuid4().hex
    steps = [Step(("hot",), 1, "any", None, repeat=False)] * 15

    async def run() -> None:
        connector = aiohttp.TCPConnector(limit=0)
        async with (
            aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(60)) as session,
            asyncio.TaskGroup() as group,
        ):
            for writer in range(96):
                api = Api(appenders[writer % 3].url, session)
                group.create_task(write(writer, steps, api, record, prefix))

    asyncio.run(run())
    assert len(record.acknowledged) == 96 * 15
    check(mongodb_uri, record, prefix)


async def test_a_client_that_gave_up_repeats_and_gets_the_first_answer(mongodb_uri: str, database_name: str) -> None:
    """Its answer was lost, not its event."""
    async with connect(SecretStr(mongodb_uri), "test") as client:
        database = open_database(client, database_name)
        await provision(database)
        with Process.several(1, mongodb_uri, database_name) as (process,):
            async with aiohttp.ClientSession() as session:
                api = Api(process.url, session)
                await api.ready()
                for number in range(40):
                    body = {"events": [event(eventId=f"e{number}")]}
                    timeout = aiohttp.ClientTimeout(total=0.0002 * (number % 10 + 1))
                    try:
                        await api.call("POST", "/v1/aggregates/a/events", json=body, timeout=timeout)
                    except TimeoutError:
                        pass
                    status, answer = await api.call("POST", "/v1/aggregates/a/events", json=body)
                    assert status in {200, 201}
                    assert answer["firstSequenceNo"] == number + 1
        assert await database[EVENTS].count_documents({}) == 40
        await client.drop_database(database_name)
