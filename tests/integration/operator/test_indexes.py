"""The passes over indexes against a real MongoDB: what is made, changed, refused, replaced, dropped and left alone."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import pytest
from bson.objectid import ObjectId
from pydantic import SecretStr
from pymongo import ASCENDING

from eventstore.embedded import ReplicaSet
from projector.operator import measure, ownership
from projector.operator.align import Alignment, Wishes, align, drop_ours
from projector.operator.build import Builder, Target
from projector.operator.indexes import Index
from projector.operator.mongo import Mongo
from projector.operator.ownership import Owner
from tests.conftest import need_mongod

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from eventstore.client import Database

ONE = Owner("Projection", "shop", "orders", "uid-1")
TWO = Owner("Projection", "shop", "others", "uid-2")
STATUS = Index("status_1", (("status", 1),))


class Bench:
    """A collection, and passes over it."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.builder = Builder()
        self.drifts: list[str] = []

    @property
    def database(self) -> Database:
        return self.target.mongo.database(self.target.database)

    async def align(self, *indexes: Index, owner: Owner = ONE, **options: Any) -> Alignment:
        return await align(
            self.target, Wishes(owner, indexes, **options), self.builder, lambda: None, self.drifts.append
        )

    async def settle(self, *indexes: Index, seconds: float = 20, **options: Any) -> Alignment:
        """Passes until nothing is being built."""
        deadline = time.monotonic() + seconds
        while True:
            found = await self.align(*indexes, **options)
            if not found.building:
                return found
            assert time.monotonic() < deadline, found
            await asyncio.sleep(0.05)

    async def indexes(self) -> dict[str, Index]:
        found = await measure.indexes_of(self.database, self.target.collection) or []
        return {one.index.name: one.index for one in found if one.index.name != "_id_"}

    async def insert(self, *documents: dict[str, Any]) -> None:
        await self.database[self.target.collection].insert_many(documents)


@pytest.fixture
async def bench(mongodb_uri: str, database_name: str) -> AsyncIterator[Bench]:
    mongo = Mongo(SecretStr(mongodb_uri))
    made = Bench(Target(mongo, database_name, "orders.v1"))
    yield made
    await made.builder.close()
    await mongo.client.drop_database(database_name)
    await mongo.close()


OPTIONS = [
    Index("i", (("a", 1), ("b", -1))),
    Index("i", (("b", -1), ("a", 1)), unique=True),
    Index("i", (("a", 1),), sparse=True),
    Index("i", (("a", 1),), hidden=True),
    Index("i", (("at", 1),), expire_after_seconds=3600),
    Index("i", (("a", 1),), partial_filter={"b": {"$gt": 1}, "c": {"$exists": True}}),
    Index("i", (("a", 1),), collation={"locale": "en", "strength": 2}),
    Index("i", (("a", 1),), collation={"locale": "da"}),
    Index("i", (("a", 1),), collation={"locale": "fr_CA", "numericOrdering": True}),
    Index("i", (("a", "hashed"),)),
    Index("i", (("place", "2dsphere"), ("a", 1))),
    Index("i", (("a", 1), ("text", "text"), ("title", "text"), ("z", -1))),
    Index("i", (("payload.order.total", 1),)),
]


@pytest.mark.parametrize("index", OPTIONS, ids=str)
async def test_what_was_made_is_what_is_wanted(bench: Bench, index: Index) -> None:
    assert (await bench.settle(index)).ready
    [found] = (await bench.indexes()).values()
    assert index.differences(found) == ()
    again = await bench.align(index)
    assert [status.state for status in again.indexes] == ["Ready"]
    assert bench.drifts == []


async def test_the_same_index_written_otherwise(bench: Bench) -> None:
    """What another program made with 1.0 and other orders of fields is the same index."""
    await bench.database.command(
        "createIndexes",
        "orders.v1",
        indexes=[{"name": "i", "key": {"a": 1.0, "b": -1.0}, "partialFilterExpression": {"y": 1.0, "x": {"$gt": 2}}}],
    )
    wanted = Index("i", (("a", 1), ("b", -1)), partial_filter={"x": {"$gt": 2}, "y": 1})
    assert (await bench.align(wanted)).ready


