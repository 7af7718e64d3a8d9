"""What is not valid gets a clear 4xx that names the field, writes nothing, and harms nobody."""

from __future__ import annotations

import io
import json
from typing import TYPE_CHECKING, Any

import pytest

from eventstore.event import EVENTS
from tests.appending import Api, event, local_appender

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from eventstore.client import Database


@pytest.fixture
async def api(mongodb_uri: str, database: Database) -> AsyncIterator[Api]:
    async with local_appender(mongodb_uri, database.name) as api:
        yield api


def one(**fields: Any) -> bytes:
    return json.dumps({"events": [event(**fields)]}).encode()


def payload(value: Any) -> bytes:
    return one(payload=value)


def nested(levels: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(levels - 1):
        value = {"a": value}
    return value


BODIES: list[tuple[str, bytes, int, str | None]] = [
    ("empty", b"", 400, None),
    ("bad JSON", b'{"events":[', 400, None),
    ("trailing", one() + b"x", 400, None),
    ("not UTF-8", b'{"events":[{"eventName":"x","payload":{"a":"\xff"}}]}', 400, None),
    ("NaN", b'{"events":[{"eventName":"x","payload":{"a":[1,NaN]}}]}', 400, "events[0].payload.a[1]"),
    ("Infinity", b'{"events":[{"eventName":"x","payload":{"a":-Infinity}}]}', 400, "events[0].payload.a"),
    ("overflow", b'{"events":[{"eventName":"x","payload":{"a":1e999}}]}', 422, "events[0].payload.a"),
    ("surrogate", b'{"events":[{"eventName":"x","payload":{"a":"\\ud800"}}]}', 400, "events[0].payload.a"),
    ("surrogate name", b'{"events":[{"eventName":"\\udfff","payload":{}}]}', 400, "events[0].eventName"),
    ("an array", b"[]", 422, None),
    ("no events", b"{}", 422, "events"),
    ("empty events", b'{"events":[]}', 422, "events"),
    ("no eventName", b'{"events":[{"payload":{}}]}', 422, "events[0].eventName"),
    ("no payload", b'{"events":[{"eventName":"x"}]}', 422, "events[0].payload"),
    ("eventName a number", one(eventName=5), 422, "events[0].eventName"),
    ("eventName empty", one(eventName=""), 422, "events[0].eventName"),
    ("eventName NUL", one(eventName="a\0b"), 422, "events[0].eventName"),
    ("eventId empty", one(eventId=""), 422, "events[0].eventId"),
    ("eventId long", one(eventId="x" * 129), 422, "events[0].eventId"),
    ("eventId NUL", one(eventId="\0"), 422, "events[0].eventId"),
    ("eventId a number", one(eventId=7), 422, "events[0].eventId"),
    ("payload an array", payload([1]), 422, "events[0].payload"),
    ("payload null", payload(None), 422, "events[0].payload"),
    ("metadata a string", one(metadata="x"), 422, "events[0].metadata"),
    ("metadata $", one(metadata={"$x": 1}), 422, "events[0].metadata.$x"),
    ("timestamp words", one(timestamp="yesterday"), 422, "events[0].timestamp"),
    ("timestamp local", one(timestamp="2024-01-01T00:00:00"), 422, "events[0].timestamp"),
    ("timestamp a number", one(timestamp=5), 422, "events[0].timestamp"),
    ("$ key", payload({"a": [{"b": {"$set": 1}}]}), 422, "events[0].payload.a[0].b.$set"),
    ("dotted key", payload({"a": {"b.c": 1}}), 422, "events[0].payload.a.b.c"),
    ("NUL key", payload({"a": {"b\0": 1}}), 422, "events[0].payload.a.b\0"),
    ("beyond int64", payload({"n": {"big": 2**63}}), 422, "events[0].payload.n.big"),
    ("beyond int64 below", payload({"n": [-(2**63) - 1]}), 422, "events[0].payload.n[0]"),
    ("far beyond int64", payload({"n": 10**40}), 422, "events[0].payload.n"),
    ("101 levels", payload(nested(101)), 422, "events[0].payload"),
    ("very deep", b'{"events":[{"eventName":"x","payload":' + b'{"a":' * 5000, 400, None),
    ("2 MiB", payload({"a": "x" * 2**21}), 413, "events[0]"),
    ("unknown field", json.dumps({"events": [event()], "expectedVersion": 1}).encode(), 422, "expectedVersion"),
    ("unknown event field", one(evenId="e"), 422, "events[0].evenId"),
    (
        "expectation below 0",
        json.dumps({"events": [event()], "expectedSequenceNo": -1}).encode(),
        422,
        "expectedSequenceNo",
    ),
    (
        "expectation words",
        json.dumps({"events": [event()], "expectedSequenceNo": "1"}).encode(),
        422,
        "expectedSequenceNo",
    ),
    (
        "expectation big",
        json.dumps({"events": [event()], "expectedSequenceNo": 2**63}).encode(),
        422,
        "expectedSequenceNo",
    ),
    (
        "expectation 1.5",
        json.dumps({"events": [event()], "expectedSequenceNo": 1.5}).encode(),
        422,
        "expectedSequenceNo",
    ),
    ("1,001 events", json.dumps({"events": [event()] * 1001}).encode(), 413, "events"),
    ("same eventId twice", json.dumps({"events": [event(eventId="e")] * 2}).encode(), 422, "eventId"),
]


@pytest.mark.parametrize(("body", "status", "field"), [case[1:] for case in BODIES], ids=[case[0] for case in BODIES])
async def test_bodies(api: Api, database: Database, body: bytes, status: int, field: str | None) -> None:
    answer = await api.call(
        "POST", "/v1/aggregates/a/events", data=io.BytesIO(body), headers={"Content-Type": "application/json"}
    )
    assert answer[0] == status, answer
    problem = answer[1]
    assert problem["status"] == status
    assert problem["type"].startswith("urn:eventprojector:problem:")
    assert problem.get("field") == field
    assert field is None or field.encode(errors="replace") in problem["detail"].encode(errors="replace")
    assert await database[EVENTS].count_documents({}) == 0
    assert (await api.append("a", event()))[1]["firstSequenceNo"] == 1


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/v1/aggregates/%00/events", 422),
        ("/v1/aggregates/%ff/events", 422),
        ("/v1/aggregates/" + "x" * 513 + "/events", 422),
        ("/v1/aggregates/" + "%C3%BC" * 257 + "/events", 422),
        ("/v1/aggregates//events", 404),
        ("/v1/aggregates/a/b/events", 404),
    ],
)
async def test_aggregate_ids_in_the_path(api: Api, database: Database, path: str, status: int) -> None:
    import yarl

    async with api.session.post(yarl.URL(api.url + path, encoded=True), json={"events": [event()]}) as response:
        assert response.status == status
        assert (await response.json(content_type=None))["status"] == status
    assert await database[EVENTS].count_documents({}) == 0


