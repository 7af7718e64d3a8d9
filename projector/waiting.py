"""Reading one's own writes: waits until the read model shows an event.

The appender says which sequenceNo an event got; once the live build's mark of the aggregate is there, a read through the view
shows it. Sound, since a mark is written in the transaction of the document, and events of an aggregate come in order.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Final

from msgspec import Struct

from eventstore.event import EVENTS
from projector.applied import first_pending, marks_of_aggregates
from projector.builds import build_of, read_builds, read_control
from projector.parking import PARKED, parked_id

if TYPE_CHECKING:
    from eventstore.client import Database
    from projector.builds import BuildRecord
    from projector.projection import Projection

__all__ = ["Waited", "wait_for"]

FIRST_PAUSE_SECONDS: Final = 0.01
LONGEST_PAUSE_SECONDS: Final = 0.2
"""Two small reads per look: seldom enough for a thousand that wait, often enough for a person."""


class Waited(Struct, frozen=True, kw_only=True, rename="camel"):
    """How a wait ended."""

    name: str
    aggregate_id: str
    sequence_no: int
    reached: bool
    """A read through the view shows the event, or would if it changed anything."""
    mark: int
    """The last sequenceNo of the aggregate that the live build has applied."""
    build: str | None = None
    reason: str | None = None
    """Why it was not reached, as far as that is known."""


async def wait_for(
    log: Database,
    database: Database,
    name: str,
    aggregate_id: str,
    sequence_no: int,
    *,
    timeout: float,
    code: Projection | None = None,
) -> Waited:
    """Waits at most `timeout` seconds. `code` is the projection in Python, which alone tells which events it handles."""
    deadline = time.monotonic() + timeout
    pause = FIRST_PAUSE_SECONDS
    watch = _Watch(log, database, aggregate_id, sequence_no, code)
    while True:
        record = await _live(database, name)
        # A cut-over in between would make this the answer of a build that readers no longer see.
        reached = await watch.look(record) and await _live(database, name) == record
        if reached or time.monotonic() >= deadline:
            return Waited(
                name=name,
                aggregate_id=aggregate_id,
                sequence_no=sequence_no,
                reached=reached,
                mark=watch.mark,
                build=record.id if record else None,
                reason=None if reached else await watch.reason(record),
            )
        await asyncio.sleep(min(pause, max(0.0, deadline - time.monotonic())))
        pause = min(pause * 1.5, LONGEST_PAUSE_SECONDS)


async def _live(database: Database, name: str) -> BuildRecord | None:
    control = await read_control(database, name)
    if control is None or control.live is None:
        return None
    return (await read_builds(database, name)).get(control.live)


class _Watch:
    """Looks at one aggregate; reads the log only when the mark has moved past what it waited for."""

    def __init__(
        self, log: Database, database: Database, aggregate_id: str, sequence_no: int, code: Projection | None
    ) -> None:
        self._log = log
        self._database = database
        self._aggregate_id = aggregate_id
        self._sequence_no = sequence_no
        self._code = code
        self._build: str | None = None
        self._blocking = 0
        self.mark = 0

    async def look(self, record: BuildRecord | None) -> bool:
        """Whether the build shows the event."""
        if record is None:
            return False
        if record.id != self._build:
            self._build, self._blocking = record.id, 0
        self.mark = (await marks_of_aggregates(self._database, record, [self._aggregate_id]))[self._aggregate_id]
        if self.mark >= self._sequence_no:
            return True
        if self.mark < self._blocking:
            return False
        build = build_of(record, self._code)
        if build is None:
            return False
        pending = await first_pending(
            self._log, build.projection, {self._aggregate_id: self.mark}, {self._aggregate_id: self._sequence_no}
        )
        blocking = pending.get(self._aggregate_id)
        if blocking is None:
            return True
        # An event that the log lacks may come yet, and may then turn out to change nothing: it is looked for again.
        self._blocking = blocking if await self._exists(blocking) else 0
        return False

    async def _exists(self, sequence_no: int) -> bool:
        query = {"aggregateId": self._aggregate_id, "sequenceNo": sequence_no}
        return await self._log[EVENTS].find_one(query, {"_id": 1}) is not None

    async def reason(self, record: BuildRecord | None) -> str | None:
        """Why the event is not shown, as far as that can be told."""
        if record is None:
            return "the projection has no read model yet: its first build is not done"
        parked = await self._database[PARKED].find_one({"_id": parked_id(record.id, self._aggregate_id)})
        if parked is not None:
            return f"the aggregate is set aside at event {parked['sequenceNo']}: {parked['reason']}"
        if not await self._exists(self._sequence_no):
            return f"the log has no event {self._sequence_no} of this aggregate"
        return None
