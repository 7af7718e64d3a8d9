"""Repair of a lost position: the log itself says what the change stream can no longer tell.

A new token is taken first, then the heads of the log are compared with the marks (one index scan), and the events that are missing
are read and applied. Whatever is appended meanwhile comes by the new token. No loss, no full rebuild, no person.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

from eventstore import log as event_log
from projector.behind import differences
from projector.changes import Failure
from projector.stream import BATCH_EVENTS, Batch

if TYPE_CHECKING:
    from eventstore.client import Database
    from projector.aside import Aside
    from projector.build import Build
    from projector.checkpoint import PartitionId
    from projector.position import Position

__all__ = ["Repairable", "repair"]

GROUP: Final = 200
"""Aggregates read by one query. Its `$or` has a branch, thus an index seek, for each; MongoDB plans a few hundred well."""


class Repairable(Protocol):
    """What is needed of the loop of the partition."""

    log: Database
    database: Database
    build: Build
    partition: PartitionId
    aside: Aside
    position: Position

    async def take(self, batch: Batch) -> None:
        """Folds a batch."""

    async def flush(self) -> None:
        """Writes what has been folded, and the position."""


async def repair(loop: Repairable, fresh: Position) -> int:
    """Brings the partition up to date from the log and its position to `fresh`, taken before; returns the events read."""
    await loop.aside.reload()
    behind: dict[str, int] = {}
    events = read = 0
    async for found in differences(loop.log, loop.database, loop.build, loop.partition.slots):
        if found.aggregate_id in loop.aside.records:
            continue  # it is read from its mark anyway
        if found.head < found.mark:
            reason = f"event {found.mark} was applied, but the log ends with {found.head}: it was restored, or is another one"
            loop.aside.fail(Failure(found.aggregate_id, found.mark, None, None, "reset", reason))
            continue
        behind[found.aggregate_id] = found.mark
        events += found.head - found.mark
        if len(behind) >= GROUP or events >= BATCH_EVENTS:
            read += await _apply(loop, behind)
            behind, events = {}, 0
    read += await _apply(loop, behind)
    loop.position = fresh
    await loop.flush()
    return read


async def _apply(loop: Repairable, marks: dict[str, int]) -> int:
    """Reads the events above these marks and applies them, in batches."""
    read = 0
    while marks:
        events = await event_log.events_after(loop.log, marks, limit=BATCH_EVENTS)
        if not events:
            break
        read += len(events)
        await loop.take(Batch([dict(event) for event in events], loop.position))
        await loop.flush()
        if len(events) < BATCH_EVENTS:
            break
        last = events[-1]
        # By aggregateId: those before the last one are complete.
        marks = {name: mark for name, mark in marks.items() if name >= last["aggregateId"]}
        marks[last["aggregateId"]] = int(last["sequenceNo"])
    return read
