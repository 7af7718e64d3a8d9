"""Appending over HTTP, against a real MongoDB: numbers, expectations, idempotency, atomicity."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from bson.int64 import Int64

from eventstore import log
from eventstore.event import EVENTS
from tests.appending import Api, event, local_appender

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from eventstore.client import Database


@pytest.fixture
async def api(mongodb_uri: str, database: Database) -> AsyncIterator[Api]:
    async with local_appender(mongodb_uri, database.name) as api:
        yield api


async def numbers(database: Database, aggregate_id: str) -> list[int]:
    """The sequence numbers that the log has."""
    return [e["sequenceNo"] for e in await log.history(database, aggregate_id, limit=10_000)]


async def test_events_are_numbered_from_one(api: Api, database: Database) -> None:
    status, body = await api.append("a", event(), event(eventId="mine"))
    assert status == 201
    assert (body["aggregateId"], body["firstSequenceNo"], body["lastSequenceNo"]) == ("a", 1, 2)
    assert [e["sequenceNo"] for e in body["events"]] == [1, 2]
    assert body["events"][1]["eventId"] == "mine"
    assert (await api.append("a", event()))[1]["firstSequenceNo"] == 3
    assert await numbers(database, "a") == [1, 2, 3]


async def test_what_is_stored_is_what_was_sent(api: Api, database: Database) -> None:
    sent = event(
        "Placed",
        eventId="e1",
        payload={"n": 2**62, "f": 1.5, "s": "grün\0", "l": [1, {"": None}], "b": True},
        metadata={"correlationId": "c"},
        timestamp="2024-02-29T12:00:00.123456+02:00",
    )
    await api.append("a/b c%2F{ü}", sent)
    (stored,) = await log.history(database, "a/b c%2F{ü}")
    assert stored["_id"] == "e1"
    assert stored["eventName"] == "Placed"
    assert stored["payload"] == sent["payload"]
    assert stored["metadata"] == sent["metadata"]
    assert stored["timestamp"].isoformat() == "2024-02-29T10:00:00.123000+00:00"


async def test_64_writers_on_one_aggregate_all_succeed(api: Api, database: Database) -> None:
    answers = await asyncio.gather(*(api.append("hot", event(eventId=f"e{n}")) for n in range(64)))
    assert {status for status, _ in answers} == {201}
    assert sorted(body["firstSequenceNo"] for _, body in answers) == list(range(1, 65))
    stored = {e["_id"]: e["sequenceNo"] for e in await log.history(database, "hot")}
    assert stored == {body["events"][0]["eventId"]: body["firstSequenceNo"] for _, body in answers}


async def test_of_two_equal_expectations_exactly_one_wins(api: Api, database: Database) -> None:
    for round_no in range(20):
        answers = await asyncio.gather(*(api.append("a", event(), expectedSequenceNo=round_no) for _ in range(4)))
        won = [body for status, body in answers if status == 201]
        lost = [body for status, body in answers if status == 409]
        assert len(won) == 1
        assert len(lost) == 3
        assert won[0]["firstSequenceNo"] == round_no + 1
        for problem in lost:
            assert problem["type"] == "urn:eventprojector:problem:sequence-conflict"
            assert problem["actualSequenceNo"] == round_no + 1
    assert await numbers(database, "a") == list(range(1, 21))


async def test_an_expectation_beyond_the_head_is_a_conflict(api: Api, database: Database) -> None:
    assert (await api.append("a", event(), expectedSequenceNo=5))[1]["actualSequenceNo"] == 0
    await api.append("a", event())
    assert (await api.append("a", event(), expectedSequenceNo=2))[1]["actualSequenceNo"] == 1
    assert await numbers(database, "a") == [1]


@pytest.mark.parametrize("expected", [{}, {"expectedSequenceNo": 0}])
async def test_a_repeat_gets_the_original_numbers(api: Api, database: Database, expected: dict[str, int]) -> None:
    first = await api.append("a", event(eventId="e1"), event(eventId="e2"), **expected)
    await api.append("a", event())
    again = await api.append("a", event(eventId="e1"), event(eventId="e2"), **expected)
    assert first[0] == 201
    assert again == (200, first[1])
    assert await numbers(database, "a") == [1, 2, 3]


async def test_the_same_event_at_the_same_time_gets_one_answer(api: Api, database: Database) -> None:
    answers = await asyncio.gather(*(api.append("a", event(eventId="once")) for _ in range(32)))
    assert sorted(status for status, _ in answers) == [200] * 31 + [201]
    assert {body["firstSequenceNo"] for _, body in answers} == {1}
    many = [event(eventId=f"m{n}") for n in range(3)]
    answers = await asyncio.gather(*(api.append("b", *many) for _ in range(32)))
    assert sorted(status for status, _ in answers) == [200] * 31 + [201]
    assert {body["lastSequenceNo"] for _, body in answers} == {3}
    assert await numbers(database, "a") == [1]
    assert await numbers(database, "b") == [1, 2, 3]


async def test_an_event_id_belongs_to_one_event(api: Api, database: Database) -> None:
    await api.append("a", event(eventId="e1", payload={"x": 1}), event(eventId="e2"))
    others: list[tuple[str, list[dict[str, Any]]]] = [
        ("b", [event(eventId="e1", payload={"x": 1})]),
        ("a", [event(eventId="e1", payload={"x": 2})]),
        ("a", [event("other", eventId="e1", payload={"x": 1})]),
        ("a", [event(eventId="e1", payload={"x": 1}, metadata={"m": 1})]),
        ("a", [event(eventId="e1", payload={"x": 1}, timestamp="2020-01-01T00:00:00Z")]),
        ("a", [event(eventId="e1", payload={"x": 1}), event(eventId="new")]),
    ]
    for aggregate_id, events in others:
        status, problem = await api.append(aggregate_id, *events)
        assert status == 409, events
        assert problem["type"] == "urn:eventprojector:problem:event-id-conflict"
        assert problem["eventIds"] == ["e1"]
    assert await numbers(database, "a") == [1, 2]
    assert await numbers(database, "b") == []


async def test_a_repeat_may_carry_another_trace(api: Api) -> None:
    path = "/v1/aggregates/a/events"
    body = {"events": [event(eventId="e1")]}
    first = await api.call("POST", path, json=body, headers={"traceparent": "00-aa-bb-01"})
    again = await api.call("POST", path, json=body, headers={"traceparent": "00-cc-dd-01"})
    assert (first[0], again[0]) == (201, 200)
    page = (await api.call("GET", path))[1]
    assert page["events"][0]["metadata"] == {"traceparent": "00-aa-bb-01"}


async def test_several_aggregates_all_or_nothing(api: Api, database: Database) -> None:
    await api.append("a", event())
    status, body = await api.append_several(
        {"aggregateId": "a", "events": [event(), event()], "expectedSequenceNo": 1},
        {"aggregateId": "b", "events": [event()], "expectedSequenceNo": 0},
    )
    assert status == 201
    assert [(each["aggregateId"], each["lastSequenceNo"]) for each in body["appends"]] == [("a", 3), ("b", 1)]
    status, problem = await api.append_several(
        {"aggregateId": "b", "events": [event()]},
        {"aggregateId": "a", "events": [event()], "expectedSequenceNo": 1},
    )
    assert status == 409
    assert (problem["aggregateId"], problem["actualSequenceNo"]) == ("a", 3)
    assert await numbers(database, "b") == [1]


async def test_one_bad_request_never_fails_its_neighbours(api: Api, database: Database) -> None:
    await api.append("taken", event(eventId="taken"))
    calls = []
    for n in range(40):
        match n % 4:
            case 0:
                calls.append(api.append(f"good{n}", event(), event()))
            case 1:
                calls.append(api.append(f"stale{n}", event(), event(), expectedSequenceNo=9))
            case 2:
                calls.append(api.append(f"id{n}", event(eventId="taken"), event()))
            case 3:
                calls.append(api.append("hot", event()))
    statuses = [status for status, _ in await asyncio.gather(*calls)]
    assert statuses == [201, 409, 409, 201] * 10
    assert await numbers(database, "hot") == list(range(1, 11))
    assert await numbers(database, "good0") == [1, 2]
    assert await numbers(database, "id2") == []


async def test_a_repeat_amid_others_leaves_no_gap(api: Api, database: Database) -> None:
    await asyncio.gather(*(api.append("a", event(eventId=f"old{n}")) for n in range(20)))
    ids = [f"old{n // 2}" if n % 2 else f"new{n // 2}" for n in range(40)]
    answers = await asyncio.gather(*(api.append("a", event(eventId=each)) for each in ids))
    assert [status for status, _ in answers] == [201, 200] * 20
    assert await numbers(database, "a") == list(range(1, 41))


async def test_a_foreign_writer_amid_others_leaves_no_gap(api: Api, database: Database) -> None:
    """The cached head is wrong for some aggregates of a batch, and right for others."""
    names = [f"a{n}" for n in range(20)]
    await asyncio.gather(*(api.append(name, event()) for name in names))
    for name in names[::3]:
        (first,) = await log.history(database, name)
        await database[EVENTS].insert_one(dict(first) | {"_id": f"foreign-{name}", "sequenceNo": Int64(2)})
    answers = await asyncio.gather(*(api.append(name, event()) for name in names * 3))
    assert {status for status, _ in answers} == {201}
    for index, name in enumerate(names):
        assert await numbers(database, name) == list(range(1, 6 if index % 3 == 0 else 5))
