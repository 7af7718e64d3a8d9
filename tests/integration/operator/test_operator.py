"""The operator on a real API server and a real MongoDB: what users see of it in their resources."""

from __future__ import annotations

import base64
import contextlib
import datetime
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
from pymongo.errors import WriteError

from projector.catalog import DEFINITIONS, STATUS
from projector.operator.ownership import CLAIMS
from projector.operator.resources import PAUSED_ANNOTATION
from tests.integration.operator.cluster import (
    BY_NAME,
    ON,
    PROJECTION,
    ApiError,
    condition,
    index_state,
    some_passes,
    store,
    until,
)

if TYPE_CHECKING:
    from eventstore.client import Database
    from tests.integration.operator.cluster import Operators, Resources


async def names(database: Database, collection: str) -> set[str]:
    return set(await database[collection].index_information()) - {"_id_"}


async def report(database: Database, name: str, **fields: Any) -> None:
    """A projector's word on a projection."""
    now = datetime.datetime.now(datetime.UTC)
    await database[STATUS].update_one({"_id": name}, {"$set": {"updatedAt": now} | fields}, upsert=True)


async def test_an_event_store(operators: Operators, resources: Resources, empty: Database) -> None:
    async with operators.run():
        await resources.create("EventStore", "main", store(empty))
        found = await resources.until_ready("EventStore", "main")
        assert found["status"]["observedGeneration"] == found["metadata"]["generation"] == 1
        assert {one["type"] for one in found["status"]["conditions"]} == {"Ready", "Progressing", "Degraded", "Paused"}
        assert all(one["observedGeneration"] == 1 and one["reason"] for one in found["status"]["conditions"])
        assert found["status"]["indexSummary"] == "2/2"
        assert await names(empty, "events") == {"aggregate_sequence", "by-name"}
        with pytest.raises(WriteError):
            await empty["events"].insert_one({"no": "event"})

        other = {"name": "by-time", "keys": [{"field": "timestamp"}]}
        await resources.patch("EventStore", "main", {"spec": {"indexes": [BY_NAME, other]}})
        found = await resources.until_ready("EventStore", "main")
        assert found["status"]["observedGeneration"] == found["metadata"]["generation"] == 2
        assert await names(empty, "events") == {"aggregate_sequence", "by-name", "by-time"}


async def test_what_was_made_while_no_operator_ran(operators: Operators, resources: Resources, empty: Database) -> None:
    await resources.create("EventStore", "main", store(empty))
    async with operators.run():
        await resources.until_ready("EventStore", "main")
    await resources.patch("EventStore", "main", {"spec": {"indexes": [BY_NAME, BY_NAME | {"name": "n2", "hidden": True,
        "keys": [{"field": "slot"}]}]}})  # fmt: skip
    await empty["events"].drop_index("by-name")
    async with operators.run():
        await resources.until_ready("EventStore", "main")
        assert await names(empty, "events") == {"aggregate_sequence", "by-name", "n2"}


async def test_drift_is_mended_and_foreign_indexes_are_reported(
    operators: Operators, resources: Resources, empty: Database
) -> None:
    async with operators.run() as operator:
        await resources.create("EventStore", "main", store(empty))
        await resources.until_ready("EventStore", "main")
        await empty["events"].drop_index("by-name")
        await empty["events"].create_index("theirs")
        await empty.command("collMod", "events", validator={})

        async def mended() -> bool:
            options = await empty["events"].options()
            return "by-name" in await names(empty, "events") and bool(options.get("validator"))

        await until(mended)
        found = await resources.until("EventStore", "main", lambda one: one["status"].get("foreignIndexes"))
        assert found["status"]["foreignIndexes"] == ["theirs_1"]
        assert await names(empty, "events") == {"aggregate_sequence", "by-name", "theirs_1"}
        assert operator.metrics.drift.labels("created")._value.get() == 1
        assert operator.metrics.drift.labels("validator")._value.get() == 1