async def test_a_collection_with_a_collation_of_its_own(bench: Bench) -> None:
    await bench.database.create_collection("orders.v1", collation={"locale": "de"})
    assert (await bench.settle(STATUS)).ready
    assert (await bench.align(STATUS)).ready


async def test_a_dropped_index_comes_back(bench: Bench) -> None:
    await bench.settle(STATUS)
    await bench.database["orders.v1"].drop_index("status_1")
    assert (await bench.settle(STATUS, ready_before={"status_1"})).ready
    assert set(await bench.indexes()) == {"status_1"}
    assert bench.drifts == ["created"]


async def test_foreign_indexes_are_reported_and_stay(bench: Bench) -> None:
    await bench.database["orders.v1"].create_index([("theirs", ASCENDING)])
    for policy in (False, True):
        found = await bench.settle(STATUS, drop_unwanted=policy)
        assert found.foreign == ["theirs_1"]
    await drop_ours(bench.target, ONE)
    assert set(await bench.indexes()) == {"theirs_1"}


@pytest.mark.parametrize("drop", [True, False])
async def test_an_index_that_is_no_longer_wanted(bench: Bench, *, drop: bool) -> None:
    other = Index("other", (("other", 1),))
    await bench.settle(STATUS, other, drop_unwanted=drop)
    found = await bench.settle(STATUS, drop_unwanted=drop)
    assert set(await bench.indexes()) == ({"status_1"} if drop else {"status_1", "other"})
    assert found.foreign == ([] if drop else ["other"])


async def test_an_adopted_index_is_never_dropped(bench: Bench) -> None:
    await bench.database["orders.v1"].create_index([("status", ASCENDING)])
    assert (await bench.settle(STATUS, drop_unwanted=True)).ready
    await bench.settle(drop_unwanted=True)
    assert set(await bench.indexes()) == {"status_1"}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (Index("i", (("at", 1),)), Index("i", (("at", 1),), hidden=True)),
        (Index("i", (("at", 1),), hidden=True), Index("i", (("at", 1),))),
        (Index("i", (("at", 1),)), Index("i", (("at", 1),), expire_after_seconds=60)),
        (Index("i", (("at", 1),), expire_after_seconds=60), Index("i", (("at", 1),), expire_after_seconds=90)),
        (Index("i", (("at", 1),)), Index("i", (("at", 1),), unique=True)),
        (Index("i", (("at", 1),)), Index("i", (("at", 1),), unique=True, hidden=True, expire_after_seconds=5)),
    ],
    ids=str,
)
async def test_what_collmod_can_change_is_changed_in_place(bench: Bench, before: Index, after: Index) -> None:
    await bench.settle(before)
    assert (await bench.settle(after)).ready
    [found] = (await bench.indexes()).values()
    assert after.differences(found) == ()
    assert found.name == "i"


REPLACED = [
    (Index("i", (("a", 1),)), Index("i", (("b", 1),)), True),
    (Index("i", (("a", 1), ("b", 1))), Index("i", (("b", 1), ("a", 1))), True),
    (Index("i", (("a", 1),)), Index("i", (("a", 1),), sparse=True), True),
    (Index("i", (("a", 1),), unique=True), Index("i", (("a", 1),)), True),
    (Index("i", (("a", 1),)), Index("i", (("a", 1),), collation={"locale": "en"}), True),
    (Index("i", (("a", 1),)), Index("i", (("a", 1),), partial_filter={"b": 1}), True),
    (Index("i", (("a", 1),), expire_after_seconds=9), Index("i", (("a", 1),)), False),
]


