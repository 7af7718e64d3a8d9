"""Filling a new build from the log: who does it, how far it is, how it ends.

Every partition of a new build comes here before it goes on to the stream. The owner of the first one has the whole log read,
by processes of its own when the log is long; the others wait. When it loses the partition or its life, what it has done
stays, and the partition's next owner goes on from there.
"""

from __future__ import annotations

import asyncio
import os
import time
import uuid
from typing import TYPE_CHECKING, Final

import structlog

from eventstore import tasks
from projector import scans, workers
from projector.checkpoint import CHECKPOINTS, FencedError

if TYPE_CHECKING:
    from collections.abc import Callable

    from projector.build import Build
    from projector.checkpoint import Checkpoint
    from projector.surroundings import Place

__all__ = ["fill"]

POLL_SECONDS: Final = 0.25
"""How often a waiting partition looks whether the scan is done."""

TELL_SECONDS: Final = 1.0
"""How often the one that scans tells its progress: as often as the projector reports everything else."""

SHORT_LOG: Final = 50_000
"""Events that are scanned by the projector itself, in a second or less: a process takes half a second to begin."""

MOST_PROCESSES: Final = 2
"""Unless it is set: two scan as fast as MongoDB delivers on as many processors again, and whoever reads and appends meanwhile
needs some of it too. A rebuild that takes longer is the cheaper mistake."""

_log = structlog.stdlib.get_logger(__name__)


async def fill(
    around: Place, build: Build, checkpoint: Checkpoint, stopping: asyncio.Event, beat: Callable[[], None]
) -> None:
    """Returns when the log has been scanned, or `stopping` is set; calls `beat` about every second meanwhile.

    Raises FencedError when the partition has another owner or its build was dropped, StoppedError when too much is set
    aside, `projector.workers.WorkerError` and errors of pymongo.
    """
    if checkpoint.partition.number == 0:
        await _Scan(around, build, checkpoint, beat).run(stopping)
        return
    mine = {"_id": str(checkpoint.partition), "epoch": checkpoint.epoch}
    while not stopping.is_set():
        found = await around.database[CHECKPOINTS].find_one(mine, {"scan": 1})
        if found is None:
            raise FencedError(f"{checkpoint.partition} has another owner")
        if not found.get("scan"):
            return
        beat()
        try:
            async with asyncio.timeout(POLL_SECONDS):
                await stopping.wait()
        except TimeoutError:
            pass


class _Scan:
    """The scan of a build, by the owner of its first partition."""

    def __init__(self, around: Place, build: Build, checkpoint: Checkpoint, beat: Callable[[], None]) -> None:
        self._around = around
        self._database = around.database
        self._build = build
        self._name = build.projection.name
        self._checkpoint = checkpoint
        self._beat = beat
        self._owner = uuid.uuid4().hex  # never used before, not even by a build of the same name that was dropped
        self._counted = 0
        self._log = _log.bind(projection=self._name, build=build.id)

    async def run(self, stopping: asyncio.Event) -> None:
        """Until it is done or `stopping` is set."""
        total = await scans.begin(self._around.log, self._database, self._checkpoint, self._owner)
        progress = await scans.progress_of(self._database, self._build.id)
        self._counted = progress.events if progress else 0
        processes = self._processes(total)
        self._log.info("rebuild_scan_started", events=total, done=self._counted, processes=processes)
        started = time.monotonic()
        while not stopping.is_set():
            await self._read_until(stopping, processes)
            await self._tell()
            if await scans.finish(self._database, self._build.id, self._owner):
                self._around.metrics.rebuild_ratio.labels(self._name).set(1)
                seconds = round(time.monotonic() - started, 3)
                self._log.info("rebuild_scan_done", events=self._counted, seconds=seconds)
                return

    async def _read_until(self, stopping: asyncio.Event, processes: int) -> None:
        """Reads until no range is left or `stopping` is set."""
        reading = asyncio.create_task(self._read(processes))
        watching = asyncio.create_task(self._watch())
        stopped = asyncio.create_task(stopping.wait())
        running = [reading, watching, stopped]
        try:
            done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            await tasks.end(running)

    def _processes(self, total: int) -> int:
        """How many processes read; 0: this one does."""
        if total < SHORT_LOG or self._around.uri is None or not workers.travels(self._build.projection):
            return 0
        return self._around.settings.rebuild_processes or min(MOST_PROCESSES, len(os.sched_getaffinity(0)))

    async def _read(self, processes: int) -> None:
        around, projection, settings = self._around, self._build.projection, self._around.settings
        job = workers.Job(
            uri=around.uri.get_secret_value() if processes and around.uri is not None else "",
            log=around.log.name,
            database=around.database.name,
            number=self._build.number,
            owner=self._owner,
            events_per_second=settings.rebuild_events_per_second,
            retry_seconds=settings.retry_seconds,
            max_parked=settings.max_parked,
            name=projection.name,
            definition=projection.definition,
            module=projection.module,
        )
        if processes:
            await workers.run(job, processes)
        else:
            await workers.scan_here(around.log, around.database, self._build, job)

    async def _watch(self) -> None:
        """Tells that it lives, and how far it is."""
        while True:
            await asyncio.sleep(TELL_SECONDS)
            self._beat()
            await self._tell()

    async def _tell(self) -> None:
        progress = await scans.progress_of(self._database, self._build.id)
        if progress is not None:
            metrics = self._around.metrics
            metrics.rebuild_ratio.labels(self._name).set(progress.ratio)
            metrics.rebuild_events.labels(self._name).inc(max(0, progress.events - self._counted))
            self._counted = max(self._counted, progress.events)
