"""One partition of a build, from its checkpoint on, again and again until it is stopped or lost.

A life of it is: take the checkpoint, repair a position that MongoDB has forgotten, fill a new build from the log, then the
loop (`projector.loop`). Whatever goes wrong ends that life, and the next one begins with what is in MongoDB.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING

import structlog

from eventstore.errors import Meaning, classify
from projector.aside import StoppedError
from projector.checkpoint import Checkpoint, FencedError
from projector.loop import Loop
from projector.progress import Progress
from projector.rebuild import fill
from projector.repair import InterruptedRepairError, repair
from projector.stream import PositionLostError, position_now

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from projector.build import Build
    from projector.checkpoint import PartitionId
    from projector.surroundings import Surroundings

__all__ = ["Partition"]

_log = structlog.stdlib.get_logger(__name__)


class Partition:
    """Runs one partition until `stopping` is set or the partition is lost."""

    def __init__(self, around: Surroundings, build: Build, partition: PartitionId) -> None:
        self._around = around
        self._metrics = around.metrics
        self._build = build
        self.id = partition
        self._name = build.projection.name
        self._log = _log.bind(projection=self._name, partition=str(partition))
        self.progress = Progress()
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        """Asks the loop to end after it has written what it folded."""
        self._stopping.set()

    async def run(self) -> None:
        """Until `stop`. Raises FencedError when another owner took over, StoppedError when a person is needed."""
        pause = 0.05
        started = time.monotonic()
        lost: PositionLostError | None = None
        again = False
        while not self._stopping.is_set():
            try:
                async with self._taken(again=again) as checkpoint:
                    again = True
                    if lost is not None:
                        await self._repair(checkpoint, lost)
                        lost = None
                    if checkpoint.scan:
                        await self._scan(checkpoint)
                    started = time.monotonic()
                    await self._from(checkpoint)
            except (FencedError, StoppedError):
                raise
            except InterruptedRepairError:
                return
            except Exception as error:  # noqa: BLE001 - whatever it is, memory is void and the checkpoint is not
                if isinstance(error, PositionLostError):
                    lost = error
                    self._restart("history_lost", error)
                else:
                    meaning = classify(error)
                    self._restart("unexpected" if meaning is Meaning.UNEXPECTED else "unavailable", error)
                    self.progress.state, self.progress.error = "waiting", type(error).__name__
                # A lost position is no retry loop either: one that is lost again and again waits longer and longer.
                pause = 0.1 if time.monotonic() - started > 10 else min(pause * 2, 5.0)
                await self._pause(pause)

    @contextlib.asynccontextmanager
    async def _taken(self, *, again: bool) -> AsyncIterator[Checkpoint]:
        checkpoint = await Checkpoint.take(self._around.database, self.id, self._around.owner, again=again)
        self.progress.position = self.progress.checkpoint = checkpoint.position
        try:
            yield checkpoint
        finally:
            await checkpoint.close()

    def _restart(self, reason: str, error: Exception) -> None:
        self.progress.caught_up, self.progress.pending = False, 0
        self._metrics.restarts.labels(self._name, reason).inc()
        log = self._log.exception if reason == "unexpected" else self._log.warning
        log("partition_restarts", reason=reason, error=type(error).__name__, code=getattr(error, "code", None))

    async def _pause(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._stopping.wait()
        except TimeoutError:
            pass

    async def _repair(self, checkpoint: Checkpoint, error: PositionLostError) -> None:
        """Applies what the lost stream would have brought, from the log, and moves the checkpoint to a new token."""
        self.progress.state = "repairing"
        count = await repair(self._loop(checkpoint), await position_now(self._around.log))
        self._metrics.repaired.labels(self._name).inc(count)
        self._log.warning("position_repaired", reason=error.reason, events=count)

    async def _scan(self, checkpoint: Checkpoint) -> None:
        """Fills a new build from the log. Its checkpoint's token was taken before, so the stream brings the rest."""
        self.progress.state = "rebuilding"
        if self._build.projection.aggregate_keyed:
            await fill(self._around, self._build, checkpoint, self._stopping, self._beat)
            return
        count = await repair(self._loop(checkpoint), checkpoint.position)
        await checkpoint.scanned()
        self._metrics.rebuild_events.labels(self._name).inc(count)
        self._log.info("build_scanned", events=count)

    def _loop(self, checkpoint: Checkpoint) -> Loop:
        return Loop(self._around, self._build, checkpoint, self.progress, self._stopping)

    def _beat(self) -> None:
        self.progress.heartbeat = time.time()

    async def _from(self, checkpoint: Checkpoint) -> None:
        """The loop from a checkpoint until `stop` or an error."""
        loop = self._loop(checkpoint)
        self.progress.state = "catching_up"
        await loop.aside.load()
        source = self._around.source(self._build, checkpoint.position, self.id.slots)
        try:
            await loop.run(source)
        finally:
            await source.close()