@pytest.mark.parametrize(("before", "after", "beside"), REPLACED, ids=str)
async def test_what_cannot_be_changed_is_replaced_where_allowed(
    bench: Bench, before: Index, after: Index, *, beside: bool
) -> None:
    await bench.settle(before)
    refused = await bench.settle(after)
    assert [status.state for status in refused.indexes] == ["Drifted"]
    assert refused.problem is not None
    assert refused.problem[0] == "DriftDetected"
    assert list(await bench.indexes()) == ["i"]

    await bench.settle(after, recreate=True)
    done = await bench.settle(after, recreate=True)  # the pass that finds the new one drops the old one
    assert done.ready
    [found] = (await bench.indexes()).values()
    assert after.differences(found) == ()
    assert found.name == (after.beside().name if beside else "i")
    assert done.indexes[0].index == (found.name if beside else None)

    await bench.settle(before, recreate=True)
    await bench.settle(before, recreate=True)
    [back] = (await bench.indexes()).values()
    assert before.differences(back) == ()
    assert (await bench.align(before, recreate=True)).foreign == []


async def test_the_old_index_stands_until_the_new_one_does(bench: Bench) -> None:
    """A replacement that fails leaves what there was."""
    await bench.insert({"a": 1, "b": 1}, {"a": 2, "b": 1})
    await bench.settle(Index("i", (("a", 1),)))
    unique = Index("i", (("b", 1),), unique=True)
    found = await bench.settle(unique, recreate=True)
    assert found.problem is not None
    assert found.problem[0] == "DuplicateKey"
    assert list(await bench.indexes()) == ["i"]


async def test_duplicates_are_named_and_building_goes_on_when_they_are_gone(bench: Bench) -> None:
    first, second = ObjectId(), ObjectId()
    await bench.insert({"_id": first, "email": "a@x"}, {"_id": second, "email": "a@x"}, {"email": "b@x"})
    unique = Index("email_1", (("email", 1),), unique=True)
    found = await bench.settle(unique, STATUS)
    assert [status.state for status in found.indexes] == ["Failed", "Ready"]
    assert found.problem is not None
    reason, message = found.problem
    assert reason == "DuplicateKey"
    for part in ("email_1", "a@x", str(first), str(second)):
        assert part in message
    assert (await bench.settle(unique, STATUS)).problem == found.problem  # not tried again, and still said
    await bench.database["orders.v1"].delete_one({"_id": second})
    assert (await bench.settle(unique, STATUS)).ready


async def test_becoming_unique_names_duplicates_and_leaves_the_index_as_it_was(bench: Bench) -> None:
    ids = [ObjectId() for _ in range(4)]
    await bench.insert(*({"_id": identity, "email": "a@x"} for identity in ids))
    await bench.settle(Index("email_1", (("email", 1),)))
    unique = Index("email_1", (("email", 1),), unique=True)
    found = await bench.settle(unique)
    assert found.problem is not None
    assert found.problem[0] == "DuplicateKey"
    assert str(ids[0]) in found.problem[1]
    await bench.insert({"email": "a@x"})  # is not refused: the index is what it was
    await bench.database["orders.v1"].delete_many({"_id": {"$ne": ids[0]}})
    assert (await bench.settle(unique)).ready


async def test_an_index_of_another_name_with_the_same_keys(bench: Bench) -> None:
    await bench.database["orders.v1"].create_index([("status", ASCENDING)], name="theirs")
    found = await bench.settle(STATUS, recreate=True)
    assert found.problem is not None
    assert found.problem[0] == "IndexOptionsConflict"
    assert "theirs" in found.problem[1]
    assert set(await bench.indexes()) == {"theirs"}
    await bench.database["orders.v1"].drop_index("theirs")
    assert (await bench.settle(STATUS)).ready


@pytest.mark.parametrize(
    ("theirs", "reason"),
    [({"other": 1}, "IndexKeySpecsConflict"), ({"status": 1}, "IndexOptionsConflict")],
)
async def test_an_index_of_the_same_name_that_was_there_before(bench: Bench, theirs: Any, reason: str) -> None:
    await bench.database["orders.v1"].create_index(list(theirs.items()), name="status_1", sparse=True)
    found = await bench.settle(STATUS)
    assert found.problem is not None
    assert found.problem[0] == reason
    assert "status_1" in found.problem[1]
    assert (await bench.indexes())["status_1"].sparse