async def test_changed_options_need_leave_to_recreate(
    operators: Operators, resources: Resources, empty: Database
) -> None:
    async with operators.run():
        await resources.create("EventStore", "main", store(empty))
        await resources.until_ready("EventStore", "main")
        change = {"indexes": [BY_NAME | {"keys": [{"field": "eventName", "order": -1}]}]}
        await resources.patch("EventStore", "main", {"spec": change})
        found = await resources.until_ready("EventStore", "main", "False", "DriftDetected")
        assert index_state(found, "by-name") == "Drifted"
        assert "by-name" in condition(found, "Ready")["message"]
        assert condition(found, "Degraded")["status"] == "True"
        await resources.patch("EventStore", "main", {"spec": {"allowRecreate": True}})
        found = await resources.until_ready("EventStore", "main")
        [name] = [one["index"] for one in found["status"]["indexes"] if one["name"] == "by-name"]
        await until(lambda: _is(empty, {"aggregate_sequence", name}))
        assert condition(found, "Degraded")["status"] == "False"


async def _is(database: Database, wanted: set[str], collection: str = "events") -> bool:
    return await names(database, collection) == wanted


async def test_two_event_stores_for_one_database(operators: Operators, resources: Resources, empty: Database) -> None:
    async with operators.run():
        await resources.create("EventStore", "main", store(empty))
        await resources.until_ready("EventStore", "main")
        await resources.create("EventStore", "second", store(empty, indexes=[]))
        found = await resources.until_ready("EventStore", "second", "False", "Conflict")
        assert f"EventStore {resources.namespace}/main" in condition(found, "Ready")["message"]
        assert index_state(found, "aggregate_sequence") == "Conflict"
        await resources.delete("EventStore", "main")
        await resources.until_gone("EventStore", "main")
        await resources.until_ready("EventStore", "second")


@pytest.mark.parametrize("policy", ["Retain", "Delete"])
async def test_deletion_of_an_event_store(
    operators: Operators, resources: Resources, empty: Database, policy: str
) -> None:
    await empty["events"].create_index("theirs")
    async with operators.run():
        await resources.create("EventStore", "main", store(empty, deletionPolicy=policy))
        await resources.until_ready("EventStore", "main")
        await resources.delete("EventStore", "main")
        await resources.until_gone("EventStore", "main")
    kept = {"aggregate_sequence", "theirs_1"} | ({"by-name"} if policy == "Retain" else set())
    assert await names(empty, "events") == kept
    assert await empty[CLAIMS].count_documents({}) == 0


async def test_the_pause_annotation(operators: Operators, resources: Resources, empty: Database) -> None:
    async with operators.run() as operator:
        await resources.create("EventStore", "main", store(empty))
        await resources.until_ready("EventStore", "main")
        await resources.patch("EventStore", "main", {"metadata": {"annotations": {PAUSED_ANNOTATION: "true"}}})
        found = await resources.until(
            "EventStore", "main", lambda one: condition(one, "Paused").get("status") == "True"
        )
        assert condition(found, "Ready")["status"] == "True"
        await empty["events"].drop_index("by-name")
        await some_passes(operator, "EventStore")
        assert "by-name" not in await names(empty, "events")
        await resources.patch("EventStore", "main", {"metadata": {"annotations": {PAUSED_ANNOTATION: None}}})
        await until(lambda: _is(empty, {"aggregate_sequence", "by-name"}))
        await resources.until("EventStore", "main", lambda one: condition(one, "Paused").get("status") == "False")


async def test_a_quiet_operator_writes_nothing(operators: Operators, resources: Resources, empty: Database) -> None:
    async with operators.run(resync_seconds=0.2) as operator:
        await resources.create("EventStore", "main", store(empty))
        await resources.create("Projection", "orders", PROJECTION)
        await resources.until_ready("EventStore", "main")
        await report(empty, "orders", version=1, state="live", lagSeconds=0.0, parked=0)
        await resources.until_ready("Projection", "orders")
        await some_passes(operator, "Projection")
        before = [await resources.get(kind, name) for kind, name in (("EventStore", "main"), ("Projection", "orders"))]
        events = await resources.events()
        counts = await empty.command("serverStatus")
        await some_passes(operator, "EventStore", 6)
        await some_passes(operator, "Projection", 6)
        after = [await resources.get(kind, name) for kind, name in (("EventStore", "main"), ("Projection", "orders"))]
        counted = await empty.command("serverStatus")
        assert [one["metadata"]["resourceVersion"] for one in after] == [
            one["metadata"]["resourceVersion"] for one in before
        ]
        assert await resources.events() == events
        for command in ("insert", "update", "delete", "createIndexes", "collMod", "create"):
            now, then = (one["metrics"]["commands"][command]["total"] for one in (counted, counts))
            assert now == then, command


