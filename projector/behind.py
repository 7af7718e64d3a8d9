"""Comparing the heads of the log with the marks of a build: which aggregates are behind, and which ahead.

One pass over an index of each, merged by aggregateId, so that memory does not grow with the log. The repair of a lost position,
the rebuild's check and `verify` all ask this.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from eventstore import log as event_log
from eventstore.event import SLOTS, slot_of
from projector.owned import MARK

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from eventstore.client import Database
    from projector.build import Build

__all__ = ["Difference", "differences", "marks_of"]


class Difference(NamedTuple):
    """An aggregate whose mark is not its head. `head` 0: the log has no such aggregate."""

    aggregate_id: str
    mark: int
    head: int


async def differences(
    log: Database, database: Database, build: Build, slots: range = range(SLOTS)
) -> AsyncIterator[Difference]:
    """The aggregates of these slots whose mark is not their head, by descending aggregateId."""
    marks = marks_of(database, build)
    marked = await anext(marks, None)
    async for aggregate_id, head in event_log.all_heads(log):
        while marked is not None and marked[0] > aggregate_id:
            if slot_of(marked[0]) in slots:
                yield Difference(marked[0], marked[1], 0)
            marked = await anext(marks, None)
        mark = 0
        if marked is not None and marked[0] == aggregate_id:
            mark = marked[1]
            marked = await anext(marks, None)
        if mark != head and slot_of(aggregate_id) in slots:
            yield Difference(aggregate_id, mark, head)
    while marked is not None:
        if slot_of(marked[0]) in slots:
            yield Difference(marked[0], marked[1], 0)
        marked = await anext(marks, None)


async def marks_of(database: Database, build: Build) -> AsyncIterator[tuple[str, int]]:
    """All marks of a build, by descending aggregateId: those in documents and those beside them."""
    beside = _scan(database, build.marks, "mark")
    if not build.projection.aggregate_keyed:
        async for row in beside:
            yield row
        return
    inside = _scan(database, build.collection, MARK)
    left, right = await anext(inside, None), await anext(beside, None)
    while left is not None or right is not None:
        if right is None or (left is not None and left[0] > right[0]):
            assert left is not None  # noqa: S101 - not both are None
            yield left
            left = await anext(inside, None)
        elif left is None or right[0] > left[0]:
            yield right
            right = await anext(beside, None)
        else:  # deleted once, and there again
            yield left[0], max(left[1], right[1])
            left, right = await anext(inside, None), await anext(beside, None)


async def _scan(database: Database, collection: str, field: str) -> AsyncIterator[tuple[str, int]]:
    cursor = database[collection].find({}, {field: 1}).sort("_id", -1).batch_size(10_000)
    async for row in cursor:
        yield row["_id"], int(row.get(field, 0))
