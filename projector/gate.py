"""Whether a build that has caught up may become the one that readers see.

It must be what the log says: its marks are compared with all heads, a sample of its documents with a fresh fold. And it must not
lack aggregates that readers have now: when more of them are set aside than in the live build, a person decides.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final, NamedTuple

from eventstore import tasks
from projector.parking import PARKED, build_range
from projector.verify import verify

if TYPE_CHECKING:
    import datetime

    from eventstore.client import Database
    from projector.build import Build
    from projector.builds import BuildRecord, Control
    from projector.verify import Finding, Verification

__all__ = ["Decision", "Gate"]

SAMPLE: Final = 500
"""Documents compared: a fault in one of a hundred is missed once in 150 cut-overs, and it takes about a second."""

GRACE_SECONDS: Final = 2.0
"""How long a mark may stay behind its head. What is behind only puts the cut-over off, so that shorter is the cheaper mistake."""

PATIENCE_SECONDS: Final = 0.2
"""How long a tick waits for a verification: that of a short log is done by then, a longer one goes on beside it."""


class Decision(NamedTuple):
    """Whether to cut over now, and if not, what stands against it (None: it is only being looked at)."""

    ready: bool
    problem: str | None = None
    fatal: bool = False
    """The build is not what the log says; waiting will not mend it."""


class Gate:
    """Decides, and remembers for each build what was found."""

    def __init__(self, log: Database, database: Database) -> None:
        self._log = log
        self._database = database
        self._running: dict[tuple[str, datetime.datetime], asyncio.Task[Verification]] = {}
        self._faults: dict[tuple[str, datetime.datetime], str] = {}

    async def decide(self, build: Build, control: Control, record: BuildRecord) -> Decision:
        """Whether to cut over to this candidate, which has caught up. Raises errors of pymongo."""
        if record.id == control.previous:
            return Decision(ready=True)  # a person wants it back, whatever it is
        if decision := await self._aside(control, record):
            return decision
        key = record.id, record.created_at
        if fault := self._faults.get(key):
            return Decision(ready=False, problem=fault, fatal=True)
        running = self._running.get(key)
        if running is None:
            running = self._running[key] = tasks.start(self._verify(build, record))
        await asyncio.wait({running}, timeout=PATIENCE_SECONDS)
        if not running.done():
            return Decision(ready=False)
        del self._running[key]
        return self._judge(key, running.result())

    async def _verify(self, build: Build, record: BuildRecord) -> Verification:
        # A document of several aggregates can only be folded by reading the whole log: its marks must do.
        sample = SAMPLE if build.projection.aggregate_keyed else 0
        return await verify(self._log, self._database, build, record, sample=sample, grace_seconds=GRACE_SECONDS)

    def _judge(self, key: tuple[str, datetime.datetime], found: Verification) -> Decision:
        faults = [finding for finding in found.findings if finding.kind not in {"parked", "behind"}]
        if faults:
            self._faults[key] = f"{found.build} is not what the log says, so readers do not get it: {_text(faults[0])}"
            return Decision(ready=False, problem=self._faults[key], fatal=True)
        behind = [finding for finding in found.findings if finding.kind == "behind"]
        if behind:
            return Decision(ready=False, problem=f"{found.build} waits for its cut-over: {_text(behind[0])}")
        return Decision(ready=True)

    async def _aside(self, control: Control, record: BuildRecord) -> Decision | None:
        """What stands against a build that lacks aggregates of the live one; None when nothing does."""
        if control.live is None or control.cutover == record.id:
            return None  # readers have nothing else, or a person has decided
        counts = {"retrying": 0, "parked": 0}
        cursor = await self._database[PARKED].aggregate(
            [{"$match": {"_id": build_range(record.id)}}, {"$group": {"_id": "$state", "count": {"$sum": 1}}}]
        )
        async for row in cursor:
            counts[row["_id"]] = row["count"]
        if counts["retrying"]:
            return Decision(ready=False)  # soon it is either healed or parked
        live = await self._database[PARKED].count_documents({"_id": build_range(control.live)})
        if counts["parked"] <= live:
            return None
        return Decision(
            ready=False,
            problem=f"{record.id} has set {counts['parked']} aggregates aside, {control.live} {live}: "
            "retry or skip them, or order the cut-over",
        )

    def forget(self, record_id: str) -> None:
        """Has a build verified anew when it comes again."""
        self._faults = {key: fault for key, fault in self._faults.items() if key[0] != record_id}

    async def close(self) -> None:
        """Ends what is going on."""
        await tasks.end(self._running.values())
        self._running.clear()


def _text(finding: Finding) -> str:
    return f"{finding.key!r}: {finding.detail}"