async def test_the_first_resource_owns_an_index(bench: Bench) -> None:
    await bench.settle(STATUS)
    other = Index("status_1", (("other", 1),))
    for _ in range(2):
        found = await bench.settle(other, owner=TWO, recreate=True, drop_unwanted=True)
        assert found.problem == ("Conflict", f"index status_1 of {bench.target.namespace} belongs to {ONE}")
    assert (await bench.align(STATUS)).ready
    await ownership.release_all(bench.database, ONE)
    await bench.settle(other, owner=TWO, recreate=True)
    assert (await bench.settle(other, owner=TWO, recreate=True)).ready


async def test_two_that_claim_an_index_at_once(bench: Bench) -> None:
    owners = [Owner("Projection", "shop", f"p{number}", f"uid-{number}") for number in range(8)]
    found = await asyncio.gather(*(bench.align(STATUS, owner=owner) for owner in owners))
    assert sum(1 for one in found if one.problem is None) == 1


async def test_a_resource_that_was_made_again_gets_its_indexes_back(bench: Bench) -> None:
    await bench.settle(STATUS)
    assert (await bench.settle(STATUS, owner=ONE._replace(uid="uid-new"))).ready
    found = await bench.settle(STATUS, owner=ONE)  # the name is what counts, and the last one has it
    assert found.ready


async def test_a_quiet_pass_reads_twice_and_writes_nothing(bench: Bench) -> None:
    await bench.settle(STATUS)
    before = await bench.database.command("serverStatus")
    for _ in range(5):
        await bench.align(STATUS)
    after = await bench.database.command("serverStatus")
    for kind in ("insert", "update", "delete"):
        assert after["opcounters"][kind] == before["opcounters"][kind]
    listed = (
        after["metrics"]["commands"]["listIndexes"]["total"] - before["metrics"]["commands"]["listIndexes"]["total"]
    )
    found = after["metrics"]["commands"]["find"]["total"] - before["metrics"]["commands"]["find"]["total"]
    assert (listed, found) == (5, 5)


@pytest.fixture
def failing_server() -> Iterator[str]:
    """A mongod that can be told to stop in the middle of something."""
    need_mongod()
    with ReplicaSet(parameters={"enableTestCommands": "1"}) as replica_set:
        yield replica_set.uri


async def test_a_build_is_watched_and_joined(failing_server: str) -> None:
    """Two builders, as after a restart: the second joins what the first began, and learns how it ends."""
    mongo = Mongo(SecretStr(failing_server))
    bench = Bench(Target(mongo, "shop", "orders.v1"))
    await bench.insert(*({"a": number % 1_000} for number in range(2_000)))
    index = Index("a_1", (("a", 1),), unique=True)
    hang = "hangAfterSettingUpIndexBuild"
    await mongo.client.admin.command("configureFailPoint", hang, mode="alwaysOn")
    try:
        first = await bench.align(index)
        assert [status.state for status in first.indexes] == ["Building"]
        build = await build_of(bench)
        assert build
        await bench.builder.close()
        bench.builder = Builder()
        second = await bench.align(index)
        assert [status.state for status in second.indexes] == ["Building"]
        assert await build_of(bench) == build
    finally:
        await mongo.client.admin.command("configureFailPoint", hang, mode="off")
    done = await bench.settle(index)
    assert done.problem is not None
    assert done.problem[0] == "DuplicateKey"
    await bench.builder.close()
    await mongo.close()


async def build_of(bench: Bench) -> str | None:
    """The buildUUID of the one index that is being built."""
    found = await measure.indexes_of(bench.database, bench.target.collection) or []
    return next((one.build for one in found if one.build), None)
