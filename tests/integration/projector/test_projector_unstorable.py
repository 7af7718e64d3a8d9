"""Documents that MongoDB or BSON cannot hold, and keys that cannot be one: the aggregate is set aside at the right event."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from eventstore.event import EVENTS
from projector.parking import skip_parked
from projector.projection import IndexSpec, Projection
from tests.eventually import eventually, eventually_equal
from tests.projecting import (
    Here,
    Writer,
    aside_at,
    begun,
    named,
    only,
    parked,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from eventstore.client import Database
    from projector.build import Build

    Model = Callable[[], Awaitable[dict[Any, Any]]]


def growing(**options: Any) -> Projection:
    """Documents that become too large, or what MongoDB refuses, by what the events say."""
    projection = Projection("growing", **options)

    @projection.on("grown")
    def _(state: dict[str, Any], event: dict[str, Any]) -> None:
        state["steps"] = state.get("steps", 0) + 1
        state.setdefault("parts", []).append("x" * event["payload"].get("size", 0))
        state.update(event["payload"].get("set", {}))
        if "number" in event["payload"]:
            state["number"] = 2 ** int(event["payload"]["number"])

    return projection


async def steps(database: Database, build: Build) -> dict[Any, int]:
    return {row["_id"]: row["steps"] async for row in database[build.collection].find({}, {"steps": 1})}


KEYS = pytest.mark.parametrize("key", ["$aggregateId", "$payload.room"], ids=["owned", "shared"])


@KEYS
@pytest.mark.parametrize(
    ("bad", "reason"),
    [({"size": 6 * 2**20}, "16 MiB"), ({"number": 64}, "8-byte ints"), ({"set": {"unique": "taken"}}, "duplicate key")],
    ids=["16MiB", "int64", "unique"],
)
async def test_a_document_that_cannot_be_stored_parks_its_aggregate_at_the_event(
    database: Database, key: str, bad: dict[str, Any], reason: str
) -> None:
    """The third "grown" in a row of seven in one transaction is what makes the document impossible; it is found."""
    index = IndexSpec(keys={"unique": 1}, unique=True, sparse=True)
    build = await begun(database, growing(key=key, indexes=[index]))
    writer, here = Writer(database), Here(database, retry_seconds=0)
    size = 6 * 2**20 if "size" in bad else 0
    payloads: list[dict[str, Any]] = [{"size": size}, {"size": size}, bad, {}, {}, {}, {}]
    async with here.runs(build, only(build)):
        await writer.append("taker", "grown", room="taker", set={"unique": "taken"})
        await eventually_equal(lambda: steps(database, build), {"taker": 1})
        pairs = [(name, payload) for payload in payloads for name in ("a", "b") if payload is not bad or name == "a"]
        await writer.insert([writer.next(name, "grown", room=name, **payload) for name, payload in pairs])
        await eventually(lambda: aside_at(database, "a", 3))
        await eventually_equal(lambda: steps(database, build), {"a": 2, "b": 6, "taker": 1})
        record = await eventually(lambda: named(database, "a"))
        assert (record["sequenceNo"], record["category"]) == (3, "write")
        assert reason in record["reason"]
        found = await database[EVENTS].find_one({"aggregateId": "a", "sequenceNo": 3})
        assert found is not None
        assert record["eventId"] == found["_id"]

        assert await skip_parked(database, build.id, "a", 3)
        await eventually_equal(lambda: steps(database, build), {"a": 6, "b": 6, "taker": 1})
        await eventually_equal(lambda: parked(database), {})


@pytest.mark.parametrize("value", [1.5, True, {"a": 1}, "\ud800"], ids=repr)
async def test_a_key_that_cannot_be_one_parks_its_aggregate(database: Database, value: Any) -> None:
    projection = Projection("keyed", key=lambda event: value if event["payload"].get("bad") else "x")

    @projection.on("counted")
    def _(state: dict[str, Any], event: dict[str, Any]) -> None:
        state["steps"] = state.get("steps", 0) + 1

    build = await begun(database, projection)
    writer, here = Writer(database), Here(database, retry_seconds=0)
    async with here.runs(build, only(build)):
        await writer.insert([writer.next("a"), writer.next("b"), writer.next("a", bad=True), writer.next("b")])
        await eventually(lambda: aside_at(database, "a", 2))
        await eventually_equal(lambda: steps(database, build), {"x": 3})
        assert await skip_parked(database, build.id, "a", 2)
        await eventually_equal(lambda: parked(database), {})