async def test_events_tell_transitions_alone(operators: Operators, resources: Resources, empty: Database) -> None:
    async with operators.run() as operator:
        await resources.create("EventStore", "main", store(empty))
        await resources.until_ready("EventStore", "main")
        await some_passes(operator, "EventStore")
        await until(resources.events)
        [only] = await resources.events()
        assert (only["type"], only["reason"]) == ("Normal", "Reconciled")
        assert only["involvedObject"]["name"] == "main"
        assert only["source"]["component"] == "eventprojector-operator"


async def test_nothing_under_kopfs_own_name(operators: Operators, resources: Resources, empty: Database) -> None:
    async with operators.run():
        await resources.create("EventStore", "main", store(empty))
        found = await resources.until_ready("EventStore", "main")
        found = await resources.until("EventStore", "main", lambda one: one["metadata"].get("annotations"))
    assert found["metadata"]["finalizers"] == ["eventprojector.io/operator"]
    assert all(name.startswith("operator.eventprojector.io/") for name in found["metadata"]["annotations"])
    assert set(found["status"]) <= {"observedGeneration", "conditions", "indexes", "indexSummary", "foreignIndexes"}


@pytest.mark.usefixtures("impatient")
async def test_a_connection_from_a_secret(
    operators: Operators, resources: Resources, empty: Database, mongodb_uri: str
) -> None:
    connection = {"secretRef": {"name": "mongodb", "key": "url"}}
    secrets = f"/api/v1/namespaces/{resources.namespace}/secrets"
    nowhere = "mongodb://nobody:secret@127.0.0.1:1/"
    async with operators.run(uri="mongodb://127.0.0.1:1/") as operator:
        operator.context.secrets._kept = Forgetful()
        await resources.create("EventStore", "main", store(empty, connection=connection))
        found = await resources.until_ready("EventStore", "main", "False", "SecretUnreadable")
        assert condition(found, "Ready")["message"] == f"there is no Secret {resources.namespace}/mongodb"
        for data, reason in (
            ({"uri": mongodb_uri}, "SecretUnreadable"),
            ({"url": "http://127.0.0.1"}, "InvalidConnection"),
            ({"url": nowhere}, "MongoUnavailable"),
        ):
            encoded = {key: base64.b64encode(value.encode()).decode() for key, value in data.items()}
            secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "mongodb"}, "data": encoded}
            await resources.api.apply(f"{secrets}/mongodb", secret)
            found = await resources.until(
                "EventStore", "main", lambda one, reason=reason: condition(one, "Ready")["reason"] == reason
            )
            assert "secret" not in str(found["status"]).replace("Secret", "").replace("secretRef", "")
        data = {"url": base64.b64encode(mongodb_uri.encode()).decode()}
        await resources.api.apply(f"{secrets}/mongodb", secret | {"data": data})
        await resources.until_ready("EventStore", "main")
        assert "by-name" in await names(empty, "events")
        # A projection of that store finds its way by the reference alone.
        await resources.create("Projection", "orders", PROJECTION | {"eventStoreRef": {"name": "none"}})
        await resources.until_ready("Projection", "orders", "False", "EventStoreNotFound")
        await resources.create("Projection", "others", PROJECTION | {"eventStoreRef": {"name": "main"}})
        await resources.until_ready("Projection", "others", "Unknown", "ProjectorSilent")
        assert await empty[DEFINITIONS].count_documents({"_id": "others"}) == 1


class Forgetful(dict[Any, Any]):
    """A cache that keeps nothing, so that the test need not wait until a Secret's value is old."""

    def __setitem__(self, key: Any, value: Any) -> None:
        return


