"""Lanes: arrival order, one batch per aggregate, nothing lost, bounded batches. A state machine drives them by hand."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import bson
from bson.raw_bson import RawBSONDocument
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

from appender.encoding import Append, Event
from appender.lanes import BATCH_BYTES, BATCH_EVENTS, Batch, Kind, Lanes, Request
from appender.problems import Unavailable

if TYPE_CHECKING:
    from appender.problems import Problem

EMPTY = RawBSONDocument(bson.encode({}))


def append(aggregate_id: str, events: int = 1, size: int = 100) -> Append:
    import datetime

    made = [
        Event("e", "x", datetime.datetime.now(datetime.UTC), EMPTY, None, False, False, size) for _ in range(events)
    ]
    return Append(aggregate_id, None, made)


def request(*appends: Append, deadline: float = 1e9) -> Request:
    return Request(appends, 0.0, deadline, lambda _: None)


def too_late(_request: Request) -> Problem:
    return Unavailable("late")


def nobody(_aggregate_id: str) -> bool:
    return False


AGGREGATES = st.sampled_from("abcd")


class LanesMachine(RuleBasedStateMachine):
    """Any mix of arrivals, batches in flight, outcomes and retries."""

    batches = Bundle("batches")

    def __init__(self) -> None:
        super().__init__()
        self.contended: set[str] = set()
        self.lanes = Lanes(self.contended.__contains__)
        self.waiting: list[Request] = []
        self.in_flight: list[Batch] = []
        self.told: list[Request] = []
        self.clock = 0  # one tick an arrival

    def _add(self, made: Request) -> None:
        self.waiting.append(made)
        self.lanes.add(made)

    @rule(aggregate=AGGREGATES, events=st.sampled_from([1, 1, 1, 3, 700]), size=st.sampled_from([100, 3 * 2**20]))
    def one(self, aggregate: str, events: int, size: int) -> None:
        self.clock += 1
        self._add(Request([append(aggregate, events, size if events < 10 else 100)], 0, self.clock, self.told.append))

    @rule(aggregates=st.lists(AGGREGATES, min_size=2, max_size=4, unique=True))
    def several(self, aggregates: list[str]) -> None:
        self.clock += 1
        self._add(Request([append(each) for each in aggregates], 0, self.clock, self.told.append))

    @rule(aggregate=AGGREGATES)
    def contend(self, aggregate: str) -> None:
        self.contended.symmetric_difference_update({aggregate})

    @rule(target=batches)
    def take(self) -> Batch | None:
        batch = self.lanes.take()
        if batch is None:
            # Nobody may be stuck: whatever waits stands behind a batch in flight.
            busy = {lane.aggregate_id for held in self.in_flight for lane in held.lanes}
            for place, waiting in enumerate(self.waiting):
                behind = {each.aggregate_id for each in waiting.appends}
                for earlier in reversed(self.waiting[:place]):
                    ids = {each.aggregate_id for each in earlier.appends}
                    behind |= ids if ids & behind else set()
                assert behind & busy
            return None
        assert batch.requests
        aggregates = [lane.aggregate_id for lane in batch.lanes]
        assert len(set(aggregates)) == len(aggregates)
        for held in self.in_flight:
            assert not {lane.aggregate_id for lane in held.lanes} & set(aggregates)
        assert {each.aggregate_id for taken in batch.requests for each in taken.appends} == set(aggregates)
        if len(batch.requests) > 1:
            assert batch.events <= BATCH_EVENTS
            assert batch.size <= BATCH_BYTES
        if batch.kind is Kind.SINGLES:
            assert all(taken.single for taken in batch.requests)
        for aggregate in aggregates:
            mine = [taken for taken in batch.requests if any(a.aggregate_id == aggregate for a in taken.appends)]
            first = [w for w in self.waiting if any(a.aggregate_id == aggregate for a in w.appends)][: len(mine)]
            assert mine == first
        self.in_flight.append(batch)
        return batch

    @rule(batch=consumes(batches), data=st.data())
    def outcome(self, batch: Batch | None, data: Any) -> None:
        if batch is None:
            return
        done = data.draw(st.lists(st.booleans(), min_size=len(batch.requests), max_size=len(batch.requests)))
        failed = set()
        for taken, finished in zip(batch.requests, done, strict=True):
            if taken.finished:
                continue  # too late
            if finished:
                self.lanes.finish(taken)
                self.waiting.remove(taken)
            else:
                taken.attempts += 1
                failed |= {each.aggregate_id for each in taken.appends}
        self.lanes.let_go(batch)
        self.in_flight.remove(batch)
        later = [lane for lane in batch.lanes if lane.aggregate_id in failed]
        for lane in later:
            lane.attempts += 1
        self.lanes.release([lane for lane in batch.lanes if lane.aggregate_id not in failed])
        self.lanes.release(later)

    @precondition(lambda self: self.waiting)
    @rule(age=st.integers(0, 20))
    def expire(self, age: int) -> None:
        before = list(self.waiting)
        taken = {id(each) for held in self.in_flight for each in held.requests}
        maybe = {id(each) for each in before if each.uncertain or id(each) in taken}
        self.lanes.expire(self.clock - age, 5.0, too_late)
        for each in before:
            overdue = each.deadline + (5 if id(each) in maybe else 0) < self.clock - age
            assert each.finished == overdue
            if overdue:
                assert isinstance(each.problem, Unavailable)
                self.waiting.remove(each)

    @invariant()
    def totals(self) -> None:
        assert self.lanes.requests == len(self.waiting)
        assert self.lanes.events == sum(each.events for each in self.waiting)
        assert self.lanes.size == sum(each.size for each in self.waiting)
        assert len(self.told) == self.clock - len(self.waiting)

    def teardown(self) -> None:
        """Everything that waits can be finished."""
        for batch in list(self.in_flight):
            self._finish(batch)
        while (batch := self.lanes.take()) is not None:
            self._finish(batch)
        assert self.waiting == []
        assert self.lanes._lanes == {}

    def _finish(self, batch: Batch) -> None:
        for taken in batch.requests:
            if not taken.finished:
                self.lanes.finish(taken)
                self.waiting.remove(taken)
        self.lanes.let_go(batch)
        self.lanes.release(batch.lanes)


TestLanes = LanesMachine.TestCase
TestLanes.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


def test_singles_and_transactions_take_turns() -> None:
    lanes = Lanes(nobody)
    for n in range(3):
        lanes.add(request(append(f"s{n}")))
        lanes.add(request(append(f"m{n}", 2)))
    kinds = []
    while (batch := lanes.take()) is not None:
        kinds.append((batch.kind, len(batch.requests)))
    assert kinds == [(Kind.SINGLES, 3), (Kind.ATOMIC, 3)]


def test_what_failed_twice_stands_alone() -> None:
    lanes = Lanes(nobody)
    bad = request(append("bad", 2))
    for made in (request(append("a", 2)), bad, request(append("b", 2))):
        lanes.add(made)
    for _ in range(2):
        batch = lanes.take()
        assert batch is not None
        assert len(batch.requests) == 3
        lanes.let_go(batch)
        next(lane for lane in batch.lanes if lane.aggregate_id == "bad").attempts += 1
        lanes.release(batch.lanes)
    sizes = []
    while (batch := lanes.take()) is not None:
        sizes.append([each.appends[0].aggregate_id for each in batch.requests])
    assert sizes == [["a"], ["bad"], ["b"]]


def test_a_lane_is_written_in_a_transaction_while_others_write_it_too() -> None:
    lanes = Lanes({"a"}.__contains__)
    lanes.add(request(append("a")))
    batch = lanes.take()
    assert batch is not None
    assert (batch.kind, batch.contended) == (Kind.ATOMIC, True)
