"""The operator on its worst days: killed in the middle of a long build, and with hundreds of resources."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
from pymongo import AsyncMongoClient

from eventstore.embedded import ReplicaSet
from projector.catalog import STATUS
from projector.operator import measure
from tests.conftest import need_mongod
from tests.integration.operator.cluster import condition, index_state, until
from tests.integration.operator.test_operator import ON, report

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from eventstore.client import Database
    from tests.integration.operator.cluster import Operators, Resources

pytestmark = [pytest.mark.faults, pytest.mark.timeout(540)]

DOCUMENTS = 1_000_000
PROJECTIONS = 200


@pytest.fixture
def server() -> Iterator[str]:
    """A MongoDB of the test's own, since its work would slow down the others'."""
    need_mongod()
    with ReplicaSet(parameters={"enableTestCommands": "1"}) as replica_set:
        yield replica_set.uri


@contextlib.asynccontextmanager
async def process(
    resources: Resources, uri: str, kubeconfig: Path, log: Path
) -> AsyncIterator[subprocess.Popen[bytes]]:
    """`projector operator` as a process; killed at the end."""
    environment = os.environ | {
        "MONGODB_URI": uri,
        "EVENTSTORE_DATABASE": "shop",
        "KUBECONFIG": str(kubeconfig),
        "OPERATOR_NAMESPACES": resources.namespace,
        "OPERATOR_HTTP_PORT": "0",
        "OPERATOR_HTTP_HOST": "127.0.0.1",
        "OPERATOR_POLL_SECONDS": "0.2",
        "OPERATOR_RESYNC_SECONDS": "1",
    }
    with log.open("ab") as output:
        started = subprocess.Popen(
            [sys.executable, "-c", "from projector.cli import main; main()", "operator"],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        yield started
    finally:
        started.kill()
        await asyncio.to_thread(started.wait, 30)


async def test_killed_in_the_middle_of_a_build(
    resources: Resources, server: str, kubeconfig: Path, tmp_path: Path
) -> None:
    """The build goes on without the operator; the next one joins it, begins nothing anew, and learns how it ends."""
    log = tmp_path / "operator.log"
    indexes = [{"keys": [{"field": "email"}], "unique": True}, {"keys": [{"field": "city"}, {"field": "age"}]}]
    spec = {"version": 1, "on": ON, "readModel": {"indexes": indexes}}
    async with AsyncMongoClient[dict[str, Any]](server) as client:
        database = client["shop"]
        for first in range(0, DOCUMENTS, 50_000):
            numbers = range(first, first + 50_000)
            # Documents 0 and 999,999 have one email.
            await database["people.v1"].insert_many(
                [{"_id": n, "email": f"{n % (DOCUMENTS - 1)}@x", "city": n % 977, "age": n % 97} for n in numbers]
            )

        async def builds() -> dict[str, str]:
            found = await measure.indexes_of(database, "people.v1") or []
            return {one.index.name: one.build for one in found if one.build}

        async def waiting() -> int:
            """How many commands wait for the build."""
            cursor = await client.admin.aggregate(
                [
                    {"$currentOp": {"allUsers": True}},
                    {"$match": {"command.createIndexes": "people.v1", "command.comment": "eventprojector"}},
                    {"$match": {"desc": {"$regex": "^conn"}}},
                ]
            )
            return len(await cursor.to_list())

        # Held at its end, or a fast machine would be through before the next operator is there.
        point = "hangAfterIndexBuildFirstDrain"
        await client.admin.command("configureFailPoint", point, mode="alwaysOn")
        async with process(resources, server, kubeconfig, log) as operator:
            await resources.create("Projection", "people", spec)
            await until(builds)
            began = await builds()
            assert len(set(began.values())) == 1, "both are built in one scan"
            found = await resources.until_ready("Projection", "people", "False", "BuildingIndexes")
            assert condition(found, "Progressing")["status"] == "True"
            operator.send_signal(signal.SIGKILL)
            await asyncio.to_thread(operator.wait, 30)
        assert await builds() == began
        left = await waiting()  # the killed one's connection may take a while to be missed

        async def joined() -> bool:
            return await waiting() > left

        async with process(resources, server, kubeconfig, log):
            await until(joined)
            assert await builds() == began
            await client.admin.command("configureFailPoint", point, mode="off")
            found = await resources.until_ready("Projection", "people", "False", "DuplicateKey", seconds=120)
            for part in ("email_1", "0@x", "999999"):
                assert part in condition(found, "Ready")["message"]
            assert index_state(found, "email_1") == "Failed"
            await resources.until(
                "Projection", "people", lambda one: index_state(one, "city_1_age_1") == "Ready", seconds=120
            )
            await database["people.v1"].delete_one({"_id": DOCUMENTS - 1})
            await resources.until(
                "Projection", "people", lambda one: index_state(one, "email_1") == "Ready", seconds=120
            )
    assert "Traceback" not in log.read_text()


@pytest.fixture
def requests(resources: Resources, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts what the operator asks the API server, by method. The server's own counters also have what others ask it."""
    counted: Counter[str] = Counter()
    request = aiohttp.ClientSession._request

    async def counting(session: aiohttp.ClientSession, method: str, url: Any, **options: Any) -> Any:
        if session is not resources.api.session:
            counted[method.upper()] += 1
        return await request(session, method, url, **options)

    monkeypatch.setattr(aiohttp.ClientSession, "_request", counting)
    return counted


