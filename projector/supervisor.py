"""Who runs what: shares the partitions of all builds among the replicas, and brings candidates to their cut-over.

Every tick each replica says that it lives, renews its leases, takes what is free up to its fair share, and gives back what is over
it. Nothing here is needed for correctness, which the checkpoints' epochs give; it only makes somebody run everything.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import time
import uuid
from collections import Counter
from typing import TYPE_CHECKING, Any, Final

import pymongo
import structlog
from pymongo.errors import OperationFailure, PyMongoError

from eventstore import tasks, tracing
from eventstore.client import cause
from eventstore.errors import Meaning, classify
from projector.aside import StoppedError
from projector.builds import (
    Control,
    build_of,
    cut_over,
    drop_build,
    ensure_build,
    obsolete,
    partitions_of,
    read_builds,
    read_controls,
    set_control,
)
from projector.checkpoint import FencedError, ensure_layout
from projector.gate import Gate
from projector.lease import Leases
from projector.partition import Partition
from projector.sources import Sources
from projector.status import Reports

if TYPE_CHECKING:
    import datetime
    from collections.abc import Iterator, Mapping

    from pydantic import SecretStr

    from eventstore.client import Database
    from projector.build import Build
    from projector.builds import BuildRecord
    from projector.checkpoint import PartitionId
    from projector.metrics import Metrics
    from projector.position import Position
    from projector.projection import Projection
    from projector.settings import ProjectorSettings
    from projector.sources import Source
    from projector.wanted import Catalog, Wanted

__all__ = ["Supervisor"]

_log = structlog.stdlib.get_logger(__name__)

TICKS_PER_LEASE: Final = 5
LONGEST_TICK_SECONDS: Final = 1.0
SHORTEST_DEADLINE_SECONDS: Final = 5.0


class _Running:
    """A partition that this replica runs."""

    def __init__(self, partition: Partition, build: Build, drain_seconds: float) -> None:
        self.partition = partition
        self.build = build
        self.task = tasks.start(partition.run(), name=str(partition.id))
        self._drain_seconds = drain_seconds
        self._overdue: float | None = None

    @property
    def stopping(self) -> bool:
        """Whether it was asked to end."""
        return self._overdue is not None

    def stop(self) -> None:
        """Asks it to end after its last write."""
        if self._overdue is None:
            self._overdue = time.monotonic() + self._drain_seconds + 5
            self.partition.stop()

    async def ended(self) -> None:
        """Waits for its end, and brings it about when it takes too long."""
        assert self._overdue is not None  # noqa: S101 - asked of what was stopped
        await asyncio.wait({self.task}, timeout=max(0.0, self._overdue - time.monotonic()))
        await tasks.end([self.task])

    def cancel_if_overdue(self) -> None:
        """Cancels it when its time to drain is over: what it had not written is folded again by the next owner."""
        if self._overdue is not None and time.monotonic() >= self._overdue:
            self.task.cancel()


class Supervisor:
    """The projector of a process; also what its partitions see of it (`projector.surroundings.Surroundings`)."""

    def __init__(
        self,
        log: Database,
        database: Database,
        catalog: Catalog,
        settings: ProjectorSettings,
        metrics: Metrics,
        *,
        uri: SecretStr | None = None,
    ) -> None:
        self.log = log
        self.database = database
        self.settings = settings
        self.metrics = metrics
        self.uri = uri
        self.owner = uuid.uuid4().hex
        self.leases = Leases(database, self.owner, settings.lease_seconds)
        self.sources = Sources(log)
        self.reports = Reports(log, database, metrics, self.owner)
        self.gate = Gate(log, database)
        self.running: dict[str, _Running] = {}
        self.projections: dict[str, Projection] = {}
        """What the catalog wanted last, by name."""
        self.last_tick = 0.0
        """`time.monotonic()` of the last tick that went through."""
        self.last_turn: float | None = None
        """The same of the last one that began; None before the first."""
        self.tick_seconds = max(settings.lease_seconds, SHORTEST_DEADLINE_SECONDS)
        """A tick that takes longer fails."""
        self._catalog = catalog
        self._started: set[str] = set()
        self._able: dict[tuple[str, datetime.datetime], Build] = {}  # also builds that are not to run: for a rollback
        self._problems: dict[str, str] = {}
        self._reported: dict[str, str] = {}
        self._trouble = ""
        self._controls: dict[str, Control] = {}

    def source(self, build: Build, position: Position, slots: range) -> Source:
        """Opens a source of batches for a partition."""
        return self.sources.open(position, slots=slots, fields=tracing.fields(build.projection.fields))

    async def run(self, stopping: asyncio.Event) -> None:
        """Until `stopping`; then every partition writes what it has folded, and all leases are given back."""
        tick = min(LONGEST_TICK_SECONDS, self.settings.lease_seconds / TICKS_PER_LEASE)
        try:
            while not stopping.is_set():
                self.last_turn = time.monotonic()
                try:
                    # pymongo's own deadline: to cancel it amid a server selection can leave its locks in disorder.
                    with pymongo.timeout(self.tick_seconds):
                        await self.tick()
                    self.last_tick = time.monotonic()
                    self._trouble = ""
                except (PyMongoError, TimeoutError) as error:
                    self._report(error)
                self.reports.show(self.running, self._controls)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(tick):
                        await stopping.wait()
        finally:
            await self._shut_down()

    def _report(self, error: Exception) -> None:
        """One line for each new kind of trouble, not one for each tick."""
        error = cause(self.database.client, error)
        trouble = f"{type(error).__name__} {getattr(error, 'code', None)}"
        if trouble != self._trouble:
            self._trouble = trouble
            log = _log.error if classify(error) in {Meaning.UNEXPECTED, Meaning.DENIED} else _log.warning
            log("tick_failed", error=type(error).__name__, code=getattr(error, "code", None), reason=str(error)[:500])

    async def tick(self) -> None:
        """One round of everything."""
        # First of all, for the rest may take its time: a lease that was not renewed is lost.
        held = await self.leases.renew(self.running)
        for name in self.running.keys() - held:
            self.running[name].stop()
        controls, builds = await self._prepare()
        self._controls = controls
        runnable = {build.id: (build, control) for build, control in builds}
        partitions = {
            str(partition): partition
            for build, control in builds
            if not control.failed and not control.paused
            for partition in partitions_of(build.id, control.partitions)
        }
        await self._reap(controls)
        for name in self.running.keys() - partitions.keys():
            self.running[name].stop()
        peers = await self.leases.announce(sorted(build.id for build in self._able.values()))
        await self._share(partitions, runnable, peers)
        trouble: PyMongoError | None = None
        try:
            await self._cut_over_candidates(runnable)
        except PyMongoError as error:  # what cannot be verified now must not keep all others from saying where they are
            trouble = error
        self._report_problems()
        await self.reports.write(self.running, controls, runnable, peers, self._problems)
        if trouble is not None:
            raise trouble

    async def _prepare(self) -> tuple[dict[str, Control], list[tuple[Build, Control]]]:
        """Begins builds that are missing, drops those that are over; returns what is to run of what this replica can run."""
        wanted = {item.projection.name: item for item in await self._catalog.wanted()}
        self.projections = {name: item.projection for name, item in wanted.items()}
        self._problems = dict(self._catalog.problems)
        self._count(wanted)
        controls = await read_controls(self.database)
        records = await read_builds(self.database)
        for name, item in wanted.items():
            known = [record for record in records.values() if record.projection == name]
            self._check_version(item, known)
            if name not in controls or not any(record.version >= item.projection.version for record in known):
                with self._isolated(name):
                    await ensure_build(
                        self.log,
                        self.database,
                        item.projection,
                        item.partitions or 1,
                        manual_cutover=item.manual_cutover,
                    )
                controls, records = await read_controls(self.database), await read_builds(self.database)
            control = controls.get(name)
            if control is not None:
                controls[name] = await self._follow(item, control)
        builds = []
        able: dict[tuple[str, datetime.datetime], Build] = {}
        for name, item in wanted.items():
            control = controls.get(name)
            if control is None:
                continue
            for build_id in (control.live, control.candidate, control.previous):
                record = records.get(build_id) if build_id else None
                if record is None:
                    continue
                key = record.id, record.created_at
                build = self._able.get(key) or build_of(record, item.projection)
                if build is None:
                    continue
                able[key] = build
                if build_id in (control.live, control.candidate):
                    builds.append((build, control))
            for record in obsolete(control, records.values()):
                _log.info("build_dropped", projection=name, build=record.id)
                await drop_build(self.database, record)
        await tasks.together(ensure_layout(self.database, build.id, control.partitions) for build, control in builds)
        self._able = able
        return {name: controls[name] for name in wanted if name in controls}, builds

    def _count(self, wanted: Mapping[str, Wanted]) -> None:
        """Begins the metrics of new projections, and ends those of projections that are gone."""
        for name in wanted.keys() - self._started:
            self.metrics.start(name)
        for name in self._started - wanted.keys():
            self.metrics.forget(name)
        self._started = set(wanted)

    def _check_version(self, item: Wanted, known: list[BuildRecord]) -> None:
        """A definition that is not what runs must not go unnoticed."""
        projection = item.projection
        for record in known:
            if record.version == projection.version and record.definition != projection.definition:
                self._problems.setdefault(
                    projection.name,
                    f"the definition of version {projection.version} has changed: what was built runs on; raise the version",
                )
        newest = max((record.version for record in known), default=0)
        if newest > projection.version:
            self._problems.setdefault(
                projection.name, f"version {projection.version} is not run, since there is a version {newest}"
            )

    @contextlib.contextmanager
    def _isolated(self, name: str) -> Iterator[None]:
        """What MongoDB refuses of one projection (an index that it cannot make, a collection in the view's place) is that
        projection's problem, and does not stop the others."""
        try:
            yield
        except OperationFailure as error:
            if classify(error) not in {Meaning.UNEXPECTED, Meaning.INDEX_CONFLICT, Meaning.REJECTED, Meaning.DUPLICATE}:
                raise
            text = (error.details or {}).get("errmsg", str(error))  # without the reply around it, which has a time
            self._problems[name] = f"MongoDB refused it (code {error.code}): {text:.500}"

    def _report_problems(self) -> None:
        for name, problem in self._problems.items():
            if self._reported.get(name) != problem:
                _log.error("projection_problem", projection=name, reason=problem)
        self._reported = dict(self._problems)

    async def _follow(self, item: Wanted, control: Control) -> Control:
        """Takes over what the catalog says of partitions, pause and cut-over, where it says anything."""
        changes: dict[str, Any] = {}
        if item.partitions is not None:
            if control.partitions != item.partitions:
                changes["partitions"] = item.partitions
            if control.paused != item.paused:
                changes["paused"] = item.paused
            if control.manual_cutover != item.manual_cutover:
                changes["manualCutover"] = item.manual_cutover
        if changes:
            await set_control(self.database, control.name, **changes)
            return (await read_controls(self.database))[control.name]
        return control

    # Sharing

    async def _reap(self, controls: dict[str, Control]) -> None:
        """Takes note of partitions that ended, and gives their leases back."""
        for name, running in list(self.running.items()):
            running.cancel_if_overdue()
            if running.task.done():
                await self._bury(name, running, controls)

    async def _bury(self, name: str, running: _Running, controls: dict[str, Control]) -> None:
        projection = running.build.projection.name
        error = None if running.task.cancelled() else running.task.exception()
        if isinstance(error, StoppedError):
            _log.error("projection_failed", projection=projection, reason=str(error))
            await set_control(self.database, projection, failed=str(error))
            if projection in controls:
                controls[projection] = (await read_controls(self.database))[projection]
        elif isinstance(error, FencedError):
            _log.info("partition_lost", partition=name)
            self.metrics.restarts.labels(projection, "fenced").inc()
        elif error is not None:
            _log.error("partition_ended", partition=name, error=repr(error))
        del self.running[name]  # even if the lease cannot be given back now: it ends by itself
        await self.leases.release(name)

    async def _share(
        self,
        partitions: dict[str, PartitionId],
        runnable: dict[str, tuple[Build, Control]],
        peers: dict[str, frozenset[str]],
    ) -> None:
        """Takes free partitions up to the fair share; gives one back when a peer that can run it has two fewer.

        The share counts for each partition those who can run it: in a rolling deploy, or with different projections, not
        every replica can.
        """
        holders = await self.leases.holders(partitions)
        able = Counter(build for builds in peers.values() for build in builds)
        share = math.ceil(sum(1 / max(1, able[partition.build]) for partition in partitions.values()) - 1e-9)
        free = [name for name in partitions if name not in holders and name not in self.running]
        random.shuffle(free)  # so that replicas that wake together seldom grasp for the same one
        mine = sum(not running.stopping for running in self.running.values())
        for name in free[: max(0, share - mine)]:
            if await self.leases.acquire(name):
                build, _ = runnable[partitions[name].build]
                partition = Partition(self, build, partitions[name])
                self.running[name] = _Running(partition, build, self.settings.drain_seconds)
        if len(self.running) != mine:  # something has just begun or is about to end: look again when it has
            return
        counts = dict.fromkeys(peers, 0)
        for owner in holders.values():
            if owner in counts and owner != self.owner:
                counts[owner] += 1
        for running in self.running.values():
            fewer = [
                counts[peer] for peer, builds in peers.items() if peer != self.owner and running.build.id in builds
            ]
            if fewer and min(fewer) <= mine - 2:
                running.stop()
                return

    # Candidates

    async def _cut_over_candidates(self, runnable: dict[str, tuple[Build, Control]]) -> None:
        """Cuts over to candidates that have caught up, unless a person is to say when."""
        for build, control in runnable.values():
            if control.candidate != build.id or control.failed:
                continue
            if control.live is not None and control.manual_cutover and control.cutover != build.id:
                continue
            if not await self.reports.caught_up(build, control.partitions):
                continue
            record = (await read_builds(self.database, control.name)).get(build.id)
            if record is None or not await self._may_take_over(build, control, record):
                continue
            with self._isolated(control.name):
                if await cut_over(self.database, control, record):
                    _log.info("cut_over", projection=control.name, build=build.id)

    async def _may_take_over(self, build: Build, control: Control, record: BuildRecord) -> bool:
        decision = await self.gate.decide(build, control, record)
        if decision.problem is not None:
            self._problems[control.name] = decision.problem
        if decision.fatal and control.live is None:
            self.gate.forget(record.id)  # `projector resume` has it looked at again
            await set_control(self.database, control.name, failed=decision.problem)
        return decision.ready

    async def _shut_down(self) -> None:
        """Ends all partitions at once, gives their leases back, and says good-bye."""
        for running in self.running.values():
            running.stop()
        await asyncio.gather(*(running.ended() for running in self.running.values()))
        await self.gate.close()
        await self.sources.close()
        with contextlib.suppress(PyMongoError):
            for name in self.running:
                await self.leases.release(name)
            await self.leases.leave()
