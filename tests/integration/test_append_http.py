"""The HTTP API beyond the single append: histories, heads, streams of lines, CloudEvents, tokens, metrics."""

from __future__ import annotations

import asyncio
import datetime
import json
from typing import TYPE_CHECKING, Any

import pytest
from bson.int64 import Int64
from bson.objectid import ObjectId

from eventstore import log
from eventstore.auth import CHECK_SECONDS
from eventstore.event import EVENTS, slot_of
from tests.appending import Api, event, eventually, local_appender

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from eventstore.client import Database

NDJSON = {"Content-Type": "application/x-ndjson"}


@pytest.fixture
async def api(mongodb_uri: str, database: Database) -> AsyncIterator[Api]:
    async with local_appender(mongodb_uri, database.name) as api:
        yield api


async def test_a_history_comes_in_pages(api: Api) -> None:
    await api.append("a/b", *(event(payload={"n": n}) for n in range(25)))
    path: str | None = "/v1/aggregates/a%2Fb/events?after=2&limit=10"
    seen, sizes = [], []
    import yarl

    while path is not None:
        async with api.session.get(yarl.URL(api.url + path, encoded=True)) as response:
            page = await response.json()
        sizes.append(len(page["events"]))
        seen += [(e["sequenceNo"], e["payload"]["n"], e["aggregateId"]) for e in page["events"]]
        path = page.get("next")
    assert seen == [(n + 1, n, "a/b") for n in range(2, 25)]
    assert sizes == [10, 10, 3]


async def test_a_page_of_large_events_ends_early(api: Api) -> None:
    for _ in range(7):
        await api.append("a", event(payload={"x": "x" * 900_000}))
    page = (await api.call("GET", "/v1/aggregates/a/events?limit=1000"))[1]
    assert 1 <= len(page["events"]) < 7
    assert page["next"] == f"/v1/aggregates/a/events?after={len(page['events'])}&limit=1000"


async def test_a_history_without_events_is_empty(api: Api) -> None:
    assert await api.call("GET", "/v1/aggregates/a/events") == (200, {"aggregateId": "a", "events": []})


@pytest.mark.parametrize(
    "query", ["limit=0", "limit=1001", "limit=x", "after=-1", "after=", "after=9223372036854775808"]
)
async def test_a_history_s_parameters(api: Api, query: str) -> None:
    status, problem = await api.call("GET", f"/v1/aggregates/a/events?{query}")
    assert status == 422
    assert problem["field"] == query.split("=", maxsplit=1)[0]


async def test_a_history_comes_as_a_stream(api: Api) -> None:
    for _ in range(3):
        await api.append("a", *(event(payload={"x": "x" * 500}) for _ in range(500)))
    status, text = await api.call("GET", "/v1/aggregates/a/events?after=1", headers={"Accept": "application/x-ndjson"})
    assert status == 200
    assert [json.loads(line)["sequenceNo"] for line in text.splitlines()] == list(range(2, 1501))


async def test_values_that_json_lacks_come_as_extended_json(api: Api, database: Database) -> None:
    when = datetime.datetime(2024, 5, 1, 12, 30, tzinfo=datetime.UTC)
    number = ObjectId()
    await database[EVENTS].insert_one(
        {
            "_id": "foreign",
            "aggregateId": "a",
            "sequenceNo": Int64(1),
            "eventName": "x",
            "timestamp": when,
            "payload": {"when": when, "id": number, "big": Int64(2**60), "nan": float("nan"), "raw": b"\x00\xff"},
            "metadata": {"plain": [1, 2.5, None, True, "x"]},
            "slot": slot_of("a"),
        }
    )
    ((found,),) = [(await api.call("GET", "/v1/aggregates/a/events"))[1]["events"]]
    assert found["timestamp"] == "2024-05-01T12:30:00.000Z"
    assert found["payload"]["when"] == {"$date": "2024-05-01T12:30:00Z"}
    assert found["payload"]["id"] == {"$oid": str(number)}
    assert found["payload"]["big"] == 2**60
    assert found["payload"]["nan"] == {"$numberDouble": "NaN"}
    assert found["payload"]["raw"]["$binary"]["base64"] == "AP8="
    assert found["metadata"] == {"plain": [1, 2.5, None, True, "x"]}


