"""A killed appender leaves a transaction open; the next one does not wait for MongoDB to notice."""

from __future__ import annotations

import datetime
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from bson.int64 import Int64

from eventstore import log, orphans
from eventstore.event import EVENTS, slot_of
from tests.appending import event, local_appender

if TYPE_CHECKING:
    from eventstore.client import Client, Database

WRITER = """
import asyncio, sys
from bson import json_util
from pydantic import SecretStr
from eventstore.client import connect, open_database

async def main(uri, name, component, document):
    client = connect(SecretStr(uri), component)
    session = client.start_session()
    await session.start_transaction()
    await open_database(client, name).events.insert_one(json_util.loads(document), session=session)
    print("inserted", flush=True)
    await asyncio.Event().wait()

asyncio.run(main(*sys.argv[1:]))
"""


def leave_open(uri: str, database_name: str, component: str, event_id: str) -> None:
    """A process of ours inserts number 1 of aggregate `a` in a transaction, and is killed before its commit."""
    from bson import json_util

    document = {
        "_id": event_id,
        "aggregateId": "a",
        "sequenceNo": Int64(1),
        "eventName": "happened",
        "timestamp": datetime.datetime.now(datetime.UTC),
        "payload": {},
        "slot": slot_of("a"),
    }
    text = json_util.dumps(document, json_options=json_util.CANONICAL_JSON_OPTIONS)
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, uri, database_name, component, text], stdout=subprocess.PIPE
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"inserted\n"
        process.kill()


@pytest.mark.parametrize("events", [1, 2], ids=["single", "atomic"])
async def test_appends_go_on(mongodb_uri: str, database: Database, events: int) -> None:
    leave_open(mongodb_uri, database.name, "appender", "lost")
    async with local_appender(mongodb_uri, database.name) as api:
        # MongoDB would end it after 60 s and more; an append has 15 s.
        status, body = await api.append("a", *(event() for _ in range(events)))
    assert (status, body["firstSequenceNo"]) == (201, 1)
    assert await log.events_by_id(database, ["lost"]) == {}


async def test_only_idle_transactions_of_the_component_are_ended(
    mongodb_uri: str, client: Client, database: Database
) -> None:
    leave_open(mongodb_uri, database.name, "other", "kept")
    async with client.start_session() as session, await session.start_transaction():
        await database[EVENTS].find_one({}, session=session)
        assert await orphans.end_orphans(client, "appender", idle_seconds=0.0) == 0
        assert await orphans.end_orphans(client, "test", idle_seconds=60.0) == 0
        await database[EVENTS].find_one({}, session=session)  # still open
    assert await orphans.end_orphans(client, "other", idle_seconds=0.0) == 1