async def commands_of(database: Database) -> dict[str, int]:
    """What MongoDB has counted, by command."""
    found = (await database.client.admin.command("serverStatus"))["metrics"]["commands"]
    return {name: value["total"] for name, value in found.items() if isinstance(value, dict) and value.get("total")}


def grown(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
    return {name: value - before.get(name, 0) for name, value in after.items() if value != before.get(name, 0)}


async def test_two_hundred_projections(
    operators: Operators, resources: Resources, server: str, database_name: str, requests: Counter[str]
) -> None:
    indexes = [{"keys": [{"field": "status"}]}, {"keys": [{"field": "city"}, {"field": "age", "order": -1}]}]
    names = [f"p{number}" for number in range(PROJECTIONS)]
    async with AsyncMongoClient[dict[str, Any]](server) as client:
        database = client[database_name]
        for name in names:
            await report(database, name, version=1, state="live", lagSeconds=0, parked=0)
            await resources.create("Projection", name, {"version": 1, "on": ON, "readModel": {"indexes": indexes}})

        async def keep_reporting() -> None:
            while True:
                await database[STATUS].update_many({}, [{"$set": {"updatedAt": "$$NOW"}}])
                await asyncio.sleep(10)

        reporting = asyncio.create_task(keep_reporting())
        mongo_before = await commands_of(database)
        started = time.monotonic()
        async with operators.run(uri=server, poll_seconds=5.0, resync_seconds=60.0) as operator:

            async def all_ready() -> bool:
                items = (await resources.api.call("GET", resources.path("Projection")))["items"]
                return all(condition(one, "Ready").get("status") == "True" for one in items)

            await until(all_ready, seconds=240)
            seconds = time.monotonic() - started
            api_first = dict(requests)
            mongo_first = grown(mongo_before, await commands_of(database))

            def passes() -> float:
                return sum(
                    one.value
                    for one in next(iter(operator.metrics.reconciles.collect())).samples
                    if one.name.endswith("_total")
                )

            versions = await versions_of(resources)
            mongo_idle, before = await commands_of(database), passes()
            requests.clear()
            deadline = time.monotonic() + 180
            while passes() < before + PROJECTIONS:
                assert time.monotonic() < deadline
                await asyncio.sleep(1)
            count = passes() - before
            api_idle = dict(requests)
            mongo_idle = grown(mongo_idle, await commands_of(database))
            assert await versions_of(resources) == versions
        reporting.cancel()
        await asyncio.gather(reporting, return_exceptions=True)

    # Each resource is written three times: its finalizer, kopf's annotation, its status.
    assert api_first["PATCH"] <= 3 * PROJECTIONS + 20
    assert mongo_first["createIndexes"] <= PROJECTIONS + 5
    assert api_first["POST"] <= PROJECTIONS + 5  # an event for each
    assert set(api_idle) <= {"GET"}, api_idle  # at most a watch that begins anew
    for command in ("insert", "delete", "createIndexes", "collMod", "dropIndexes", "create"):
        assert command not in mongo_idle, mongo_idle
    asked = sum(mongo_idle.get(command, 0) for command in ("listIndexes", "find", "aggregate", "listCollections"))
    assert asked <= 5 * count, mongo_idle
    print(f"\nready after {seconds:.1f} s; API {api_first}, MongoDB {mongo_first}")
    print(f"{count:.0f} quiet passes: API {api_idle}, MongoDB {mongo_idle}")


async def versions_of(resources: Resources) -> dict[str, str]:
    items = (await resources.api.call("GET", resources.path("Projection")))["items"]
    return {one["metadata"]["name"]: one["metadata"]["resourceVersion"] for one in items}