async def test_a_head_has_a_tag(api: Api) -> None:
    assert (await api.call("GET", "/v1/aggregates/a"))[0] == 404
    await api.append("a", event(), event())
    async with api.session.get(api.url + "/v1/aggregates/a") as response:
        assert (response.status, response.headers["ETag"]) == (200, '"2"')
        assert await response.json() == {"aggregateId": "a", "sequenceNo": 2}
    for asked, status in [('"2"', 304), ('"1", W/"2"', 304), ("*", 304), ('"1"', 200), ("2", 200)]:
        assert (await api.call("GET", "/v1/aggregates/a", headers={"If-None-Match": asked}))[0] == status


async def test_other_routes_and_methods(api: Api) -> None:
    assert (await api.call("GET", "/v2"))[1]["type"] == "urn:eventprojector:problem:not-found"
    async with api.session.put(api.url + "/v1/events") as response:
        assert (response.status, response.headers["Allow"]) == (405, "POST")
    async with api.session.delete(api.url + "/v1/aggregates/a/events") as response:
        assert (response.status, response.headers["Allow"]) == (405, "POST, GET")
    assert (await api.call("GET", "/openapi.json"))[1]["openapi"] == "3.1.0"
    assert (await api.call("GET", "/healthz"))[0] == 200


def lines(*events: dict[str, Any] | str) -> bytes:
    return "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in events).encode()


async def bulk(api: Api, body: Any) -> list[dict[str, Any]]:
    async with api.session.post(api.url + "/v1/events", data=body, headers=NDJSON) as response:
        assert response.status == 200
        assert response.content_type == "application/x-ndjson"
        return [json.loads(line) async for line in response.content]


async def test_a_stream_is_answered_line_by_line_in_order(api: Api, database: Database) -> None:
    await api.append("b", event(eventId="there"))
    answers = await bulk(
        api,
        lines(
            {"aggregateId": "a", **event(eventId="e1")},
            {"aggregateId": "a", **event(eventId="e2")},
            "{bad",
            "",
            {"aggregateId": "b", **event(eventId="there")},
            {"aggregateId": "b", "expectedSequenceNo": 7, **event(eventId="e3")},
            {"aggregateId": "a", **event(payload={"$": 1}, eventId="e4")},
            {"aggregateId": "a\0", **event()},
            {"aggregateId": "a", "extra": 1, **event()},
            {"aggregateId": "a", **event(eventId="e1")},
            {"aggregateId": "a", **event(eventId="e5")},
        ),
    )
    assert [answer["status"] for answer in answers] == [201, 201, 400, 200, 409, 422, 422, 422, 200, 201]
    assert [answer.get("sequenceNo") for answer in answers] == [1, 2, None, 1, None, None, None, None, 1, 3]
    assert answers[4]["eventId"] == "e3"
    assert answers[4]["actualSequenceNo"] == 1
    assert answers[5]["eventId"] == "e4"
    assert answers[5]["field"] == "payload.$"
    assert [e["_id"] for e in await log.history(database, "a")] == ["e1", "e2", "e5"]


async def test_a_line_that_is_too_long_is_answered_and_skipped(mongodb_uri: str, database: Database) -> None:
    async with local_appender(mongodb_uri, database.name, max_event_bytes=20_000) as api:

        async def body() -> AsyncIterator[bytes]:
            yield lines({"aggregateId": "a", **event()})
            for _ in range(200):
                yield b'{"aggregateId":"a",' + b"x" * 5_000
            yield b"\n"
            yield lines({"aggregateId": "a", **event(payload={"x": "x" * 21_000})}, {"aggregateId": "a", **event()})

        answers = await bulk(api, body())
        assert [answer["status"] for answer in answers] == [201, 413, 413, 201]
        assert [e["sequenceNo"] for e in await log.history(database, "a")] == [1, 2]


async def test_a_stream_goes_both_ways(api: Api) -> None:
    """The answer to a line comes while the request is still open."""
    answered = asyncio.Event()

    async def body() -> AsyncIterator[bytes]:
        yield lines({"aggregateId": "a", **event()})
        await answered.wait()
        yield lines({"aggregateId": "a", **event()})

    async with api.session.post(api.url + "/v1/events", data=body(), headers=NDJSON) as response:
        first = json.loads(await response.content.readline())
        answered.set()
        second = json.loads(await response.content.readline())
        assert await response.content.read() == b""
    assert (first["sequenceNo"], second["sequenceNo"]) == (1, 2)


