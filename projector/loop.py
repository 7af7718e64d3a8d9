"""The loop that keeps a partition's read model current, in order and exactly once.

    read ahead ──> load marks and documents ──> check order, fold ──> one transaction: documents + marks + checkpoint
         (EventStream)        (Folder.load)        (Folder.fold)                (Loop._write_loop)

Reading, folding and writing go on at the same time, each a step ahead of the next. Memory is ahead of MongoDB by what waits for
the writer (bounded) and nothing else, so that after any failure the partition simply begins again from its checkpoint:
what was applied already, the marks tell.

The position is moved only when a whole batch has been folded, healed and set aside; the marks may be ahead of it, never behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING, Any, Final

import pymongo
import structlog
from pymongo.errors import OperationFailure

from eventstore import tasks, tracing
from eventstore.errors import Meaning, classify
from projector.aside import Aside
from projector.changes import EventFailedError, give_way
from projector.owned import OwnedFolder
from projector.shared import SharedFolder

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection

    from pymongo.asynchronous.client_session import AsyncClientSession

    from projector.aside import ParkedWrites
    from projector.build import Build
    from projector.changes import Changes, Failure, Folder, Outcome
    from projector.checkpoint import Checkpoint
    from projector.position import Position
    from projector.progress import Progress
    from projector.sources import Source
    from projector.stream import Batch
    from projector.surroundings import Place

__all__ = ["Loop"]

_log = structlog.get_logger(__name__)

PENDING_BYTES: Final = 32 * 2**20
"""Documents that may wait for the writer, as they were when they were read: what is written together is in memory twice."""

PENDING_BATCHES: Final = 8
"""Batches that may wait for the writer, however few events they hold: a batch has at most 16 MiB, so this bounds the memory for
large events. Fewer would make the reader wait for nothing while batches are small."""

IDLE_CHECKPOINT_SECONDS: Final = 10.0
"""How often a quiet partition writes its position down. Seldom enough to cost nothing (12 small updates a minute for 2
partitions), often enough that no oplog is so short that its token ages out between two."""

TICK_SECONDS: Final = 0.5
"""How often a loop without events looks for what is due: retries, commands, idle checkpoints."""

COMMAND_SECONDS: Final = 2.0
"""How often the records of aggregates aside are read for commands (`parked retry`, `skip`): the wait of a person."""

WRITE_SECONDS: Final = 60.0
"""How long one transaction may take, with all its repetitions; MongoDB ends one after 60 s itself."""


VAIN_SECONDS: Final = 5.0
"""How long a transaction is run again before it is divided: MongoDB may tell a full cache as a conflict, which ends with others'
writes; this one ends with a smaller write."""


class _VainError(Exception):
    """The transaction has been run again and again, and could be two smaller ones."""


class _VoidError(Exception):
    """An earlier write has failed, so memory is void: the partition begins again from its checkpoint."""


class Loop:
    """The memory of a partition between two fresh starts: folder, aggregates aside, position."""

    def __init__(
        self,
        around: Place,
        build: Build,
        checkpoint: Checkpoint,
        progress: Progress,
        stopping: asyncio.Event,
    ) -> None:
        self.log, self.database = around.log, around.database
        self.build, self.partition = build, checkpoint.partition
        self.metrics, self.settings = around.metrics, around.settings
        self.checkpoint = checkpoint
        self.position = checkpoint.position
        folder_class = OwnedFolder if build.projection.aggregate_keyed else SharedFolder
        self.folder: Folder = folder_class(around.database, build)
        self.aside = Aside(self)
        self.progress = progress
        self.progress.aside = self.aside.records
        self._stopping = stopping
        self._wake = asyncio.Event()
        self._room = asyncio.Event()
        self._written_at = self._looked_at = time.monotonic()
        self._newest: float | None = None
        self._drained = False
        self._batches = 0
        self._held = 0.0
        self._events = self._seconds = 0.0
        self._writer: asyncio.Task[None] | None = None
        self._writing = asyncio.Lock()
        self._links: dict[int, Any] = {}
        """Spans that appended what waits for the writer, where traces are recorded."""
        self._in_doubt = False
        """What was taken from the folder is not written: yet, or ever."""

    @property
    def stopping(self) -> bool:
        """Whether the partition was asked to end."""
        return self._stopping.is_set()

    async def run(self, source: Source) -> None:
        """Reads and folds while the writer writes; ends after the last write."""
        self._writer = writer = asyncio.create_task(self._write_loop())
        reader = asyncio.create_task(self._read_loop(source))
        try:
            await asyncio.wait({writer, reader}, return_when=asyncio.FIRST_COMPLETED)
            if writer.done():
                writer.result()
            reader.result()
            await self._drain()
        except _VoidError:
            if writer.done():
                writer.result()  # the cause
            raise
        finally:
            await tasks.end([reader, writer])

    async def _drain(self) -> None:
        """Writes what was folded, and the position, before the partition is given back."""
        async with asyncio.timeout(self.settings.drain_seconds):
            while self.dirty:
                await self.flush()
            await self._move_checkpoint()

    @contextlib.asynccontextmanager
    async def between_writes(self) -> AsyncIterator[None]:
        """No write is under way while it lasts. Raises when one has failed: from then on memory is ahead of MongoDB by what it
        held, and a position written now would pass events that were never applied."""
        async with self._writing:
            if self._in_doubt:
                raise _VoidError
            yield

    async def _move_checkpoint(self) -> None:
        """Writes the position down. Nothing must wait to be written."""
        async with self.between_writes():
            if self.position.cluster_time != self.checkpoint.position.cluster_time:
                await self.checkpoint.move(self.position)
            self.progress.checkpoint = self.checkpoint.position
            self._written_at = time.monotonic()

    @property
    def dirty(self) -> bool:
        """Whether anything waits to be written."""
        return bool(self.folder.pending or self.aside.dirty)

    # Reading and folding

    async def _read_loop(self, source: Source) -> None:
        while not self._stopping.is_set():
            batch = await source.get(0 if self.aside.due else TICK_SECONDS)
            self.progress.heartbeat = time.time()
            if batch is not None:
                await self.take(batch)
                self._note(batch)
            await self._look_for_due()

    async def _look_for_due(self) -> None:
        """Commands of people, aggregates whose next try is due, the checkpoint of a quiet partition."""
        now = time.monotonic()
        if now - self._looked_at >= COMMAND_SECONDS:
            self._looked_at = now
            await self.aside.follow_commands()
        if self.aside.due:
            await self.aside.heal_due()
        if self.dirty:
            self._wake.set()
        elif now - self._written_at > IDLE_CHECKPOINT_SECONDS:
            await self._move_checkpoint()

    async def take(self, batch: Batch) -> None:
        """Folds a batch, heals its gaps, sets failed aggregates aside, then moves the position."""
        if batch.events:
            await self._fold(batch.events, light=batch.light)
            tracing.collect(batch.events, self._links)
        if batch.last_event_time is not None:
            self._newest = batch.last_event_time
        self.position = batch.position
        self.progress.heartbeat = time.time()
        self._show()
        if self.dirty:
            self._wake.set()
        await self.make_way()

    def _note(self, batch: Batch) -> None:
        """What a batch of the stream tells of how far the partition is."""
        progress, self._drained = self.progress, batch.drained
        # Over about sixteen batches, so that neither a burst nor a pause says much by itself.
        self._events = self._events * 15 / 16 + len(batch.events)
        self._seconds = self._seconds * 15 / 16 + batch.seconds
        progress.density = self._events / max(1.0, self._seconds)
        progress.state, progress.error = ("live" if batch.drained else "catching_up"), None
        self._show()

    def _show(self) -> None:
        progress, settled = self.progress, not self.dirty and not self._in_doubt
        if settled:
            progress.position = self.position
        progress.caught_up = settled and self._drained
        progress.pending = self.folder.pending

    async def make_way(self) -> None:
        """Called after each batch of events, from the stream or the log: waits while too much is folded and not written."""
        self._batches = self._batches + 1 if self.folder.pending else 0
        await self._wait_for_room()

    async def _wait_for_room(self) -> None:
        while (
            self.folder.pending >= self.folder.limit
            or self.folder.pending_bytes >= PENDING_BYTES
            or self._batches >= PENDING_BATCHES
        ):
            if self._writer is None:  # the repair writes for itself
                await self.flush()
                continue
            self._room.clear()
            self._wake.set()
            if self._in_doubt:
                self.folder.prepare()  # so that MongoDB need not wait for it when it has done with the write before
            await self._room.wait()

    async def portions(self, events: list[dict[str, Any]]) -> AsyncIterator[list[dict[str, Any]]]:
        """A batch in parts that may be folded in one go; in between others in the process get their turn."""
        start = 0
        while start < len(events):
            end = start + self.folder.portion
            self._held = 0.0
            yield events[start:end]
            start = end
            await give_way(self._held)
            if start < len(events):
                await self._wait_for_room()

    def fold(self, events: list[dict[str, Any]], aside: Collection[str]) -> Outcome:
        """Folds a part of a batch, and learns how long that takes."""
        began = time.perf_counter()
        outcome = self.folder.fold(events, aside)
        took = time.perf_counter() - began
        self.folder.typical.learn_fold(len(events), took)
        self._held += took
        self.metrics.fold_seconds.labels(self.name).observe(took)
        return outcome

    async def _fold(self, events: list[dict[str, Any]], *, light: bool) -> None:
        async for portion in self.portions(events):
            await self._fold_portion(portion, light=light)

    async def _fold_portion(self, events: list[dict[str, Any]], *, light: bool) -> None:
        # Not those that are aside: what is known of them must stay what their own turns have read.
        await self.folder.load({event["aggregateId"] for event in events}.difference(self.aside.records))
        if light:  # the events came without payload: whatever is new of them must be read from the log
            gaps = {
                e["aggregateId"]: int(e["sequenceNo"]) for e in events if e["aggregateId"] not in self.aside.records
            }
            gaps = {name: last for name, last in gaps.items() if last > self.folder.mark(name)}
            failures: list[Failure] = []
        else:
            outcome = self.fold(events, self.aside.records)
            self.aside.passed(outcome.passed)
            gaps, failures, tally = outcome.gaps, outcome.failures, outcome.tally
            self.count(applied=tally.applied, unhandled=tally.unhandled, aside=tally.aside, duplicate=tally.duplicate)
            if tally.duplicate:
                self.metrics.duplicates.labels(self.name).inc(tally.duplicate)
        for failure in failures:
            self.aside.fail(failure)
        if gaps:
            self.metrics.gaps.labels(self.name).inc(len(gaps))
            await self.aside.heal_gaps(gaps)

    def count(self, **outcomes: int) -> None:
        """Counts events by outcome."""
        for outcome, number in outcomes.items():
            if number:
                self.metrics.events.labels(self.name, outcome).inc(number)

    @property
    def name(self) -> str:
        """The projection's name, as a label."""
        return self.build.projection.name

    # Writing

    async def _write_loop(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self.dirty:
                await self.flush()
            self._room.set()

    async def flush(self) -> None:
        """Writes what has come together; aggregates that stand in its way are set aside first."""
        async with self.between_writes():
            position, newest = self.position, self._newest
            self._in_doubt = True
            self._batches = 0
            changes, failures = self.folder.take()
            self._room.set()
            for failure in failures:
                self.aside.fail(failure)
            parked = self.aside.snapshot()
            links, self._links = self._links, {}
            started = time.perf_counter()
            with tracing.span(f"project {self.name}", links.values(), events=changes.events):
                await self._write(changes, parked, position)
            self._in_doubt = False
            self.metrics.write_seconds.labels(self.name).observe(time.perf_counter() - started)
            self.metrics.write_events.labels(self.name).observe(changes.events)
            self._written_at = time.monotonic()
            self.progress.position = self.progress.checkpoint = position
            self._show()
            if newest is not None:
                self.metrics.last_applied.labels(self.name).set(newest)
                self.metrics.delay_seconds.labels(self.name).observe(max(0.0, time.time() - newest))

    async def _write(self, changes: Changes, parked: ParkedWrites, position: Position) -> None:
        """By one transaction, or by several where MongoDB's cache has no room for one: the last moves the position, and has the
        records of aggregates aside, which must not come before what was folded of these.
        """
        parts = [changes]
        while parts:
            part = parts.pop()
            try:
                if parts:
                    await self._transaction(part, None, self.checkpoint.position)
                else:
                    await self._transaction(part, parked, position)
            except EventFailedError as error:
                refused = self.aside.refuse(error.failure, part, parked)
                parts = [*(other.without(error.failure.aggregate_id) for other in parts), refused]
            except (_VainError, OperationFailure) as error:
                crowded = isinstance(error, _VainError) or classify(error) is Meaning.OVERFLOW
                if not (crowded and part.divisible):
                    raise
                _log.info("transaction_split", projection=self.name, partition=str(self.partition), events=part.events)
                parts += reversed(part.halves())

    async def _transaction(self, changes: Changes, parked: ParkedWrites | None, position: Position) -> None:
        runs = 0
        started = time.monotonic()

        async def write(session: AsyncClientSession) -> None:
            nonlocal runs
            runs += 1
            if runs > 1 and changes.divisible and time.monotonic() - started > VAIN_SECONDS:
                raise _VainError
            await self.checkpoint.move(position, session)
            await changes.write(session)
            if parked is not None:
                await parked.write(session)

        with pymongo.timeout(WRITE_SECONDS):
            await self.checkpoint.session.with_transaction(write)
        if parked is not None:
            parked.done()
        if runs > 1:
            self.metrics.conflicts.labels(self.name).inc(runs - 1)
