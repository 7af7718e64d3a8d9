"""What waits to be written: a lane per aggregate, and the batches that are taken from them.

A lane keeps the arrival order of its aggregate. It is in at most one batch at a time, and what a batch could not finish
stays in front. A request for several aggregates stands in each of their lanes and is taken when it is first in all of
them; since a request enters all its lanes at once, two requests stand in the same order in every lane that they share,
and nobody waits for himself.

Two kinds of batch: *singles* (requests of one event each, one command, no transaction) and *atomic* (anything else, in a
transaction). Nothing here waits or talks to MongoDB.
"""

from __future__ import annotations

import enum
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from eventstore import tracing

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from appender.encoding import Append
    from appender.problems import Problem

__all__ = ["BATCH_BYTES", "BATCH_EVENTS", "Batch", "Kind", "Lane", "Lanes", "Request"]

BATCH_EVENTS: Final = 1_000
"""Larger batches win nothing (measured: flat from 250) and make the lock times in mongod and the retries longer."""

BATCH_BYTES: Final = 8 * 1024 * 1024
"""Far below the 16 MiB of an oplog entry and the 48 MB of a message; one request may be that large by itself."""

ALONE_AFTER: Final = 2
"""Failed attempts after which a request gets a transaction of its own, so that it cannot fail its neighbours again."""


class Kind(enum.Enum):
    """How a batch is written."""

    SINGLES = "singles"
    ATOMIC = "atomic"


class Request:
    """An append that waits for its outcome.

    `done(request)` is called once, with `problem` set or with the numbers in `appends`; `replayed` says that all events
    were there already.
    """

    __slots__ = (
        "appends",
        "arrived",
        "attempts",
        "deadline",
        "done",
        "events",
        "finished",
        "grants",
        "look_up",
        "problem",
        "replayed",
        "single",
        "size",
        "span",
        "taken",
        "uncertain",
    )

    def __init__(
        self, appends: Sequence[Append], arrived: float, deadline: float, done: Callable[[Request], None]
    ) -> None:
        self.appends = appends
        self.arrived = arrived
        self.deadline = deadline
        self.done = done
        self.span = tracing.current()
        self.problem: Problem | None = None
        self.replayed = False
        self.finished = False
        self.taken = False
        """A batch has it."""
        self.attempts = 0
        self.grants = 0
        """Lanes in which it is first (of a request for several aggregates)."""
        self.look_up = False
        """Its eventIds may be in the log: look before writing."""
        self.uncertain = False
        """It was sent and no answer came: it may be written."""
        if len(appends) == 1 and len(appends[0].events) == 1:
            self.single = True
            self.events = 1
            self.size = appends[0].events[0].size
        else:
            self.single = False
            self.events = sum(len(append.events) for append in appends)
            self.size = sum(event.size for append in appends for event in append.events)

    def event_ids(self) -> list[str]:
        """The ids of all its events, in order."""
        return [event.event_id for append in self.appends for event in append.events]


class Lane:
    """The requests of one aggregate, in arrival order. `held` while a batch or a request for several aggregates has it."""

    __slots__ = ("aggregate_id", "attempts", "contended", "held", "waiting")

    def __init__(self, aggregate_id: str) -> None:
        self.aggregate_id = aggregate_id
        self.waiting: deque[Request] = deque()
        self.held = False
        self.attempts = 0
        self.contended = False


@dataclass(slots=True)
class Batch:
    """Lanes that nobody else has, and the requests taken from them; those of one lane in arrival order."""

    kind: Kind
    lanes: list[Lane] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    events: int = 0
    size: int = 0
    contended: bool = False

    def fits(self, request: Request) -> bool:
        """Whether it may join; the first always may."""
        return not self.requests or (
            self.events + request.events <= BATCH_EVENTS and self.size + request.size <= BATCH_BYTES
        )

    def add(self, request: Request) -> None:
        """Takes it in."""
        request.taken = True
        self.requests.append(request)
        self.events += request.events
        self.size += request.size