async def test_a_long_stream_is_read_no_faster_than_it_is_written(mongodb_uri: str, database: Database) -> None:
    count = 12_000
    async with local_appender(mongodb_uri, database.name, queue_events=300) as api:
        depths: set[int] = set()

        async def watch() -> None:
            while True:
                depths.add(sample(api, "appender_queue_events"))
                await asyncio.sleep(0)

        async def body() -> AsyncIterator[bytes]:
            for start in range(0, count, 200):
                yield lines(
                    *({"aggregateId": f"a{n % 40}", **event(payload={"n": n})} for n in range(start, start + 200))
                )

        watching = asyncio.create_task(watch())
        answers = await bulk(api, body())
        watching.cancel()
    assert {answer["status"] for answer in answers} == {201}
    assert len(answers) == count
    assert 0 < max(depths) <= 300
    for aggregate in range(40):
        events = await log.history(database, f"a{aggregate}")
        assert [e["payload"]["n"] for e in events] == list(range(aggregate, count, 40))


def sample(api: Api, name: str, **labels: str) -> int:
    """A metric's value now."""
    assert api.metrics is not None
    value = api.metrics.registry.get_sample_value(name, labels)
    assert value is not None, name
    return int(value)


CLOUD = {
    "specversion": "1.0",
    "id": "ce-1",
    "source": "/shop",
    "type": "shop.placed",
    "subject": "order/1",
    "time": "2024-01-01T10:00:00Z",
    "data": {"total": 1},
    "dataschema": "https://example.org/s",
    "traceparent": "00-1-2-01",
}


async def stored_cloud_event(database: Database) -> dict[str, Any]:
    (stored,) = await log.history(database, "order/1")
    assert stored["timestamp"] == datetime.datetime(2024, 1, 1, 10, tzinfo=datetime.UTC)
    return {key: stored[key] for key in ("_id", "eventName", "payload", "metadata")}  # type: ignore[literal-required]


EXPECTED_CLOUD = {
    "_id": "ce-1",
    "eventName": "shop.placed",
    "payload": {"total": 1},
    "metadata": {"source": "/shop", "dataschema": "https://example.org/s", "traceparent": "00-1-2-01"},
}


async def test_a_structured_cloud_event(api: Api, database: Database) -> None:
    headers = {"Content-Type": "application/cloudevents+json; charset=utf-8"}
    status, body = await api.call("POST", "/v1/events", data=json.dumps(CLOUD), headers=headers)
    assert (status, body["lastSequenceNo"]) == (201, 1)
    assert await stored_cloud_event(database) == EXPECTED_CLOUD
    assert (await api.call("POST", "/v1/events", data=json.dumps(CLOUD), headers=headers))[0] == 200


async def test_a_binary_cloud_event(api: Api, database: Database) -> None:
    attributes = {name: value for name, value in CLOUD.items() if name != "data"}
    headers = {f"ce-{name}": str(value) for name, value in attributes.items()} | {"ce-subject": "order%2F1"}
    status, body = await api.call("POST", "/v1/events", json=CLOUD["data"], headers=headers)
    assert (status, body["aggregateId"]) == (201, "order/1")
    assert await stored_cloud_event(database) == EXPECTED_CLOUD


async def test_a_batch_of_cloud_events_is_atomic(api: Api, database: Database) -> None:
    headers = {"Content-Type": "application/cloudevents-batch+json"}
    batch = [CLOUD | {"id": f"ce-{n}", "subject": f"s{n % 2}"} for n in range(5)]
    status, body = await api.call("POST", "/v1/events", data=json.dumps(batch), headers=headers)
    assert status == 201
    assert [(each["aggregateId"], each["lastSequenceNo"]) for each in body["appends"]] == [("s0", 3), ("s1", 2)]
    assert [e["_id"] for e in await log.history(database, "s0")] == ["ce-0", "ce-2", "ce-4"]
    bad = [CLOUD | {"id": "new"}, CLOUD | {"id": "ce-1", "subject": "other"}]
    status, problem = await api.call("POST", "/v1/events", data=json.dumps(bad), headers=headers)
    assert (status, problem["eventIds"]) == (409, ["ce-1"])
    assert await log.head(database, "order/1") == 0


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"id": None}, "id"),
        ({"id": ""}, "eventId"),
        ({"specversion": "0.3"}, "specversion"),
        ({"subject": None}, "subject"),
        ({"data": [1]}, "data"),
        ({"data_base64": "AA=="}, "data_base64"),
        ({"datacontenttype": "text/plain"}, "datacontenttype"),
        ({"time": "soon"}, "time"),
        ({"source": ""}, "source"),
    ],
    ids=str,
)
async def test_bad_cloud_events(api: Api, change: dict[str, Any], field: str) -> None:
    attributes = {name: value for name, value in (CLOUD | change).items() if value is not None}
    headers = {"Content-Type": "application/cloudevents+json"}
    status, problem = await api.call("POST", "/v1/events", data=json.dumps(attributes), headers=headers)
    assert status == 422
    assert field in problem["field"]


