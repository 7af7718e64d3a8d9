"""Operator and projector together, both as processes: a resource becomes a read model, and all its changes take effect."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

from bson.int64 import Int64

from eventstore.event import EVENTS, new_event_id, slot_of
from projector.catalog import DEFINITIONS
from tests.integration.operator.cluster import condition, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from eventstore.client import Client, Database
    from tests.integration.operator.cluster import Operators, Resources


@contextlib.asynccontextmanager
async def projector(uri: str, database: str, log: Path) -> AsyncIterator[None]:
    """`projector run --from-database` as a process."""
    environment = os.environ | {
        "MONGODB_URI": uri,
        "EVENTSTORE_DATABASE": database,
        "EVENTSTORE_PROVISION": "false",
        "PROJECTOR_HTTP_PORT": "0",
        "PROJECTOR_LEASE_SECONDS": "2",
    }
    command = [sys.executable, "-c", "from projector.cli import main; main()", "run", "--from-database"]
    with log.open("ab") as output:
        started = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        yield
        assert started.poll() is None, log.read_text()
    finally:
        started.terminate()
        try:
            await asyncio.to_thread(started.wait, 20)
        finally:
            started.kill()


async def append(database: Database, aggregate_id: str, *names: str, first: int = 1) -> None:
    """Events as the appender writes them."""
    await database[EVENTS].insert_many(
        [
            {
                "_id": new_event_id(),
                "aggregateId": aggregate_id,
                "sequenceNo": Int64(first + number),
                "eventName": name,
                "timestamp": datetime.datetime.now(datetime.UTC),
                "payload": {},
                "slot": slot_of(aggregate_id),
            }
            for number, name in enumerate(names)
        ]
    )


async def test_the_life_of_a_projection(
    operators: Operators, resources: Resources, client: Client, mongodb_uri: str, database_name: str, tmp_path: Path
) -> None:
    database = client[database_name]
    fold = {"Opened": {"$set": {"status": "open"}}, "Closed": {"$set": {"status": "closed"}}}
    spec = {
        "version": 1,
        "on": fold,
        "readModel": {"indexes": [{"keys": [{"field": "status"}]}]},
        "deletionPolicy": "Delete",
    }

    async def reads(key: str, **fields: Any) -> bool:
        return bool(await database["orders"].count_documents({"_id": key} | fields))

    async with operators.run(), projector(mongodb_uri, database_name, tmp_path / "projector.log"):
        await resources.create("EventStore", "main", {"database": database_name})
        await resources.until_ready("EventStore", "main")
        await append(database, "a", "Opened", "Closed")
        await append(database, "b", "Opened")
        await resources.create("Projection", "orders", spec)
        found = await resources.until_ready("Projection", "orders", "True", "Live", seconds=60)
        assert found["status"]["version"] == 1
        assert await reads("a", status="closed")
        assert await reads("b", status="open")
        found = await resources.until("Projection", "orders", lambda one: one["status"].get("lagSeconds") == 0)
        assert found["status"]["parked"] == 0
        assert "status_1" in await database["orders.v1"].index_information()

        await append(database, "b", "Closed", first=2)
        await until(lambda: reads("b", status="closed"))

        await resources.patch("Projection", "orders", {"spec": {"paused": True}})
        await resources.until_ready("Projection", "orders", "False", "Paused")
        await resources.until("Projection", "orders", lambda one: one["status"].get("state") == "paused")
        await append(database, "c", "Opened")
        await resources.patch("Projection", "orders", {"spec": {"paused": False, "partitions": 2}})
        await until(lambda: reads("c", status="open"))
        await resources.until_ready("Projection", "orders", "True", "Live")

        changed = {"Opened": None, "Closed": None, "*": {"$inc": {"steps": 1}}}
        await resources.patch("Projection", "orders", {"spec": {"version": 2, "on": changed}})
        await resources.until_ready("Projection", "orders", "True", "Live", seconds=60)
        await until(lambda: reads("a", steps=2))
        assert "status_1" in await database["orders.v2"].index_information()

        await resources.delete("Projection", "orders")
        await resources.until_gone("Projection", "orders")

        async def dropped() -> bool:
            left = set(await database.list_collection_names())
            return not left & {"orders", "orders.v1", "orders.v2"} and not await database[DEFINITIONS].count_documents(
                {}
            )

        await until(dropped, seconds=60)
        found = await resources.get("EventStore", "main")
        assert condition(found, "Ready")["status"] == "True"
        assert await database[EVENTS].count_documents({}) == 5
    await client.drop_database(database_name)