@pytest.mark.parametrize(
    "appends",
    [
        [],
        [{"aggregateId": "", "events": [event()]}],
        [{"aggregateId": "a\0", "events": [event()]}],
        [{"aggregateId": "a", "events": []}],
        [{"aggregateId": "a", "events": [event()]}, {"aggregateId": "a", "events": [event()]}],
        [{"aggregateId": "a", "events": [event(eventId="e")]}, {"aggregateId": "b", "events": [event(eventId="e")]}],
        [{"aggregateId": "a", "events": [event()]}, {"aggregateId": "b", "events": [event(payload={"$": 1})]}],
    ],
    ids=str,
)
async def test_several_aggregates(api: Api, database: Database, appends: list[dict[str, Any]]) -> None:
    status, problem = await api.append_several(*appends)
    assert status == 422, problem
    assert await database[EVENTS].count_documents({}) == 0


@pytest.mark.parametrize("content_type", ["text/plain", "application/xml", "application/json-patch+json", ""])
async def test_media_types(api: Api, content_type: str) -> None:
    for path in ("/v1/aggregates/a/events", "/v1/events"):
        headers = {"Content-Type": content_type}
        assert (await api.call("POST", path, data=b"{}", headers=headers))[0] == 415


async def test_a_charset_is_fine(api: Api) -> None:
    headers = {"Content-Type": "Application/JSON; charset=utf-8"}
    assert (await api.call("POST", "/v1/aggregates/a/events", data=one(), headers=headers))[0] == 201


async def test_100_levels_and_the_ends_of_int64_are_fine(api: Api) -> None:
    for value in (nested(100), {"n": [2**63 - 1, -(2**63)]}):
        assert (await api.append("a", event(payload=value)))[0] == 201
    page = (await api.call("GET", "/v1/aggregates/a/events"))[1]
    assert [e["payload"] for e in page["events"]] == [nested(100), {"n": [2**63 - 1, -(2**63)]}]


async def test_an_event_of_exactly_the_limit_or_more(api: Api, mongodb_uri: str, database: Database) -> None:
    async with local_appender(mongodb_uri, database.name, max_event_bytes=2_000, max_request_bytes=4_000) as small:
        statuses = [(await small.append("s", event(payload={"a": "x" * size})))[0] for size in range(1_600, 2_100, 20)]
        assert statuses == sorted(statuses)
        assert set(statuses) == {201, 413}
        assert (await small.append("s", event(payload={"a": "x" * 5_000})))[0] == 413

        async def chunks() -> AsyncIterator[bytes]:
            for _ in range(10):
                yield b" " * 1_000

        headers = {"Content-Type": "application/json"}
        assert (await small.call("POST", "/v1/events", data=chunks(), headers=headers))[0] == 413
