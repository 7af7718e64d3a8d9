"""The ops API: routes, problems, and who may give orders."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp.test_utils import TestClient, TestServer

from eventstore.auth import TokensMissingError
from projector import http
from projector.builds import ensure_build
from projector.ops import Ops
from projector.parking import Parked
from projector.settings import ProjectorSettings
from tests.eventually import eventually
from tests.projecting import Writer, ledger, running

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from eventstore.client import Database

GETS = ("/v1/projections", "/v1/projections/ledger", "/v1/projections/ledger/parked")
ORDERS = (
    ("POST", "pause"), ("POST", "resume"), ("PUT", "partitions"), ("POST", "rebuild"), ("POST", "cutover"),
    ("POST", "rollback"), ("POST", "cancel"), ("POST", "parked/retry"), ("POST", "parked/skip"), ("POST", "verify"),
    ("DELETE", ""),
)  # fmt: skip


@pytest.fixture
async def serve(database: Database) -> AsyncIterator[Any]:
    """Serves the API with settings, over a database with a projection that nobody runs."""
    await ensure_build(database, database, ledger(), 1)
    clients = []

    async def start(**settings: Any) -> TestClient[Any, Any]:
        app = http.make_app(Ops(database, database), ProjectorSettings(**settings))
        client = TestClient(TestServer(app))
        await client.start_server()
        clients.append(client)
        return client

    yield start
    for client in clients:
        await client.close()


async def _call(client: TestClient[Any, Any], method: str, path: str, **options: Any) -> tuple[int, Any]:
    async with client.request(method, path, **options) as answer:
        if answer.status >= 400:
            assert answer.content_type == "application/problem+json"
        return answer.status, await answer.json(content_type=None)


def _route(verb: str) -> str:
    return f"/v1/projections/ledger/{verb}".rstrip("/")


async def test_looking_is_open_and_orders_need_a_token_beyond_loopback(serve: Any, tmp_path: Path) -> None:
    without = await serve(http_host="0.0.0.0")
    tokens = tmp_path / "tokens"
    tokens.write_text("old\n")
    guarded = await serve(http_host="0.0.0.0", token_file=tokens)
    local = await serve(http_host="127.0.0.1", token_file=tokens)
    for client in (without, guarded):
        for path in GETS:
            assert (await _call(client, "GET", path))[0] == 200
    for method, verb in ORDERS:
        status, problem = await _call(without, method, _route(verb))
        assert status == 403
        assert "PROJECTOR_TOKEN_FILE" in problem["detail"]
        for client in (guarded, local):
            for headers in ({}, {"Authorization": "Bearer new"}, {"Authorization": "old"}):
                assert (await _call(client, method, _route(verb), headers=headers))[0] == 401
    status, _ = await _call(guarded, "POST", _route("pause"), headers={"Authorization": "Bearer old"})
    assert status == 200

    tokens.write_text("a-new-one\n")

    async def rotated() -> bool:
        headers = {"Authorization": "Bearer a-new-one"}
        return (await _call(guarded, "POST", _route("resume"), headers=headers))[0] == 200

    await eventually(rotated)
    assert (await _call(guarded, "POST", _route("pause"), headers={"Authorization": "Bearer old"}))[0] == 401


async def test_a_token_file_without_a_token_is_refused_at_the_start(database: Database, tmp_path: Path) -> None:
    empty = tmp_path / "tokens"
    empty.touch()
    with pytest.raises(TokensMissingError):
        http.make_app(Ops(database, database), ProjectorSettings(token_file=empty))


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("10.1.2.3", False), ("x", False)],
)
def test_loopback(host: str, *, expected: bool) -> None:
    assert http.is_loopback(host) is expected


async def test_orders_and_their_problems(serve: Any, database: Database) -> None:
    client = await serve(http_host="127.0.0.1")
    for method, path, body, expected in (
        ("GET", "/v1/projections/permits", None, 404),
        ("GET", "/v1/nothing", None, 404),
        ("PATCH", "/v1/projections", None, 405),
        ("PUT", _route("partitions"), {"partitions": 65}, 422),
        ("PUT", _route("partitions"), {"partitions": "four"}, 422),
        ("PUT", _route("partitions"), {"partitions": 4, "more": 1}, 422),
        ("PUT", _route("partitions"), {"partitions": 4}, 200),
        ("POST", _route("pause"), None, 200),
        ("POST", _route("resume"), None, 200),
        ("POST", _route("rollback"), None, 409),
        ("POST", _route("cutover"), None, 202),
        ("POST", _route("parked/retry"), None, 202),
        ("POST", _route("parked/retry"), {"aggregateId": "a"}, 404),
        ("POST", _route("parked/skip"), {"aggregateId": "a"}, 422),
        ("GET", _route("parked") + "?limit=none", None, 422),
        ("GET", _route("parked") + "?limit=100000", None, 422),
        ("GET", _route("wait"), None, 422),
        ("GET", _route("wait") + "?aggregateId=a&sequenceNo=1.5", None, 422),
        ("GET", _route("wait") + "?aggregateId=a&sequenceNo=1&timeout=0", None, 504),
        ("POST", _route("verify"), {"sample": 0}, 422),
        ("POST", _route("verify"), None, 409),
    ):
        status, answer = await _call(client, method, path, json=body)
        assert status == expected, (method, path, body, answer)
        if status >= 400:
            assert answer["type"].startswith("urn:eventprojector:problem:")
            assert answer["detail"]
    status, answer = await _call(client, "POST", _route("pause"), data=b"x" * 100_000)
    assert status == 200  # a body that nobody reads does no harm
    status, answer = await _call(client, "POST", _route("parked/retry"), data=b"x" * 100_000)
    assert status == 422
    assert (await _call(client, "PATCH", "/v1/projections"))[1]["status"] == 405
    assert (await database["projector.projections"].find_one({"_id": "ledger"}))["partitions"] == 4  # type: ignore[index]


async def test_parked_aggregates_come_in_pages(serve: Any, database: Database) -> None:
    client = await serve(http_host="127.0.0.1")
    names = [f"a/{number}" for number in range(5)]
    for name in names:
        parked = Parked("ledger.v1", name, 3, "e", "counted", "fold", "it failed", state="parked")
        await database["projector.parked"].insert_one(parked.dump())
    seen, after = [], ""
    while True:
        status, page = await _call(client, "GET", _route("parked"), params={"limit": "2", "after": after})
        assert status == 200
        seen += [row["aggregateId"] for row in page["parked"]]
        if page["next"] is None:
            break
        after = page["next"]
    assert seen == names
    status, answer = await _call(client, "POST", _route("parked/skip"), json={"aggregateId": "a/1", "sequenceNo": 3})
    assert (status, answer) == (202, {"skipped": 3})
    assert (await _call(client, "POST", _route("parked/retry")))[1] == {"retried": 5}


async def test_waiting_is_bounded(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "MAX_WAITS", 2)
    client = await serve(http_host="127.0.0.1")
    path = _route("wait") + "?aggregateId=a&sequenceNo=1&timeout=2"
    waiting = {asyncio.create_task(_call(client, "GET", path)) for _ in range(5)}
    refused: list[int] = []
    while len(refused) < 3:
        done, waiting = await asyncio.wait(waiting, timeout=30, return_when=asyncio.FIRST_COMPLETED)
        assert done
        refused += [task.result()[0] for task in done]
    assert refused == [503] * 3
    assert [(await task)[0] for task in waiting] == [504] * 2


async def test_reading_ones_own_write_over_http(database: Database) -> None:
    async with running(database, [ledger()], lease_seconds=0.5) as supervisor:
        ops = Ops(database, database, lambda: supervisor.projections)
        app = http.make_app(ops, ProjectorSettings(http_host="127.0.0.1"))
        async with TestClient(TestServer(app)) as client:
            await Writer(database).append("a b/ü", "counted", "noise")
            query = {"aggregateId": "a b/ü", "sequenceNo": "2", "timeout": "1"}

            async def shown() -> bool:
                status, answer = await _call(client, "GET", _route("wait"), params=query)
                return status == 200 and answer["reached"] is True

            await eventually(shown)
            query |= {"sequenceNo": "3", "timeout": "0.1"}
            status, answer = await _call(client, "GET", _route("wait"), params=query)
            assert (status, answer["reached"]) == (504, False)
            assert answer["mark"] in {1, 2}  # event 2 changes nothing, and may not have moved it
            status, answer = await _call(client, "POST", _route("verify"), json={})
            assert (status, answer["findings"], answer["documents"]) == (200, [], 1)