async def test_a_projection_reaches_the_projector_and_its_status_comes_back(
    operators: Operators, resources: Resources, empty: Database
) -> None:
    async with operators.run():
        made = await resources.create("Projection", "orders", PROJECTION)
        found = await resources.until_ready("Projection", "orders", "Unknown", "ProjectorSilent")
        assert found["status"]["collection"] == "orders.v1"
        assert await names(empty, "orders.v1") == {"status_1"}
        definition = await empty[DEFINITIONS].find_one({"_id": "orders"})
        assert definition is not None
        assert definition["definition"]["on"] == ON
        assert definition["definition"]["readModel"]["indexes"][0]["keys"] == {"status": 1}
        assert (definition["partitions"], definition["paused"], definition["deleted"]) == (1, False, False)
        assert definition["source"]["uid"] == made["metadata"]["uid"]

        await report(empty, "orders", version=None, state="rebuilding", rebuild={"percent": 44.4}, lagSeconds=3.2)
        found = await resources.until_ready("Projection", "orders", "False", "Rebuilding")
        assert condition(found, "Progressing")["status"] == "True"
        assert found["status"]["rebuildPercent"] == 40
        await report(empty, "orders", version=1, state="live", rebuild=None, lagSeconds=0.0, parked=0)
        found = await resources.until_ready("Projection", "orders", "True", "Live")
        assert (found["status"]["lagSeconds"], found["status"]["parked"], found["status"]["version"]) == (0, 0, 1)
        await report(empty, "orders", lagSeconds=77.0, parked=2)
        found = await resources.until("Projection", "orders", lambda one: one["status"].get("parked") == 2)
        assert found["status"]["lagSeconds"] == 60
        assert condition(found, "Degraded")["reason"] == "ParkedAggregates"
        await report(empty, "orders", state="failed", error="1,000 aggregates are parked")
        found = await resources.until_ready("Projection", "orders", "False", "ProjectionFailed")
        assert "1,000 aggregates" in condition(found, "Ready")["message"]


async def test_changes_of_a_projection(operators: Operators, resources: Resources, empty: Database) -> None:
    async with operators.run():
        await resources.create("Projection", "orders", PROJECTION)
        await report(empty, "orders", version=1, state="live", lagSeconds=0, parked=0)
        await resources.until_ready("Projection", "orders")

        await resources.patch("Projection", "orders", {"spec": {"paused": True, "partitions": 4}})
        await resources.until_ready("Projection", "orders", "False", "Paused")
        definition = await empty[DEFINITIONS].find_one({"_id": "orders"})
        assert definition is not None
        assert (definition["paused"], definition["partitions"]) == (True, 4)
        await resources.patch("Projection", "orders", {"spec": {"paused": False}})
        await resources.until_ready("Projection", "orders")

        # Another fold under the same version is refused, and the one in force stays.
        changed = {"Opened": {"$set": {"status": "new"}}}
        await resources.patch("Projection", "orders", {"spec": {"on": changed}})
        found = await resources.until_ready("Projection", "orders", "False", "VersionUnchanged")
        definition = await empty[DEFINITIONS].find_one({"_id": "orders"})
        assert definition is not None
        assert definition["definition"]["on"] == ON
        await resources.patch("Projection", "orders", {"spec": {"version": 2}})
        found = await resources.until_ready("Projection", "orders", "True", "Rebuilding")  # version 1 is still read
        assert found["status"]["collection"] == "orders.v2"
        assert await names(empty, "orders.v2") == {"status_1"}
        definition = await empty[DEFINITIONS].find_one({"_id": "orders"})
        assert definition is not None
        assert (definition["definition"]["version"], definition["definition"]["on"]) == (2, changed)
        await report(empty, "orders", version=2, live="orders.v2")
        await resources.until_ready("Projection", "orders", "True", "Live")

        # Built once more, the version lies in another collection: that is where the indexes belong now.
        await report(empty, "orders", live="orders.v2-2")
        found = await resources.until("Projection", "orders", lambda one: one["status"]["collection"] == "orders.v2-2")
        assert await names(empty, "orders.v2-2") == {"status_1"}


@pytest.mark.parametrize("policy", ["Retain", "Delete"])
async def test_deletion_of_a_projection(
    operators: Operators, resources: Resources, empty: Database, policy: str
) -> None:
    async with operators.run():
        await resources.create("Projection", "orders", PROJECTION | {"deletionPolicy": policy})
        await resources.until_ready("Projection", "orders", "Unknown", "ProjectorSilent")
        await resources.delete("Projection", "orders")
        await resources.until_gone("Projection", "orders")
        assert await names(empty, "orders.v1") == {"status_1"}  # the projector drops it, in one go with the data
        definition = await empty[DEFINITIONS].find_one({"_id": "orders"})
        if policy == "Retain":
            assert definition is None
            return
        assert definition is not None
        assert (definition["deleted"], definition["deletionPolicy"]) == (True, "Delete")
        # Made again while the old read model is still being dropped: it waits.
        await resources.create("Projection", "orders", PROJECTION)
        await resources.until_ready("Projection", "orders", "False", "Deleting")
        await empty[DEFINITIONS].delete_one({"_id": "orders"})
        await resources.until_ready("Projection", "orders", "Unknown", "ProjectorSilent")


