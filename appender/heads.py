"""The last sequenceNo of the aggregates that were written lately: a bounded guess that the unique index keeps honest.

An entry is what a majority acknowledged or what a majority read returned, so the log holds at least that many events:
writing on top of it can conflict, but can never leave a gap. Where other appenders write the same aggregate, guesses
lose; such an aggregate is *contended* for a while and has no entry.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from typing import Final

__all__ = ["Heads"]

CONTENDED_SECONDS: Final = 2.0
"""How long an aggregate stays contended after a conflict. Too short costs a lost write per change of hands, too long a
read inside a transaction per batch: the latter is cheaper, but not for ever."""

CONTENDED_AGGREGATES: Final = 4_096


class Heads:
    """LRU map from aggregateId to its last known sequenceNo, of at most `size` entries."""

    __slots__ = ("_contended", "_heads", "_size")

    def __init__(self, size: int) -> None:
        self._heads: OrderedDict[str, int] = OrderedDict()
        self._contended: OrderedDict[str, float] = OrderedDict()
        self._size = size

    def __len__(self) -> int:
        return len(self._heads)

    def get(self, aggregate_id: str) -> int | None:
        """The last known sequenceNo; None when it must be read."""
        found = self._heads.get(aggregate_id)
        if found is not None:
            self._heads.move_to_end(aggregate_id)
        return found

    def put(self, aggregate_id: str, sequence_no: int) -> None:
        """Remembers what a majority has; forgets the entry used least recently when there are too many."""
        if self._contended and self.contended(aggregate_id):
            return
        self._heads[aggregate_id] = sequence_no
        self._heads.move_to_end(aggregate_id)
        if len(self._heads) > self._size:
            self._heads.popitem(last=False)

    def forget(self, aggregate_id: str) -> None:
        """The entry may be wrong: the next append reads."""
        self._heads.pop(aggregate_id, None)

    def conflicted(self, aggregate_id: str) -> None:
        """Another writer took the number: read before each write for a while."""
        self.forget(aggregate_id)
        self._contended[aggregate_id] = time.monotonic() + CONTENDED_SECONDS
        self._contended.move_to_end(aggregate_id)
        if len(self._contended) > CONTENDED_AGGREGATES:
            self._contended.popitem(last=False)

    def contended(self, aggregate_id: str) -> bool:
        """Whether another writer was met on this aggregate lately."""
        until = self._contended.get(aggregate_id)
        if until is None:
            return False
        if until > time.monotonic():
            return True
        del self._contended[aggregate_id]
        return False