async def test_a_token_is_asked_for_and_may_change(mongodb_uri: str, database: Database, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("old-token\n")
    async with local_appender(mongodb_uri, database.name, token_file=file) as api:

        async def status(authorization: str | None) -> int:
            headers = {} if authorization is None else {"Authorization": authorization}
            return (await api.call("POST", "/v1/aggregates/a/events", json={"events": [event()]}, headers=headers))[0]

        assert await status(None) == 401
        assert await status("Bearer wrong") == 401
        assert await status("Basic old-token") == 401
        assert await status("Bearer old-token") == 201
        for path in ("/healthz", "/readyz", "/metrics"):
            assert (await api.call("GET", path))[0] == 200
        assert (await api.call("GET", "/v1/aggregates/a"))[0] == 401

        file.write_text("old-token\nnew-token\n")
        await eventually(lambda: accepted(status, "Bearer new-token"), CHECK_SECONDS + 10)
        assert await status("Bearer old-token") == 201
        other = tmp_path / "other"
        other.write_text("new-token\n")
        other.rename(file)
        await eventually(lambda: refused(status, "Bearer old-token"), CHECK_SECONDS + 10)
        file.unlink()
        await asyncio.sleep(CHECK_SECONDS)
        assert await status("Bearer new-token") == 201


async def accepted(status: Any, authorization: str) -> bool:
    return await status(authorization) == 201


async def refused(status: Any, authorization: str) -> bool:
    return await status(authorization) == 401


async def test_what_the_metrics_count(api: Api) -> None:
    route = "/v1/aggregates/{aggregateId}/events"
    await api.append("a", event(eventId="e1"), event())
    await api.append("a", event(eventId="e1", payload={"x": 1}))
    await api.append("a", event(eventId="e1"))
    await api.append("a", event(), expectedSequenceNo=0)
    assert sample(api, "appender_events_appended_total") == 2
    assert sample(api, "appender_idempotent_replays_total") == 1
    assert sample(api, "appender_append_conflicts_total") == 1
    assert sample(api, "appender_event_id_conflicts_total") == 1
    for code, count in [("201", 1), ("200", 1), ("409", 2)]:
        assert sample(api, "appender_http_requests_total", route=route, method="POST", code=code) == count
    assert sample(api, "appender_http_request_duration_seconds_count", route=route, method="POST") == 4
    assert sample(api, "appender_http_requests_in_progress") == 0
    assert sample(api, "appender_queue_events") == 0
    assert sample(api, "appender_queue_bytes") == 0
    await api.call("GET", "/nowhere/a/b/c")
    assert sample(api, "appender_http_requests_total", route="unmatched", method="other", code="404") == 1


async def test_a_full_queue_is_answered_with_503(mongodb_uri: str, database: Database) -> None:
    async with local_appender(mongodb_uri, database.name, queue_events=3) as api:

        async def append(number: int) -> tuple[int, str | None]:
            path = f"{api.url}/v1/aggregates/a{number}/events"
            async with api.session.post(path, json={"events": [event()]}) as response:
                body = await response.json(content_type=None)
                if response.status == 503:
                    assert body["type"] == "urn:eventprojector:problem:queue-full"
                return response.status, response.headers.get("Retry-After")

        answers = await asyncio.gather(*(append(n) for n in range(200)))
        assert set(answers) == {(201, None), (503, "1")}
        assert await database[EVENTS].count_documents({}) == answers.count((201, None))
