"""`projector run --from-database`: what stands in `projector.definitions` is what runs."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import pytest

from projector.catalog import DEFINITIONS, DefinitionRecord, Source, read_definition, read_statuses, write_definition
from projector.database_catalog import DatabaseCatalog
from projector.metrics import Metrics
from projector.ops import Ops
from projector.refusals import Conflict
from projector.supervisor import Supervisor
from tests.eventually import eventually
from tests.projecting import Writer, documents, metric, settings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from eventstore.client import Database


def counting(name: str, version: int = 1, step: int = 1, **read_model: Any) -> dict[str, Any]:
    """A declared projection that counts events."""
    return {
        "name": name, "version": version, "readModel": {"key": "$aggregateId"} | read_model,
        "on": {"counted": {"$inc": {"count": step}}},
    }  # fmt: skip


async def define(database: Database, definition: dict[str, Any], name: str | None = None, **fields: Any) -> None:
    """Makes it the definition of its name, as the operator does."""
    name = name or definition["name"]
    record = DefinitionRecord(name=name, definition=definition, **fields)
    await write_definition(database, record, await read_definition(database, name))


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
async def projector(database: Database, metrics: Metrics) -> AsyncIterator[Supervisor]:
    """A projector that runs what the database says."""
    supervisor = Supervisor(database, database, DatabaseCatalog(database), settings(lease_seconds=0.5), metrics)
    stopping = asyncio.Event()
    task = asyncio.create_task(supervisor.run(stopping))
    yield supervisor
    stopping.set()
    await asyncio.wait_for(task, 60)


async def _reaches(ops: Ops, name: str, aggregate_id: str, sequence_no: int, version: int = 1) -> None:
    async def shown() -> bool:
        with contextlib.suppress(Exception):
            detail = await ops.show(name)
            return detail.version == version and (await ops.wait(name, aggregate_id, sequence_no, timeout=1)).reached
        return False

    await eventually(shown, f"{name} shows {sequence_no}")


async def _error(database: Database, name: str, part: str) -> None:
    async def reported() -> bool:
        status = (await read_statuses(database)).get(name)
        return status is not None and part in (status.error or "")

    await eventually(reported, f"{name} reports {part}")


@pytest.mark.usefixtures("projector")
async def test_definitions_come_change_and_go(database: Database, metrics: Metrics) -> None:
    ops, writer = Ops(database, database), Writer(database)
    await writer.append("a", "counted")
    # A new one is built from history.
    await define(database, counting("one"))
    await _reaches(ops, "one", "a", 1)
    # A new version is built beside it and takes over.
    await define(database, counting("one", version=2, step=10))
    await _reaches(ops, "one", "a", 1, version=2)
    assert (await documents(database, "one"))["a"]["count"] == 10
    # A pause holds it.
    await define(database, counting("one", version=2, step=10), paused=True)

    async def paused() -> bool:
        return (await ops.show("one")).state == "paused" and not await database["projector.leases"].count_documents({})

    await eventually(paused)
    await writer.append("a", "counted")
    assert not (await ops.wait("one", "a", 2, timeout=0)).reached
    # It goes on, in more partitions.
    await define(database, counting("one", version=2, step=10), partitions=3)
    await _reaches(ops, "one", "a", 2, version=2)
    assert len((await ops.show("one")).partition_owners) == 3
    # A definition that is gone leaves the read model.
    record = await read_definition(database, "one")
    assert record is not None
    await database[DEFINITIONS].delete_one({"_id": "one"})

    async def nobody_runs_it() -> bool:
        return not await database["projector.leases"].count_documents({})

    await eventually(nobody_runs_it)
    assert (await documents(database, "one"))["a"]["count"] == 20
    assert metric(metrics, "projector_lag_seconds", projection="one") is None
    # Back again it goes on where it stood; marked for deletion, data and definition go.
    await writer.append("a", "counted")
    await define(database, counting("one", version=2, step=10))
    await _reaches(ops, "one", "a", 3, version=2)
    await database[DEFINITIONS].update_one({"_id": "one"}, {"$set": {"deleted": True, "deletionPolicy": "Delete"}})

    async def all_gone() -> bool:
        names = await database.list_collection_names()
        return not any(name.startswith("one") for name in names) and await read_definition(database, "one") is None

    await eventually(all_gone)
    for collection in ("projections", "builds", "checkpoints", "status", "leases"):
        assert await database[f"projector.{collection}"].count_documents({}) == 0, collection


@pytest.mark.usefixtures("projector")
async def test_one_that_is_wrong_is_reported_and_stops_no_other(database: Database) -> None:
    ops, writer = Ops(database, database), Writer(database)
    await database.create_collection("taken")
    await define(database, counting("good"))
    await writer.append("a", "counted")
    await _reaches(ops, "good", "a", 1)
    await define(database, counting("bad") | {"on": {"counted": {"$inc": {"count": "one"}}}})
    await define(database, counting("other-name"), name="misnamed")
    await define(database, counting("thief", collection="good"))
    await define(database, counting("squatter", collection="taken"))
    await define(database, counting("badly-indexed", indexes=[{"keys": {"count": 1}, "partialFilter": {"$or": 1}}]))
    await database[DEFINITIONS].insert_one({"_id": "garbage", "definition": 5})
    for name, part in (
        ("bad", "'one' must be a number"),
        ("misnamed", "'other-name', not 'misnamed'"),
        ("thief", "is that of the projection 'good'"),
        ("squatter", "MongoDB refused it"),
        ("badly-indexed", "MongoDB refused it"),
        ("garbage", "cannot be read"),
    ):
        await _error(database, name, part)
    await writer.append("a", "counted")
    await _reaches(ops, "good", "a", 2)
    # What was built goes on while its definition is wrong, or has changed without a new version.
    await define(database, counting("good") | {"on": {}})
    await _error(database, "good", "on")
    await writer.append("a", "counted")
    await _reaches(ops, "good", "a", 3)
    await define(database, counting("good", step=100))
    await _error(database, "good", "raise the version")
    await writer.append("a", "counted")
    await _reaches(ops, "good", "a", 4)
    assert (await documents(database, "good"))["a"]["count"] == 4
    # Put right, it reports nothing any more.
    await define(database, counting("good", version=2))

    async def content() -> bool:
        status = (await read_statuses(database))["good"]
        return status.error is None and status.version == 2

    await eventually(content)
    names = {each.name: each.state for each in await ops.projections()}
    assert names["bad"] == "failed"
    assert names["good"] == "live"


@pytest.mark.usefixtures("projector")
async def test_the_definition_has_the_last_word_on_how_it_is_run(database: Database) -> None:
    ops, writer = Ops(database, database), Writer(database)
    await define(database, counting("mine"))
    source = Source(kind="Projection", namespace="shop", name="theirs", uid="u", generation=1)
    await define(database, counting("theirs"), source=source)
    await writer.append("a", "counted")
    for name in ("mine", "theirs"):
        await _reaches(ops, name, "a", 1)
    with pytest.raises(Conflict, match=r"as Projection shop/theirs says: set spec.paused: true there"):
        await ops.pause("theirs")
    with pytest.raises(Conflict, match=r"spec.partitions: 4"):
        await ops.partitions("theirs", 4)
    with pytest.raises(Conflict, match="delete it there"):
        await ops.drop("theirs")
    assert (await ops.resume("theirs")).state == "live"
    # A definition that somebody wrote by hand is changed where it stands, or the next tick would undo it.
    await ops.pause("mine")
    record = await read_definition(database, "mine")
    assert record is not None
    assert record.paused
    assert (await ops.show("mine")).state == "paused"
    await ops.resume("mine")
    await writer.append("a", "counted")
    await _reaches(ops, "mine", "a", 2)


async def test_a_read_model_is_not_dropped_under_another_replica(database: Database) -> None:
    catalogs = [DatabaseCatalog(database), DatabaseCatalog(database)]
    first, second = (
        Supervisor(database, database, catalog, settings(lease_seconds=2.0), Metrics()) for catalog in catalogs
    )
    await define(database, counting("one"))
    for supervisor in (first, second):
        await supervisor.tick()
    await database[DEFINITIONS].update_one({"_id": "one"}, {"$set": {"deleted": True, "deletionPolicy": "Delete"}})
    await first.tick()
    assert await read_definition(database, "one") is not None, "the second replica still believes in it"
    await second.tick()
    await first.tick()
    assert await read_definition(database, "one") is None
    assert "one.v1" not in await database.list_collection_names()
    stopping = asyncio.Event()
    stopping.set()
    for supervisor in (first, second):
        await supervisor.run(stopping)
