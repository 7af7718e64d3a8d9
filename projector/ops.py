"""What a person can ask of projections, and do to them: the verbs of the command and of the HTTP API.

They read and write MongoDB; whoever runs the projection sees it within a tick. None of them needs a projector to be running,
but a verb whose effect needs one says so when it is clear that none can bring it about.
"""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING, Any, Final

from projector import builds
from projector.catalog import DEFINITIONS, read_definition
from projector.lease import REPLICAS
from projector.overview import Overview, ParkedInfo, ParkedPage
from projector.parking import PARKED, Parked, build_range, parked_id, retry_parked, skip_parked
from projector.refusals import Conflict, Invalid, NotFound
from projector.status import REPORTS
from projector.verify import GRACE_SECONDS, verify
from projector.waiting import wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from eventstore.client import Database
    from projector.build import Build
    from projector.builds import BuildRecord, Control
    from projector.overview import Detail, Summary
    from projector.projection import Projection
    from projector.verify import Verification
    from projector.waiting import Waited

__all__ = ["MAX_PARTITIONS", "MAX_WAIT_SECONDS", "PAGE", "Ops"]

MAX_PARTITIONS: Final = 64
"""Of 16 slots each: more replicas than a projection can make use of, since MongoDB's stream ends before."""

MAX_WAIT_SECONDS: Final = 300.0
PAGE: Final = 100
LARGEST_PAGE: Final = 1_000
_NAMES: Final = 20