class Lanes:
    """All lanes, their totals, and the two queues of what is ready to be taken.

    `contended(aggregateId)` says whether other writers were met there: such lanes are written in a transaction.
    """

    def __init__(self, contended: Callable[[str], bool]) -> None:
        self._contended = contended
        self._lanes: dict[str, Lane] = {}
        self._ready: dict[Kind, deque[Lane | Request]] = {Kind.SINGLES: deque(), Kind.ATOMIC: deque()}
        self._turn = Kind.SINGLES
        self._arrived: list[Request] = []
        self.requests = 0
        self.events = 0
        self.size = 0

    @property
    def ready(self) -> bool:
        """Whether there is something to take."""
        return bool(self._ready[Kind.SINGLES] or self._ready[Kind.ATOMIC])

    def add(self, request: Request) -> None:
        """Puts a request at the end of its lanes."""
        self.requests += 1
        self.events += request.events
        self.size += request.size
        self._arrived.append(request)
        for append in request.appends:
            lane = self._lanes.get(append.aggregate_id)
            if lane is None:
                lane = self._lanes[append.aggregate_id] = Lane(append.aggregate_id)
            lane.waiting.append(request)
            if not lane.held:
                self._offer(lane)

    def _offer(self, lane: Lane) -> None:
        """The lane is free and has somebody in front: queue it, or grant it to a request for several aggregates."""
        first = lane.waiting[0]
        lane.held = True
        if len(first.appends) > 1:
            first.grants += 1
            if first.grants == len(first.appends):
                self._ready[Kind.ATOMIC].append(first)
        else:
            lane.contended = self._contended(lane.aggregate_id)
            self._ready[Kind.SINGLES if first.single and not lane.contended else Kind.ATOMIC].append(lane)

    def take(self, share: int = BATCH_EVENTS) -> Batch | None:
        """The next batch, of the kind whose turn it is, with no further lane once it has `share` events; None when nothing
        is ready.
        """
        other = {Kind.SINGLES: Kind.ATOMIC, Kind.ATOMIC: Kind.SINGLES}
        while self.ready:  # what expired while it was ready leaves an empty batch, and may make others ready
            for kind in (self._turn, other[self._turn]):
                batch = self._fill(kind, share)
                if batch.requests:
                    self._turn = other[kind]
                    return batch
        return None

    def _fill(self, kind: Kind, share: int) -> Batch:
        batch = Batch(kind)
        ready = self._ready[kind]
        while ready and batch.events < share:
            unit = ready[0]
            alone = kind is Kind.ATOMIC and unit.attempts >= ALONE_AFTER
            if batch.requests and alone:
                break
            if isinstance(unit, Request):
                if not batch.fits(unit):
                    break
                ready.popleft()
                lanes = [self._lanes[append.aggregate_id] for append in unit.appends]
                if unit.finished:  # its deadline passed while it stood here
                    self.release(lanes)
                    continue
                batch.lanes += lanes
                batch.contended = batch.contended or any(self._contended(lane.aggregate_id) for lane in lanes)
                batch.add(unit)
            else:
                first = next((request for request in unit.waiting if not request.finished), None)
                if first is not None and not batch.fits(first):
                    break
                ready.popleft()
                if not self._take_lane(batch, unit):
                    self.release([unit])
            if alone:
                break
        return batch

    @staticmethod
    def _take_lane(batch: Batch, lane: Lane) -> bool:
        """Takes the lane with as many of its requests as may stand in this batch; False when there is none."""
        taken = False
        for request in lane.waiting:
            if request.finished:
                continue
            if len(request.appends) > 1 or (batch.kind is Kind.SINGLES and not request.single):
                break
            if not batch.fits(request):
                break
            batch.add(request)
            taken = True
        if taken:
            batch.lanes.append(lane)
            batch.contended = batch.contended or lane.contended
        return taken

    def finish(self, request: Request) -> None:
        """A request has its outcome: it no longer counts, and is told. It leaves its lanes when they are released."""
        request.finished = True
        self.requests -= 1
        self.events -= request.events
        self.size -= request.size
        request.done(request)

    @staticmethod
    def let_go(batch: Batch) -> None:
        """The batch has done with its requests; those without an outcome wait in their lanes, which it still holds."""
        for request in batch.requests:
            request.taken = False
            request.grants = 0

    def release(self, lanes: Sequence[Lane]) -> None:
        """Frees lanes: their finished requests go, the rest waits for its next turn."""
        for lane in lanes:
            waiting = lane.waiting
            while waiting and waiting[0].finished:
                waiting.popleft()
            lane.held = False
            if waiting:
                self._offer(lane)
            else:
                del self._lanes[lane.aggregate_id]

    def expire(self, now: float, grace: float, problem: Callable[[Request], Problem]) -> None:
        """Finishes what waits beyond its deadline. What a batch has, or may be written, gets `grace` more seconds to be
        heard of or looked up; then its outcome is unknown, whatever becomes of it.
        """
        self._arrived = [request for request in self._arrived if not request.finished]
        for request in self._arrived:
            if request.deadline >= now:
                break
            request.uncertain = request.uncertain or request.taken
            if request.deadline + (grace if request.uncertain else 0.0) < now:
                request.problem = problem(request)
                self.finish(request)
                if not request.taken and 0 < request.grants < len(request.appends):
                    # It waited for its other lanes: who stands behind it may go on.
                    lanes = [self._lanes[append.aggregate_id] for append in request.appends]
                    self.release([lane for lane in lanes if lane.waiting[0] is request])

    def oldest(self) -> float | None:
        """When the request arrived that waits longest; None when nothing waits."""
        return next((request.arrived for request in self._arrived if not request.finished), None)
