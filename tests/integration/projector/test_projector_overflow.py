"""More than MongoDB's cache has room for in one transaction."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from pydantic import SecretStr

from eventstore.client import connect, open_database
from eventstore.embedded import ReplicaSet
from eventstore.indexes import provision
from projector.owned import OwnedChanges
from projector.projection import Projection
from projector.shared import _SharedChanges
from tests.conftest import need_mongod
from tests.eventually import eventually_equal
from tests.projecting import Here, Writer, begun, metric, only, parked

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from eventstore.client import Database
    from projector.changes import Changes

AGGREGATES = 60
"""Documents of 1 MiB, of which MongoDB holds two copies until the commit (the second for its oplog); a cache of 256 MiB has room
for some 40 MiB of one transaction."""


@pytest.fixture
async def cramped(database_name: str) -> AsyncIterator[Database]:
    """A database of a MongoDB with the smallest cache."""
    need_mongod()
    with ReplicaSet(cache_gib=0.25) as replica_set:
        async with connect(SecretStr(replica_set.uri), "test") as client:
            database = open_database(client, database_name)
            await provision(database)
            yield database


@pytest.mark.parametrize(
    ("kind", "key"),
    [(OwnedChanges, "$aggregateId"), (_SharedChanges, lambda event: event["aggregateId"])],
    ids=["owned", "shared"],
)
async def test_it_is_written_in_parts(
    cramped: Database, monkeypatch: pytest.MonkeyPatch, kind: type[Changes], key: Any
) -> None:
    """Nobody is blamed for it: no aggregate is set aside but the one whose own event fails, and nothing begins anew."""
    projection = Projection("large", key=key)

    @projection.on("*")
    def _(state: dict[str, Any], event: dict[str, Any]) -> None:
        state.setdefault("applied", []).append(event["sequenceNo"])
        state.setdefault("text", "x" * 2**20)
        if event["eventName"] == "spoilt":
            raise RuntimeError("made to fail")

    split: list[int] = []
    halves = kind.halves

    def noted(self: Any) -> Any:
        split.append(self.events)
        return halves(self)

    monkeypatch.setattr(kind, "halves", noted)
    build = await begun(cramped, projection)
    writer, here = Writer(cramped), Here(cramped)
    here.metrics.start("large")
    names = [f"aggregate-{number}" for number in range(AGGREGATES)]

    async def applied() -> dict[str, list[int]]:
        return {row["_id"]: row["applied"] async for row in cramped[build.collection].find({}, {"applied": 1})}

    async def aside() -> dict[str, int]:
        return {name: record["sequenceNo"] for name, record in (await parked(cramped)).items()}

    async with here.runs(build, only(build)):
        events = [writer.next(name) for _ in range(2) for name in names]
        await writer.insert([*events, writer.next(names[7], "spoilt"), writer.next(names[8])])
        await eventually_equal(applied, {name: [1, 2] for name in names} | {names[8]: [1, 2, 3]}, timeout=60)
        await eventually_equal(aside, {names[7]: 3})
    assert split
    restarts = "projector_stream_restarts_total"
    for reason in ("unavailable", "unexpected"):
        assert metric(here.metrics, restarts, projection="large", reason=reason) == 0