class Ops:
    """The verbs. Each raises `projector.refusals.NotFound` for a name that nothing is known of.

    `code` gives the projections that were written in Python and are at hand, by name.
    """

    def __init__(self, log: Database, database: Database, code: Callable[[], Mapping[str, Projection]] = dict) -> None:
        self.log = log
        self.database = database
        self.grace_seconds = GRACE_SECONDS
        """How long `verify` lets a mark be behind."""
        self._code = code

    # Looking

    async def projections(self) -> list[Summary]:
        """All projections that are defined, run, or have been run, by name."""
        return (await Overview.read(self.database)).summaries()

    async def show(self, name: str) -> Detail:
        """Everything about one: builds, partitions and their owners, lag, rebuild, aggregates set aside."""
        overview = await Overview.read(self.database)
        if name not in overview.names:
            raise await self._unknown(name)
        return await overview.detail(name)

    async def wait(self, name: str, aggregate_id: str, sequence_no: int, timeout: float = 10.0) -> Waited:
        """Waits until a read through the view shows an event; at most `timeout` seconds, capped at 300."""
        if sequence_no < 1:
            raise Invalid("sequenceNo", "must be at least 1")
        await self._control(name)
        timeout = min(timeout, MAX_WAIT_SECONDS)
        return await wait_for(
            self.log,
            self.database,
            name,
            aggregate_id,
            sequence_no,
            timeout=timeout,
            code=self._code().get(name),
        )

    async def verify(self, name: str, sample: int | None = None) -> Verification:
        """Compares the live build with the log: its marks with all heads, its documents with a fresh fold of the log.

        `sample`: about how many documents; None is all. Raises Conflict when it cannot be done.
        """
        control = await self._control(name)
        if control.live is None:
            raise Conflict(f"{name} has no read model yet: its first build is not done")
        build, record = await self._build(name, control.live)
        return await verify(self.log, self.database, build, record, sample=sample, grace_seconds=self.grace_seconds)

    # Running

    async def pause(self, name: str) -> Summary:
        """Has everybody stop running it; what it has applied stays."""
        control = await self._control(name)
        await self._configure(control, paused=True)
        return await self._summary(name)

    async def resume(self, name: str) -> Summary:
        """Takes a pause back, and lets one that has failed try again."""
        control = await self._control(name)
        if control.failed:
            await builds.set_control(self.database, name, failed=None)
        if control.paused:
            await self._configure(control, paused=False)
        return await self._summary(name)

    async def partitions(self, name: str, count: int) -> Summary:
        """Shares it among up to `count` replicas; it goes on where it stands."""
        if not 1 <= count <= MAX_PARTITIONS:
            raise Invalid("partitions", f"must be 1 to {MAX_PARTITIONS}, not {count}")
        await self._configure(await self._control(name), partitions=count)
        return await self._summary(name)

    async def _configure(self, control: Control, **fields: Any) -> None:
        """Sets how a projection is run: in its definition where there is one, since that has the last word."""
        definition = await read_definition(self.database, control.name)
        if definition is not None and definition.source is not None:
            source = definition.source
            wanted = ", ".join(f"spec.{field}: {str(value).lower()}" for field, value in fields.items())
            raise Conflict(
                f"{control.name} is run as {source.kind} {source.namespace}/{source.name} says: set {wanted} there"
            )
        if definition is not None:
            changed = fields | {"updatedAt": datetime.datetime.now(datetime.UTC)}
            await self.database[DEFINITIONS].update_one({"_id": control.name}, {"$set": changed})
        await builds.set_control(self.database, control.name, **fields)

    # Builds

    async def rebuild(self, name: str) -> str:
        """Begins to build the live version anew beside itself; returns the build's id. Raises Conflict."""
        control = await self._control(name)
        if control.candidate is not None:
            raise Conflict(f"{control.candidate} is being built already")
        if control.live is None:
            raise Conflict(f"{name} has no build yet")
        build, _ = await self._build(name, control.live)
        started = await builds.start_rebuild(self.log, self.database, build.projection, control.partitions)
        return started.id

    async def cutover(self, name: str) -> str:
        """Orders the cut-over to the build that waits for it, as soon as it has caught up; returns its id."""
        control = await self._control(name)
        if control.candidate is None:
            raise Conflict(f"{name} has no build that could take over; {control.live} is live")
        same = {"candidate": control.candidate}
        if not await builds.set_control(self.database, name, where=same, cutover=control.candidate):
            raise Conflict(f"{control.candidate} was cut over to, or given up, at this moment")
        return control.candidate

    async def rollback(self, name: str) -> str:
        """Cuts over to the build before the live one, once it has caught up again; returns its id.

        Raises Conflict when there is none, when another one is being built, or when nobody has the code to run it.
        """
        control = await self._control(name)
        if control.previous is None:
            raise Conflict(f"{name} has no previous build")
        if control.candidate is not None:
            raise Conflict(
                f"{control.candidate} is on its way to be cut over to; `cancel` a rebuild first, or wait for it"
            )
        record = (await builds.read_builds(self.database, name)).get(control.previous)
        if record is None:
            raise Conflict(f"{control.previous} has been dropped")
        if record.definition is None and record.id not in await self._announced():
            raise Conflict(
                f"{record.id} was written in Python, and no projector that runs now has version {record.version} of its code: "
                "deploy that version, then roll back"
            )
        # What it said of itself when it was live is no longer true.
        await self.database[REPORTS].delete_many({"_id": build_range(record.id)})
        same = {"live": control.live, "candidate": None, "previous": record.id}
        if not await builds.set_control(self.database, name, where=same, candidate=record.id, cutover=record.id):
            raise Conflict(f"the builds of {name} changed at this moment; look again")
        return record.id

    async def cancel(self, name: str) -> str:
        """Gives up a rebuild (or a rollback) that has not been cut over; returns the build's id. Raises Conflict."""
        control = await self._control(name)
        known = await builds.read_builds(self.database, name)
        live, candidate = known.get(control.live or ""), known.get(control.candidate or "")
        if candidate is None:
            raise Conflict(f"nothing of {name} is being built")
        returning = candidate.id == control.previous
        if live is None or (candidate.version != live.version and not returning):
            raise Conflict(
                f"{candidate.id} is being built because version {candidate.version} is defined, and would be begun again: "
                "change the definition"
            )
        same = {"candidate": candidate.id, "live": live.id}
        if not await builds.set_control(self.database, name, where=same, candidate=None, cutover=None):
            raise Conflict(f"{candidate.id} was cut over to at this moment")
        if not returning:
            await builds.drop_build(self.database, candidate)
        return candidate.id

    async def drop(self, name: str) -> None:
        """Removes a projection that is no longer run: view, builds, bookkeeping. Raises Conflict while somebody runs it."""
        await self._control(name)
        if (await read_definition(self.database, name)) is not None:
            raise Conflict(f"{name} is defined in {DEFINITIONS}: delete it there (or its Projection resource)")
        if (await self._announced()).intersection(await builds.read_builds(self.database, name)):
            raise Conflict(f"{name} is being run: take it out of the projector's folder or module first")
        await builds.drop_projection(self.database, name)

    async def _announced(self) -> set[str]:
        """The builds that the projectors that run now could run."""
        alive = {"$expr": {"$gt": ["$expiresAt", "$$NOW"]}}
        return {build async for row in self.database[REPLICAS].find(alive, {"builds": 1}) for build in row["builds"]}

    # Aggregates that are set aside

    async def parked(self, name: str, *, after: str = "", limit: int = PAGE) -> ParkedPage:
        """A page of the aggregates that the live build and the one in the making have set aside; `after` is the `next` of
        the page before."""
        if not 1 <= limit <= LARGEST_PAGE:
            raise Invalid("limit", f"must be 1 to {LARGEST_PAGE}, not {limit}")
        ranges = [{"_id": build_range(build)} for build in await self._current(name)]
        if not ranges:
            return ParkedPage(parked=[])
        query: dict[str, Any] = {"$and": [{"$or": ranges}, {"_id": {"$gt": after}}]}
        rows = await self.database[PARKED].find(query).sort("_id", 1).limit(limit).to_list(limit)
        following = rows[-1]["_id"] if len(rows) == limit else None
        return ParkedPage(parked=[ParkedInfo.of(Parked.load(row)) for row in rows], next=following)

    async def retry(self, name: str, aggregate_id: str | None = None) -> int:
        """Has an aggregate that is set aside, or all of them, tried again now; returns how many."""
        count = 0
        for build in await self._current(name):
            count += await retry_parked(self.database, build, aggregate_id)
        if aggregate_id is not None and not count:
            raise NotFound(f"{name} has not set the aggregate {aggregate_id!r} aside")
        return count

    async def skip(self, name: str, aggregate_id: str, sequence_no: int) -> None:
        """Has the event in an aggregate's way passed over for good, and the aggregate tried again.

        Raises NotFound when it is not set aside, Conflict when another event stands in its way.
        """
        current = await self._current(name)
        done = [await skip_parked(self.database, build, aggregate_id, sequence_no) for build in current]
        if any(done):
            return
        ids = [parked_id(build, aggregate_id) for build in current]
        found = await self.database[PARKED].find_one({"_id": {"$in": ids}})
        if found is None:
            raise NotFound(f"{name} has not set the aggregate {aggregate_id!r} aside")
        raise Conflict(f"event {found['sequenceNo']} stands in the way of {aggregate_id!r}, not {sequence_no}")

    async def _current(self, name: str) -> list[str]:
        control = await self._control(name)
        return [build for build in (control.live, control.candidate) if build is not None]

    # What they share

    async def _control(self, name: str) -> Control:
        control = await builds.read_control(self.database, name)
        if control is None:
            raise await self._unknown(name)
        return control

    async def _unknown(self, name: str) -> NotFound:
        known = (await Overview.read(self.database)).names
        names = ", ".join(known[:_NAMES]) + (", …" if len(known) > _NAMES else "")
        return NotFound(f"there is no projection {name!r}; there is {names or 'none at all'}", known=known[:_NAMES])

    async def _summary(self, name: str) -> Summary:
        return (await Overview.read(self.database)).summary(name)

    async def _build(self, name: str, build_id: str) -> tuple[Build, BuildRecord]:
        """A build with its fold. Raises Conflict when that is not at hand."""
        record = (await builds.read_builds(self.database, name)).get(build_id)
        if record is None:
            raise Conflict(f"{build_id} has been dropped")
        build = builds.build_of(record, self._code().get(name))
        if build is None:
            raise Conflict(
                f"{build_id} was written in Python, and version {record.version} of its code is not at hand here: "
                "name its module (--module)"
            )
        return build, record