async def test_an_invalid_definition_names_the_place(
    operators: Operators, resources: Resources, empty: Database
) -> None:
    async with operators.run():
        await resources.create("Projection", "orders", PROJECTION | {"on": {"Opened": {"$inc": {"steps": "one"}}}})
        found = await resources.until_ready("Projection", "orders", "False", "InvalidDefinition")
        message = condition(found, "Ready")["message"]
        assert 'on["Opened"].$inc.steps' in message
        assert condition(found, "Degraded")["status"] == "True"
        assert await empty[DEFINITIONS].count_documents({}) == 0
        await resources.patch("Projection", "orders", {"spec": {"on": {"Opened": {"$inc": {"steps": 1}}}}})
        await resources.until_ready("Projection", "orders", "Unknown", "ProjectorSilent")


async def test_a_projection_that_somebody_else_defined(
    operators: Operators, resources: Resources, empty: Database
) -> None:
    source = {"kind": "Projection", "namespace": "elsewhere", "name": "orders", "uid": "u", "generation": 1}
    foreign = {"_id": "orders", "definition": {"name": "orders", "version": 1}, "source": source}
    await empty[DEFINITIONS].insert_one(dict(foreign))
    async with operators.run():
        await resources.create("Projection", "orders", PROJECTION)
        found = await resources.until_ready("Projection", "orders", "False", "Conflict")
        assert "Projection elsewhere/orders" in condition(found, "Ready")["message"]
        await resources.delete("Projection", "orders")
        await resources.until_gone("Projection", "orders")
    assert await empty[DEFINITIONS].find_one({"_id": "orders"}) == foreign


async def test_duplicates_are_named_in_the_condition(
    operators: Operators, resources: Resources, empty: Database
) -> None:
    await empty["orders.v1"].insert_many([{"_id": "first", "email": "a@x"}, {"_id": "second", "email": "a@x"}])
    unique = {"keys": [{"field": "email"}], "unique": True}
    async with operators.run():
        await resources.create("Projection", "orders", PROJECTION | {"readModel": {"indexes": [unique]}})
        found = await resources.until_ready("Projection", "orders", "False", "DuplicateKey")
        assert index_state(found, "email_1") == "Failed"
        for part in ("email_1", "a@x", "first", "second"):
            assert part in condition(found, "Ready")["message"]


async def test_a_resource_whose_finalizer_was_taken_away(
    operators: Operators, resources: Resources, empty: Database
) -> None:
    async with operators.run(poll_seconds=60) as operator:
        await resources.create("EventStore", "main", store(empty))
        await resources.until_ready("EventStore", "main")
        await resources.delete("EventStore", "main")  # whatever the operator does about it in the meantime
        with contextlib.suppress(ApiError):
            await resources.patch("EventStore", "main", {"metadata": {"finalizers": None}})
        await resources.until_gone("EventStore", "main")

        async def forgotten() -> bool:
            return not operator._tracked

        await until(forgotten)


async def test_probes_and_metrics(operators: Operators, resources: Resources, empty: Database) -> None:
    async with (
        operators.run(poll_seconds=60, stalled_seconds=5) as operator,
        aiohttp.ClientSession(f"http://127.0.0.1:{operator.port}") as session,
    ):
        await resources.create("EventStore", "main", store(empty))
        await resources.until_ready("EventStore", "main")
        async with session.get("/healthz") as response:
            assert response.status == 200
            assert (await response.json())["status"] == "ok"
        async with session.get("/readyz") as response:
            assert await response.json() == {"status": "ready", "resources": 1}
        async with session.get("/metrics") as response:
            text = await response.text()
        labels = f'kind="EventStore",name="main",namespace="{resources.namespace}"'
        assert f'indexer_condition{{{labels},status="True",type="Ready"}} 1.0' in text
        assert f'indexer_condition{{{labels},status="False",type="Ready"}} 0.0' in text
        assert 'indexer_reconciles_total{kind="Projection",result="error"} 0.0' in text
        assert "indexer_build_info{" in text
        [tracked] = operator._tracked.values()
        tracked.due -= 1_000  # as if the pass that is due did not come
        async with session.get("/healthz") as response:
            assert response.status == 503
        await resources.delete("EventStore", "main")
        await resources.until_gone("EventStore", "main")

        async def forgotten() -> bool:
            async with session.get("/metrics") as response:
                return "indexer_condition{" not in await response.text()

        await until(forgotten)
