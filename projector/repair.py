"""Repair of a lost position: the log itself says what the change stream can no longer tell.

A new token is taken first, then the heads of the log are compared with the marks (one index scan), and the events that are missing
are read and applied. Whatever is appended meanwhile comes by the new token. No loss, no full rebuild, no person.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

from eventstore import log as event_log
from projector.aside import reset
from projector.behind import differences
from projector.stream import BATCH_EVENTS, Batch

if TYPE_CHECKING:
    from eventstore.client import Database
    from projector.aside import Aside
    from projector.build import Build
    from projector.checkpoint import PartitionId
    from projector.position import Position

__all__ = ["InterruptedRepairError", "Repairable", "repair"]

GROUP: Final = 200
"""Aggregates read by one query. Its `$or` has a branch, thus an index seek, for each; MongoDB plans a few hundred well."""


class InterruptedRepairError(Exception):
    """The partition was asked to end: what has been read so far is written, and the next owner begins the repair again."""


class Repairable(Protocol):
    """What is needed of the loop of the partition."""

    log: Database
    database: Database
    build: Build
    partition: PartitionId
    aside: Aside
    position: Position

    @property
    def stopping(self) -> bool:
        """Whether the partition was asked to end."""

    async def take(self, batch: Batch) -> None:
        """Folds a batch."""

    async def flush(self) -> None:
        """Writes what has been folded, and the position."""


async def repair(loop: Repairable, fresh: Position) -> int:
    """Brings the partition up to date from the log and its position to `fresh`, taken before; returns the events read.

    Raises InterruptedRepairError when the partition is to end before that.
    """
    await loop.aside.load()
    behind: dict[str, int] = {}
    events = read = 0
    async for found in differences(loop.log, loop.database, loop.build, loop.partition.slots):
        if found.aggregate_id in loop.aside.records:
            continue  # it is read from its mark anyway
        if found.head < found.mark:
            loop.aside.fail(reset(found.aggregate_id, found.mark, found.head))
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
    async for events in event_log.batches_after(loop.log, marks, fields=loop.build.projection.fields):
        read += len(events)
        await loop.take(Batch(events, loop.position))
        if loop.stopping:
            await loop.flush()
            raise InterruptedRepairError
    await loop.flush()
    return read
