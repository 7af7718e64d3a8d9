"""Group commit: everything that waits is written together, and each request hears its own outcome.

A request is queued in the lanes of its aggregates; up to `BATCHES_IN_FLIGHT` batches are taken from the lanes and
attempted. An attempt is: look up what may be there already, read the heads that are not known, give out numbers, write,
hear what became of each. Whatever has no outcome after an attempt stays in front of its lane, and is attempted again with
what is left, after a jittered pause where a pause helps, until its deadline.

Why no gap can arise: a number is given out only on top of one that a majority has (acknowledged to us, or read), or
within the same command or transaction, and an ordered command stops at its first failure.
Why no event is written twice: an event keeps its eventId through all attempts, and `_id` is unique.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from typing import TYPE_CHECKING, Any, Final

import structlog
from pymongo.errors import PyMongoError, ServerSelectionTimeoutError, WaitQueueTimeoutError

from appender import problems
from appender.attempt import Attempt
from appender.heads import Heads
from appender.lanes import Lanes, Request
from appender.resolve import judge, too_late
from appender.write import OPERATION_SECONDS, Outcome, outcome_of
from eventstore import tasks, tracing
from eventstore.errors import Meaning, classify
from eventstore.orphans import IDLE_SECONDS, end_orphans

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from appender.encoding import Append
    from appender.lanes import Batch, Lane
    from appender.metrics import Metrics
    from appender.settings import AppenderSettings
    from eventstore.client import Client, Database

__all__ = ["BATCHES_IN_FLIGHT", "Committer"]

_log = structlog.get_logger(__name__)

BATCHES_IN_FLIGHT: Final = 8
PATIENCE_SECONDS: Final = 0.005
SHARE_EVENTS: Final = 8
"""A batch takes half of the events that have no outcome yet (or the few of `SHARE_EVENTS`), and starts beside others once
as many wait as those have on average: so two alternate, one written by MongoDB while the requests of the next are read and
those of the last are answered, and neither shrinks to nothing or grows to all there is. A batch costs the appender 200 µs
and mongod as much, whatever is in it. When the last was taken so long ago that the disk or a lock must hold the others up,
another starts at once."""

PAUSE_SECONDS: Final = 0.004
MAX_PAUSE_SECONDS: Final = 0.5
"""Pauses before a repeated attempt: random up to 4 ms doubled each time, at most half a second. Short ones cost vain
attempts while MongoDB is away (bounded by the batches in flight), long ones cost latency after it is back."""

GRACE_SECONDS: Final = 2.0
"""How long after its deadline a request that may be written waits for a last look at the log: "unknown" costs the caller a
repeat, and is said only when MongoDB does not answer."""

SWEEP_SECONDS: Final = 0.25
"""How late a request may hear that its deadline is over."""


SUSPICIOUS_ATTEMPTS: Final = 4
ORPHANS_SECONDS: Final = 0.5
"""When to look for transactions that nobody will end, and how often at most: a cheap question, of no use in daily life."""

_NEVER_SENT: Final = (ServerSelectionTimeoutError, WaitQueueTimeoutError)


class Committer:
    """Takes appends, writes them in batches, and tells each its outcome."""

    def __init__(
        self,
        client: Client,
        database: Database,
        settings: AppenderSettings,
        metrics: Metrics,
        batches_in_flight: int = BATCHES_IN_FLIGHT,
    ) -> None:
        self._client = client
        self._database = database
        self._settings = settings
        self._metrics = metrics
        self._limit = batches_in_flight
        self._heads = Heads(settings.heads)
        self._lanes = Lanes(self._heads.contended)
        self._loop = asyncio.get_running_loop()
        self._pumping = False
        self._started = 0.0
        self._taken = 0
        self._patience: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._endings: set[asyncio.Task[None]] = set()
        self._scopes: dict[asyncio.Timeout, float] = {}
        self._orphans: asyncio.Task[None] | None = None
        self._room: list[asyncio.Future[None]] = []
        self._drained: asyncio.Event | None = None
        self._sweep: asyncio.TimerHandle | None = None
        self._available = True
        self._refusal: problems.Problem | None = problems.Unavailable("The appender has not reached MongoDB yet.")
        self.draining = False
        metrics.follow(metrics.queue_events, lambda: self._lanes.events)
        metrics.follow(metrics.queue_bytes, lambda: self._lanes.size)
        metrics.follow(metrics.queue_age, self._oldest_age)
        metrics.follow(metrics.batches_in_flight, lambda: len(self._tasks))
        metrics.follow(metrics.heads, lambda: len(self._heads))
        metrics.follow(metrics.draining, lambda: self.draining)

    # What comes in.

    def submit(self, appends: Sequence[Append], done: Callable[[Request], None]) -> Request:
        """Queues an append; `done` is called once with its outcome. Raises QueueFull and Draining, and keeps nothing then."""
        if self._refusal is not None:
            raise type(self._refusal)(self._refusal.detail)  # an exception of its own for each caller
        if self.full:
            raise problems.QueueFull("Repeat the request after a moment.")
        now = time.monotonic()
        request = Request(appends, now, now + self._settings.deadline_seconds, done)
        self._lanes.add(request)
        if self._sweep is None:
            self._sweep = self._loop.call_later(SWEEP_SECONDS, self._expire)
        if not self._pumping and len(self._tasks) < self._limit:
            self._pumping = True
            self._loop.call_soon(self._pump)
        return request

    async def append(self, appends: Sequence[Append]) -> Request:
        """Queues an append and waits for its outcome. Raises the Problem that it met."""
        future: asyncio.Future[None] = self._loop.create_future()

        def done(_request: Request) -> None:
            if not future.done():  # the caller may have gone
                future.set_result(None)

        request = self.submit(appends, done)
        await future
        if request.problem is not None:
            raise request.problem
        return request

    @property
    def full(self) -> bool:
        """Whether the queue takes nothing more now."""
        return self._lanes.events >= self._settings.queue_events or self._lanes.size >= self._settings.queue_bytes

    @property
    def waiting_events(self) -> int:
        """Events without an outcome."""
        return self._lanes.events

    @property
    def refusal(self) -> str | None:
        """Why nothing is taken in; None when appends are."""
        return None if self._refusal is None else self._refusal.detail

    def open(self) -> None:
        """Lets appends in."""
        if not self.draining:
            self._refusal = None

    def refuse(self, why: str) -> None:
        """Takes nothing in until `open`."""
        if not self.draining:
            self._refusal = problems.Unavailable(why)

    def _close_door(self) -> None:
        self.draining = True
        self._refusal = problems.Draining("The appender is shutting down; repeat the request with another, or later.")
        self._wake()

    async def room(self) -> None:
        """Waits until the queue takes something again, or takes nothing at all any more."""
        while self.full and not self.draining:
            waiter = self._loop.create_future()
            self._room.append(waiter)
            await waiter

    async def drain(self, seconds: float) -> bool:
        """Takes nothing new, and waits until everything queued has its outcome; False when the time was not enough."""
        self._close_door()
        if self._lanes.requests:
            self._drained = asyncio.Event()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._drained.wait(), seconds)
        return not self._lanes.requests

    async def close(self) -> None:
        """Ends the batches in flight; what has no outcome yet is answered as at its deadline."""
        self._close_door()
        if self._sweep is not None:
            self._sweep.cancel()
        await tasks.end([*self._tasks, *self._endings, *([self._orphans] if self._orphans else [])])
        self._lanes.expire(float("inf"), 0.0, too_late)

    def primary_changed(self) -> None:
        """Another primary was found: what is on its way to the old one counts as unknown now, not after its timeout."""
        for scope in self._scopes:
            scope.reschedule(self._loop.time())

    def _wake(self) -> None:
        """After requests got their outcome, or will get none: tells who waits for that."""
        if self._drained is not None and not self._lanes.requests:
            self._drained.set()
        if self.full and not self.draining:
            return
        waiters, self._room = self._room, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    def _oldest_age(self) -> float:
        oldest = self._lanes.oldest()
        return 0.0 if oldest is None else time.monotonic() - oldest

    def _expire(self) -> None:
        self._sweep = None
        if self._lanes.requests:
            self._lanes.expire(time.monotonic(), GRACE_SECONDS, too_late)
            self._wake()
            if self._scopes and self._loop.time() - min(self._scopes.values()) > IDLE_SECONDS:
                self._suspect_orphans()
            self._sweep = self._loop.call_later(SWEEP_SECONDS, self._expire)
            self._pump()

    # Batches.

    def _pump(self) -> None:
        self._pumping = False
        while self._lanes.ready and self._may_start():
            batch = self._lanes.take(max(SHARE_EVENTS, self._lanes.events // 2))
            if batch is None:
                break
            self._started = self._loop.time()
            self._taken += batch.events
            task = self._loop.create_task(self._run(batch))
            self._tasks.add(task)
            task.add_done_callback(self._ended)

    def _may_start(self) -> bool:
        """Whether another batch may be taken beside those in flight."""
        in_flight = len(self._tasks)
        if in_flight >= self._limit:
            return False
        if (self._lanes.events - self._taken) * in_flight >= self._taken:
            return True
        patient = self._started + PATIENCE_SECONDS - self._loop.time()
        if patient <= 0:
            return True
        if self._patience is None:
            self._patience = self._loop.call_later(patient, self._lose_patience)
        return False

    def _lose_patience(self) -> None:
        self._patience = None
        self._pump()

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("batch_failed", exc_info=error)  # a defect; `_run` has put its requests back
        if self._room or self._drained is not None:
            self._wake()
        self._pump()

    async def _run(self, batch: Batch) -> None:
        """One attempt at a batch; what has no outcome after it goes back to its lanes."""
        started = time.perf_counter()
        attempt = Attempt(self._client, self._database, self._heads, batch, self._end_later)
        finished = False
        try:
            with tracing.span("commit", (request.span for request in batch.requests), events=batch.events):
                outcome = await self._bounded(attempt)
            self._settle(attempt, outcome)
            finished = True
        finally:
            if not finished:  # cancelled, or a defect
                if attempt.sent:
                    attempt.fail_all(Outcome.UNKNOWN)
                attempt.failed.update(lane.aggregate_id for lane in batch.lanes)
            self._give_back(batch, attempt.failed)
            self._taken -= batch.events
        self._metrics.batch_events.observe(batch.events)
        self._metrics.batch_seconds.labels(batch.kind.value).observe(time.perf_counter() - started)

    async def _bounded(self, attempt: Attempt) -> Outcome:
        """The attempt within its time: WRITTEN when the server heard and answered, else what failed for all of it."""
        try:
            async with asyncio.timeout(OPERATION_SECONDS) as scope:
                self._scopes[scope] = self._loop.time()
                try:
                    await self._look_up(attempt)
                    await attempt.write()
                finally:
                    del self._scopes[scope]
        except Exception as error:  # noqa: BLE001 - the table of errors says what it means
            outcome = outcome_of(error)
            if self._available:
                self._note_failure(outcome, error)
            if outcome is Outcome.UNKNOWN and not attempt.sent:
                return Outcome.UNAVAILABLE  # a read failed, or a transaction before its commit: nothing is written
            if outcome is Outcome.UNAVAILABLE and attempt.sent and not isinstance(error, _NEVER_SENT):
                return Outcome.UNKNOWN  # a primary may refuse after the first part of a command
            return outcome
        return Outcome.WRITTEN

    async def _look_up(self, attempt: Attempt) -> None:
        """Gives an outcome to what needs no write: repeats, failed expectations, requests beyond their deadline."""
        now = time.monotonic()
        doubtful: set[str] = set()
        for request in attempt.batch.requests:
            if request.look_up:
                doubtful.update(append.aggregate_id for append in request.appends)
            elif now >= request.deadline:
                request.problem = too_late(request)
                self._finish(request)
        if not doubtful:
            return
        asking = [
            request
            for request in attempt.batch.requests
            if not request.finished and any(append.aggregate_id in doubtful for append in request.appends)
        ]
        for request in await judge(self._database, asking, attempt.known, now):
            self._finish(request)

    def _settle(self, attempt: Attempt, outcome: Outcome) -> None:
        """Turns outcomes into answers and notes."""
        if outcome is not Outcome.WRITTEN:
            attempt.fail_all(outcome)
        elif not self._available:
            self._available = True
            _log.info("mongodb_available")
        for request, became in attempt.outcomes:
            if became is Outcome.WRITTEN:
                self._finish(request)
            elif became is Outcome.REFUSED:
                request.problem = problems.Invalid("", "MongoDB's validator of the collection refused the event.")
                self._finish(request)
            elif became is not Outcome.NOT_TRIED:
                request.attempts += 1
        if attempt.failed:
            for reason, count in attempt.reasons().items():
                self._metrics.retries.labels(reason.value).inc(count)
        for append in attempt.written():
            self._heads.put(append.aggregate_id, append.first + len(append.events) - 1)

    def _finish(self, request: Request) -> None:
        if request.finished:  # its deadline passed while the batch had it
            return
        problem = request.problem
        if problem is None:
            if request.replayed and not request.uncertain:
                self._metrics.replays.inc()
            else:
                self._metrics.events.inc(request.events)
        elif isinstance(problem, problems.SequenceConflict):
            self._metrics.conflicts.inc()
        elif isinstance(problem, problems.EventIdConflict):
            self._metrics.event_id_conflicts.inc()
        self._lanes.finish(request)

    def _give_back(self, batch: Batch, failed: set[str]) -> None:
        """Frees the lanes: those that failed a second time after a pause, together, the others at once."""
        self._lanes.let_go(batch)
        if not failed:
            self._lanes.release(batch.lanes)
            return
        again = [lane for lane in batch.lanes if lane.aggregate_id in failed]
        self._lanes.release([lane for lane in batch.lanes if lane.aggregate_id not in failed])
        attempts = max(lane.attempts for lane in again)
        if attempts >= SUSPICIOUS_ATTEMPTS:
            self._suspect_orphans()
        for lane in again:
            lane.attempts += 1
        if attempts == 0:
            self._lanes.release(again)
        else:
            longest = min(MAX_PAUSE_SECONDS, PAUSE_SECONDS * 2 ** min(attempts, 10))
            self._loop.call_later(random.uniform(0, longest), self._resume, again)  # noqa: S311 - jitter

    def _end_later(self, ending: Coroutine[Any, Any, None]) -> None:
        """Ends a session in the background; bounded by the client's timeouts and the batches in flight."""
        task = self._loop.create_task(ending)
        self._endings.add(task)
        task.add_done_callback(self._session_ended)

    def _session_ended(self, task: asyncio.Task[None]) -> None:
        self._endings.discard(task)
        if not task.cancelled():
            task.exception()  # the transaction is aborted by its lifetime at the latest

    def _suspect_orphans(self) -> None:
        """A batch is held up, or fails again and again: an appender that was killed may have left a transaction open."""
        if self._orphans is None:
            self._orphans = self._loop.create_task(self._end_orphans())

    async def _end_orphans(self) -> None:
        try:
            if ended := await end_orphans(self._client, "appender"):
                _log.warning("orphaned_transactions_ended", transactions=ended)
        except PyMongoError as error:
            _log.debug("orphans_not_found", error=repr(error))
        await asyncio.sleep(ORPHANS_SECONDS)
        self._orphans = None

    def _resume(self, lanes: list[Lane]) -> None:
        self._lanes.release(lanes)
        self._pump()

    def _note_failure(self, outcome: Outcome, error: Exception) -> None:
        """One line when MongoDB goes away or misbehaves, with the whole error where the table does not know it."""
        if outcome in {Outcome.UNKNOWN, Outcome.UNAVAILABLE}:
            self._available = False
            unexpected = classify(error) is Meaning.UNEXPECTED and not isinstance(error, TimeoutError)
            _log.error("mongodb_unavailable", error=repr(error), exc_info=error if unexpected else None)
