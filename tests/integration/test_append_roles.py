"""The roles of docs/reference/mongodb-roles.md suffice, and the appender's cannot change or remove an event."""

from __future__ import annotations

import json
import re
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from pydantic import SecretStr
from pymongo import MongoClient
from pymongo.errors import OperationFailure, PyMongoError

from eventstore import indexes, log, orphans
from eventstore.client import cause, connect, open_database, silence
from eventstore.embedded import ReplicaSet
from eventstore.errors import Meaning, classify
from eventstore.event import EVENTS
from projector.operator.reference import PRIVILEGES
from tests.appending import event, local_appender
from tests.conftest import need_mongod

if TYPE_CHECKING:
    from collections.abc import Iterator

DOCUMENT = Path(__file__).parents[2] / "docs" / "reference" / "mongodb-roles.md"
PASSWORD = "only-for-this-test"


def documented_roles() -> list[dict[str, Any]]:
    """The `createRole` commands of the reference, as it shows them."""
    return [json.loads(block) for block in re.findall(r"```json\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)]


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ReplicaSet]:
    """A replica set with authentication and a user for each documented role."""
    need_mongod()
    key = tmp_path_factory.mktemp("key") / "key"
    key.write_text(secrets.token_hex(100))
    key.chmod(0o600)
    with ReplicaSet(arguments=["--keyFile", str(key), "--transitionToAuth"]) as replica_set:
        with MongoClient[dict[str, Any]](replica_set.uri) as client:
            client.admin.command("createUser", "root", pwd=PASSWORD, roles=["root"])
            for role in documented_roles():
                client.admin.command(role)
                name = role["createRole"]
                client.admin.command("createUser", name, pwd=PASSWORD, roles=[name])
        # From here on nobody gets in without a password.
        member = replica_set.members[0]
        member.kill()
        member.arguments = [each for each in member.arguments if each != "--transitionToAuth"]
        member.start()
        with MongoClient[dict[str, Any]](uri_of(replica_set, "root"), serverSelectionTimeoutMS=30_000) as client:
            client.admin.command("ping")
        yield replica_set


def uri_of(replica_set: ReplicaSet, user: str) -> str:
    return replica_set.uri.replace("mongodb://", f"mongodb://{user}:{PASSWORD}@").replace("/?", "/?authSource=admin&")


async def refused(operation: Any) -> bool:
    with pytest.raises(OperationFailure) as caught:
        await operation
    return caught.value.code == 13


async def test_nobody_gets_in_without_a_password(secured: ReplicaSet) -> None:
    async with connect(SecretStr(secured.uri), "test") as client:
        assert await refused(open_database(client, "eventstore")[EVENTS].find_one())


async def test_refused_credentials_are_told_from_a_server_that_is_away(secured: ReplicaSet) -> None:
    uri = uri_of(secured, "root").replace(PASSWORD, "mistaken")
    async with connect(SecretStr(uri), "test", serverSelectionTimeoutMS=300) as client:
        # At first the server says so; from then on the driver says that it finds none.
        kinds = set()
        for _ in range(4):
            with pytest.raises(PyMongoError) as caught:
                await client.admin.command("ping")
            kinds.add(classify(caught.value))
            assert classify(cause(client, caught.value)) is Meaning.DENIED
        assert kinds == {Meaning.DENIED, Meaning.UNAVAILABLE}
        reason = await silence(open_database(client, "eventstore"))
        assert reason is not None
        assert "Authentication failed" in reason
        assert "mistaken" not in reason


@pytest.mark.parametrize("user", ["eventprojector-appender", "eventprojector-appender-provisioning"])
async def test_the_appender_can_do_its_work_and_no_more(secured: ReplicaSet, user: str) -> None:
    name = "eventstore"
    async with connect(SecretStr(uri_of(secured, "root")), "test") as root:
        await root.drop_database(name)
        provisions = user.endswith("provisioning")
        if not provisions:
            await indexes.provision(open_database(root, name))
        async with local_appender(uri_of(secured, user), name, provision=provisions) as api:
            assert (await api.append("a", event(eventId="e1")))[0] == 201
            assert (await api.append("a", event(), event()))[0] == 201
            assert (await api.append("a", event(eventId="e1")))[0] == 200
            assert (await api.append("a", event(), expectedSequenceNo=9))[1]["actualSequenceNo"] == 3
            assert len((await api.call("GET", "/v1/aggregates/a/events"))[1]["events"]) == 3
            assert (await api.call("GET", "/readyz"))[0] == 200
        async with connect(SecretStr(uri_of(secured, user)), "appender") as client:
            database = open_database(client, name)
            collection = database[EVENTS]
            assert await refused(collection.update_one({"_id": "e1"}, {"$set": {"eventName": "other"}}))
            assert await refused(collection.replace_one({"_id": "e1"}, {}))
            assert await refused(collection.find_one_and_update({"_id": "e1"}, {"$set": {"eventName": "other"}}))
            assert await refused(collection.delete_one({"_id": "e1"}))
            assert await refused(collection.delete_many({}))
            assert await refused(collection.drop())
            assert await refused(collection.drop_index("aggregate_sequence"))
            assert await refused(collection.rename("other"))
            assert await refused(database["other"].insert_one({}))
            assert await refused(client["other"]["events"].find_one())
            assert await refused(collection.aggregate([{"$out": "events"}]))
            assert await orphans.end_orphans(client, "appender") == 0
            async with client.start_session() as session:
                await session.start_transaction()
                await log.heads(database, ["a"], session)
                assert await orphans.end_orphans(client, "appender", idle_seconds=0.0) == 1  # its own, nobody else's
                with pytest.raises(OperationFailure):
                    await log.heads(database, ["a"], session)
        assert await log.head(open_database(root, name), "a") == 3


async def test_the_projector_can_follow_and_write_and_not_touch_the_log(secured: ReplicaSet) -> None:
    async with (
        connect(SecretStr(uri_of(secured, "root")), "test") as root,
        connect(SecretStr(uri_of(secured, "eventprojector-projector")), "projector") as client,
    ):
        await root.drop_database("eventstore")
        await indexes.provision(open_database(root, "eventstore"))
        events = open_database(client, "eventstore")[EVENTS]
        models = open_database(client, "readmodels")
        async with await events.watch() as stream:
            assert await stream.try_next() is None
        async with await events.watch([], start_at_operation_time=None) as stream:
            assert stream.resume_token is not None
        assert [each async for each in log.all_heads(open_database(client, "eventstore"))] == []
        await models.create_collection("permits.v1")
        await models["permits.v1"].create_index("status", name="status")
        async with client.start_session() as session, await session.start_transaction():
            await models["permits.v1"].insert_one({"_id": "a"}, session=session)
            await models["permits.v1"].update_one({"_id": "a"}, {"$set": {"n": 1}}, session=session)
        await models.create_collection("permits", viewOn="permits.v1", pipeline=[])
        assert [each async for each in models["permits"].find()] == [{"_id": "a", "n": 1}]
        await models.command("collMod", "permits", viewOn="permits.v1", pipeline=[{"$project": {"n": 0}}])
        await models["permits.v1"].drop_index("status")
        await models["permits.v1"].delete_many({})
        await models["permits.v1"].rename("permits.v0")
        await models["permits.v0"].drop()
        await models.command("listCollections")
        assert (await client.local["oplog.rs"].find_one(sort=[("$natural", 1)])) is not None
        assert await orphans.end_orphans(client, "projector") == 0
        assert await refused(events.insert_one({"_id": "x"}))
        assert await refused(events.update_many({}, {"$set": {"x": 1}}))
        assert await refused(events.delete_many({}))
        assert await refused(events.drop())
        assert await refused(client["other"]["x"].insert_one({}))


async def test_the_operator_can_provision_and_watch_builds_and_not_touch_events(secured: ReplicaSet) -> None:
    async with (
        connect(SecretStr(uri_of(secured, "root")), "test") as root,
        connect(SecretStr(uri_of(secured, "eventprojector-operator")), "operator") as client,
    ):
        await root.drop_database("eventstore")
        database = open_database(client, "eventstore")
        await indexes.provision(database)
        await database.command("collMod", EVENTS, validator={})
        await indexes.provision(database)
        await database[EVENTS].create_index("eventName", name="by_name")
        await database.command("collMod", EVENTS, index={"name": "by_name", "hidden": True})
        await database.command("listIndexes", EVENTS, includeBuildUUIDs=True)
        async for _ in await client.admin.aggregate([{"$currentOp": {"allUsers": True}}, {"$limit": 1}]):
            pass
        await database[EVENTS].drop_index("by_name")
        assert await database[EVENTS].find_one() is None
        assert await refused(database[EVENTS].insert_one({"_id": "x"}))
        assert await refused(database[EVENTS].update_many({}, {"$set": {"x": 1}}))
        assert await refused(database[EVENTS].delete_many({}))
        models = open_database(client, "readmodels")
        await models["projector.definitions"].update_one({"_id": "p"}, {"$set": {"paused": True}}, upsert=True)
        await models["projector.definitions"].delete_one({"_id": "p"})
        await models.create_collection("m.v1")
        await models["m.v1"].create_index("a")


def test_the_operator_s_role_is_what_its_own_page_says() -> None:
    (role,) = [role for role in documented_roles() if role["createRole"] == "eventprojector-operator"]
    granted = {
        (each["resource"].get("db"), each["resource"].get("collection")): each["actions"] for each in role["privileges"]
    }
    for collection, actions in PRIVILEGES:
        assert granted["readmodels", collection] == list(actions)
    log_only = [row for row in PRIVILEGES if not row[0].startswith("projector.")]
    for collection, actions in log_only:
        assert granted["eventstore", collection] == list(actions)
