"""Where partitions get their batches: a change stream of their own, or a share of one that all near the head have in common.

A mongod of 2 cores delivers a bounded number of change events per second over all streams together (docs/explanation/), so twenty
streams of one process would each get a twentieth, and decode everything twenty times.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from projector.partition import OwnSource
from projector.stream import EventStream

if TYPE_CHECKING:
    from collections.abc import Iterable

    from eventstore.client import Database
    from projector.partition import Source
    from projector.position import Position

__all__ = ["Sources"]


class Sources:
    """The sources of a process."""

    def __init__(self, log: Database) -> None:
        self._log = log

    def open(self, position: Position, *, slots: range, fields: Iterable[str] | None) -> Source:
        """A source of batches after a position."""
        return OwnSource(EventStream(self._log, position, slots=slots, fields=fields))

    async def close(self) -> None:
        """Ends what is shared."""
